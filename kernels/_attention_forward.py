"""The kernel of the forward: one program owns a tile of queries. See attention."""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.kernels._attention_heads import head_moments, load_head
from vitfast.kernels._attention_scores import band_tiles, in_band, make_scores
from vitfast.kernels._attention_tiles import load_rows, load_scores, sequence, store_tile
from vitfast.kernels.quantize import in_8_bits


@triton.jit
def _key_tile(
    acc,  # [BLOCK_M, D_MAIN] running sums of weight * v
    acc_rest,  # [BLOCK_M, D_REST]
    row_shift,  # [BLOCK_M] largest score so far (times unit unless SCALE_FIRST); -inf where none was seen
    row_sum,  # [BLOCK_M] of the weights so far
    q,  # [BLOCK_M, D_MAIN]
    q_rest,  # [BLOCK_M, D_REST]
    k,  # this head's keys and values
    v,
    k_norm,  # see _attention_heads
    rope,
    bias,  # [BLOCK_M or 1, 1] pointers to this head's rows, or None
    mask,
    slope,  # this head's, or None
    k_stride_n,
    v_stride_n,
    bias_stride_k,
    mask_stride_k,
    start,  # first key of this tile
    key_count,
    positions,  # [BLOCK_M, 1] of the queries
    left,
    right,
    softcap,
    scale,
    unit,  # what exp2 needs the scores to be multiplied by; positive
    SCALE_FIRST: tl.constexpr,
    RMS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Take one tile of keys into the online softmax."""
    in_tile = tl.arange(0, BLOCK_N)
    count = key_count - start
    first = tl.cast(start, tl.int64)
    k += first * k_stride_n
    v += first * v_stride_n

    tokens = start + in_tile
    moments = head_moments(k, k_stride_n, in_tile, count, k_norm, RMS, HEAD_DIM, D_MAIN, D_REST, BOUNDED)
    k_tile = load_head(k, k_stride_n, in_tile, count, tokens, moments, k_norm, rope, INTERLEAVED, 0, D_MAIN, HEAD_DIM,
                       BOUNDED)  # fmt: skip
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
    if D_REST > 0:
        k_tile = load_head(k, k_stride_n, in_tile, count, tokens, moments, k_norm, rope, INTERLEAVED, D_MAIN, D_REST,
                           HEAD_DIM, BOUNDED)  # fmt: skip
        scores = tl.dot(q_rest, tl.trans(k_tile), scores, input_precision="ieee")

    keys = (start + in_tile)[None, :]
    bias_tile = None
    if bias is not None:
        bias_tile = load_scores(bias, bias_stride_k, start, in_tile, count, BOUNDED)
    if SCALE_FIRST:
        scores = make_scores(scores, scale, softcap, bias_tile, slope, keys, positions)
    if mask is not None:
        seen = load_scores(mask, mask_stride_k, start, in_tile, count, BOUNDED)
        scores = tl.where(seen != 0, scores, float("-inf"))
    if BOUNDED:
        inside = in_band((in_tile < count)[None, :], keys, positions, left, right)
        scores = tl.where(inside, scores, float("-inf"))

    tile_max = tl.max(scores, 1)
    if not SCALE_FIRST:
        tile_max *= unit
    new_shift = tl.maximum(row_shift, tile_max)
    shift = tl.where(new_shift == float("-inf"), 0.0, new_shift)  # -inf - -inf would be NaN
    if SCALE_FIRST:  # multiplying before subtracting would overflow for a bias of finfo.min
        weights = tl.exp2((scores - shift[:, None]) * unit)
        decay = tl.exp2((row_shift - shift) * unit)
    else:  # one fma per score; its shift is rounded once, so that a row's weights share that error
        weights = tl.exp2(tl.fma(scores, unit, -shift[:, None]))
        decay = tl.exp2(row_shift - shift)
    row_sum = row_sum * decay + tl.sum(weights, 1)

    v_tile = load_rows(v, v_stride_n, in_tile, count, 0, D_MAIN, HEAD_DIM, BOUNDED)
    weights = weights.to(v_tile.dtype)
    acc = tl.dot(weights, v_tile, acc * decay[:, None], input_precision="ieee")
    if D_REST > 0:
        v_tile = load_rows(v, v_stride_n, in_tile, count, D_MAIN, D_REST, HEAD_DIM, BOUNDED)
        acc_rest = tl.dot(weights, v_tile, acc_rest * decay[:, None], input_precision="ieee")
    return acc, acc_rest, new_shift, row_sum


@triton.jit(do_not_specialize=["heads", "query_rows", "key_rows", "longest", "offset", "left", "right", "prefix"])
def attention_forward_kernel(
    out,  # [B, Nq, H, D] contiguous
    out_scale,  # [B, Nq, H] fp32 if out is in 8 bits, else None
    max_out,  # [B, H, Nq] fp32: the largest score of each query, or None; with SCALE_FIRST only
    sum_out,  # [B, H, Nq] fp32: sum of exp(score - largest), or None
    q,  # [B, Nq, H, D]
    k,  # [B, Nk, H / GROUP, D]
    v,  # [B, Nk, H / GROUP, D]
    bias,  # [B, H, Nq, Nk], any strides, or None
    mask,  # [B, H, Nq, Nk] bool, any strides, or None
    slopes,  # [B, H] fp32, or None
    cu_queries,  # [sequences + 1], and B is 1; or None
    cu_keys,
    cos,  # [B, H, Nq - prefix, D], any strides, or None
    sin,  # the same strides
    q_weight,  # [D], or None: the norms of q and k
    q_bias,
    k_weight,
    k_bias,
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
    table_stride_b,  # of cos and sin
    table_stride_h,
    table_stride_n,
    heads,
    query_rows,  # Nq, Nk
    key_rows,
    longest,  # queries of a sequence; Nq where none are packed
    offset,  # position of the first query; where sequences are packed, keys less queries
    left,  # a query sees the keys from position - left to position + right; None: no limit
    right,
    softcap,  # or None
    prefix,  # tokens that are not rotated
    norm_eps,
    scale,
    unit,  # log2(e), times the scale unless SCALE_FIRST; positive
    SCALE_FIRST: tl.constexpr,  # make whole scores before maxima are taken: see the launcher
    BIAS_PER_QUERY: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    RMS: tl.constexpr,  # the norms are RMSNorms
    INTERLEAVED: tl.constexpr,  # the channels that are rotated together are neighbours
    GROUP: tl.constexpr,  # query heads that share a key head
    VECTOR: tl.constexpr,  # elements by which every stride and pointer of q, k, v, out, cos, sin is aligned
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # keys of the last tile; BLOCK_N with a band or packed sequences
):
    # Locate: query tiles of one head are neighbours, so that they share its keys in L2.
    tiles = tl.cdiv(longest, BLOCK_M)
    program = tl.program_id(0)
    tile = program % tiles
    head = ((program // tiles) % heads).to(tl.int64)
    key_head = head // GROUP
    batch = ((program // tiles) // heads).to(tl.int64)
    entry = batch if cu_queries is None else batch * 0  # packed sequences are one entry of the batch
    first_query, query_count = sequence(cu_queries, batch, query_rows)
    first_key, key_count = sequence(cu_keys, batch, key_rows)
    if cu_queries is not None:
        if tile * BLOCK_M >= query_count:
            return
        offset = key_count - query_count
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_offset = entry * q_stride_b + first_query * q_stride_n + head * q_stride_h
    k_offset = entry * k_stride_b + first_key * k_stride_n + key_head * k_stride_h
    v_offset = entry * v_stride_b + first_key * v_stride_n + key_head * v_stride_h
    out_offset = ((entry * query_rows + first_query) * heads + head) * HEAD_DIM
    out_stride_n = heads * HEAD_DIM
    if VECTOR > 1:  # head strides such as 72 are no multiple of 16, the only alignment Triton infers
        q_offset, q_stride_n = tl.multiple_of(q_offset, VECTOR), tl.multiple_of(q_stride_n, VECTOR)
        k_offset, k_stride_n = tl.multiple_of(k_offset, VECTOR), tl.multiple_of(k_stride_n, VECTOR)
        v_offset, v_stride_n = tl.multiple_of(v_offset, VECTOR), tl.multiple_of(v_stride_n, VECTOR)
        out_offset, out_stride_n = tl.multiple_of(out_offset, VECTOR), tl.multiple_of(out_stride_n, VECTOR)
    q, k, v, out = q + q_offset, k + k_offset, v + v_offset, out + out_offset
    # Rows past the end repeat the last one: no mask in the loop, and what they give is not stored.
    bias_rows = tl.minimum(queries, query_count - 1).to(tl.int64)[:, None]
    if bias is not None:
        bias += batch * bias_stride_b + head * bias_stride_h
        bias += bias_rows * bias_stride_q if BIAS_PER_QUERY else tl.zeros([1, 1], tl.int64)
    if mask is not None:
        mask += batch * mask_stride_b + head * mask_stride_h
        mask += bias_rows * mask_stride_q if MASK_PER_QUERY else tl.zeros([1, 1], tl.int64)

    positions = (queries + offset)[:, None]
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + batch * slopes_stride_b + head)

    if cos is not None:
        table_offset = batch * table_stride_b + head * table_stride_h
        if VECTOR > 1:
            table_offset = tl.multiple_of(table_offset, VECTOR)
            table_stride_n = tl.multiple_of(table_stride_n, VECTOR)
        cos, sin = cos + table_offset, sin + table_offset
    rope = (cos, sin, table_stride_n, prefix)
    q_norm, k_norm = (q_weight, q_bias, norm_eps), (k_weight, k_bias, norm_eps)

    # Load.
    moments = head_moments(q, q_stride_n, queries, query_count, q_norm, RMS, HEAD_DIM, D_MAIN, D_REST, True)
    q_tile = load_head(q, q_stride_n, queries, query_count, queries, moments, q_norm, rope, INTERLEAVED, 0, D_MAIN,
                       HEAD_DIM, True)  # fmt: skip
    q_rest = q_tile  # where there is none: Triton has no None tile
    if D_REST > 0:
        q_rest = load_head(q, q_stride_n, queries, query_count, queries, moments, q_norm, rope, INTERLEAVED, D_MAIN,
                           D_REST, HEAD_DIM, True)  # fmt: skip

    # Compute.
    acc = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, D_REST if D_REST > 0 else 1], tl.float32)
    row_shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    begin, inner, tail, end = band_tiles(tile * BLOCK_M + offset, left, right, key_count, BLOCK_M, BLOCK_N)
    if left is not None:
        for start in tl.range(begin, inner, BLOCK_N):
            acc, acc_rest, row_shift, row_sum = _key_tile(
                acc, acc_rest, row_shift, row_sum, q_tile, q_rest, k, v, k_norm, rope, bias, mask, slope,
                k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
                start, key_count, positions, left, right, softcap, scale, unit, SCALE_FIRST,
                RMS, INTERLEAVED, HEAD_DIM, D_MAIN, D_REST, BLOCK_N, BOUNDED=True,
            )  # fmt: skip
    for start in tl.range(inner, tail, BLOCK_N):
        acc, acc_rest, row_shift, row_sum = _key_tile(
            acc, acc_rest, row_shift, row_sum, q_tile, q_rest, k, v, k_norm, rope, bias, mask, slope,
            k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
            start, key_count, positions, left, right, softcap, scale, unit, SCALE_FIRST,
            RMS, INTERLEAVED, HEAD_DIM, D_MAIN, D_REST, BLOCK_N, BOUNDED=False,
        )  # fmt: skip
    for start in tl.range(tail, end, BLOCK_TAIL):
        acc, acc_rest, row_shift, row_sum = _key_tile(
            acc, acc_rest, row_shift, row_sum, q_tile, q_rest, k, v, k_norm, rope, bias, mask, slope,
            k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
            start, key_count, positions, left, right, softcap, scale, unit, SCALE_FIRST,
            RMS, INTERLEAVED, HEAD_DIM, D_MAIN, D_REST, BLOCK_TAIL, BOUNDED=True,
        )  # fmt: skip

    # Store. A query that saw no key has sum 0 and gives zeros.
    norm = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    value, value_rest = acc * norm[:, None], acc_rest * norm[:, None]
    if out_scale is not None:
        tl.static_assert(D_MAIN == HEAD_DIM, "all of a head must lie in one chunk, whose largest value is its scale")
        value, head_scale = in_8_bits(value, out.dtype.element_ty)
        row = (entry * query_rows + first_query + queries) * heads + head
        tl.store(out_scale + row, head_scale, mask=queries < query_count)
    store_tile(out, out_stride_n, queries, query_count, value, value_rest, HEAD_DIM, D_MAIN, D_REST)
    if max_out is not None:
        row = (entry * heads + head) * query_rows + first_query + queries
        tl.store(max_out + row, row_shift, mask=queries < query_count)
        tl.store(sum_out + row, row_sum, mask=queries < query_count)
