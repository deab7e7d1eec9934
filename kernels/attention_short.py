"""softmax(q kᵀ * scale) v over at most 320 keys: all of them at once, an exact softmax, nothing rescaled.

    q [B, Nq, H, D], k, v [B, Nk, H, D]  ->  out [B, Nq, H, D];  fp16 or bf16, fp32 accumulation, D = 32, 64 or 128
    or in 8 bits with a scale [B, Nq, H], as in attention.py

The general kernel (attention.py) walks over keys and corrects its sums whenever a larger score turns up.
The sequences of a Vision Transformer are short enough to be held whole: the key axis is cut into up to three
powers of two that leave little over (197 = 128 + 64 + 5 of 16), their scores stay in registers, and each
score costs one fma and one exp2. No bias, no mask, no causality: those go to the general kernel.

A program takes one tile of queries of one head, and other programs read the head's keys again, from L2. With
WALK it takes all of the head's queries, and holds keys and values in shared memory meanwhile.

Bound by bytes at N = 197, then by the exponentials and the tensor cores.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from vitfast.kernels._parts.attention_arguments import LOG2E, Problem, strides, vector
from vitfast.kernels._parts.attention_tiles import load_rows
from vitfast.kernels._parts.eight_bits import in_8_bits
from vitfast.kernels._parts.launch import Config

HEAD_DIMS = (32, 64, 128)

CONFIGS = [
    Config("short", {"BLOCK_M": 64, "WALK": 0}, num_warps=4, num_stages=1),
    Config("short-8-warps", {"BLOCK_M": 64, "WALK": 0}, num_warps=8, num_stages=1, min_capability=(10, 0)),
    Config("short-walk", {"BLOCK_M": 64, "WALK": 1}, num_warps=4, num_stages=1),
    Config("short-walk-32", {"BLOCK_M": 32, "WALK": 1}, num_warps=4, num_stages=1),
]
MOST_KEYS = {
    "short": {(8, 0): {32: 208, 64: 208, 128: 64}, (9, 0): {32: 272, 64: 272, 128: 192}, (10, 0): {32: 320, 64: 208}},
    "short-8-warps": {(10, 0): {32: 320, 64: 320, 128: 64}},
    "short-walk": {
        (8, 0): {32: 208, 64: 208, 128: 64},
        (9, 0): {32: 272, 64: 272, 128: 64},
        (10, 0): {32: 208, 64: 208},
    },
    "short-walk-32": {(8, 0): {64: 320}, (9, 0): {}},
}
"""Config -> compute capability and up -> head dim -> keys up to which the compiler spills no registers, found by
compiling for sm_80, sm_90 and sm_100 (tests/test_inspect.py). None of the configs has been timed."""
MOST_KEYS_IN_8_BITS = {"short": 208, "short-walk": 208}
"""Config -> the same at head dim 64 where the output is in 8 bits, if it is less: found likewise."""


def key_tiles(key_count: int) -> tuple[int, int, int]:
    """Cut the key axis into up to three powers of two, largest first, with as little left over as can be."""
    choices = itertools.combinations_with_replacement((128, 64, 32, 16, 0), 3)
    able = (tiles for tiles in choices if sum(tiles) >= key_count and tiles[0])
    return min(able, key=lambda tiles: (sum(tiles), tiles.count(0) * -1))


def why_not(config: Config, problem: Problem) -> list[str]:
    """Every reason why a config here cannot run a problem of `attention`; empty if it can."""
    reasons = []
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {problem.dtype} is not fp16 or bf16")
    head_dim, keys = problem.head_dim, problem.keys
    by_chip = MOST_KEYS[config.name]
    chips = [chip for chip in by_chip if chip <= problem.capability]
    most = by_chip[max(chips)].get(head_dim, 0) if chips else 0
    if problem.in_8_bits and head_dim == 64:
        most = min(most, MOST_KEYS_IN_8_BITS.get(config.name, most))
    if not 1 <= keys <= most:
        reasons.append(f"{keys} keys of head dim {head_dim} are outside 1..{most}" + ", in 8 bits" * problem.in_8_bits)
    if problem.given:
        reasons.append(f"it has no {', no '.join(problem.given)}")
    if not problem.scale > torch.finfo(torch.float32).tiny:
        reasons.append(f"the scale must be positive, got {problem.scale}")
    return reasons


@triton.jit
def _scores(q, k, left, SIZE: tl.constexpr, BOUNDED: tl.constexpr):
    """q kᵀ [BLOCK_M, SIZE]; -inf beyond the first `left` keys."""
    scores = tl.dot(q, tl.trans(k))
    if BOUNDED:
        scores = tl.where((tl.arange(0, SIZE) < left)[None, :], scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=["heads", "query_count", "key_count"])
def _attention_short_kernel(
    out,  # [B, Nq, H, D] contiguous
    out_scale,  # [B, Nq, H] fp32 if out is in 8 bits, else None
    q,  # [B, Nq, H, D]
    k,  # [B, Nk, H, D]
    v,  # [B, Nk, H, D]
    q_strides,  # of axes B, N, H
    k_strides,
    v_strides,
    heads,
    query_count,
    key_count,
    scale_log2,  # scale * log2(e); positive
    VECTOR: tl.constexpr,  # elements by which every stride and pointer is aligned
    HEAD_DIM: tl.constexpr,
    KEYS_0: tl.constexpr,  # keys of the three tiles; all but the last one used are full
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WALK: tl.constexpr,
):
    q_stride_b, q_stride_n, q_stride_h = q_strides
    k_stride_b, k_stride_n, k_stride_h = k_strides
    v_stride_b, v_stride_n, v_stride_h = v_strides

    # Locate: query tiles of one head are neighbours, so that they share its keys in L2.
    tiles = 1 if WALK else tl.cdiv(query_count, BLOCK_M)
    program = tl.program_id(0)
    head = ((program // tiles) % heads).to(tl.int64)
    batch = ((program // tiles) // heads).to(tl.int64)
    q_offset = batch * q_stride_b + head * q_stride_h
    k_offset = batch * k_stride_b + head * k_stride_h
    v_offset = batch * v_stride_b + head * v_stride_h
    if VECTOR > 1:
        q_offset, q_stride_n = tl.multiple_of(q_offset, VECTOR), tl.multiple_of(q_stride_n, VECTOR)
        k_offset, k_stride_n = tl.multiple_of(k_offset, VECTOR), tl.multiple_of(k_stride_n, VECTOR)
        v_offset, v_stride_n = tl.multiple_of(v_offset, VECTOR), tl.multiple_of(v_stride_n, VECTOR)
    q, k, v = q + q_offset, k + k_offset, v + v_offset
    out += (batch * query_count * heads + head) * HEAD_DIM
    if out_scale is not None:
        out_scale += batch * query_count * heads + head

    # Load: the head's keys and values.
    keys_0 = tl.arange(0, KEYS_0)
    k_0 = load_rows(k, k_stride_n, keys_0, key_count, 0, HEAD_DIM, HEAD_DIM, KEYS_1 == 0)
    v_0 = load_rows(v, v_stride_n, keys_0, key_count, 0, HEAD_DIM, HEAD_DIM, KEYS_1 == 0)
    if KEYS_1 > 0:
        keys_1 = KEYS_0 + tl.arange(0, KEYS_1)
        k_1 = load_rows(k, k_stride_n, keys_1, key_count, 0, HEAD_DIM, HEAD_DIM, KEYS_2 == 0)
        v_1 = load_rows(v, v_stride_n, keys_1, key_count, 0, HEAD_DIM, HEAD_DIM, KEYS_2 == 0)
    if KEYS_2 > 0:
        keys_2 = KEYS_0 + KEYS_1 + tl.arange(0, KEYS_2)
        k_2 = load_rows(k, k_stride_n, keys_2, key_count, 0, HEAD_DIM, HEAD_DIM, True)
        v_2 = load_rows(v, v_stride_n, keys_2, key_count, 0, HEAD_DIM, HEAD_DIM, True)

    # Compute and store.
    first = 0 if WALK else (program % tiles) * BLOCK_M
    last = query_count if WALK else first + 1
    for start in tl.range(first, last, BLOCK_M, num_stages=1):
        queries = start + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, q_stride_n, queries, query_count, 0, HEAD_DIM, HEAD_DIM, True)
        scores_0 = _scores(q_tile, k_0, key_count, KEYS_0, KEYS_1 == 0)
        largest = tl.max(scores_0, 1)
        if KEYS_1 > 0:
            scores_1 = _scores(q_tile, k_1, key_count - KEYS_0, KEYS_1, KEYS_2 == 0)
            largest = tl.maximum(largest, tl.max(scores_1, 1))
        if KEYS_2 > 0:
            scores_2 = _scores(q_tile, k_2, key_count - KEYS_0 - KEYS_1, KEYS_2, True)
            largest = tl.maximum(largest, tl.max(scores_2, 1))
        shift = (largest * scale_log2)[:, None]

        weights = tl.exp2(tl.fma(scores_0, scale_log2, -shift))
        total = tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_0.dtype), v_0)
        if KEYS_1 > 0:
            weights = tl.exp2(tl.fma(scores_1, scale_log2, -shift))
            total += tl.sum(weights, 1)
            acc = tl.dot(weights.to(v_0.dtype), v_1, acc)
        if KEYS_2 > 0:
            weights = tl.exp2(tl.fma(scores_2, scale_log2, -shift))
            total += tl.sum(weights, 1)
            acc = tl.dot(weights.to(v_0.dtype), v_2, acc)

        rows = queries.to(tl.int64)[:, None] * (heads * HEAD_DIM)
        tile = out + rows + tl.arange(0, HEAD_DIM)[None, :]
        value = acc / total[:, None]
        if out_scale is not None:
            value, head_scale = in_8_bits(value, out.dtype.element_ty)
            tl.store(out_scale + queries.to(tl.int64) * heads, head_scale, mask=queries < query_count)
        tl.store(tile, value.to(out.dtype.element_ty), mask=(queries < query_count)[:, None])


def attention_short(
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    config: Config,
) -> None:
    """Write attention into `out`, on checked arguments for which `why_not` has nothing against `config`.

    out_scale: [B, Nq, H] fp32, written too, if `out` is in 8 bits.
    """
    batch, query_count, heads, head_dim = q.shape
    tiles = 1 if config.blocks["WALK"] else triton.cdiv(query_count, config.blocks["BLOCK_M"])
    keys = key_tiles(k.shape[1])
    _attention_short_kernel[(tiles * batch * heads,)](
        out,
        out_scale,
        q,
        k,
        v,
        strides(q)[:3],
        strides(k)[:3],
        strides(v)[:3],
        heads,
        query_count,
        k.shape[1],
        scale * LOG2E,
        VECTOR=vector(head_dim, q, k, v),
        HEAD_DIM=head_dim,
        KEYS_0=keys[0],
        KEYS_1=keys[1],
        KEYS_2=keys[2],
        **config.options(),
    )
