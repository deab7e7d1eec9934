"""Rows that a program holds whole: their loads, moments, products with a weight, and the epilogue that stores them.

For C <= MAX_WIDTH, in `mlp` and `attention_block`. Power-of-two tiles cover C > 128 as a large and a small one
(192 = 128 + 64, 384 = 256 + 128), so that little is padded, and tiles of row statistics lie in one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.kernels._parts.epilogue import STATS_TILE, norm_and_bias

MAX_WIDTH = 384
"""Largest C of these kernels."""


@triton.jit
def load_block(tensor, rows, row_ok, columns, C, stride):
    """[rows, columns] of a matrix of C columns."""
    mask = row_ok[:, None] & (columns < C)[None, :]
    return tl.load(tensor + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def moments(x0, x1, columns0, columns1, C, eps, C1: tl.constexpr):
    """Mean and 1/sqrt(var + eps) of each row, in two passes over both column tiles."""
    total = tl.sum(x0.to(tl.float32), axis=1)  # columns beyond C are zeros
    if C1 > 0:
        total += tl.sum(x1.to(tl.float32), axis=1)
    mean = total / C
    shift = tl.where((columns0 < C)[None, :], x0.to(tl.float32) - mean[:, None], 0.0)
    squares = tl.sum(shift * shift, axis=1)
    if C1 > 0:
        shift = tl.where((columns1 < C)[None, :], x1.to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(shift * shift, axis=1)
    return mean, tl.rsqrt(squares / C + eps)


@triton.jit
def product(
    x0, x1, mean, rstd, weight, weight_sum, bias, units, unit_ok, columns0, columns1, C, stride, C1: tl.constexpr
):
    """Some columns of norm(x) Wᵀ + b, [BLOCK_M, units] fp32; `units` are rows of W."""
    acc = tl.dot(x0, load_block(weight, units, unit_ok, columns0, C, stride).T)
    if C1 > 0:
        acc = tl.dot(x1, load_block(weight, units, unit_ok, columns1, C, stride).T, acc)
    return norm_and_bias(acc, mean, rstd, weight_sum, bias, units, unit_ok)


@triton.jit
def store_stats(y_stats, value, rows, row_ok, first_column, C):
    """(mean, M2) of each row of each 128 columns of a tile, or of all its columns if they are fewer."""
    WIDTH: tl.constexpr = min(128, value.shape[1])
    TILES: tl.constexpr = value.shape[1] // WIDTH
    first = first_column + tl.arange(0, TILES) * 128
    count = tl.maximum(tl.minimum(C - first, 128), 1).to(tl.float32)
    value = tl.reshape(value.to(tl.float32), (value.shape[0], TILES, WIDTH))
    column_ok = (first[:, None] + tl.arange(0, WIDTH)[None, :] < C)[None, :, :]
    mean = tl.sum(tl.where(column_ok, value, 0.0), axis=2) / count[None, :]
    shift = tl.where(column_ok, value - mean[:, :, None], 0.0)
    pairs = y_stats + (rows.to(tl.int64)[:, None] * tl.cdiv(C, 128) + (first // 128)[None, :]) * 2
    mask = row_ok[:, None] & (first < C)[None, :]
    tl.store(pairs, mean, mask=mask)
    tl.store(pairs + 1, tl.sum(shift * shift, axis=2), mask=mask)


@triton.jit
def store(y, y_stats, acc, bias, layer_scale, residual, residual_stride, rows, row_ok, first_column, columns, C):
    """Bias, LayerScale and residual of one column tile, its store and its statistics."""
    column_ok = columns < C
    if bias is not None:
        acc += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if layer_scale is not None:
        acc *= tl.load(layer_scale + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc += load_block(residual, rows, row_ok, columns, C, residual_stride).to(tl.float32)
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    value = acc.to(y.dtype.element_ty)
    tl.store(y + offsets, value, mask=row_ok[:, None] & column_ok[None, :])
    if y_stats is not None:
        store_stats(y_stats, value, rows, row_ok, first_column, C)


def column_tiles(width: int) -> tuple[int, int]:
    """One power of two that covers `width` <= 128; beyond, two whose sum does, the second of which may be 0."""
    if width <= STATS_TILE:
        return max(16, triton.next_power_of_2(width)), 0
    large = 1 << (width.bit_length() - 1)
    if large >= width:
        return large, 0
    small = max(16, triton.next_power_of_2(width - large))
    return (2 * large, 0) if small == large else (large, small)
