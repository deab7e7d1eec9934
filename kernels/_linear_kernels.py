"""The kernels of `linear` (see there): a tile of the product from pointers or by TMA, its epilogue, and parts of K."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.kernels._common import activate, silu


@triton.jit
def _tile_origin(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile number -> (tile row, tile column): down GROUP rows first, then to the next column."""
    first_row = tile // (GROUP * tiles_n) * GROUP
    group_rows = tl.minimum(tiles_m - first_row, GROUP)
    within = tile % (GROUP * tiles_n)
    return first_row + within % group_rows, within // group_rows


@triton.jit
def _combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK: tl.constexpr):
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
def _norm_and_bias(acc, mean, rstd, weight_sum, bias, columns, column_ok):
    """The folded LayerNorm's correction of the product, then the bias; [BLOCK_M, columns] fp32."""
    if weight_sum is not None:
        column_sum = tl.load(weight_sum + columns, mask=column_ok, other=0.0)
        acc = rstd[:, None] * (acc - mean[:, None] * column_sum[None, :])
    if bias is not None:
        acc += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _activated(acc, up, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION: tl.constexpr):
    """The epilogue before the residual: act(norm(product) + bias) * layer_scale, in fp32."""
    column_ok = columns < N
    value = _norm_and_bias(acc, mean, rstd, weight_sum, bias, columns, column_ok)
    if ACTIVATION == "swiglu":
        value = silu(value) * _norm_and_bias(up, mean, rstd, weight_sum, bias, columns + N, column_ok)
    else:
        value = activate(value, ACTIVATION)
    if layer_scale is not None:
        value *= tl.load(layer_scale + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _store_stats(y_stats, value, rows, row_ok, first_column, N):
    """(mean, M2) of each row of one 128-column tile; columns beyond N do not count."""
    tl.static_assert(value.shape[1] == 128)
    column_ok = first_column + tl.arange(0, 128) < N
    value = value.to(tl.float32)
    count = tl.maximum(tl.minimum(N - first_column, 128), 1).to(tl.float32)
    mean = tl.sum(tl.where(column_ok[None, :], value, 0.0), axis=1) / count
    shift = tl.where(column_ok[None, :], value - mean[:, None], 0.0)
    pairs = y_stats + (rows.to(tl.int64) * tl.cdiv(N, 128) + first_column // 128) * 2
    mask = row_ok & (first_column + tl.zeros_like(rows) < N)  # a 256-column tile may end before its half
    tl.store(pairs, mean, mask=mask)
    tl.store(pairs + 1, tl.sum(shift * shift, axis=1), mask=mask)


@triton.jit
def _finish(
    y, y_stats, acc, up, bias, layer_scale, residual, row_stats, weight_sum, rows, first_column, residual_stride,
    M, N, K, eps, ACTIVATION: tl.constexpr, STATS_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The whole epilogue of a tile of at most 128 columns, and its store."""
    columns = first_column + tl.arange(0, BLOCK_N)
    row_ok = rows < M
    mean, rstd = None, None
    if row_stats is not None:
        mean, rstd = _combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK)
    value = _activated(acc, up, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION)
    mask = row_ok[:, None] & (columns < N)[None, :]
    if residual is not None:
        offsets = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    value = value.to(y.dtype.element_ty)
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], value, mask=mask)
    if y_stats is not None:
        _store_stats(y_stats, value, rows, row_ok, first_column, N)


@triton.jit
def _part_of_inner(job, tiles, K, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Number of a job -> its tile, its part, and where the part begins and ends in K."""
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    part = job // tiles
    return job % tiles, part, part * length, tl.minimum((part + 1) * length, K)


@triton.jit
def _store_part(partial, acc, part, rows, columns, M, N):
    """One part's sums, [BLOCK_M, BLOCK_N] fp32."""
    offsets = (part.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
    tl.store(partial + offsets, acc, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _halves(tile):
    """[BLOCK_M, BLOCK_N] -> its left and its right half."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def _linear_kernel(
    y,  # [M, N], or None
    y_stats,  # [M, ceil(N / 128), 2] fp32, or None
    partial,  # [SPLIT_K, M, N] fp32, or None; if given it takes the bare sums, and there is no epilogue
    x,  # [M, K]
    weight,  # [N, K], or [2N, K] for swiglu
    bias,  # [N] or [2N], or None
    layer_scale,  # [N], or None
    residual,  # [M, N], or None
    row_stats,  # [M, ceil(K / 128), 2] fp32, or None
    weight_sum,  # [N] or [2N] fp32, or None
    x_stride,
    weight_stride,
    residual_stride,
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tl.static_assert(BLOCK_N <= 128)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for job in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLIT_K, tl.num_programs(0)):
        # Locate.
        tile, part, first_k, last_k = job, 0, 0, K
        if SPLIT_K > 1:
            tile, part, first_k, last_k = _part_of_inner(job, tiles_m * tiles_n, K, SPLIT_K, BLOCK_K)
        tile_m, tile_n = _tile_origin(tile, tiles_m, tiles_n, GROUP)
        first_column = tile_n * BLOCK_N
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        row_ok, column_ok = rows < M, columns < N
        x_tile = x + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]  # [BLOCK_M, BLOCK_K]
        weight_tile = weight + columns.to(tl.int64)[None, :] * weight_stride + inner[:, None]  # [BLOCK_K, BLOCK_N]
        up_tile = weight + (columns.to(tl.int64) + N)[None, :] * weight_stride + inner[:, None]

        # Load and compute.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = None
        if ACTIVATION == "swiglu":
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(first_k, last_k, BLOCK_K):
            inner_ok = inner < K - k
            a = tl.load(x_tile + k, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
            b = tl.load(weight_tile + k, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if ACTIVATION == "swiglu":
                c = tl.load(up_tile + k, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
                up = tl.dot(a, c, up, input_precision="ieee")

        # Epilogue and store.
        if partial is not None:
            _store_part(partial, acc, part, rows, columns, M, N)
        else:
            _finish(
                y, y_stats, acc, up, bias, layer_scale, residual, row_stats, weight_sum, rows, first_column,
                residual_stride, M, N, K, eps, ACTIVATION, STATS_BLOCK, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _linear_tma_kernel(
    y,  # descriptor of [M, N], blocks [BLOCK_M, min(BLOCK_N, 128)], or None
    y_stats,  # [M, ceil(N / 128), 2] fp32, or None
    partial,  # [SPLIT_K, M, N] fp32, or None; if given it takes the bare sums, and there is no epilogue
    x,  # descriptor of [M, K], blocks [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [N, K], or [2N, K] for swiglu, blocks [BLOCK_N, BLOCK_K]
    bias,  # [N] or [2N], or None
    layer_scale,  # [N], or None
    residual,  # descriptor like y's, or None
    row_stats,  # [M, ceil(K / 128), 2] fp32, or None
    weight_sum,  # [N] or [2N] fp32, or None
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PART_N: tl.constexpr = min(BLOCK_N, 128)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for job in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLIT_K, tl.num_programs(0)):
        # Locate.
        tile, part, first_k, last_k = job, 0, 0, K
        if SPLIT_K > 1:
            tile, part, first_k, last_k = _part_of_inner(job, tiles_m * tiles_n, K, SPLIT_K, BLOCK_K)
        tile_m, tile_n = _tile_origin(tile, tiles_m, tiles_n, GROUP)
        first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N

        # Load (beyond the tensors: zeros) and compute.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = None
        if ACTIVATION == "swiglu":
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(first_k, last_k, BLOCK_K):
            a = x.load([first_row, k])
            acc = tl.dot(a, weight.load([first_column, k]).T, acc)
            if ACTIVATION == "swiglu":
                up = tl.dot(a, weight.load([N + first_column, k]).T, up)

        # Epilogue and store (beyond y: dropped). 256 columns go in halves, which need half the
        # registers and are one tile of row statistics each.
        rows = first_row + tl.arange(0, BLOCK_M)
        if partial is not None:
            _store_part(partial, acc, part, rows, first_column + tl.arange(0, BLOCK_N), M, N)
        else:
            row_ok = rows < M
            mean, rstd = None, None
            if row_stats is not None:
                mean, rstd = _combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK)
            halves = (acc,)
            if BLOCK_N == 256:
                halves = _halves(acc)
            for half in tl.static_range(len(halves)):
                column = first_column + half * 128
                columns = column + tl.arange(0, PART_N)
                value = _activated(halves[half], up, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION)
                if residual is not None:
                    value += residual.load([first_row, column]).to(tl.float32)
                value = value.to(y.dtype)
                y.store([first_row, column], value)
                if y_stats is not None:
                    _store_stats(y_stats, value, rows, row_ok, column, N)


@triton.jit
def _linear_sum_kernel(
    y,  # [M, N]
    y_stats,  # [M, ceil(N / 128), 2] fp32, or None
    partial,  # [SPLIT_K, M, N] fp32
    bias,  # [N], or None
    layer_scale,  # [N], or None
    residual,  # [M, N], or None
    row_stats,  # [M, ceil(K / 128), 2] fp32, or None
    weight_sum,  # [N] fp32, or None
    residual_stride,
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Locate.
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % tiles_n * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)

    # Load and add up, first part first.
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        offsets = (rows.to(tl.int64) + part * M)[:, None] * N + columns[None, :]
        acc += tl.load(partial + offsets, mask=mask, other=0.0)

    # Epilogue and store.
    _finish(
        y, y_stats, acc, None, bias, layer_scale, residual, row_stats, weight_sum, rows, first_column, residual_stride,
        M, N, K, eps, ACTIVATION, STATS_BLOCK, BLOCK_N,
    )  # fmt: skip
