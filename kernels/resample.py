"""One axis of uint8 images resampled by weights in fixed point, which is how Pillow resizes.

    out[b, i, c] = clip((2^21 + sum over t of images[b, first[i] + t, c] * weights[i, t]) >> 22, 0, 255)

images is uint8 [B, H, W, C] and i runs over rows (axis 1) or columns (axis 2) of the output, uint8 too; c stands for
all that lies behind the axis: C numbers behind a column, W C behind a row. first is int64 [out], weights int32
[out, taps], as `vitfast.images.pillow_resize.taps` makes them: 22 bits of a weight are its fraction. Sums are int32 and
every step is that of Pillow, so that two launches, one an axis, give Pillow's bits.

Bound, by arithmetic and not measured: a tap of an output byte is one load from L1, since neighbours share their input.
From memory a pass reads each input byte once and writes each output byte once. An image that shrinks by s takes
about 4 s taps by bicubic's filter, so that the first pass, 4 loads for each of its input bytes, is bound by loads.

Source: the fixed-point format of Pillow's 8-bit resampling.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels._parts import launch
from vitfast.kernels._parts.launch import Config

# Starting points by arithmetic, not tuned on a GPU. Along a row 16 rows share the loads of weights, which lie apart
# there; across rows a weight serves all of a block, and neighbouring threads read neighbouring bytes.
CONFIGS = {
    1: Config("across_rows", {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 1024}, num_warps=4, num_stages=1),
    2: Config("along_row", {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 64}, num_warps=4, num_stages=1),
}
"""Axis -> config."""

CAPABILITIES: dict[str, Any] = {"dtypes": ("uint8",), "min_capability": (8, 0), "limits": {}}


@triton.jit
def _resample_kernel(
    out,  # [R, L] uint8 contiguous, L = outputs * inner
    images,  # [R, length * inner] uint8 contiguous
    first,  # [outputs] int64
    weights,  # [outputs, taps] int32 contiguous
    row_stride,  # length * inner
    rows,
    columns,  # L
    inner,
    taps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # Locate
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_ok, column_ok = row < rows, column < columns
    mask = row_ok[:, None] & column_ok[None, :]
    output = column // inner
    begin = tl.load(first + output, mask=column_ok, other=0) * inner + column % inner
    pixel = images + row.to(tl.int64)[:, None] * row_stride + begin[None, :]  # [BLOCK_ROWS, BLOCK_COLUMNS]
    weight = weights + output.to(tl.int64) * taps  # [BLOCK_COLUMNS]

    # Load and compute
    total = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), 1 << 21, tl.int32)  # half of the last bit that is kept
    for _ in range(taps):
        value = tl.load(pixel, mask=mask, other=0).to(tl.int32)
        total += value * tl.load(weight, mask=column_ok, other=0)[None, :]
        pixel += inner
        weight += 1
    value = tl.minimum(tl.maximum(total >> 22, 0), 255)

    # Store
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], value.to(tl.uint8), mask=mask)


@launch.on_its_device
def resample(images: Tensor, first: Tensor, weights: Tensor, *, axis: int) -> Tensor:
    """Resample axis 1 (rows) or 2 (columns) of uint8 images [B, H, W, C]; contiguous uint8 of the new length.

    first: int64 [out], weights: int32 [out, taps], both contiguous, such that first + taps is within the axis: that is
    not checked, for the host would have to wait for it.

    Raises:
        ValueError: if a stride or device does not fit.
    """
    op = "resample"
    launch.check_device(op, images=images, first=first, weights=weights)
    launch.check_contiguous(op, images=images, first=first, weights=weights)
    shape = list(images.shape)
    inner = shape[3] if axis == 2 else shape[2] * shape[3]
    row_stride, rows = shape[axis] * inner, shape[0] * (shape[1] if axis == 2 else 1)
    shape[axis] = len(first)
    out = torch.empty(shape, dtype=torch.uint8, device=images.device)
    config, columns = CONFIGS[axis], len(first) * inner
    if out.numel():
        blocks = triton.cdiv(rows, config.blocks["BLOCK_ROWS"]) * triton.cdiv(columns, config.blocks["BLOCK_COLUMNS"])
        _resample_kernel[(blocks,)](
            out,
            images,
            first,
            weights,
            row_stride,
            rows,
            columns,
            inner,
            weights.shape[1],
            **config.options(),
        )
    return out
