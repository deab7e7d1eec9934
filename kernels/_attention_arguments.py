"""The arguments of the attention launchers: what is allowed, and how the three kernels want them."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from vitfast.kernels._attention_configs import head_chunks
from vitfast.kernels._common import DTYPES, check_device, check_dtype, check_last_contiguous, check_shape

LOG2E = 1.4426950408889634

CAPABILITIES = {
    "dtypes": DTYPES,
    "min_capability": (8, 0),
    "limits": {"head_dim": (1, 256)},
    "features": (
        *("fewer key heads", "causal", "window", "softcap", "slopes", "packed sequences", "log-sum-exp"),
        *("rope", "qk-norm", "float8_e4m3fn output", "int8 output"),
    ),
}


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, 0 where an axis has one entry: its stride can be any number, but is never used."""
    return tuple(stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def vector(head_dim: int, *tensors: torch.Tensor) -> int:
    """Elements (a power of two, at most 16 bytes) that divide D and every address and stride."""
    size = tensors[0].element_size()
    steps = [stride for tensor in tensors for stride in strides(tensor)[:-1]]
    return math.gcd(16 // size, head_dim, *steps, *(tensor.data_ptr() // size for tensor in tensors))


def kernel_arguments(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    left: int | None = None,
    right: int | None = None,
    offset: int = 0,
    scale: float | None = None,
    cu_queries: torch.Tensor | None = None,
    cu_keys: torch.Tensor | None = None,
    max_queries: int = 0,
    max_keys: int = 0,
) -> dict[str, Any]:
    """What all three kernels take, by name, of a checked call; see `attention`.

    Raises:
        ValueError: if a shape, dtype, stride, device or number does not fit.
    """
    _check(op, q, k, v, bias, mask, slopes, softcap, cu_queries, cu_keys, max_queries, max_keys)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    shape = (batch, heads, queries, keys)
    if cu_queries is not None:
        batch = len(cu_queries) - 1
    main, rest = head_chunks(head_dim)
    farthest = queries + keys + abs(offset)  # no key is farther from a query's position
    named = {"q": strides(q), "k": strides(k), "v": strides(v)}
    return {
        **{f"{name}_stride_{axis}": n for name, of in named.items() for axis, n in zip("bnh", of[:3], strict=True)},
        **_score_strides(op, "bias", bias, shape),
        **_score_strides(op, "mask", mask, shape),
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "mask": mask,
        "slopes": slopes,
        "cu_queries": cu_queries,
        "cu_keys": cu_keys,
        "slopes_stride_b": 0 if slopes is None else strides(slopes.expand(batch, heads))[0],
        "query_rows": queries,
        "key_rows": keys,
        "offset": offset,
        "left": None if left is None or left >= farthest else max(left, -farthest),
        "right": None if right is None or right >= farthest else max(right, -farthest),
        "softcap": float(softcap) or None,
        "scale": float(head_dim**-0.5 if scale is None else scale),
        "GROUP": heads // max(k.shape[2], 1),
        "HEAD_DIM": head_dim,
        "D_MAIN": main,
        "D_REST": rest,
    }


HEAD_OPTIONS = ("cos", "sin", "interleaved", "q_weight", "k_weight", "q_bias", "k_bias", "norm_eps", "rms")
"""The options of `head_arguments`; the other kernels' options are those of `kernel_arguments`."""


def head_arguments(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    rms: bool = False,
    packed: bool = False,
) -> dict[str, Any]:
    """What the forward does to the heads of q and k, by name; see `attention`.

    Raises:
        ValueError: if a shape, dtype, stride or device does not fit.
    """
    batch, tokens, heads, head_dim = q.shape
    norms = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for name, tensor in norms.items():
        check_shape(op, name, tensor, (head_dim,))
    for name, tensor in {**norms, "cos": cos, "sin": sin}.items():
        check_dtype(op, torch.float32, q.dtype, **{name: tensor})
    check_last_contiguous(op, cos=cos, sin=sin, **norms)
    check_device(op, q=q, cos=cos, sin=sin, **norms)
    if (q_weight is None) != (k_weight is None) or (q_weight is None and (q_bias is not None or k_bias is not None)):
        raise ValueError(f"{op}: q_weight and k_weight go together, and a bias with its weight")
    arguments: dict[str, Any] = {
        **norms,
        "cos": cos,
        "sin": sin,
        "norm_eps": None if q_weight is None else float(norm_eps),
        **dict.fromkeys((*(f"table_stride_{axis}" for axis in "bhn"), "prefix")),
        "RMS": rms,
        "INTERLEAVED": interleaved,
    }
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError(f"{op}: cos and sin go together; only one was given")
        return arguments
    if packed or k.shape[1] != tokens or head_dim % 2:
        raise ValueError(
            f"{op}: rope needs an even head dim, as many keys as queries and no packed sequences; got q "
            f"{tuple(q.shape)}, k {tuple(k.shape)}"
        )
    rows = cos.shape[-2] if cos.ndim > 1 else 0
    shape = (batch, heads, rows, head_dim)
    axes = zip(reversed(cos.shape), reversed(shape), strict=False)
    if not 2 <= cos.ndim <= 4 or rows > tokens or cos.shape[-1] != head_dim or any(n not in (1, m) for n, m in axes):
        raise ValueError(
            f"{op}: cos must be [rows, D], [H, rows, D] or [B, H, rows, D] with at most {tokens} rows, got "
            f"{tuple(cos.shape)} for q {tuple(q.shape)}"
        )
    if cos.ndim > 2 and cos.shape[-3] != 1 and k.shape[2] != heads:
        raise ValueError(f"{op}: cos for each head needs as many key heads, got {k.shape[2]} for {heads}")
    check_shape(op, "sin", sin, tuple(cos.shape))
    if strides(sin) != strides(cos):
        raise ValueError(f"{op}: cos and sin must be laid out alike, got strides {cos.stride()} and {sin.stride()}")
    steps = zip("bhn", strides(cos.expand(shape)), strict=False)
    return arguments | {f"table_stride_{axis}": n for axis, n in steps} | {"prefix": tokens - rows}


def last_block(block: int, count: int, arguments: dict[str, Any]) -> int:
    """Width of the last tile out of `count`: as narrow as what is left, where every row of a call has the same left."""
    if any(arguments[name] is not None for name in ("left", "right", "cu_keys")):
        return block
    return min(block, max(16, triton.next_power_of_2(count % block)))


def _score_strides(op: str, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> dict[str, int]:
    """Strides of a bias or mask as seen with [B, H, Nq, Nk], 0 for the axes it is broadcast along."""
    steps: tuple[int, ...] = (0,) * len(shape)
    if tensor is not None:
        pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
        if tensor.ndim > len(shape) or any(have not in (1, want) for have, want in pairs):
            raise ValueError(f"{op}: {name} of shape {tuple(tensor.shape)} cannot be broadcast to {shape}")
        steps = strides(tensor.expand(shape))
    return {f"{name}_stride_{axis}": n for axis, n in zip("bhqk", steps, strict=True)}


def _check(op, q, k, v, bias, mask, slopes, softcap, cu_queries, cu_keys, max_queries, max_keys) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} must be [B, N, H, D], got shape {tuple(tensor.shape)}")
    check_dtype(op, q=q)
    check_dtype(op, q.dtype, k=k, v=v)
    check_dtype(op, bias=bias)
    check_dtype(op, torch.bool, mask=mask)
    check_dtype(op, torch.float32, slopes=slopes)
    check_dtype(op, torch.int32, torch.int64, cu_queries=cu_queries, cu_keys=cu_keys)
    batch, _, heads, head_dim = q.shape
    key_heads = k.shape[2]
    if heads != key_heads and (not key_heads or heads % key_heads):
        raise ValueError(f"{op}: the heads of k must divide q's, got {key_heads} and {heads}")
    check_shape(op, "k", k, (batch, k.shape[1], key_heads, head_dim))
    check_shape(op, "v", v, tuple(k.shape))
    low, high = CAPABILITIES["limits"]["head_dim"]
    if not low <= head_dim <= high:
        raise ValueError(f"{op}: head dim must be {low}..{high}, got {head_dim}")
    check_last_contiguous(op, q=q, k=k, v=v, slopes=slopes, cu_queries=cu_queries, cu_keys=cu_keys)
    check_device(op, q=q, k=k, v=v, bias=bias, mask=mask, slopes=slopes, cu_queries=cu_queries, cu_keys=cu_keys)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be 0 (off) or positive, got {softcap}")
    if (cu_queries is None) != (cu_keys is None):
        raise ValueError(f"{op}: cu_queries and cu_keys go together; only one was given")
    if cu_queries is not None:
        if batch != 1 or bias is not None or mask is not None:
            raise ValueError(f"{op}: packed sequences have batch size 1, no bias and no mask; got q {tuple(q.shape)}")
        if cu_queries.ndim != 1 or len(cu_queries) < 2 or cu_keys.shape != cu_queries.shape:
            raise ValueError(
                f"{op}: cu_queries and cu_keys must be [sequences + 1] alike, got shapes {tuple(cu_queries.shape)} "
                f"and {tuple(cu_keys.shape)}"
            )
        if max_queries < 0 or max_keys < 0:
            raise ValueError(f"{op}: max_queries and max_keys must not be negative, got {max_queries} and {max_keys}")
        batch = len(cu_queries) - 1
    if slopes is not None and tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"{op}: slopes must be [H] or [B, H] = {(batch, heads)}, got {tuple(slopes.shape)}")
