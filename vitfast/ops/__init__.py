"""The ops of a Vision Transformer forward, one public function each.

Axes: B batch, N tokens, C width, H heads, D head dim, M = B*N rows, K input width of a product.
Every function takes `backend`: None calls `torch.ops.vitfast.<op>` (traceable by torch.compile),
which takes the first able backend in default order; "torch", "triton" or "native" forces one and
raises `BackendError` with every reason if it cannot run. Products accumulate in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitfast.ops import checks, reference
from vitfast.ops import heads as _heads
from vitfast.ops import library as _library  # registers torch.ops.vitfast
from vitfast.ops.heads import QKNorm, Rope
from vitfast.ops.products import attention_block, linear, mlp, quantized_linear
from vitfast.ops.reference import PIXEL_CENTER, QUANTIZED, SCALE_GROUP, SCALE_GROUPS, STATS_TILE
from vitfast.ops.registry import BACKENDS, OPS, Backend, BackendError, Spec, choose

__all__ = [
    "BACKENDS",
    "OPS",
    "PIXEL_CENTER",
    "QUANTIZED",
    "SCALE_GROUP",
    "SCALE_GROUPS",
    "STATS_TILE",
    "Backend",
    "BackendError",
    "QKNorm",
    "Rope",
    "Spec",
    "add_layer_norm",
    "attention",
    "attention_block",
    "choose",
    "fold_norm",
    "layer_norm",
    "linear",
    "mlp",
    "pack_patch_embed",
    "patch_embed",
    "quantize",
    "quantized_linear",
    "resample",
    "row_stats",
]


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Images to tokens [B, P + L, C]: patches @ weightᵀ + bias + position, after P prefix tokens.

    Args:
        images: [B, Cin, H, W], or [B, H, W, Cin] if channels_last; uint8 or floating point.
            uint8 pixels enter as pixel - 128, which is exact in every dtype.
        weight: [C, K], as `pack_patch_embed` makes it; K runs over (Cin, ph, pw), or
            (ph, pw, Cin) if channels_last. Its dtype is the output's.
        bias: [C].
        position: [L, C], L = (H / ph) * (W / pw), row-major.
        prefix: [P, C], the same for every image.

    Raises:
        ValueError: if a shape or dtype does not fit, or the image is not a multiple of the patch.
    """
    checks.check_patch_embed(images, weight, bias, position, prefix, patch_size, channels_last)
    if backend is None:
        return torch.ops.vitfast.patch_embed(images, weight, bias, position, prefix, list(patch_size), channels_last)
    entry = choose(checks.patch_embed_spec(images, weight), backend)
    return entry.call(images, weight, bias, position, prefix, patch_size=tuple(patch_size), channels_last=channels_last)


