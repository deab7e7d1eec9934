"""The kernel for dq, delta and dS: one program owns a tile of queries. See attention_backward."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.kernels._attention_scores import band_tiles, cap_slope, in_band, load_stats, weights_again
from vitfast.kernels._attention_tiles import (
    add_product,
    load_scores,
    load_tile,
    score_product,
    sequence,
    store_tile,
)


@triton.jit
def _dq_key_tile(
    acc,  # [BLOCK_M, D_MAIN] of dq / scale
    acc_rest,  # [BLOCK_M, D_REST]
    q, q_rest,  # [BLOCK_M, D_MAIN], [BLOCK_M, D_REST]
    dout, dout_rest,
    k, v,  # this head's
    bias, mask,  # [BLOCK_M or 1, 1] pointers to this head's rows, or None
    slope,  # this head's, or None
    dbias,  # [BLOCK_M, 1] pointers to rows of dS, or None
    k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
    row_max, norm, delta,  # [BLOCK_M, 1]
    start,  # first key of this tile
    key_count,
    queries,  # [BLOCK_M] indices
    query_count,
    offset, left, right, softcap, scale,
    HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dq."""
    in_tile = tl.arange(0, BLOCK_N)
    count = key_count - start
    first = tl.cast(start, tl.int64)
    k_tile, k_rest = load_tile(k + first * k_stride_n, k_stride_n, in_tile, count, HEAD_DIM, D_MAIN, D_REST, BOUNDED)
    v_tile, v_rest = load_tile(v + first * v_stride_n, v_stride_n, in_tile, count, HEAD_DIM, D_MAIN, D_REST, BOUNDED)
    bias_tile = None
    if bias is not None:
        bias_tile = load_scores(bias, bias_stride_k, start, in_tile, count, BOUNDED)
    seen = None
    if mask is not None:
        seen = load_scores(mask, mask_stride_k, start, in_tile, count, BOUNDED)
    keys, positions = (start + in_tile)[None, :], (queries + offset)[:, None]
    products = score_product(q, q_rest, k_tile, k_rest, D_REST)
    weights = weights_again(products, scale, softcap, bias_tile, slope, keys, positions, seen, row_max, norm)
    if BOUNDED:
        weights = tl.where(in_band((in_tile < count)[None, :], keys, positions, left, right), weights, 0.0)
    dscores = weights * (score_product(dout, dout_rest, v_tile, v_rest, D_REST) - delta)
    if dbias is not None:
        inside = (queries < query_count)[:, None] & (in_tile < count)[None, :]
        tl.store(dbias + (first + in_tile)[None, :], dscores, mask=inside)
    if softcap is not None:
        dscores *= cap_slope(products, scale, softcap)
    return add_product(acc, acc_rest, dscores, k_tile, k_rest, D_REST)


