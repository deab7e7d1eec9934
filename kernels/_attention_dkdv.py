"""The kernel for dk and dv: one program owns a tile of keys. See attention_backward."""

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
def _dkdv_query_tile(
    dk, dk_rest,  # [BLOCK_N, D_MAIN], [BLOCK_N, D_REST]: sums so far, of dk / scale
    dv, dv_rest,
    k, k_rest,
    v, v_rest,
    q, dout,  # this head's
    row_max, row_sum, delta,  # this head's rows
    bias, mask,  # [BLOCK_N, 1] pointers to this head's columns, or None
    slope,  # this head's, or None
    q_stride_n, dout_stride_n, bias_stride_q, mask_stride_q,
    start,  # first query of this tile
    query_count,
    keys,  # [BLOCK_N] indices
    offset, left, right, softcap, scale,
    HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to dk and dv. Tiles of scores are [keys, queries] here."""
    in_tile = tl.arange(0, BLOCK_M)
    count = query_count - start
    first = tl.cast(start, tl.int64)
    q_tile, q_rest = load_tile(q + first * q_stride_n, q_stride_n, in_tile, count, HEAD_DIM, D_MAIN, D_REST, BOUNDED)
    dout_tile, dout_rest = load_tile(
        dout + first * dout_stride_n, dout_stride_n, in_tile, count, HEAD_DIM, D_MAIN, D_REST, BOUNDED
    )
    bias_tile = None
    if bias is not None:
        bias_tile = load_scores(bias, bias_stride_q, start, in_tile, count, BOUNDED)
    seen = None
    if mask is not None:
        seen = load_scores(mask, mask_stride_q, start, in_tile, count, BOUNDED)
    tile_max, tile_norm = load_stats(row_max + first, row_sum + first, in_tile, count)
    tile_delta = tl.load(delta + first + in_tile, mask=in_tile < count, other=0.0)

    keys, positions = keys[:, None], (start + in_tile + offset)[None, :]
    products = score_product(k, k_rest, q_tile, q_rest, D_REST)
    weights = weights_again(
        products, scale, softcap, bias_tile, slope, keys, positions, seen, tile_max[None, :], tile_norm[None, :]
    )
    if BOUNDED and (left is not None or right is not None):
        weights = tl.where(in_band((in_tile < count)[None, :], keys, positions, left, right), weights, 0.0)
    dv, dv_rest = add_product(dv, dv_rest, weights, dout_tile, dout_rest, D_REST)
    dscores = weights * (score_product(v, v_rest, dout_tile, dout_rest, D_REST) - tile_delta[None, :])
    if softcap is not None:
        dscores *= cap_slope(products, scale, softcap)
    dk, dk_rest = add_product(dk, dk_rest, dscores, q_tile, q_rest, D_REST)
    return dk, dk_rest, dv, dv_rest


@triton.jit
def _dkdv_head(
    dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest,  # as above
    q, dout,  # of head 0, as all that follow
    row_max, row_sum, delta,
    bias, mask,
    slopes,
    q_stride_n, q_stride_h, dout_stride_n, dout_stride_h, bias_stride_h, bias_stride_q, mask_stride_h, mask_stride_q,
    head,
    first_key,  # of the tile
    query_rows, query_count, keys, offset, left, right, softcap, scale,
    VECTOR: tl.constexpr, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Add all queries of one head."""
    q_offset, dout_offset = head * q_stride_h, head * dout_stride_h
    if VECTOR > 1:
        q_offset, dout_offset = tl.multiple_of(q_offset, VECTOR), tl.multiple_of(dout_offset, VECTOR)
    q, dout = q + q_offset, dout + dout_offset
    row_max, row_sum, delta = row_max + head * query_rows, row_sum + head * query_rows, delta + head * query_rows
    if bias is not None:
        bias += head * bias_stride_h
    if mask is not None:
        mask += head * mask_stride_h
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head)
    # A key is seen by the queries from its index - offset - right to its index - offset + left.
    begin, inner, tail, end = band_tiles(first_key - offset, right, left, query_count, BLOCK_N, BLOCK_M)
    if right is not None:
        for start in tl.range(begin, inner, BLOCK_M):
            dk, dk_rest, dv, dv_rest = _dkdv_query_tile(
                dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q, dout, row_max, row_sum, delta, bias, mask, slope,
                q_stride_n, dout_stride_n, bias_stride_q, mask_stride_q, start, query_count, keys,
                offset, left, right, softcap, scale, HEAD_DIM, D_MAIN, D_REST, BLOCK_M, BOUNDED=True,
            )  # fmt: skip
    for start in tl.range(inner, tail, BLOCK_M):
        dk, dk_rest, dv, dv_rest = _dkdv_query_tile(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q, dout, row_max, row_sum, delta, bias, mask, slope,
            q_stride_n, dout_stride_n, bias_stride_q, mask_stride_q, start, query_count, keys,
            offset, left, right, softcap, scale, HEAD_DIM, D_MAIN, D_REST, BLOCK_M, BOUNDED=False,
        )  # fmt: skip
    for start in tl.range(tail, end, BLOCK_TAIL):
        dk, dk_rest, dv, dv_rest = _dkdv_query_tile(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q, dout, row_max, row_sum, delta, bias, mask, slope,
            q_stride_n, dout_stride_n, bias_stride_q, mask_stride_q, start, query_count, keys,
            offset, left, right, softcap, scale, HEAD_DIM, D_MAIN, D_REST, BLOCK_TAIL, BOUNDED=True,
        )  # fmt: skip
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=["heads", "query_rows", "key_rows", "longest", "offset", "left", "right"])
def attention_dkdv_kernel(
    dk,  # [B, Nk, H / GROUP, D] contiguous
    dv,  # [B, Nk, H / GROUP, D] contiguous
    dout,  # [B, Nq, H, D]
    delta,  # [B, H, Nq] fp32
    row_max,  # [B, H, Nq] fp32
    row_sum,  # [B, H, Nq] fp32
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
    heads,  # of the keys
    query_rows,  # Nq, Nk
    key_rows,
    longest,  # keys of a sequence; Nk where none are packed
    offset,  # this and the next four as in the forward
    left,
    right,
    softcap,
    scale,
    GROUP: tl.constexpr,  # query heads that share a key head
    VECTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # queries of the last tile; BLOCK_M with a band or packed sequences
):
    # Locate: key tiles of one head are neighbours, so that they share its queries in L2.
    tiles = tl.cdiv(longest, BLOCK_N)
    program = tl.program_id(0)
    tile = program % tiles
    key_head = ((program // tiles) % heads).to(tl.int64)
    batch = ((program // tiles) // heads).to(tl.int64)
    entry = batch if cu_keys is None else batch * 0
    first_query, query_count = sequence(cu_queries, batch, query_rows)
    first_key, key_count = sequence(cu_keys, batch, key_rows)
    if cu_keys is not None:
        if tile * BLOCK_N >= key_count:
            return
        offset = key_count - query_count
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dout_offset = entry * dout_stride_b + first_query * dout_stride_n
    q_offset = entry * q_stride_b + first_query * q_stride_n
    k_offset = entry * k_stride_b + first_key * k_stride_n + key_head * k_stride_h
    v_offset = entry * v_stride_b + first_key * v_stride_n + key_head * v_stride_h
    out_offset = ((entry * key_rows + first_key) * heads + key_head) * HEAD_DIM
    out_stride_n = heads * HEAD_DIM
    if VECTOR > 1:
        dout_offset, dout_stride_n = tl.multiple_of(dout_offset, VECTOR), tl.multiple_of(dout_stride_n, VECTOR)
        q_offset, q_stride_n = tl.multiple_of(q_offset, VECTOR), tl.multiple_of(q_stride_n, VECTOR)
        k_offset, k_stride_n = tl.multiple_of(k_offset, VECTOR), tl.multiple_of(k_stride_n, VECTOR)
        v_offset, v_stride_n = tl.multiple_of(v_offset, VECTOR), tl.multiple_of(v_stride_n, VECTOR)
        out_offset, out_stride_n = tl.multiple_of(out_offset, VECTOR), tl.multiple_of(out_stride_n, VECTOR)
    dout, q, k, v = dout + dout_offset, q + q_offset, k + k_offset, v + v_offset
    row = entry * heads * GROUP * query_rows + first_query
    row_max, row_sum, delta = row_max + row, row_sum + row, delta + row
    # Keys past the end repeat the last one's bias and mask; what they give is not stored.
    columns = tl.minimum(keys, key_count - 1).to(tl.int64)[:, None]
    if bias is not None:
        bias += batch * bias_stride_b + columns * bias_stride_k
    if mask is not None:
        mask += batch * mask_stride_b + columns * mask_stride_k
    if slopes is not None:
        slopes += batch * slopes_stride_b

    # Load.
    k_tile, k_rest = load_tile(k, k_stride_n, keys, key_count, HEAD_DIM, D_MAIN, D_REST, True)
    v_tile, v_rest = load_tile(v, v_stride_n, keys, key_count, HEAD_DIM, D_MAIN, D_REST, True)

    # Compute.
    dk_acc = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dk_rest = tl.zeros([BLOCK_N, D_REST if D_REST > 0 else 1], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dv_rest = tl.zeros([BLOCK_N, D_REST if D_REST > 0 else 1], tl.float32)
    for member in tl.range(0, GROUP):
        dk_acc, dk_rest, dv_acc, dv_rest = _dkdv_head(
            dk_acc, dk_rest, dv_acc, dv_rest, k_tile, k_rest, v_tile, v_rest, q, dout,
            row_max, row_sum, delta, bias, mask, slopes,
            q_stride_n, q_stride_h, dout_stride_n, dout_stride_h,
            bias_stride_h, bias_stride_q, mask_stride_h, mask_stride_q,
            key_head * GROUP + member, tile * BLOCK_N, query_rows, query_count, keys,
            offset, left, right, softcap, scale, VECTOR, HEAD_DIM, D_MAIN, D_REST, BLOCK_N, BLOCK_M, BLOCK_TAIL,
        )  # fmt: skip

    # Store.
    store_tile(dk + out_offset, out_stride_n, keys, key_count, dk_acc * scale, dk_rest * scale,
               HEAD_DIM, D_MAIN, D_REST)  # fmt: skip
    store_tile(dv + out_offset, out_stride_n, keys, key_count, dv_acc, dv_rest, HEAD_DIM, D_MAIN, D_REST)
