"""From fp32 sums of a product to its output: the folded LayerNorm, bias, activation, LayerScale, row statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.kernels._parts.activation import activate, silu

STATS_TILE = 128
"""Columns that one (mean, M2) pair of partial row statistics covers; the last pair covers the rest."""

GROUP_M = 8
"""Tile rows in a group: the tiles that run at the same time read few rows of x and few of W."""


@triton.jit
def tile_origin(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile number -> (tile row, tile column): down GROUP rows first, then to the next column."""
    first_row = tile // (GROUP * tiles_n) * GROUP
    group_rows = tl.minimum(tiles_m - first_row, GROUP)
    within = tile % (GROUP * tiles_n)
    return first_row + within % group_rows, within // group_rows


@triton.jit
def combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK: tl.constexpr):
    """Mean and 1/sqrt(var + eps) of rows of x from their (mean, M2) pairs, by Chan's formula."""
    tiles = tl.cdiv(K, 128)
    index = tl.arange(0, STATS_BLOCK)
    count = tl.maximum(tl.minimum(K - index * 128, 128), 0).to(tl.float32)
    pairs = row_stats + (rows.to(tl.int64)[:, None] * tiles + index[None, :]) * 2
    mask = row_ok[:, None] & (index < tiles)[None, :]
    means = tl.load(pairs, mask=mask, other=0.0)  # [BLOCK_M, STATS_BLOCK]
    m2s = tl.load(pairs + 1, mask=mask, other=0.0)
    mean = tl.sum(means * count[None, :], axis=1) / K
    shift = means - mean[:, None]
    m2 = tl.sum(m2s + count[None, :] * shift * shift, axis=1)
    return mean, tl.rsqrt(m2 / K + eps)


@triton.jit
def norm_and_bias(acc, mean, rstd, weight_sum, bias, columns, column_ok):
    """The folded LayerNorm's correction of the product, then the bias; [BLOCK_M, columns] fp32."""
    if weight_sum is not None:
        column_sum = tl.load(weight_sum + columns, mask=column_ok, other=0.0)
        acc = rstd[:, None] * (acc - mean[:, None] * column_sum[None, :])
    if bias is not None:
        acc += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def activate_and_scale(
    acc, up, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION: tl.constexpr, EXACT: tl.constexpr
):
    """The epilogue before the residual: act(norm(product) + bias) * layer_scale, in fp32.

    EXACT: the output is in fp32, and the activation to be as precise as that.
    """
    column_ok = columns < N
    value = norm_and_bias(acc, mean, rstd, weight_sum, bias, columns, column_ok)
    if ACTIVATION == "swiglu":
        value = silu(value) * norm_and_bias(up, mean, rstd, weight_sum, bias, columns + N, column_ok)
    else:
        value = activate(value, ACTIVATION, EXACT)
    if layer_scale is not None:
        value *= tl.load(layer_scale + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def store_stats(y_stats, value, rows, row_ok, first_column, N, GATED: tl.constexpr):
    """(mean, M2) of each row of one 128-column tile; columns beyond N do not count.

    All that an epilogue reads beyond N is 0, and so is its value there, unless GATED: the gate's rows end where the
    others begin.
    """
    tl.static_assert(value.shape[1] == 128)
    column_ok = first_column + tl.arange(0, 128) < N
    value = value.to(tl.float32)
    count = tl.maximum(tl.minimum(N - first_column, 128), 1).to(tl.float32)
    if GATED:
        value = tl.where(column_ok[None, :], value, 0.0)
    # Columns, not vectors: Triton then leaves the tile where the product has it.
    mean = tl.sum(value, axis=1, keep_dims=True) / count
    shift = tl.where(column_ok[None, :], value - mean, 0.0)
    pairs = (y_stats + (rows.to(tl.int64) * tl.cdiv(N, 128) + first_column // 128) * 2)[:, None]
    mask = (row_ok & (first_column + tl.zeros_like(rows) < N))[:, None]  # a 256-column tile may end before its half
    tl.store(pairs, mean, mask=mask)
    tl.store(pairs + 1, tl.sum(shift * shift, axis=1, keep_dims=True), mask=mask)
