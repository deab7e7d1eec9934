"""The kernel for dk and dv: one program owns a tile of keys. See attention_backward."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.kernels._attention_common import (
    add_product,
    load_scores,
    load_stats,
    load_tile,
    score_product,
    store_tile,
    weights_again,
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
    q_stride_n, dout_stride_n, bias_stride_q, mask_stride_q,
    start,  # first query of this tile
    query_count,
    keys,  # [BLOCK_N] indices
    scale,
    HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BOUNDED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to dk and dv. Tiles of scores are [keys, queries] here."""
    in_tile = tl.arange(0, BLOCK_M)
    left = query_count - start
    first = tl.cast(start, tl.int64)
    q_tile, q_rest = load_tile(q + first * q_stride_n, q_stride_n, in_tile, left, HEAD_DIM, D_MAIN, D_REST, BOUNDED)
    dout_tile, dout_rest = load_tile(
        dout + first * dout_stride_n, dout_stride_n, in_tile, left, HEAD_DIM, D_MAIN, D_REST, BOUNDED
    )
    bias_tile = None
    if bias is not None:
        bias_tile = load_scores(bias, bias_stride_q, start, in_tile, left, BOUNDED)
    seen = None
    if mask is not None:
        seen = load_scores(mask, mask_stride_q, start, in_tile, left, BOUNDED)
    tile_max, tile_norm = load_stats(row_max + first, row_sum + first, in_tile, left)
    tile_delta = tl.load(delta + first + in_tile, mask=in_tile < left, other=0.0)

    weights = weights_again(
        score_product(k, k_rest, q_tile, q_rest, D_REST),
        scale,
        bias_tile,
        seen,
        tile_max[None, :],
        tile_norm[None, :],
    )
    if CAUSAL:
        weights = tl.where(keys[:, None] <= (start + in_tile)[None, :], weights, 0.0)
    dv, dv_rest = add_product(dv, dv_rest, weights, dout_tile, dout_rest, D_REST)
    dscores = weights * (score_product(v, v_rest, dout_tile, dout_rest, D_REST) - tile_delta[None, :])
    dk, dk_rest = add_product(dk, dk_rest, dscores, q_tile, q_rest, D_REST)
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=["heads", "query_count", "key_count"])
def attention_dkdv_kernel(
    dk,  # [B, Nk, H, D] contiguous
    dv,  # [B, Nk, H, D] contiguous
    dout,  # [B, Nq, H, D]
    delta,  # [B, H, Nq] fp32
    row_max,  # [B, H, Nq] fp32
    row_sum,  # [B, H, Nq] fp32
    q,  # [B, Nq, H, D]
    k,  # [B, Nk, H, D]
    v,  # [B, Nk, H, D]
    bias,  # [B, H, Nq, Nk], any strides, or None
    mask,  # [B, H, Nq, Nk] bool, any strides, or None
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
    heads,
    query_count,
    key_count,
    scale,
    CAUSAL: tl.constexpr,
    VECTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # queries per tile where masks are needed
):
    # Locate: key tiles of one head are neighbours, so that they share its queries in L2.
    tiles = tl.cdiv(key_count, BLOCK_N)
    program = tl.program_id(0)
    tile = program % tiles
    head = ((program // tiles) % heads).to(tl.int64)
    batch = ((program // tiles) // heads).to(tl.int64)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dout_offset = batch * dout_stride_b + head * dout_stride_h
    q_offset = batch * q_stride_b + head * q_stride_h
    k_offset = batch * k_stride_b + head * k_stride_h
    v_offset = batch * v_stride_b + head * v_stride_h
    out_offset = (batch * key_count * heads + head) * HEAD_DIM
    out_stride_n = heads * HEAD_DIM
    if VECTOR > 1:
        dout_offset, dout_stride_n = tl.multiple_of(dout_offset, VECTOR), tl.multiple_of(dout_stride_n, VECTOR)
        q_offset, q_stride_n = tl.multiple_of(q_offset, VECTOR), tl.multiple_of(q_stride_n, VECTOR)
        k_offset, k_stride_n = tl.multiple_of(k_offset, VECTOR), tl.multiple_of(k_stride_n, VECTOR)
        v_offset, v_stride_n = tl.multiple_of(v_offset, VECTOR), tl.multiple_of(v_stride_n, VECTOR)
        out_offset, out_stride_n = tl.multiple_of(out_offset, VECTOR), tl.multiple_of(out_stride_n, VECTOR)
    dout, q, k, v = dout + dout_offset, q + q_offset, k + k_offset, v + v_offset
    row = (batch * heads + head) * query_count
    # Keys past the end repeat the last one's bias and mask; what they give is not stored.
    columns = tl.minimum(keys, key_count - 1).to(tl.int64)[:, None]
    if bias is not None:
        bias += batch * bias_stride_b + head * bias_stride_h + columns * bias_stride_k
    if mask is not None:
        mask += batch * mask_stride_b + head * mask_stride_h + columns * mask_stride_k

    # Load.
    k_tile, k_rest = load_tile(k, k_stride_n, keys, key_count, HEAD_DIM, D_MAIN, D_REST, True)
    v_tile, v_rest = load_tile(v, v_stride_n, keys, key_count, HEAD_DIM, D_MAIN, D_REST, True)

    # Compute.
    dk_acc = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dk_rest = tl.zeros([BLOCK_N, D_REST if D_REST > 0 else 1], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dv_rest = tl.zeros([BLOCK_N, D_REST if D_REST > 0 else 1], tl.float32)
    whole = query_count // BLOCK_M * BLOCK_M
    if CAUSAL:  # queries before the first key see none of these; the rest takes the masked form
        whole = tl.minimum(tile * BLOCK_N, query_count)
    else:
        for start in tl.range(0, whole, BLOCK_M):
            dk_acc, dk_rest, dv_acc, dv_rest = _dkdv_query_tile(
                dk_acc, dk_rest, dv_acc, dv_rest, k_tile, k_rest, v_tile, v_rest, q, dout,
                row_max + row, row_sum + row, delta + row, bias, mask,
                q_stride_n, dout_stride_n, bias_stride_q, mask_stride_q, start, query_count, keys, scale,
                HEAD_DIM, D_MAIN, D_REST, BLOCK_M, BOUNDED=False, CAUSAL=False,
            )  # fmt: skip
    for start in tl.range(whole, query_count, BLOCK_TAIL):
        dk_acc, dk_rest, dv_acc, dv_rest = _dkdv_query_tile(
            dk_acc, dk_rest, dv_acc, dv_rest, k_tile, k_rest, v_tile, v_rest, q, dout,
            row_max + row, row_sum + row, delta + row, bias, mask,
            q_stride_n, dout_stride_n, bias_stride_q, mask_stride_q, start, query_count, keys, scale,
            HEAD_DIM, D_MAIN, D_REST, BLOCK_TAIL, BOUNDED=True, CAUSAL=CAUSAL,
        )  # fmt: skip

    # Store.
    store_tile(dk + out_offset, out_stride_n, keys, key_count, dk_acc * scale, dk_rest * scale,
               HEAD_DIM, D_MAIN, D_REST)  # fmt: skip
    store_tile(dv + out_offset, out_stride_n, keys, key_count, dv_acc, dv_rest, HEAD_DIM, D_MAIN, D_REST)
