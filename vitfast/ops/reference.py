"""Every op in plain PyTorch: the oracle (`upcast=True`) and the "torch" backend (`upcast=False`).

With `upcast=True` everything is computed in float64 from the given (possibly rounded) inputs and
the result is returned in float64: what a kernel with no rounding at all would give.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

PIXEL_CENTER = 128
"""Subtracted from uint8 pixels before the product. Exact in every dtype, and near the mean of real
images, so that folding mean and std into low-precision weights costs no accuracy."""

STATS_TILE = 128
"""Columns per (mean, M2) pair of row statistics; the last pair covers what is left."""

FEATURES = {
    "attention": (
        *("fewer key heads", "causal", "window", "softcap", "slopes", "rope", "qk-norm"),
        *("float8_e4m3fn output", "int8 output"),
    ),
    "quantized_linear": ("scale groups", "scale groups of 64", "swiglu"),
}
"""What the references have beyond the plain op; see `registry.Backend`."""

QUANTIZED = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The dtypes that rows are quantised to, and the value that a row's largest magnitude becomes."""

SCALE_GROUP = 128
"""Columns of a quantised row that share a scale where `requantize` made them; the last group covers what is left."""

SCALE_GROUPS = (SCALE_GROUP, 64)
"""Columns that may share a scale in what `quantized_linear` reads: 64 and 128 are heads' that `attention` scaled."""

WEIGHT_BITS = 22
"""Bits of a weight of `resample` that are its fraction: 32 less 8 for the pixel and 2 for the sign and for weights
beyond 1. All sums fit int32, so that no backend, device or order changes a bit."""

LEAST_AMAX = 2.0**-100
"""A row whose largest magnitude is below this is scaled as if it were this: no division by zero."""

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    None: lambda x: x,
}


@overload
def _up(upcast: bool, *tensors: Tensor) -> tuple[Tensor, ...]: ...
@overload
def _up(upcast: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]: ...
def _up(upcast: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t.double() if upcast and t is not None and t.is_floating_point() else t for t in tensors)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Element-wise activation; over the halves of the last axis `silu(gate) * up` for "swiglu", gelu's for "geglu".

    Raises:
        ValueError: for an unknown name.
    """
    if activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation in ("geglu", "geglu_tanh"):
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh" if activation == "geglu_tanh" else "none") * up
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {(*_ACTIVATIONS, 'swiglu')}, got {activation!r}")
    return _ACTIVATIONS[activation](x)


def scale_and_add(y: Tensor, layer_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """y * layer_scale + residual, of those that are given."""
    if layer_scale is None:
        return y if residual is None else y + residual
    return y * layer_scale if residual is None else torch.addcmul(residual, y, layer_scale)


def patches(images: Tensor, patch_size: tuple[int, int], channels_last: bool) -> Tensor:
    """Cut images into rows [B, L, K], K in the order (ph, pw, Cin) if channels_last else (Cin, ph, pw)."""
    ph, pw = patch_size
    if channels_last:
        b, h, w, c = images.shape
        cut = images.reshape(b, h // ph, ph, w // pw, pw, c).permute(0, 1, 3, 2, 4, 5)
    else:
        b, c, h, w = images.shape
        cut = images.reshape(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(b, (h // ph) * (w // pw), ph * pw * c)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    channels_last: bool = False,
    upcast: bool = False,
) -> Tensor:
    (weight,) = _up(upcast, weight)
    bias, position, prefix = _up(upcast, bias, position, prefix)
    if images.dtype != torch.uint8 and not channels_last:
        # The convolution that the libraries run, and on the CPU its very bits.
        kernel = weight.view(weight.shape[0], -1, *patch_size)
        tokens = F.conv2d(images.to(weight.dtype), kernel, bias, stride=patch_size).flatten(2).transpose(1, 2)
    else:
        rows = patches(images, patch_size, channels_last).to(weight.dtype)
        if images.dtype == torch.uint8:
            rows -= PIXEL_CENTER
        tokens = F.linear(rows, weight, bias)
    if position is not None:
        tokens = tokens + position
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens.contiguous()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, upcast: bool = False) -> Tensor:
    x, weight, bias = _up(upcast, x, weight, bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, upcast: bool = False
) -> tuple[Tensor, Tensor]:
    x, residual = _up(upcast, x, residual)
    total = x + residual
    return layer_norm(total, weight, bias, eps, upcast=upcast), total


def row_stats(x: Tensor, *, upcast: bool = False) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    rows = rows.double() if upcast else rows.float()
    pairs = []
    for tile in rows.split(STATS_TILE, dim=1):
        mean = tile.mean(dim=1)
        pairs.append(torch.stack([mean, (tile - mean[:, None]).square().sum(dim=1)], dim=1))
    return torch.stack(pairs, dim=1)


def combine_stats(stats: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Row statistics [M, T, 2] -> mean [M] and 1/sqrt(var + eps) [M] (Chan, Golub, LeVeque 1979)."""
    tiles = stats.shape[1]
    count = torch.full((tiles,), float(STATS_TILE), dtype=stats.dtype, device=stats.device)
    count[-1] = width - STATS_TILE * (tiles - 1)
    mean = (stats[..., 0] * count).sum(dim=1) / width
    m2 = (stats[..., 1] + count * (stats[..., 0] - mean[:, None]).square()).sum(dim=1)
    return mean, torch.rsqrt(m2 / width + eps)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_stats: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    x, weight = _up(upcast, x, weight)
    bias, layer_scale, residual = _up(upcast, bias, layer_scale, residual)
    if row_stats is None:
        y = F.linear(x, weight, bias)
    else:
        assert weight_sum is not None  # the two go together
        mean, rstd = combine_stats(row_stats.double() if upcast else row_stats, x.shape[-1], eps)
        mean, rstd = (t.reshape(*x.shape[:-1], 1) for t in (mean, rstd))
        y = rstd * (F.linear(x, weight).to(mean.dtype) - mean * weight_sum.to(mean.dtype))
        y = (y if bias is None else y + bias).to(x.dtype)
    y = scale_and_add(activate(y, activation), layer_scale, residual)
    return (y, _row_stats(y, upcast=upcast)) if stats else y


