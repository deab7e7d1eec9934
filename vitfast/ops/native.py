"""Ops of the "native" backend whose C++ is not called like the reference itself.

On the CPU the product of linear and patch_embed reads a packed weight. A model packs its weights once (`pack`, then
`linear_packed`; `pack_patch_embed`, then `patch_embed_packed`); `linear` and the extension's own `patch_embed` pack
at every call, which costs about as much as a product of 200 rows. On CUDA weights are read as they are.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from vitfast.ops import reference

GATED_ROWS = 64
"""On the CPU SwiGLU is part of the epilogue of a weight with a multiple of so many rows, as kGatedRows of
csrc/cpu/activation.h has it: gate and up projection are whole panels then. Of others it is a pass of its own."""


def memory_pool() -> Any:
    """A context in which the CPU ops of this thread leave the memory of their large outputs to each other, so that the
    system is not asked for it again, page by page; it has `idle_bytes`. Without the extension one that does nothing."""
    try:
        return importlib.import_module("vitfast._C").MemoryPool()
    except ImportError:
        return contextlib.nullcontext()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    right: int | None = None,
    scale: float | None = None,
    quantize: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.attention`; `right` is None or 0, `quantize` None or int8: the registry sends nothing else here."""
    run = torch.ops.vitfast_native.attention if quantize is None else torch.ops.vitfast_native.attention_quantize
    return run(q, k, v, bias=bias, mask=mask, causal=right is not None, scale=scale)


def pack_patch_embed(
    weight: Tensor, *, patch_size: tuple[int, int], channels_last: bool = False, uint8: bool = False
) -> Tensor:
    """Take an fp32 or bf16 CPU weight [C, K] apart for `patch_embed_packed`, which alone reads the result.

    Args:
        uint8: the images will be uint8. Where `why_no_integers` has no reason against it, the weight becomes
            integers of 24 bits, int8 [C, 3 K + 4 Cin + 16], for uint8 images only.

    Returns:
        That, or the weight rearranged and its sums over each channel: fp32 [C, K + Cin], or bf16 [C, K + 2 Cin], where
        K is rounded up to a multiple of 2.

    Raises:
        ValueError: for a bf16 weight without AVX512-BF16, where torch's product reads the weight as it is.
    """
    layout = {"patch_size": patch_size, "channels_last": channels_last}
    return torch.ops.vitfast_native.pack_patch_embed(weight, **layout, uint8=uint8)


def why_no_integers(weight: Tensor, *, patch_size: tuple[int, int], channels_last: bool = False) -> str:
    """Why uint8 images meet this fp32 CPU weight [C, K] in fp32: for want of AVX-512 VNNI, for a K that does not suit,
    or for an output channel whose weights lose too much to the largest of them. "" if they meet in integers."""
    return torch.ops.vitfast_native.why_no_integers(weight, patch_size=patch_size, channels_last=channels_last)


def patch_embed_packed(images: Tensor, packed: Tensor, *args: Tensor | None, **kwargs: Any) -> Tensor:
    """`reference.patch_embed` on a `pack_patch_embed`ed weight."""
    return torch.ops.vitfast_native.patch_embed_packed(images, packed, *args, **kwargs)


def pack(weight: Tensor) -> Tensor:
    """Rearrange an fp32 or bf16 CPU weight [N, K] for `linear_packed`, which alone reads the result: in fp32 it has the
    same shape, in bf16 K is rounded up to a multiple of 2."""
    return torch.ops.vitfast_native.pack_linear(weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **epilogue: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear`."""
    return linear_packed(x, weight if weight.is_cuda else pack(weight), bias, **epilogue)


def pack_quantized(weight: Tensor) -> Tensor:
    """Rearrange an int8 CPU weight [N, K] for `quantized_linear_packed`, which alone reads the result: int8, K rounded
    up to a multiple of 4."""
    return torch.ops.vitfast_native.pack_quantized_linear(weight)


def quantized_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, **epilogue: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.quantized_linear`: on CUDA in e4m3 and around it bf16 or fp16, without SwiGLU; on the CPU in int8."""
    if not weight.is_cuda:
        return quantized_linear_packed(x, x_scale, pack_quantized(weight), weight_scale, bias, **epilogue)
    return _quantized(torch.ops.vitfast_native.quantized_linear, x, x_scale, weight, weight_scale, bias, **epilogue)


def _quantized(
    run: Any,
    *args: Tensor | None,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    requantize: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    outputs = run(*args, activation, layer_scale, residual, dtype, requantize)
    return tuple(outputs) if requantize else outputs[0]


def quantized_linear_packed(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    requantize: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.quantized_linear` in int8 on a `pack_quantized` weight."""
    run = torch.ops.vitfast_native.quantized_linear_packed
    if activation != "swiglu" or packed.shape[0] % GATED_ROWS == 0:
        kwargs: Any = {"layer_scale": layer_scale, "residual": residual, "dtype": dtype, "requantize": requantize}
        return _quantized(run, x, x_scale, packed, weight_scale, bias, activation=activation, **kwargs)
    if packed.shape[0] % 2:
        raise ValueError(f"quantized_linear: swiglu needs an even number of weight rows, got {packed.shape[0]}")
    exact = torch.float32
    bias, layer_scale, residual = (t if t is None else t.to(exact) for t in (bias, layer_scale, residual))
    both: Any = _quantized(run, x, x_scale, packed, weight_scale, bias, dtype=exact)
    y = reference.scale_and_add(reference.activate(both, activation), layer_scale, residual)
    return reference.in_scale_groups(y, x.dtype) if requantize else y.to(dtype)


def linear_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_stats: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear` on a `pack`ed weight, or a plain one on CUDA."""
    run = torch.ops.vitfast_native.linear_packed
    if activation != "swiglu" or (packed.shape[0] % GATED_ROWS == 0 and not packed.is_cuda):
        outputs = run(x, packed, bias, activation, layer_scale, residual, row_stats, weight_sum, eps, stats)
        return tuple(outputs) if stats else outputs[0]
    if packed.shape[0] % 2:
        raise ValueError(f"linear: swiglu needs an even number of weight rows, got {packed.shape[0]}")
    (both,) = run(x, packed, bias, None, None, None, row_stats, weight_sum, eps, False)
    y = reference.scale_and_add(reference.activate(both, activation), layer_scale, residual)
    return (y, reference.row_stats(y)) if stats else y