def pack_patch_embed(
    weight: Tensor,
    bias: Tensor | None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    uint8: bool = False,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Fold (pixel / 255 - mean) / std into a patch convolution; returns weight [C, K] and bias [C].

    Args:
        weight: [C, Cin, ph, pw], the convolution's weight. bias: [C] or None.
        mean, std: per channel, in units of a pixel range of 0 to 1; None for no normalisation
            (float images that are normalised already).
        uint8: the images will be uint8, entering `patch_embed` as pixel - 128.
        channels_last: the images will be [B, H, W, Cin].
        dtype: of the returned tensors; the weight's by default. Folding is done in float64.
    """
    dtype = dtype or weight.dtype
    folded = weight.double()
    offset = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    if bias is not None:
        offset += bias.double()
    channels = weight.shape[1]
    center = torch.full((channels,), PIXEL_CENTER / 255 if uint8 else 0.0, dtype=torch.float64)
    shift = center - torch.tensor(mean or (0.0,) * channels, dtype=torch.float64)
    scale = 1 / torch.tensor(std or (1.0,) * channels, dtype=torch.float64)
    shift, scale = shift.to(weight.device), scale.to(weight.device)
    offset += torch.einsum("oihw,i->o", folded, shift * scale)
    folded = folded * (scale / (255 if uint8 else 1)).view(1, -1, 1, 1)
    if channels_last:
        folded = folded.permute(0, 2, 3, 1)
    return folded.reshape(weight.shape[0], -1).to(dtype).contiguous(), offset.to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba, Kiros, Hinton 2016).

    x: [..., C]; weight, bias: [C]. The variance is the biased one. Returns x's shape and dtype.
    """
    checks.check_norm("layer_norm", x, weight, bias)
    if backend is None:
        return torch.ops.vitfast.layer_norm(x, weight, bias, eps)
    return choose(Spec.of("layer_norm", x, width=x.shape[-1]), backend).call(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`layer_norm(x + residual)` and the sum itself, in one pass over memory. Shapes as layer_norm."""
    checks.check_norm("add_layer_norm", x, weight, bias, residual)
    if backend is None:
        return torch.ops.vitfast.add_layer_norm(x, residual, weight, bias, eps)
    return choose(Spec.of("add_layer_norm", x, width=x.shape[-1]), backend).call(x, residual, weight, bias, eps)


def row_stats(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Statistics of each row: [M, T, 2] fp32, one (mean, M2) pair per 128 columns of x [..., C].

    M2 is the sum of squared deviations from that pair's mean; the pairs are combined by Chan's
    formula (Chan, Golub, LeVeque 1979), so no E[x²] - mean² is ever formed. T = ceil(C / 128).
    """
    checks.check_rows("row_stats", x)
    if backend is None:
        return torch.ops.vitfast.row_stats(x)
    return choose(Spec.of("row_stats", x, width=x.shape[-1]), backend).call(x)


def fold_norm(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold LayerNorm's affine part into the product that follows it.

    LN(x) Wᵀ + b = rstd * (x W'ᵀ - mean * s) + b' with W' = W diag(γ), s_n = Σ_k W'_nk,
    b' = b + W β. Returns W' [N, K] in `dtype` (the weight's by default), s [N] in fp32 (summed over
    the rounded W', so that both terms see the same numbers) and b' [N] in `dtype`: `linear`'s
    weight, weight_sum and bias. Folding is done in float64.
    """
    dtype = dtype or weight.dtype
    folded = (weight.double() * norm_weight.double()).to(dtype)
    shift = weight.double() @ norm_bias.double()
    if bias is not None:
        shift = shift + bias.double()
    return folded.contiguous(), folded.double().sum(dim=1).float(), shift.to(dtype)


def quantize(
    x: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of x, or of its LayerNorm, in 8 bits with one scale a row: x ≈ values * scale.

    The row's largest magnitude becomes 448 in float8_e4m3fn, 127 in int8; rounding is to nearest
    even. The LayerNorm is that of `layer_norm`, in fp32 and not rounded before it is quantised.

    Args:
        x: [..., K]. norm_weight, norm_bias: [K] in x's dtype, both or neither.
        dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        values [..., K] in `dtype`, and scale [...] in fp32. A row with NaN or infinity has a NaN scale.

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    checks.check_quantize(x, norm_weight, norm_bias, dtype)
    if backend is None:
        return torch.ops.vitfast.quantize(x, norm_weight, norm_bias, eps, dtype)
    return choose(checks.quantize_spec(x, dtype), backend).call(x, norm_weight, norm_bias, eps, dtype=dtype)


def resample(images: Tensor, first: Tensor, weights: Tensor, *, axis: int, backend: str | None = None) -> Tensor:
    """One axis of images resampled by weights in fixed point; both axes are a resize with the pixels of Pillow's.

    Output i is the sum over t of images[first[i] + t] * weights[i, t], rounded at 22 bits and clipped to 0..255.

    Args:
        images: uint8 [B, H, W, C], contiguous.
        first: int64 [out]; first + taps is at most the axis' length, which the Triton kernel does not check.
        weights: int32 [out, taps] with 22 bits of fraction, as `vitfast.images.pillow_resize.taps` makes them: a sum
            of theirs with pixels fits 31 bits.
        axis: 1 (rows) or 2 (columns).

    Returns:
        uint8, contiguous, that axis of length out. Every backend gives the same bits.

    Raises:
        ValueError: if a shape, dtype or stride does not fit.
    """
    checks.check_resample(images, first, weights, axis)
    if backend is None:
        return torch.ops.vitfast.resample(images, first, weights, axis)
    return choose(Spec.of("resample", images), backend).call(images, first, weights, axis=axis)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    left: int | None = None,
    right: int | None = None,
    offset: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    scale: float | None = None,
    cu_queries: Tensor | None = None,
    cu_keys: Tensor | None = None,
    max_queries: int = 0,
    max_keys: int = 0,
    rope: Rope | None = None,
    qk_norm: QKNorm | None = None,
    return_lse: bool = False,
    quantize: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """softmax(q kᵀ * scale + bias) v per head, on strided inputs (a packed qkv is three views).

    Args:
        q: [B, Nq, H, D], k, v: [B, Nk, Hk, D]; any strides with a contiguous last axis, 1 <= D <= 256. Hk divides
            H: each key head serves a run of query heads.
        bias: added to the scaled scores; broadcastable to [B, H, Nq, Nk].
        mask: bool, True where a key may be seen; broadcastable to [B, H, Nq, Nk].
        key_mask: bool [B, Nk], True for real keys (key padding); combined with mask.
        left, right: query i stands at position i + offset and sees the keys from position - left to position +
            right; None is no limit.
        causal: the same as right=0: query i sees keys 0..i (aligned at the top left, as in torch).
        offset: keys less queries aligns positions at the bottom right, as flash-attn does.
        softcap: scaled scores become softcap * tanh(score / softcap), before the bias; 0 is off.
        slopes: fp32 [H] or [B, H], of ALiBi: slope * |key - position| is taken off the scores.
        scale: 1 / sqrt(D) by default.
        cu_queries, cu_keys: int32 or int64 [sequences + 1]: sequences of different lengths lie one after another in
            a batch of 1, sequence i in rows cu[i] to cu[i + 1] - 1. Positions are aligned at the bottom right of each
            sequence, `offset` is ignored. The lengths are not read on the host. Triton backend only.
        max_queries, max_keys: at least the longest sequence; what lies beyond, or in none, is not computed.
        rope, qk_norm: what is done to q and k first: qk_norm over each head, then rope. The Triton kernel does both as
            it loads them; with a gradient or return_lse they are plain torch before it.
        return_lse: also give the log-sum-exp of the scores, without a gradient. Triton backend only.
        quantize: torch.float8_e4m3fn or torch.int8: give the output in 8 bits, an operand of `quantized_linear`, with a
            scale for each head of a row, as `quantize` gives one for a row; D is 64 or 128. Without a gradient and
            without return_lse.

    Returns:
        [B, Nq, H, D], contiguous, in q's dtype. A query that may see no key gives zeros. Can be
        differentiated with respect to q, k, v, bias and the tensors of rope and qk_norm. With return_lse
        that and [B, H, Nq] fp32, natural logarithm, -inf for a query that sees no key. With quantize values
        [B, Nq, H, D] in that dtype and scales [B, Nq, H] in fp32.

    Raises:
        ValueError: if a shape, dtype, stride or number does not fit.
    """
    if key_mask is not None:
        checks.check_key_mask(k, key_mask)
        key_mask = key_mask[:, None, None, :]
        mask = key_mask if mask is None else mask & key_mask
    if causal:
        right = 0 if right is None else min(right, 0)
    packed: Any = {"cu_queries": cu_queries, "cu_keys": cu_keys, "max_queries": max_queries, "max_keys": max_keys}
    heads = {} if rope is None and qk_norm is None else _heads.options(rope, qk_norm)
    scores: Any = {"bias": bias, "mask": mask, "slopes": slopes, "softcap": softcap}
    checks.check_attention(q, k, v, **scores, **packed, **heads, quantize=quantize)
    options = (bias, mask, slopes, softcap, left, right, offset, scale, cu_queries, cu_keys, max_queries, max_keys)
    if not return_lse:
        all_options = (*options, *(heads or _heads.OPTIONS).values())
        if quantize is not None:
            return torch.ops.vitfast.attention_quantize(q, k, v, *all_options, quantize, backend or "auto")
        return torch.ops.vitfast.attention(q, k, v, *all_options, backend or "auto")
    if quantize is not None:
        raise ValueError(f"attention: quantize must be None with return_lse, got {quantize}")
    spec = checks.attention_spec(
        q, k, slopes=slopes, softcap=softcap, left=left, right=right, offset=offset, cu_queries=cu_queries, lse=True
    )
    choose(spec, backend or "auto")  # raises unless the kernels run it: only they have a log-sum-exp
    if heads:
        q, k = reference.prepare_heads(q, k, **heads)
    out, stats = torch.ops.vitfast.attention_forward(q, k, v, *options)
    return out, stats[0] + stats[1].log()
