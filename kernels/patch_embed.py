"""Images to tokens: out[b, P + l] = patch[b, l] Wᵀ + bias + position[l], and out[b, :P] = prefix.

    images [B, Cin, H, W] or [B, H, W, Cin] -> out [B, P + L, C]
    patch[b, l] is row l = (patch row) * (W / pw) + (patch column) of image b, of K = Cin * ph * pw pixels in
    the order (Cin, ph, pw), or (ph, pw, Cin) for channels-last images; W is [C, K] in the same order

Fused: the patches are gathered from the image while multiplying (an implicit GEMM, no unfolded copy),
uint8 pixels enter as pixel - 128 (mean and standard deviation are folded into W and bias beforehand),
bias and position are added in the epilogue, and the prefix (CLS and register) tokens are copied by
extra programs of the same launch. Images: uint8 or floating point, any strides; weight: fp32, fp16 or
bf16, which is the dtype of the product and of the output. fp32 accumulation; fp32 weights multiply in
full precision, not TF32.

Bound by FLOPs for half types at ViT widths: each pixel takes part in C products, and an image is read
from memory once and then, by the other column tiles, from L2.

Source: Dosovitskiy et al. 2021 (An Image is Worth 16x16 Words), eq. 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels import _common
from vitfast.kernels._common import DTYPES, CompileCase, Config

# Sides: the largest square tile whose accumulator leaves room for the epilogue, one for widths that it
# covers badly (192) or that allow no wide stores (odd ones), and one that fills the GPU at small batches.
# BLOCK_K: 64 for one- and two-byte pixels, 32 for wider ones, to fit in shared memory. fp32 weights multiply
# on the ordinary multiply-add units, whose operands sit in registers: a short K keeps them there.
# All were compiled for their architectures: no spills, shared memory within the limit. None is measured yet.
CONFIGS = [
    Config("128x128x64", {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    Config("128x64x64", {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    Config("64x64x64", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=4),
    Config("128x128x32", {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    Config("128x64x32", {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    Config("64x64x32", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    Config("float32_64x128x16", {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16}, num_warps=8, num_stages=3),
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

CAPABILITIES: dict[str, Any] = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {}}


def pick_config(rows: int, width: int, pixel: torch.dtype, dtype: torch.dtype, sms: int) -> Config:
    """The config for M = `rows` patches, C = `width`, pixels and weights of these dtypes, on `sms` multiprocessors.

    BLOCK_K, and with it the order of summation, depends on the dtypes alone: a token does not change
    with the batch that it is in.
    """
    if dtype == torch.float32:
        name = "float32_64x128x16"
    else:
        block_k = 64 if pixel.itemsize <= 2 else 32
        fits_128 = width % 16 == 0 and triton.cdiv(width, 128) * 2 == triton.cdiv(width, 64)
        block_m, block_n = 128, 128 if fits_128 else 64
        if pixel.itemsize == 8 or triton.cdiv(rows, block_m) * triton.cdiv(width, block_n) < sms:
            block_m = block_n = 64
        name = f"{block_m}x{block_n}x{block_k}"
    return next(config for config in CONFIGS if config.name == name)


@triton.jit
def _prefix_tile(
    out, prefix, stride_prefix, batch, tokens, width, prefix_tokens, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Copy BLOCK_M x BLOCK_N elements of the B * P rows of prefix tokens; tokens = P + L."""
    tiles_n = tl.cdiv(width, BLOCK_N)
    row = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (row // prefix_tokens).to(tl.int64)
    which = (row % prefix_tokens).to(tl.int64)
    mask = (image < batch)[:, None] & (column < width)[None, :]
    value = tl.load(prefix + which[:, None] * stride_prefix + column[None, :], mask=mask, other=0.0)
    tl.store(out + (image * tokens + which)[:, None] * width + column[None, :], value, mask=mask)


@triton.jit
def _patch_embed_kernel(
    out,  # [B, P + L, C] contiguous
    images,  # uint8 or floating point, by strides
    weight,  # [C, K] contiguous
    bias,  # [C] or None
    position,  # [L, C], rows stride_position apart, or None
    prefix,  # [P, C], rows stride_prefix apart, or None
    stride_image,  # in units of UNIT elements, as stride_row, stride_outer and stride_middle
    stride_row,  # of pixels in the image
    stride_column,
    stride_outer,  # of the three axes that K runs over: K = outer * MIDDLE * INNER
    stride_middle,
    stride_inner,
    stride_position,
    stride_prefix,
    rows,  # M = B * L
    patches,  # L
    grid_width,  # patches in a row of patches
    width,  # C
    prefix_tokens,  # P
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    K: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(width, BLOCK_N)
    patch_tiles = tl.cdiv(rows, BLOCK_M) * tiles_n
    if tile >= patch_tiles:
        if prefix is not None:
            batch, tokens = rows // patches, patches + prefix_tokens
            first = tile - patch_tiles
            _prefix_tile(out, prefix, stride_prefix, batch, tokens, width, prefix_tokens, first, BLOCK_M, BLOCK_N)
    else:
        # Locate. Column tiles run fastest: those that share patches run together, and W stays in L2.
        row = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = row < rows
        column_mask = column < width
        image = (row // patches).to(tl.int64)
        patch = row % patches
        y = (patch // grid_width * PATCH_H).to(tl.int64)
        x = (patch % grid_width * PATCH_W).to(tl.int64)
        corner = images + (image * stride_image + y * stride_row) * UNIT + x * stride_column  # [BLOCK_M]
        weight_row = weight + column.to(tl.int64) * K  # [BLOCK_N]

        # Load and compute. Beyond K the weights are 0, so the pixels there only need to be finite.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            outer = (k // (INNER * MIDDLE)).to(tl.int64) * stride_outer * UNIT
            middle = (k // INNER % MIDDLE).to(tl.int64) * stride_middle * UNIT
            inner = (k % INNER).to(tl.int64) * stride_inner
            if K % BLOCK_K == 0:
                pixel_mask = row_mask[:, None]
                weight_mask = column_mask[:, None]
            else:
                pixel_mask = row_mask[:, None] & (k < K)[None, :]
                weight_mask = column_mask[:, None] & (k < K)[None, :]
            pixels = tl.load(corner[:, None] + (outer + middle + inner)[None, :], mask=pixel_mask, other=0)
            weights = tl.load(weight_row[:, None] + k[None, :], mask=weight_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
            if pixels.dtype == tl.uint8:
                pixels = pixels.to(tl.float32) - 128.0
            elif pixels.dtype == tl.float64:
                pixels = pixels.to(tl.float32)
            acc = tl.dot(pixels.to(weights.dtype), tl.trans(weights), acc, input_precision="ieee")

        if bias is not None:
            acc += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        if position is not None:
            pointer = position + patch.to(tl.int64)[:, None] * stride_position + column[None, :]
            acc += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)

        # Store
        token = image * (patches + prefix_tokens) + prefix_tokens + patch
        tl.store(out + token[:, None] * width + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


def _check(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    patch_size: tuple[int, int],
    channels_last: bool,
) -> None:
    op = "patch_embed"
    _common.check_device(op, images=images, weight=weight, bias=bias, position=position, prefix=prefix)
    _common.check_dtype(op, torch.uint8, *_FLOATS, torch.float64, images=images)
    _common.check_dtype(op, *_FLOATS, weight=weight)
    _common.check_dtype(op, weight.dtype, bias=bias, position=position, prefix=prefix)
    layout = "[B, H, W, Cin]" if channels_last else "[B, Cin, H, W]"
    if images.ndim != 4:
        raise ValueError(f"{op}: images must be {layout}, got shape {tuple(images.shape)}")
    ph, pw = patch_size
    height, width, channels = (images.shape[i] for i in ((1, 2, 3) if channels_last else (2, 3, 1)))
    if ph < 1 or pw < 1 or height < ph or width < pw or height % ph or width % pw:
        raise ValueError(f"{op}: image size {height}x{width} is not a positive multiple of the patch {ph}x{pw}")
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != channels * ph * pw or channels < 1:
        raise ValueError(
            f"{op}: weight must be [C, K] with K = {channels} * {ph} * {pw} = {channels * ph * pw} for images "
            f"{layout} of shape {tuple(images.shape)}, got shape {tuple(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"{op}: weight must be contiguous (see pack_patch_embed), got strides {weight.stride()}")
    out_width = weight.shape[0]
    _common.check_shape(op, "bias", bias, (out_width,))
    _common.check_shape(op, "position", position, ((height // ph) * (width // pw), out_width))
    if prefix is not None and (prefix.ndim != 2 or prefix.shape[1] != out_width):
        raise ValueError(f"{op}: prefix has shape {tuple(prefix.shape)}, expected (P, {out_width})")
    _common.check_last_contiguous(op, bias=bias, position=position, prefix=prefix)


def _k_axes(
    images: Tensor, patch_size: tuple[int, int], channels_last: bool
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """(MIDDLE, INNER) sizes and (outer, middle, inner) strides of the axes that K runs over.

    Channels that lie next to each other, pixel after pixel, make one axis with the patch's columns: a
    run of pw * Cin elements, which loads as wide words.
    """
    ph, pw = patch_size
    if not channels_last:
        _, _, row, column = images.stride()
        return (ph, pw), (images.stride(1), row, column)
    _, row, column, channel = images.stride()
    channels = images.shape[3]
    if column == channels * channel:
        return (ph, pw * channels), (0, row, channel)
    return (pw, channels), (row, column, channel)


@_common.on_its_device
def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    channels_last: bool = False,
) -> Tensor:
    """Images to tokens [B, P + L, C] in the weight's dtype: patches, after P prefix tokens.

    Args:
        images: [B, Cin, H, W], or [B, H, W, Cin] if channels_last; uint8 or floating point, any strides.
        weight: [C, K], contiguous; K runs over (Cin, ph, pw), or (ph, pw, Cin) if channels_last.
        bias: [C]. position: [L, C], L = (H / ph) * (W / pw). prefix: [P, C]. All in the weight's dtype.

    Raises:
        ValueError: if a shape, dtype, stride or device does not fit, or the image is not a multiple of the patch.
    """
    _check(images, weight, bias, position, prefix, patch_size, channels_last)
    ph, pw = patch_size
    height, image_width = images.shape[1:3] if channels_last else images.shape[2:4]
    batch, grid_width, width = images.shape[0], image_width // pw, weight.shape[0]
    patches = (height // ph) * grid_width
    prefix_tokens = 0 if prefix is None else prefix.shape[0]
    out = torch.empty((batch, prefix_tokens + patches, width), dtype=weight.dtype, device=weight.device)
    if batch == 0:
        return out

    rows = batch * patches
    config = pick_config(rows, width, images.dtype, weight.dtype, _common.num_sms(images.device))
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    row_tiles = triton.cdiv(rows, block_m) + triton.cdiv(batch * prefix_tokens, block_m)
    grid = (row_tiles * triton.cdiv(width, block_n),)
    stride_row, stride_column = images.stride()[1:3] if channels_last else images.stride()[2:4]
    (middle, inner), (stride_outer, stride_middle, stride_inner) = _k_axes(images, patch_size, channels_last)
    unit = math.gcd(16, images.stride(0), stride_row, stride_outer, stride_middle)
    _patch_embed_kernel[grid](
        out,
        images,
        weight,
        bias,
        position,
        prefix if prefix_tokens else None,
        images.stride(0) // unit,
        stride_row // unit,
        stride_column,
        stride_outer // unit,
        stride_middle // unit,
        stride_inner,
        0 if position is None else position.stride(0),
        0 if prefix is None else prefix.stride(0),
        rows,
        patches,
        grid_width,
        width,
        prefix_tokens,
        PATCH_H=ph,
        PATCH_W=pw,
        K=weight.shape[1],
        MIDDLE=middle,
        INNER=inner,
        UNIT=unit,
        **config.options(),
    )
    return out


_VARIANTS = {  # name: pixel and weight type, patch side, channels last
    "uint8_nhwc_16": ("u8", "bf16", 16, True),
    "bf16_nchw_16": ("bf16", "bf16", 16, False),
    "uint8_nhwc_14": ("u8", "bf16", 14, True),
    "bf16_nchw_14": ("bf16", "bf16", 14, False),
    "fp32_nchw_16": ("fp32", "bf16", 16, False),
    "uint8_nhwc_16_fp32": ("u8", "fp32", 16, True),
    "fp32_nchw_16_fp32": ("fp32", "fp32", 16, False),
}


def compile_cases() -> list[CompileCase]:
    """Every config with all of the epilogue, for 3-channel images of 224 pixels and widths that 16 divides."""
    cases = []
    for name, (pixel, element, side, channels_last) in _VARIANTS.items():
        block_k = 16 if element == "fp32" else 32 if pixel == "fp32" else 64
        for config in CONFIGS:
            if config.blocks["BLOCK_K"] != block_k:
                continue
            kinds = dict.fromkeys(("out", "weight", "bias", "position", "prefix"), f"*{element}")
            kinds["images"] = f"*{pixel}"
            constexprs = {"PATCH_H": side, "PATCH_W": side, "K": 3 * side * side, "UNIT": 16, **config.blocks}
            constexprs |= {"MIDDLE": side, "INNER": 3 * side if channels_last else side, "stride_inner": 1}
            constexprs |= {} if channels_last else {"stride_column": 1}
            signature = {n: kinds.get(n, "i32") for n in _patch_embed_kernel.arg_names if n not in constexprs}
            varying = ("rows", "patches", "grid_width", "prefix_tokens", "stride_column")
            units = ("stride_image", "stride_row", "stride_outer", "stride_middle")
            cases.append(
                CompileCase(
                    kernel="patch_embed",
                    config=f"{config.name}_{name}",
                    fn=_patch_embed_kernel,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    aligned=tuple(n for n in signature if n not in varying + units),
                    tile={"M": config.blocks["BLOCK_M"], "N": config.blocks["BLOCK_N"], "K": config.blocks["BLOCK_K"]},
                )
            )
    return cases