@triton.jit(do_not_specialize=["heads", "query_rows", "key_rows", "longest", "offset", "left", "right"])
def attention_dq_kernel(
    dq,  # [B, Nq, H, D] contiguous
    delta,  # [B, H, Nq] fp32
    dbias,  # [B, H, Nq, Nk] fp32, or None; tiles outside the band are not written
    dout,  # [B, Nq, H, D]
    out,  # [B, Nq, H, D] contiguous
    row_max,  # [B, H, Nq] fp32, of the scores
    row_sum,  # [B, H, Nq] fp32, of exp(score - row_max)
    q,  # [B, Nq, H, D]
    k,  # [B, Nk, H / GROUP, D]
    v,  # [B, Nk, H / GROUP, D]
    bias,  # [B, H, Nq, Nk], any strides, or None
    mask,  # [B, H, Nq, Nk] bool, any strides, or None
    slopes,  # [B, H] fp32, or None
    cu_queries,  # [sequences + 1], and B is 1; or None
    cu_keys,
    dout_stride_b,
    dout_stride_n,
    dout_stride_h,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    v_stride_b,
    v_stride_n,
    v_stride_h,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    slopes_stride_b,
    heads,  # of the queries
    query_rows,  # Nq, Nk
    key_rows,
    longest,  # queries of a sequence
    offset,  # this and the next four as in the forward
    left,
    right,
    softcap,
    scale,
    BIAS_PER_QUERY: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a key head
    VECTOR: tl.constexpr,  # elements by which every stride and pointer of the [B, N, H, D] is aligned
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # keys of the last tile; BLOCK_N with a band or packed sequences
):
    # Locate, as in the forward.
    tiles = tl.cdiv(longest, BLOCK_M)
    program = tl.program_id(0)
    tile = program % tiles
    head = ((program // tiles) % heads).to(tl.int64)
    key_head = head // GROUP
    batch = ((program // tiles) // heads).to(tl.int64)
    entry = batch if cu_queries is None else batch * 0
    first_query, query_count = sequence(cu_queries, batch, query_rows)
    first_key, key_count = sequence(cu_keys, batch, key_rows)
    if cu_queries is not None:
        if tile * BLOCK_M >= query_count:
            return
        offset = key_count - query_count
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dout_offset = entry * dout_stride_b + first_query * dout_stride_n + head * dout_stride_h
    q_offset = entry * q_stride_b + first_query * q_stride_n + head * q_stride_h
    k_offset = entry * k_stride_b + first_key * k_stride_n + key_head * k_stride_h
    v_offset = entry * v_stride_b + first_key * v_stride_n + key_head * v_stride_h
    out_offset = ((entry * query_rows + first_query) * heads + head) * HEAD_DIM
    out_stride_n = heads * HEAD_DIM
    if VECTOR > 1:
        dout_offset, dout_stride_n = tl.multiple_of(dout_offset, VECTOR), tl.multiple_of(dout_stride_n, VECTOR)
        q_offset, q_stride_n = tl.multiple_of(q_offset, VECTOR), tl.multiple_of(q_stride_n, VECTOR)
        k_offset, k_stride_n = tl.multiple_of(k_offset, VECTOR), tl.multiple_of(k_stride_n, VECTOR)
        v_offset, v_stride_n = tl.multiple_of(v_offset, VECTOR), tl.multiple_of(v_stride_n, VECTOR)
        out_offset, out_stride_n = tl.multiple_of(out_offset, VECTOR), tl.multiple_of(out_stride_n, VECTOR)
    dout, q, k, v = dout + dout_offset, q + q_offset, k + k_offset, v + v_offset
    row = (entry * heads + head) * query_rows + first_query
    bias_rows = tl.minimum(queries, query_count - 1).to(tl.int64)[:, None]
    if bias is not None:
        bias += batch * bias_stride_b + head * bias_stride_h
        bias += bias_rows * bias_stride_q if BIAS_PER_QUERY else tl.zeros([1, 1], tl.int64)
    if mask is not None:
        mask += batch * mask_stride_b + head * mask_stride_h
        mask += bias_rows * mask_stride_q if MASK_PER_QUERY else tl.zeros([1, 1], tl.int64)
    if dbias is not None:
        dbias += (row + bias_rows) * key_count
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + batch * slopes_stride_b + head)

    # Load.
    dout_tile, dout_rest = load_tile(dout, dout_stride_n, queries, query_count, HEAD_DIM, D_MAIN, D_REST, True)
    out_tile, out_rest = load_tile(out + out_offset, out_stride_n, queries, query_count, HEAD_DIM, D_MAIN, D_REST, True)
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if D_REST > 0:
        row_delta += tl.sum(dout_rest.to(tl.float32) * out_rest.to(tl.float32), 1)
    tl.store(delta + row + queries, row_delta, mask=queries < query_count)
    q_tile, q_rest = load_tile(q, q_stride_n, queries, query_count, HEAD_DIM, D_MAIN, D_REST, True)
    row_shift, row_norm = load_stats(row_max + row, row_sum + row, queries, query_count)

    # Compute.
    acc = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, D_REST if D_REST > 0 else 1], tl.float32)
    begin, inner, tail, end = band_tiles(tile * BLOCK_M + offset, left, right, key_count, BLOCK_M, BLOCK_N)
    if left is not None:
        for start in tl.range(begin, inner, BLOCK_N):
            acc, acc_rest = _dq_key_tile(
                acc, acc_rest, q_tile, q_rest, dout_tile, dout_rest, k, v, bias, mask, slope, dbias,
                k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
                row_shift[:, None], row_norm[:, None], row_delta[:, None],
                start, key_count, queries, query_count, offset, left, right, softcap, scale,
                HEAD_DIM, D_MAIN, D_REST, BLOCK_N, BOUNDED=True,
            )  # fmt: skip
    for start in tl.range(inner, tail, BLOCK_N):
        acc, acc_rest = _dq_key_tile(
            acc, acc_rest, q_tile, q_rest, dout_tile, dout_rest, k, v, bias, mask, slope, dbias,
            k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
            row_shift[:, None], row_norm[:, None], row_delta[:, None],
            start, key_count, queries, query_count, offset, left, right, softcap, scale,
            HEAD_DIM, D_MAIN, D_REST, BLOCK_N, BOUNDED=False,
        )  # fmt: skip
    for start in tl.range(tail, end, BLOCK_TAIL):
        acc, acc_rest = _dq_key_tile(
            acc, acc_rest, q_tile, q_rest, dout_tile, dout_rest, k, v, bias, mask, slope, dbias,
            k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
            row_shift[:, None], row_norm[:, None], row_delta[:, None],
            start, key_count, queries, query_count, offset, left, right, softcap, scale,
            HEAD_DIM, D_MAIN, D_REST, BLOCK_TAIL, BOUNDED=True,
        )  # fmt: skip

    # Store.
    store_tile(dq + out_offset, out_stride_n, queries, query_count, acc * scale, acc_rest * scale,
               HEAD_DIM, D_MAIN, D_REST)  # fmt: skip
