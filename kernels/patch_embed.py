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

from vitfast.kernels._parts import launch
from vitfast.kernels._parts.launch import DTYPES, Config

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

CAPABILITIES: dict[str, Any] = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {}}


def pick_config(M: int, C: int, pixel: torch.dtype, dtype: torch.dtype, sms: int) -> Config:
    """The config for M patches, C columns, pixels and weights of these dtypes, on `sms` multiprocessors.

    BLOCK_K, and with it the order of summation, depends on the dtypes alone: a token does not change
    with the batch that it is in.
    """
    if dtype == torch.float32:
        name = "float32_64x128x16"
    else:
        block_k = 64 if pixel.itemsize <= 2 else 32
        fits_128 = C % 16 == 0 and triton.cdiv(C, 128) * 2 == triton.cdiv(C, 64)
        block_m, block_n = 128, 128 if fits_128 else 64
        if pixel.itemsize == 8 or triton.cdiv(M, block_m) * triton.cdiv(C, block_n) < sms:
            block_m = block_n = 64
        name = f"{block_m}x{block_n}x{block_k}"
    return next(config for config in CONFIGS if config.name == name)


@triton.jit
def _prefix_tile(
    out, prefix, prefix_stride, batch, tokens, C, prefix_tokens, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Copy BLOCK_M x BLOCK_N elements of the B * P rows of prefix tokens; tokens = P + L."""
    tiles_n = tl.cdiv(C, BLOCK_N)
    row = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (row // prefix_tokens).to(tl.int64)
    which = (row % prefix_tokens).to(tl.int64)
    mask = (image < batch)[:, None] & (column < C)[None, :]
    value = tl.load(prefix + which[:, None] * prefix_stride + column[None, :], mask=mask, other=0.0)
    tl.store(out + (image * tokens + which)[:, None] * C + column[None, :], value, mask=mask)


@triton.jit
def _patch_embed_kernel(
    out,  # [B, P + L, C] contiguous
    images,  # uint8 or floating point, by strides
    weight,  # [C, K] contiguous
    bias,  # [C] or None
    position,  # [L, C], rows position_stride apart, or None
    prefix,  # [P, C], rows prefix_stride apart, or None
    image_strides,  # of images, rows and columns of pixels; those of images and rows in steps of STEP elements
    k_strides,  # of the three axes that K runs over, K = outer * MIDDLE * INNER; the first two in steps of STEP
    position_stride,
    prefix_stride,
    M,  # B * L
    patches,  # L
    grid_width,  # patches in a row of patches
    C,
    prefix_tokens,  # P
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    K: tl.constexpr,
    MIDDLE: tl.constexpr,
    INNER: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(C, BLOCK_N)
    patch_tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    if tile >= patch_tiles:
        if prefix is not None:
            batch, tokens = M // patches, patches + prefix_tokens
            first = tile - patch_tiles
            _prefix_tile(out, prefix, prefix_stride, batch, tokens, C, prefix_tokens, first, BLOCK_M, BLOCK_N)
    else:
        # Locate. Column tiles run fastest: those that share patches run together, and W stays in L2.
        row = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = row < M
        column_mask = column < C
        image = (row // patches).to(tl.int64)
        patch = row % patches
        y = (patch // grid_width * PATCH_H).to(tl.int64)
        x = (patch % grid_width * PATCH_W).to(tl.int64)
        image_stride, row_stride, column_stride = image_strides
        outer_stride, middle_stride, inner_stride = k_strides
        corner = images + (image * image_stride + y * row_stride) * STEP + x * column_stride  # [BLOCK_M]
        weight_row = weight + column.to(tl.int64) * K  # [BLOCK_N]

        # Load and compute. Beyond K the weights are 0, so the pixels there only need to be finite.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            outer = (k // (INNER * MIDDLE)).to(tl.int64) * outer_stride * STEP
            middle = (k // INNER % MIDDLE).to(tl.int64) * middle_stride * STEP
            inner = (k % INNER).to(tl.int64) * inner_stride
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
            pointer = position + patch.to(tl.int64)[:, None] * position_stride + column[None, :]
            acc += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)

        # Store
        token = image * (patches + prefix_tokens) + prefix_tokens + patch
        tl.store(out + token[:, None] * C + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


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


@launch.on_its_device
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
        ValueError: if a stride or device does not fit.
    """
    op = "patch_embed"
    launch.check_device(op, images=images, weight=weight, bias=bias, position=position, prefix=prefix)
    launch.check_contiguous(op, weight=weight)
    launch.check_last_contiguous(op, bias=bias, position=position, prefix=prefix)
    ph, pw = patch_size
    height, image_width = images.shape[1:3] if channels_last else images.shape[2:4]
    batch, grid_width, (C, K) = images.shape[0], image_width // pw, weight.shape
    patches = (height // ph) * grid_width
    prefix_tokens = 0 if prefix is None else prefix.shape[0]
    out = torch.empty((batch, prefix_tokens + patches, C), dtype=weight.dtype, device=weight.device)
    if batch == 0:
        return out

    M = batch * patches
    config = pick_config(M, C, images.dtype, weight.dtype, launch.num_sms(images.device))
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    row_tiles = triton.cdiv(M, block_m) + triton.cdiv(batch * prefix_tokens, block_m)
    image_stride = images.stride(0)
    row_stride, column_stride = images.stride()[1:3] if channels_last else images.stride()[2:4]
    (middle, inner), (outer_stride, middle_stride, inner_stride) = _k_axes(images, patch_size, channels_last)
    step = math.gcd(16, image_stride, row_stride, outer_stride, middle_stride)
    _patch_embed_kernel[(row_tiles * triton.cdiv(C, block_n),)](
        out,
        images,
        weight,
        bias,
        position,
        prefix if prefix_tokens else None,
        (image_stride // step, row_stride // step, column_stride),
        (outer_stride // step, middle_stride // step, inner_stride),
        launch.row_stride(position),
        launch.row_stride(prefix),
        M,
        patches,
        grid_width,
        C,
        prefix_tokens,
        PATCH_H=ph,
        PATCH_W=pw,
        K=K,
        MIDDLE=middle,
        INNER=inner,
        STEP=step,
        **config.options(),
    )
    return out