_row_stats = row_stats


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    offset: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    scale: float | None = None,
    quantize: torch.dtype | None = None,
    upcast: bool = False,
    **heads: Any,
) -> Any:
    if quantize is not None:
        options: Any = {"bias": bias, "mask": mask, "left": left, "right": right, "offset": offset, "softcap": softcap}
        out = attention(q, k, v, **options, slopes=slopes, scale=scale, upcast=upcast, **heads)
        values, out_scale = _in_8_bits(out if upcast else out.float(), quantize)
        return values, out_scale.squeeze(-1)
    if heads:
        q, k = prepare_heads(q, k, **heads, upcast=upcast)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain_causal = right == 0 and left is None and offset == 0 and bias is None and mask is None
    key = torch.arange(k.shape[1], device=q.device)
    position = torch.arange(q.shape[1], device=q.device)[:, None] + offset
    if not upcast and plain_causal and not softcap and slopes is None:
        return _torch_attention(q, k, v, None, scale, causal=True)
    for side, seen in ((right, key - position <= (right or 0)), (left, position - key <= (left or 0))):
        if side is not None:
            mask = seen if mask is None else mask & seen
    if upcast or softcap or slopes is not None:
        dtype = torch.float64 if upcast else torch.float32
        out = _attention_formula(q, k, v, bias, mask, softcap, slopes, (key - position).abs(), scale, dtype)
        return out if upcast else out.to(q.dtype)
    if bias is not None and mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    return _torch_attention(q, k, v, mask if bias is None else bias.to(q.dtype), scale)


