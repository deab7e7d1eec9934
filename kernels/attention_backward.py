"""Gradients of attention: dq, dk, dv and, on request, that of the additive bias.

    S = q kᵀ * scale + bias        P = exp(S - max) / sum      out = P v
    dv = Pᵀ dout                   dS = P * (dout vᵀ - delta)  delta = rowsum(dout * out)
    dq = dS k * scale              dk = dSᵀ q * scale          dbias = dS, summed over broadcast axes

    q, out, dout [B, Nq, H, D], k, v [B, Nk, H, D]  ->  dq, dk, dv likewise, contiguous;
    fp32, fp16 or bf16, fp32 accumulation

Nothing of size [Nq, Nk] is read or kept: P is made again, tile by tile, from the maximum and the
sum of each row that the forward saved (Dao et al. 2022). Two kernels, and no atomics, so that the result never depends
on timing: one program owns a tile of dq and walks over the keys, which also gives delta and, where
the bias wants a gradient, dS; then one program owns a tile of dk and dv and walks over the queries.
P and dS are rounded to the inputs' dtype before their products, as the weights are in the forward.

Bound by the tensor cores: seven products per pair of tiles, where the forward has two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.kernels._parts.attention_arguments import head_chunks, kernel_arguments, last_block, strides, vector
from vitfast.kernels._parts.attention_scores import band_tiles, cap_slope, in_band, load_stats, recompute_weights
from vitfast.kernels._parts.attention_tiles import (
    add_product,
    load_scores,
    load_tile,
    score_product,
    sequence,
    store_tile,
)
from vitfast.kernels._parts.launch import (
    DTYPES,
    Config,
    capability,
    check_contiguous,
    check_device,
    check_last_contiguous,
    on_its_device,
)

__all__ = ["CAPABILITIES", "CONFIGS", "attention_backward", "pick_config"]


@dataclass(frozen=True)
class BackwardConfig(Config):
    """A config of one of the two kernels, and what it can hold without spilling.

    `widest`: kind of call -> the largest padded head dim. Kinds are "half" (fp16 and bf16), "dense" (the same with a
    bias or a mask, or with dS written: for dkdv any bias or mask, for dq one that differs from query to query),
    "shared" (key heads that serve several query heads, in packed sequences or under a band) and "fp32".
    """

    widest: dict[str, int] = field(default_factory=dict)


def _config(
    name: str,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    widest: dict[str, int],
    since: tuple[int, int] = (8, 0),
) -> BackwardConfig:
    return BackwardConfig(name, {"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages, since, widest)


# Chosen as the forward's. dq walks over BLOCK_N, dkdv over BLOCK_M. The first that can run a call is picked.
DQ_CONFIGS = [
    _config("dq-half-128", 64, 32, 4, 2, {"half": 128}),
    _config("dq-half-256", 64, 16, 8, 2, {"half": 256}),
    _config("dq-dense-128", 64, 16, 4, 2, {"dense": 128}),
    _config("dq-dense-256", 64, 16, 8, 2, {"dense": 256}),
    _config("dq-fp32-128", 32, 16, 8, 1, {"fp32": 128}),
    _config("dq-fp32-256", 16, 16, 8, 1, {"fp32": 256}),
]
DKDV_CONFIGS = [
    _config("dkdv-half-80", 32, 64, 4, 2, {"half": 80}),
    _config("dkdv-half-96-sm90", 32, 64, 4, 2, {"half": 96}, (9, 0)),
    _config("dkdv-half-96", 16, 64, 4, 2, {"half": 96}),
    _config("dkdv-half-128-sm90", 16, 64, 4, 2, {"half": 128}, (9, 0)),
    _config("dkdv-half-128", 32, 64, 4, 2, {"half": 128}),
    _config("dkdv-half-256", 16, 64, 8, 2, {"half": 256}),
    _config("dkdv-dense-64", 16, 64, 4, 2, {"dense": 64}),
    _config("dkdv-dense-128", 16, 64, 8, 2, {"dense": 128}),
    _config("dkdv-shared-128", 16, 64, 8, 1, {"shared": 128}),
    _config("dkdv-dense-256", 16, 32, 8, 1, {"dense": 256, "shared": 256}),
    _config("dkdv-fp32-128", 16, 32, 8, 1, {"fp32": 128}),
    _config("dkdv-fp32-256", 16, 16, 8, 1, {"fp32": 256}),
]
CONFIGS = DQ_CONFIGS + DKDV_CONFIGS

CAPABILITIES: dict[str, Any] = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {"head_dim": (1, 256)}}


def pick_config(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    dense: bool,
    device_capability: tuple[int, int],
    irregular: bool = False,
    shared: bool = False,
) -> BackwardConfig:
    """The configuration of "dq" or "dkdv".

    `dense`: it reads or writes tiles of bias, mask or dS, or caps scores or adds ALiBi. `irregular`: a band or packed
    sequences; `shared`: key heads that serve several query heads. Their further loops leave dkdv fewer registers, so
    that it takes smaller tiles: with `irregular` for more than 80 columns, with `shared` always.
    """
    columns = sum(head_chunks(head_dim))
    dense = dense or (kernel == "dkdv" and (shared or (irregular and columns > 80)))
    kind = "fp32" if dtype == torch.float32 else "dense" if dense else "half"
    if kind == "dense" and kernel == "dkdv" and shared and irregular and columns > 64:
        kind = "shared"  # one stage: of the dense tiles two would spill
    return next(
        config
        for config in (DQ_CONFIGS if kernel == "dq" else DKDV_CONFIGS)
        if columns <= config.widest.get(kind, 0) and not config.too_new(device_capability)
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
    weights = recompute_weights(products, scale, softcap, bias_tile, slope, keys, positions, seen, row_max, norm)
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
def _attention_dq_kernel(
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
    dout_strides,  # of axes B, N, H
    q_strides,
    k_strides,
    v_strides,
    bias_strides,  # of axes B, H, Nq, Nk; 0 where it is broadcast
    mask_strides,
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
    dout_stride_b, dout_stride_n, dout_stride_h = dout_strides
    q_stride_b, q_stride_n, q_stride_h = q_strides
    k_stride_b, k_stride_n, k_stride_h = k_strides
    v_stride_b, v_stride_n, v_stride_h = v_strides
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k = bias_strides
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k = mask_strides

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
    for start in tl.range(tail, end, BLOCK_TAIL, num_stages=1):
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
    weights = recompute_weights(
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
    for start in tl.range(tail, end, BLOCK_TAIL, num_stages=1):
        dk, dk_rest, dv, dv_rest = _dkdv_query_tile(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q, dout, row_max, row_sum, delta, bias, mask, slope,
            q_stride_n, dout_stride_n, bias_stride_q, mask_stride_q, start, query_count, keys,
            offset, left, right, softcap, scale, HEAD_DIM, D_MAIN, D_REST, BLOCK_TAIL, BOUNDED=True,
        )  # fmt: skip
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=["heads", "query_rows", "key_rows", "longest", "offset", "left", "right"])
def _attention_dkdv_kernel(
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
    dout_strides,  # of axes B, N, H
    q_strides,
    k_strides,
    v_strides,
    bias_strides,  # of axes B, H, Nq, Nk; 0 where it is broadcast
    mask_strides,
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
    dout_stride_b, dout_stride_n, dout_stride_h = dout_strides
    q_stride_b, q_stride_n, q_stride_h = q_strides
    k_stride_b, k_stride_n, k_stride_h = k_strides
    v_stride_b, v_stride_n, v_stride_h = v_strides
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k = bias_strides
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k = mask_strides

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


@on_its_device
def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    *,
    bias_grad: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `attention` with respect to q, k, v and the bias.

    Args:
        dout: [B, Nq, H, D], the gradient of out; of q's dtype, any strides with a contiguous last axis.
        q, k, v, options: as the forward took them.
        out: [B, Nq, H, D] and stats: [2, B, H, Nq] fp32, as `attention_forward` returned them.
        bias_grad: also give the gradient of the bias. It passes through an fp32 buffer of
            4 * B * H * Nq * Nk bytes, whatever the bias is broadcast along.

    Returns:
        dq [B, Nq, H, D], dk, dv [B, Nk, Hk, D], contiguous, in q's dtype; dbias of the bias's shape and
        dtype, or None. The same bits on every run. A query that may see no key contributes nothing.

    Raises:
        ValueError: if a stride or device does not fit.
    """
    op = "attention_backward"
    arguments = kernel_arguments(op, q, k, v, **options)
    bias = arguments["bias"]
    check_last_contiguous(op, dout=dout)
    check_contiguous(op, out=out, stats=stats)
    check_device(op, q=q, dout=dout, out=out, stats=stats)
    batch, query_count, heads, head_dim = q.shape
    key_count, key_heads = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    delta = torch.empty((batch, heads, query_count), dtype=torch.float32, device=q.device)
    banded = arguments["left"] is not None or arguments["right"] is not None
    packed = arguments["cu_queries"] is not None
    dscores = None
    if bias_grad:  # tiles outside a band are never visited
        allocate = torch.zeros if banded else torch.empty
        dscores = allocate((batch, heads, query_count, key_count), dtype=torch.float32, device=q.device)
    if packed:
        batch = len(arguments["cu_queries"]) - 1
        query_count, key_count = options["max_queries"], options["max_keys"]

    chip = capability(q.device)
    scores_change = arguments["softcap"] is not None or arguments["slopes"] is not None
    dense = bias is not None or arguments["mask"] is not None or scores_change
    arguments |= {
        "dout": dout,
        "dout_strides": strides(dout)[:3],
        "delta": delta,
        "row_max": stats[0],
        "row_sum": stats[1],
        "VECTOR": vector(head_dim, dout, q, k, v, out),
    }
    if dq.numel():
        bias_per_query, mask_per_query = (arguments[f"{name}_strides"][2] != 0 for name in ("bias", "mask"))
        per_query = bias_per_query or mask_per_query or bias_grad or scores_change
        config = pick_config("dq", head_dim, q.dtype, per_query, chip)
        _attention_dq_kernel[(triton.cdiv(query_count, config.blocks["BLOCK_M"]) * batch * heads,)](
            dq=dq,
            dbias=dscores,
            out=out,
            **arguments,
            heads=heads,
            longest=query_count,
            BIAS_PER_QUERY=bias_per_query,
            MASK_PER_QUERY=mask_per_query,
            BLOCK_TAIL=last_block(config.blocks["BLOCK_N"], key_count, arguments),
            **config.options(),
        )
    if dk.numel():
        config = pick_config(
            "dkdv", head_dim, q.dtype, dense, chip, irregular=banded or packed, shared=heads != key_heads
        )
        _attention_dkdv_kernel[(triton.cdiv(key_count, config.blocks["BLOCK_N"]) * batch * key_heads,)](
            dk=dk,
            dv=dv,
            **arguments,
            heads=key_heads,
            longest=key_count,
            BLOCK_TAIL=last_block(config.blocks["BLOCK_M"], query_count, arguments),
            **config.options(),
        )
    if dscores is None or bias is None:
        return dq, dk, dv, None
    return dq, dk, dv, dscores.sum_to_size(bias.shape).to(bias.dtype)
