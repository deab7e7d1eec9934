"""LayerNorm over the last axis, with a residual added first or alone, and LayerNorm's row statistics.

    layer_norm:      y[m] = (x[m] - mean[m]) / sqrt(var[m] + eps) * weight + bias
    add_layer_norm:  the same of sum[m] = x[m] + residual[m], and sum itself
    row_stats:       [M, ceil(C / 128), 2], one (mean, sum of squared deviations) pair per 128 columns

x, residual, y and sum are [M, C], weight and bias [C], of one dtype (fp32, fp16 or bf16); the statistics
are fp32. Everything is computed in fp32: the variance is the biased one and is summed from deviations
that are held in registers, never E[x²] - mean². add_layer_norm normalises the sum before it is rounded.

Bound by bytes: every element is read once and written once, one pass each.

Sources: Ba, Kiros, Hinton 2016 (Layer Normalization); Chan, Golub, LeVeque 1983 (Algorithms for
Computing the Sample Variance), for the correction of the mean in `_moments`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels._parts import launch
from vitfast.kernels._parts.epilogue import STATS_TILE
from vitfast.kernels._parts.launch import DTYPES, Config

MAX_COLUMNS = 8192

# Starting points by arithmetic, not tuned on a GPU: four warps hold up to 4096 elements, which is four 16-byte
# loads of a half type per thread. All compile without spills, unaligned rows included (16384 columns do not).
# The choice depends on the width alone, never on the number of rows, so that a row's sums run in the same
# order at every batch size.
CONFIGS = [
    Config("128", {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 128}, num_warps=4, num_stages=1),
    Config("256", {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 256}, num_warps=4, num_stages=1),
    Config("512", {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 512}, num_warps=4, num_stages=1),
    Config("1024", {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 1024}, num_warps=4, num_stages=1),
    Config("2048", {"BLOCK_ROWS": 2, "BLOCK_COLUMNS": 2048}, num_warps=4, num_stages=1),
    Config("4096", {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 4096}, num_warps=4, num_stages=1),
    Config("8192", {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 8192}, num_warps=8, num_stages=1),
]

# One pair of statistics is 128 columns of a row, and a program takes 32 pairs at any width. In half types
# 16 lanes hold a pair, so that no sum leaves its warp.
STATS_CONFIG = Config("stats", {"BLOCK_PAIRS": 32, "TILE": STATS_TILE}, num_warps=4, num_stages=1)

CAPABILITIES = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {"width": (1, MAX_COLUMNS)}}


def pick_config(columns: int) -> Config:
    """The first config of `layer_norm` whose block covers all columns.

    Raises:
        ValueError: if there is none.
    """
    for config in CONFIGS:
        if columns <= config.blocks["BLOCK_COLUMNS"]:
            return config
    raise ValueError(f"layer_norm: the last axis has {columns} elements, allowed are 1 to {MAX_COLUMNS}")


@triton.jit
def _moments(x, mask, count):
    """Mean [R], deviations from it [R, N] and their sum of squares [R]; masked elements of x are 0.

    The first mean is off by a rounding of its own size, which for a row of large mean and small variance
    is no longer small against the deviations; their own mean is that error, and is taken out.
    """
    mean = tl.sum(x, axis=1) / count
    deviation = tl.where(mask, x - mean[:, None], 0.0)
    correction = tl.sum(deviation, axis=1) / count
    deviation = tl.where(mask, deviation - correction[:, None], 0.0)
    return mean + correction, deviation, tl.sum(deviation * deviation, axis=1)


@triton.jit
def _layer_norm_kernel(
    y,  # [M, C] contiguous
    total,  # [M, C] contiguous, or None with residual
    x,  # [M, C], rows x_stride apart
    residual,  # [M, C], rows residual_stride apart, or None
    weight,  # [C]
    bias,  # [C]
    x_stride,
    residual_stride,
    rows,
    columns,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # Locate
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    column_mask = column < columns
    mask = (row < rows) & column_mask
    out = row.to(tl.int64) * columns + column  # [BLOCK_ROWS, BLOCK_COLUMNS]

    # Load
    value = tl.load(x + row.to(tl.int64) * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(residual + row.to(tl.int64) * residual_stride + column, mask=mask, other=0.0)
        value += added.to(tl.float32)
        tl.store(total + out, value.to(total.dtype.element_ty), mask=mask)
    gain = tl.load(weight + column, mask=column_mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)

    # Compute
    _, deviation, squares = _moments(value, mask, columns)
    scale = tl.rsqrt(squares / columns + eps)
    normed = deviation * scale[:, None] * gain + shift

    # Store
    tl.store(y + out, normed.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _row_stats_kernel(
    stats,  # [M, tiles, 2] fp32, contiguous
    x,  # [M, C], rows x_stride apart
    x_stride,
    rows,
    columns,
    tiles,  # ceil(C / TILE)
    BLOCK_PAIRS: tl.constexpr,
    TILE: tl.constexpr,
):
    # Locate
    pair = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    row = pair // tiles
    first = (pair % tiles) * TILE
    column = first[:, None] + tl.arange(0, TILE)[None, :]
    mask = (row < rows)[:, None] & (column < columns)

    # Load
    pointer = x + row.to(tl.int64)[:, None] * x_stride + column  # [BLOCK_PAIRS, TILE]
    value = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)

    # Compute
    mean, _, squares = _moments(value, mask, tl.minimum(columns - first, TILE))

    # Store
    pointer = stats + pair.to(tl.int64) * 2
    tl.store(pointer, mean, mask=row < rows)
    tl.store(pointer + 1, squares, mask=row < rows)


def _launch(
    op: str,
    y: Tensor,
    total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> None:
    launch.check_device(op, x=x, residual=residual, weight=weight, bias=bias)
    launch.check_last_contiguous(op, weight=weight, bias=bias)
    config = pick_config(x.shape[-1])
    rows = launch.rows_view(op, "x", x)
    added = None if residual is None else launch.rows_view(op, "residual", residual)
    if rows.shape[0] == 0:
        return
    grid = (triton.cdiv(rows.shape[0], config.blocks["BLOCK_ROWS"]),)
    _layer_norm_kernel[grid](
        y,
        total,
        rows,
        added,
        weight,
        bias,
        rows.stride(0),
        launch.row_stride(added),
        rows.shape[0],
        rows.shape[1],
        eps,
        **config.options(),
    )


@launch.on_its_device
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm of x [..., C] over its last axis; returns a contiguous tensor of x's shape and dtype.

    x: fp32, fp16 or bf16, with a contiguous last axis and leading axes that merge into one row stride;
    weight, bias: [C] in x's dtype.

    Raises:
        ValueError: if a stride or device does not fit, or C exceeds `MAX_COLUMNS`.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("layer_norm", y, None, x, None, weight, bias, eps)
    return y


@launch.on_its_device
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual and the sum itself, both contiguous; arguments as in `layer_norm`.

    Raises:
        ValueError: if a stride or device does not fit, or C exceeds `MAX_COLUMNS`.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("add_layer_norm", y, total, x, residual, weight, bias, eps)
    return y, total


@launch.on_its_device
def row_stats(x: Tensor) -> Tensor:
    """Statistics of each row of x [..., C]: [M, ceil(C / 128), 2] fp32, a (mean, M2) pair per 128 columns.

    M2 is the sum of squared deviations from that pair's mean. x: as in `layer_norm`.

    Raises:
        ValueError: if the stride or device does not fit, or C exceeds `MAX_COLUMNS`.
    """
    launch.check_device("row_stats", x=x)
    rows = launch.rows_view("row_stats", "x", x)
    count, columns = rows.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"row_stats: the last axis has {columns} elements, allowed are 1 to {MAX_COLUMNS}")
    tiles = triton.cdiv(columns, STATS_TILE)
    stats = torch.empty((count, tiles, 2), dtype=torch.float32, device=x.device)
    if count:
        grid = (triton.cdiv(count * tiles, STATS_CONFIG.blocks["BLOCK_PAIRS"]),)
        _row_stats_kernel[grid](
            stats,
            rows,
            rows.stride(0),
            count,
            columns,
            tiles,
            **STATS_CONFIG.options(),
        )
    return stats