def prepare_heads(
    q: Tensor,
    k: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    rms: bool = False,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """q and k normed over each head, then rotated; see `heads`. Can be differentiated by all of its tensors."""
    if cos is None and q_weight is None:
        return q, k
    exact = torch.float64 if upcast else torch.promote_types(q.dtype, torch.float32)

    def prepare(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.to(exact)
        if weight is not None:
            norm = F.rms_norm if rms else F.layer_norm
            y = norm(y, y.shape[-1:], eps=norm_eps) * weight.to(exact)
        if bias is not None:
            y = y + bias.to(exact)
        if cos is not None and sin is not None:
            prefix, y = y.tensor_split([x.shape[1] - cos.shape[-2]], dim=1)
            cosines, sines = ((t if t.ndim > 2 else t[None]).transpose(-3, -2).to(exact) for t in (cos, sin))
            y = torch.cat((prefix, y * cosines + _rotate_half(y, interleaved) * sines), dim=1)
        return y if upcast else y.to(x.dtype)

    return prepare(q, q_weight, q_bias), prepare(k, k_weight, k_bias)


def _rotate_half(x: Tensor, interleaved: bool) -> Tensor:
    """Channels (a, b) to (-b, a): neighbours if interleaved, else the two halves of a head."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _torch_attention(q, k, v, added, scale, causal=False):
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if added is None else torch.atleast_2d(added),  # torch refuses fewer axes
        is_causal=causal,
        scale=scale,
        enable_gqa=bool(k.shape[2] != q.shape[2]),  # not a SymBool
    )
    return out.transpose(1, 2).contiguous()


def _attention_formula(q, k, v, bias, mask, softcap, slopes, distance, scale, dtype):
    group = q.shape[2] // max(k.shape[2], 1)
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if slopes is not None:
        scores = scores - slopes.to(dtype)[..., None, None] * distance
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    # A row with no key left gives zeros, as torch's scaled_dot_product_attention does.
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return (weights @ v).transpose(1, 2).contiguous()


def _folded_norm(x: Tensor, weight_sum: Tensor | None, eps: float, upcast: bool) -> dict[str, Any]:
    """What the first product of a block is given besides its weight and bias; see `vitfast.ops.fold_norm`."""
    if weight_sum is None:
        return {}
    return {"row_stats": row_stats(x, upcast=upcast), "weight_sum": weight_sum, "eps": eps}


def attention_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    heads: int,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    qkv: Any = linear(x, qkv_weight, qkv_bias, **_folded_norm(x, weight_sum, eps, upcast), upcast=upcast)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    attended = attention(q, k, v, upcast=upcast).flatten(2)
    epilogue: Any = {"layer_scale": layer_scale, "residual": residual, "stats": stats}
    return linear(attended, proj_weight, proj_bias, **epilogue, upcast=upcast)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    norm = _folded_norm(x, weight_sum, eps, upcast)
    hidden: Any = linear(x, fc1_weight, fc1_bias, activation=activation, **norm, upcast=upcast)
    return linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=residual, stats=stats, upcast=upcast)


def quantize(
    x: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if upcast else torch.float32
    x = x.to(exact)
    if norm_weight is not None:
        assert norm_bias is not None  # the two go together
        x = F.layer_norm(x, x.shape[-1:], norm_weight.to(exact), norm_bias.to(exact), eps)
    values, scale = _in_8_bits(x, dtype)
    return values, scale.squeeze(-1)


def _in_8_bits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows along the last axis, and a scale for each, [..., 1] in fp32."""
    amax = x.abs().amax(dim=-1, keepdim=True)
    amax = torch.where(amax.isfinite(), amax, torch.nan).clamp(min=LEAST_AMAX)
    largest = QUANTIZED[dtype]
    values = x * (largest / amax)
    if dtype == torch.int8:
        values = values.round().nan_to_num(0.0)  # the scale of such a row is NaN
    return values.to(dtype), (amax / largest).float()


def in_scale_groups(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y [..., N] in 8 bits, and a scale for each SCALE_GROUP columns, [..., ceil(N / SCALE_GROUP)] in fp32."""
    width, groups = y.shape[-1], -(-y.shape[-1] // SCALE_GROUP)
    padded = F.pad(y, (0, groups * SCALE_GROUP - width)).unflatten(-1, (groups, SCALE_GROUP))
    values, scale = _in_8_bits(padded, dtype)
    return values.flatten(-2)[..., :width].contiguous(), scale.squeeze(-1)


def scale_group(x: Tensor, x_scale: Tensor) -> int:
    """Columns of x that share a scale; 0 where a whole row does, or where x_scale has no such shape."""
    if x_scale.ndim != x.ndim:
        return 0
    return next((group for group in SCALE_GROUPS if -(-x.shape[-1] // group) == x_scale.shape[-1]), 0)


def quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    requantize: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    exact = torch.float64 if upcast else torch.float32
    if group := scale_group(x, x_scale):
        widened = x_scale.to(exact).repeat_interleave(group, dim=-1)[..., : x.shape[-1]]
        y = F.linear(widened.mul_(x.to(exact)), weight.to(exact))
    else:
        y = _sums(x, weight, exact).mul_(x_scale.to(exact)[..., None])
    y.mul_(weight_scale.to(exact))
    if bias is not None:
        y.add_(bias.to(exact))
    layer_scale, residual = (t if t is None else t.to(exact) for t in (layer_scale, residual))
    y = scale_and_add(activate(y, activation), layer_scale, residual)
    if requantize:
        return in_scale_groups(y, x.dtype)
    return y if upcast else y.to(dtype)


def resample(images: Tensor, first: Tensor, weights: Tensor, *, axis: int, upcast: bool = False) -> Tensor:
    shape, along = list(images.shape), [1] * 4
    shape[axis] = along[axis] = len(first)
    half = 1 << (WEIGHT_BITS - 1)  # rounds the shift below to nearest
    total = torch.full(shape, half, dtype=torch.int64 if upcast else torch.int32, device=images.device)
    for tap, factor in enumerate(weights.unbind(1)):
        total += images.index_select(axis, first + tap) * factor.to(total.dtype).view(along)
    pixels = (total >> WEIGHT_BITS).clamp_(0, 255)
    return pixels.double() if upcast else pixels.to(torch.uint8)


def _sums(x: Tensor, weight: Tensor, exact: torch.dtype) -> Tensor:
    """x weightᵀ of 8-bit operands (or of the same numbers in fp32), in `exact`; of int8 rounded once."""
    if x.dtype != torch.int8:
        return F.linear(x.to(exact), weight.to(exact))
    # Sums of int8 products need more than fp32's 24 bits. Without VNNI, a CPU's int8 product may saturate on the way,
    # and with a single column torch 2.13's is wrong.
    fits = exact == torch.float32 and x.device.type == "cpu" and x.shape[-1] > 1
    if fits and torch.cpu._is_vnni_supported():
        return torch._int_mm(x.reshape(-1, x.shape[-1]), weight.t()).to(exact).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x.double(), weight.double()).to(exact)
