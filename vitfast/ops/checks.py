"""Argument checks of the public ops, and the Spec of each call. Every message has the bad value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitfast.ops.reference import QUANTIZED, SCALE_GROUP, SCALE_GROUPS, STATS_TILE, scale_group
from vitfast.ops.registry import Spec

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _dtype(op: str, name: str, tensor: Tensor | None, *allowed: torch.dtype) -> None:
    if tensor is not None and tensor.dtype not in allowed:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, allowed: {', '.join(map(str, allowed))}")


def _device(op: str, first: Tensor, /, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {first.device} like the first argument")


def _operands(op: str, first: Tensor, dtype: torch.dtype, **operands: Any) -> None:
    """Operands by name, each (tensor or None, *shape): those given have it, this dtype and the first one's device."""
    for name, (tensor, *shape) in operands.items():
        _shape(op, name, tensor, tuple(shape))
        _dtype(op, name, tensor, dtype)
        _device(op, first, **{name: tensor})


def out_features(weight: Tensor, activation: str | None) -> int:
    """The width of a product's output: "swiglu" makes one column of two."""
    return weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]


def _product(op: str, x: Tensor, weight: Tensor, activation: str | None) -> tuple[int, int]:
    """Check that weight multiplies x; N, and the columns of the output."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or x.shape[-1] < 1:
        raise ValueError(
            f"{op}: x [..., K] and weight [N, K] with K >= 1 do not fit: {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    n = weight.shape[0]
    if activation == "swiglu" and n % 2:
        raise ValueError(f"{op}: swiglu needs an even number of weight rows, got {n}")
    return n, out_features(weight, activation)


def check_patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    patch_size: tuple[int, int],
    channels_last: bool,
) -> None:
    op = "patch_embed"
    _dtype(op, "images", images, torch.uint8, *FLOATS, torch.float64)
    _dtype(op, "weight", weight, *FLOATS)
    layout = "[B, H, W, Cin]" if channels_last else "[B, Cin, H, W]"
    if images.ndim != 4:
        raise ValueError(f"{op}: images must be {layout}, got shape {tuple(images.shape)}")
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight must be [C, K] (see pack_patch_embed), got shape {tuple(weight.shape)}")
    ph, pw = patch_size
    height, width, channels = (images.shape[i] for i in ((1, 2, 3) if channels_last else (2, 3, 1)))
    if ph < 1 or pw < 1 or height < ph or width < pw or height % ph or width % pw:
        raise ValueError(f"{op}: image size {height}x{width} is not a positive multiple of the patch {ph}x{pw}")
    if channels < 1:
        raise ValueError(f"{op}: images {layout} of shape {tuple(images.shape)} have no channels")
    if weight.shape[1] != channels * ph * pw:
        raise ValueError(
            f"{op}: images {layout} of shape {tuple(images.shape)} have {channels} channels, "
            f"so weight needs K = {channels}*{ph}*{pw} = {channels * ph * pw}, got {weight.shape[1]}"
        )
    c, patches = weight.shape[0], (height // ph) * (width // pw)
    if prefix is not None and (prefix.ndim != 2 or prefix.shape[1] != c):
        raise ValueError(f"{op}: prefix has shape {tuple(prefix.shape)}, expected (P, {c})")
    _device(op, images, weight=weight)
    _operands(op, images, weight.dtype, bias=(bias, c), position=(position, patches, c))
    if prefix is not None:
        _operands(op, images, weight.dtype, prefix=(prefix, prefix.shape[0], c))


def patch_embed_spec(images: Tensor, weight: Tensor) -> Spec:
    return Spec.of("patch_embed", images, weight.dtype, width=weight.shape[0], patch=weight.shape[1])


def check_rows(op: str, x: Tensor) -> None:
    _dtype(op, "x", x, *FLOATS)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x must have a non-empty last axis, got shape {tuple(x.shape)}")


def check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> None:
    check_rows(op, x)
    c = x.shape[-1]
    _operands(op, x, x.dtype, weight=(weight, c), bias=(bias, c), residual=(residual, *x.shape))


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    row_stats: Tensor | None,
    weight_sum: Tensor | None,
    op: str = "linear",
    stats: bool = False,
) -> None:
    _dtype(op, "x", x, *FLOATS)
    n, columns = _product(op, x, weight, activation)
    if stats and columns < 1:
        raise ValueError(f"{op}: stats needs weight rows, got weight of shape {tuple(weight.shape)}")
    _operands(op, x, x.dtype, weight=(weight, *weight.shape), bias=(bias, n))
    _operands(op, x, x.dtype, layer_scale=(layer_scale, columns), residual=(residual, *x.shape[:-1], columns))
    if (row_stats is None) != (weight_sum is None):
        raise ValueError(f"{op}: row_stats and weight_sum go together (see fold_norm); only one was given")
    if row_stats is not None:
        m, tiles = x.numel() // x.shape[-1], -(-x.shape[-1] // STATS_TILE)
        _operands(op, x, torch.float32, row_stats=(row_stats, m, tiles, 2), weight_sum=(weight_sum, n))


def linear_spec(x: Tensor, weight: Tensor) -> Spec:
    return Spec.of("linear", x, M=x.numel() // x.shape[-1], K=weight.shape[1], N=weight.shape[0])


def check_key_mask(k: Tensor, key_mask: Tensor) -> None:
    _dtype("attention", "key_mask", key_mask, torch.bool)
    _shape("attention", "key_mask", key_mask, (k.shape[0], k.shape[1]))


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float = 0.0,
    cu_queries: Tensor | None = None,
    cu_keys: Tensor | None = None,
    max_queries: int = 0,
    max_keys: int = 0,
    quantize: torch.dtype | None = None,
    **heads: Any,
) -> None:
    op = "attention"
    _dtype(op, "q", q, *FLOATS)
    _dtype(op, "k", k, q.dtype)
    _dtype(op, "v", v, q.dtype)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} must be [B, N, H, D], got shape {tuple(tensor.shape)}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the last axis of {name} has stride {tensor.stride(-1)}, expected 1")
    b, nq, h, d = q.shape
    key_heads = k.shape[2]
    if h != key_heads and (not key_heads or h % key_heads):
        raise ValueError(f"{op}: the heads of k must divide q's, got {key_heads} and {h}")
    _shape(op, "k", k, (b, k.shape[1], key_heads, d))
    _shape(op, "v", v, tuple(k.shape))
    if not 1 <= d <= 256:
        raise ValueError(f"{op}: head dim must be 1..256, got {d}")
    if quantize is not None and quantize not in QUANTIZED:
        raise ValueError(f"{op}: quantize must be one of {', '.join(map(str, QUANTIZED))}, got {quantize}")
    if quantize is not None and d not in SCALE_GROUPS:
        allowed = " or ".join(map(str, sorted(SCALE_GROUPS)))
        raise ValueError(f"{op}: quantize needs a head dim of {allowed}, got {d}")
    scores = (b, h, nq, k.shape[1])
    _dtype(op, "mask", mask, torch.bool)
    _dtype(op, "bias", bias, *FLOATS)
    for name, added in (("bias", bias), ("mask", mask)):
        if added is None:
            continue
        pairs = zip(reversed(added.shape), reversed(scores), strict=False)
        if added.ndim > 4 or any(have not in (1, want) for have, want in pairs):
            raise ValueError(f"{op}: {name} of shape {tuple(added.shape)} cannot be broadcast to {scores}")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be 0 (off) or positive, got {softcap}")
    _check_packed(b, bias, mask, cu_queries, cu_keys)
    if max_queries < 0 or max_keys < 0:
        raise ValueError(f"{op}: max_queries and max_keys must not be negative, got {max_queries} and {max_keys}")
    _dtype(op, "slopes", slopes, torch.float32)
    sequences = b if cu_queries is None else len(cu_queries) - 1
    if slopes is not None and tuple(slopes.shape) not in ((h,), (sequences, h)):
        raise ValueError(f"{op}: slopes must be [H] or [B, H] = {(sequences, h)}, got {tuple(slopes.shape)}")
    _device(op, q, k=k, v=v, bias=bias, mask=mask, slopes=slopes, cu_queries=cu_queries, cu_keys=cu_keys)
    for problem in heads and why_not_heads(q, k, packed=cu_queries is not None, **heads):
        raise ValueError(f"{op}: {problem}")


def why_not_heads(
    q: Tensor, k: Tensor, *, cos, sin, interleaved, q_weight, k_weight, q_bias, k_bias, norm_eps, rms, packed=False
) -> list[str]:
    """What is wrong with what `heads.options` gives, for q [B, N, H, D] and k; empty if nothing is."""
    batch, tokens, heads, head_dim = q.shape
    norms = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    named = {name: t for name, t in {**norms, "cos": cos, "sin": sin}.items() if t is not None}
    problems = [
        f"{name} has dtype {t.dtype}, allowed: {', '.join(map(str, dict.fromkeys((torch.float32, q.dtype))))}"
        for name, t in named.items()
        if t.dtype not in (torch.float32, q.dtype)
    ]
    problems += [
        f"the last axis of {name} has stride {t.stride(-1)}, expected 1"
        for name, t in named.items()
        if t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1
    ]
    problems += [f"{name} is on {t.device}, q on {q.device}" for name, t in named.items() if t.device != q.device]
    problems += [
        f"{name} has shape {tuple(t.shape)}, expected {(head_dim,)}"
        for name, t in norms.items()
        if t is not None and tuple(t.shape) != (head_dim,)
    ]
    if cos is None:
        return problems
    if packed or k.shape[1] != tokens or head_dim % 2:
        problems.append(
            f"rope needs an even head dim, as many keys as queries and no packed sequences; got q {tuple(q.shape)}, k "
            f"{tuple(k.shape)}"
        )
    rows = cos.shape[-2] if cos.ndim > 1 else 0
    axes = zip(reversed(cos.shape), (head_dim, rows, heads, batch), strict=False)
    if not 2 <= cos.ndim <= 4 or rows > tokens or cos.shape[-1] != head_dim or any(n not in (1, m) for n, m in axes):
        problems.append(
            f"cos must be [rows, D], [H, rows, D] or [B, H, rows, D] with at most {tokens} rows, got "
            f"{tuple(cos.shape)} for q {tuple(q.shape)}"
        )
    elif cos.ndim > 2 and cos.shape[-3] != 1 and k.shape[2] != heads:
        problems.append(f"cos for each head needs as many key heads, got {k.shape[2]} for {heads}")
    if sin.shape != cos.shape:
        problems.append(f"sin has shape {tuple(sin.shape)}, expected {tuple(cos.shape)}")
    elif any(n > 1 and a != b for n, a, b in zip(cos.shape, cos.stride(), sin.stride(), strict=True)):
        problems.append(f"cos and sin must be laid out alike, got strides {cos.stride()} and {sin.stride()}")
    return problems


def _check_packed(batch: int, bias: Tensor | None, mask: Tensor | None, cu_queries: Any, cu_keys: Any) -> None:
    if cu_queries is None and cu_keys is None:
        return
    if cu_queries is None or cu_keys is None:
        raise ValueError("attention: cu_queries and cu_keys go together; only one was given")
    if batch != 1 or bias is not None or mask is not None:
        raise ValueError(f"attention: packed sequences go without bias and mask, in a batch of 1; got one of {batch}")
    for name, tensor in (("cu_queries", cu_queries), ("cu_keys", cu_keys)):
        _dtype("attention", name, tensor, torch.int32, torch.int64)
        if tensor.ndim != 1 or len(tensor) < 2 or len(tensor) != len(cu_queries):
            raise ValueError(
                f"attention: {name} has shape {tuple(tensor.shape)}; both must be [sequences + 1], at least [2]"
            )


def attention_spec(
    q: Tensor,
    k: Tensor,
    *,
    slopes: Tensor | None = None,
    softcap: float = 0.0,
    left: int | None = None,
    right: int | None = None,
    offset: int = 0,
    cu_queries: Tensor | None = None,
    cos: Tensor | None = None,
    q_weight: Tensor | None = None,
    lse: bool = False,
    quantize: torch.dtype | None = None,
) -> Spec:
    causal = left is None and right == 0 and offset == 0 and cu_queries is None
    asked = {
        "fewer key heads": k.shape[2] != q.shape[2],
        "causal": causal,
        "window": not causal and (left is not None or right is not None),
        "softcap": softcap != 0,
        "slopes": slopes is not None,
        "packed sequences": cu_queries is not None,
        "log-sum-exp": lse,
        "rope": cos is not None,
        "qk-norm": q_weight is not None,
        f"{str(quantize).removeprefix('torch.')} output": quantize is not None,
    }
    features = tuple(name for name, wanted in asked.items() if wanted)
    return Spec.of("attention", q, features=features, head_dim=q.shape[-1], queries=q.shape[1], keys=k.shape[1])


def check_attention_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    heads: int,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    weight_sum: Tensor | None,
) -> None:
    op = "attention_block"
    check_linear(x, qkv_weight, qkv_bias, None, None, None, None, None, f"{op} (qkv)")
    n = qkv_weight.shape[0]
    if x.ndim != 3 or heads < 1 or n < 1 or n % (3 * heads):
        raise ValueError(
            f"{op}: x must be [B, N, C] and qkv_weight [3 * heads * D, C], got {tuple(x.shape)} and "
            f"{tuple(qkv_weight.shape)} for {heads} heads"
        )
    c = x.shape[2]
    _operands(op, x, torch.float32, weight_sum=(weight_sum, n))
    _operands(op, x, x.dtype, proj_weight=(proj_weight, c, n // 3), proj_bias=(proj_bias, c))
    _operands(op, x, x.dtype, layer_scale=(layer_scale, c), residual=(residual, *x.shape))


def attention_block_spec(x: Tensor, proj_weight: Tensor, heads: int) -> Spec:
    return Spec.of("attention_block", x, tokens=x.shape[1], width=x.shape[2], head_dim=proj_weight.shape[1] // heads)


def check_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    weight_sum: Tensor | None = None,
) -> None:
    op = "mlp"
    check_linear(x, fc1_weight, fc1_bias, activation, None, None, None, None, f"{op} (fc1)")
    c = x.shape[-1]
    hidden = out_features(fc1_weight, activation)
    if hidden < 1:
        raise ValueError(f"{op}: fc1_weight must have rows, got shape {tuple(fc1_weight.shape)}")
    _operands(op, x, torch.float32, weight_sum=(weight_sum, fc1_weight.shape[0]))
    _operands(op, x, x.dtype, fc2_weight=(fc2_weight, c, hidden), fc2_bias=(fc2_bias, c))
    _operands(op, x, x.dtype, layer_scale=(layer_scale, c), residual=(residual, *x.shape))


def mlp_spec(x: Tensor, fc1_weight: Tensor) -> Spec:
    return Spec.of("mlp", x, rows=x.numel() // x.shape[-1], width=x.shape[-1], hidden=fc1_weight.shape[0])


def check_quantize(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, dtype: torch.dtype) -> None:
    op = "quantize"
    _dtype(op, "x", x, *FLOATS)
    if dtype not in QUANTIZED:
        raise ValueError(f"{op}: dtype must be one of {', '.join(map(str, QUANTIZED))}, got {dtype}")
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x must have a non-empty last axis, got shape {tuple(x.shape)}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError(f"{op}: norm_weight and norm_bias go together; only one was given")
    _operands(op, x, x.dtype, norm_weight=(norm_weight, x.shape[-1]), norm_bias=(norm_bias, x.shape[-1]))


def quantize_spec(x: Tensor, dtype: torch.dtype) -> Spec:
    return Spec.of("quantize", x, dtype, width=x.shape[-1])


def check_resample(images: Tensor, first: Tensor, weights: Tensor, axis: int) -> None:
    op = "resample"
    _dtype(op, "images", images, torch.uint8)
    _dtype(op, "first", first, torch.int64)
    _dtype(op, "weights", weights, torch.int32)
    if images.ndim != 4:
        raise ValueError(f"{op}: images must be [B, H, W, C], got shape {tuple(images.shape)}")
    if axis not in (1, 2):
        raise ValueError(f"{op}: axis must be 1 or 2, got {axis}")
    if weights.ndim != 2 or weights.shape[1] > images.shape[axis]:
        raise ValueError(
            f"{op}: weights must be [out, taps] with at most {images.shape[axis]} taps, axis {axis} of images "
            f"{tuple(images.shape)}, got shape {tuple(weights.shape)}"
        )
    _shape(op, "first", first, (weights.shape[0],))
    _device(op, images, first=first, weights=weights)
    if not images.is_contiguous():
        raise ValueError(f"{op}: images must be contiguous, got strides {images.stride()} of {tuple(images.shape)}")


def check_quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> None:
    op = "quantized_linear"
    _dtype(op, "x", x, *QUANTIZED)
    if dtype not in FLOATS:
        raise ValueError(f"{op}: dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    n, columns = _product(op, x, weight, activation)
    rows, k = tuple(x.shape[:-1]), x.shape[-1]
    shapes = [rows]
    if x_scale.ndim == x.ndim:
        shapes = list(dict.fromkeys((*rows, -(-k // group)) for group in SCALE_GROUPS))
    if tuple(x_scale.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{op}: x_scale has shape {tuple(x_scale.shape)}, expected {expected}")
    _operands(op, x, x.dtype, weight=(weight, *weight.shape))
    _operands(op, x, torch.float32, x_scale=(x_scale, *x_scale.shape), weight_scale=(weight_scale, n))
    _operands(op, x, dtype, bias=(bias, n), layer_scale=(layer_scale, columns), residual=(residual, *rows, columns))


def quantized_linear_spec(
    x: Tensor, x_scale: Tensor, weight: Tensor, activation: str | None, requantize: bool = False
) -> Spec:
    group = scale_group(x, x_scale)
    asked = {"scale groups": requantize or group == SCALE_GROUP, "scale groups of 64": group == 64}
    asked["swiglu"] = activation == "swiglu"
    features = tuple(name for name, wanted in asked.items() if wanted)
    rows = x.numel() // x.shape[-1]
    return Spec.of("quantized_linear", x, features=features, M=rows, K=weight.shape[1], N=weight.shape[0])
