"""softmax(q kᵀ * scale + bias) v per head, without forming the [Nq, Nk] matrix in memory.

    q [B, Nq, H, D], k, v [B, Nk, Hk, D]  ->  out [B, Nq, H, D];  fp32, fp16 or bf16, fp32 accumulation
    quantize: out in float8_e4m3fn or int8, with a scale [B, Nq, H] for each head of a row: D = 64 or 128

Reads strided views, so the packed qkv [B, N, 3, H, D] of a linear layer goes in as it is. Additive
bias and bool mask are broadcast by strides of 0, a key head serves H / Hk query heads, and a query
that may see no key gives zeros. A query may be limited to a band of keys (causal masking and windows);
scores may be capped and ALiBi added (see _parts/attention_scores.py); sequences of different lengths may lie
packed one after another. The heads of q and k may be normed and rotated (RoPE) as they are loaded (see
_parts/attention_heads.py).

One program holds a tile of queries and walks over tiles of keys with the online softmax (Milakov
and Gimelshein 2018; Dao et al. 2022). Key tiles that lie wholly inside need no mask; what is left
(5 keys of 197, 1 of 257) is one narrow tile of its own. Any D up to 256: it is cut into up to two
power-of-two chunks (72 = 64 + 16), because padding 72 to 128 would waste 44 % of the products.

A program has one head's columns of its rows and no others, so an 8-bit output is scaled by the head: a scale for the
whole row would need every head's program, and a pass over the output. It is quantised from fp32, rounded to nothing
before; quantized_linear.py reads such scales.

Bound by the tensor cores and the exponentials for long sequences, by bytes for N below about 200.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl

from vitfast.kernels import attention_short
from vitfast.kernels._parts.attention_arguments import (
    HEAD_OPTIONS,
    LOG2E,
    Problem,
    head_arguments,
    head_chunks,
    kernel_arguments,
    last_block,
    vector,
)
from vitfast.kernels._parts.attention_heads import head_moments, load_head
from vitfast.kernels._parts.attention_scores import band_tiles, in_band, make_scores
from vitfast.kernels._parts.attention_tiles import load_rows, load_scores, sequence, store_tile
from vitfast.kernels._parts.eight_bits import in_8_bits
from vitfast.kernels._parts.launch import DTYPES, Config, capability, choose, on_its_device

__all__ = [
    *("CAPABILITIES", "CONFIGS", "Problem", "attention", "attention_forward", "pick_config", "problem_of", "why_not"),
]


@dataclass(frozen=True)
class AttentionConfig(Config):
    """A config, and what it can hold without spilling.

    `widest`: kind of call -> the largest padded head dim. Kinds are "half" (fp16 and bf16), "dense" (the same with a
    bias or mask that differs from query to query, whose tile takes registers too), "heads" (the same with q and k
    normed or rotated, with or without what makes others dense), "fp32" and "fp32 heads".
    `most_queries`: calls of more take the next one that can; None is no limit.
    """

    widest: dict[str, int] = field(default_factory=dict)
    most_queries: int | None = None


def _config(
    name: str,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    widest: dict[str, int],
    since: tuple[int, int] = (8, 0),
    most_queries: int | None = None,
) -> AttentionConfig:
    return AttentionConfig(name, {"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages, since, widest, most_queries)


def _half(widest: int) -> dict[str, int]:
    return {"half": widest}


def _dense(widest: int) -> dict[str, int]:
    return {"dense": widest} | _half(widest)


def _heads(widest: int) -> dict[str, int]:
    return {"heads": widest} | _dense(widest)


# Chosen by compiling for sm_80, sm_90 and sm_100: the largest tiles without spills (fp32, and
# D = 256 on sm_100: 24 bytes of stack at most) and within the shared memory of sm_86 and sm_89
# (101,376 bytes) unless for sm_90 and up. None has been timed. The first that can run a call is picked. "short": 64-row
# tiles, more and smaller programs, for few queries (224 px with patches of 14 or more).
GENERAL_CONFIGS = [
    _config("half-96-short", 64, 64, 4, 2, _half(96), most_queries=320),
    _config("half-96", 128, 64, 8, 3, _half(96)),
    _config("half-128-sm90", 128, 64, 8, 3, _half(128), (9, 0)),
    _config("half-128", 128, 64, 8, 2, _half(128)),
    _config("half-192", 64, 32, 4, 2, _half(192)),
    _config("half-256", 64, 32, 8, 2, _half(256)),
    _config("dense-96", 64, 64, 8, 2, _dense(96)),
    _config("dense-128", 64, 32, 8, 2, _dense(128)),
    _config("dense-256", 64, 16, 8, 2, _dense(256)),
    _config("heads-64", 64, 64, 8, 2, _heads(64)),
    _config("heads-96", 64, 32, 8, 2, _heads(96)),
    _config("heads-128-sm90", 64, 32, 8, 2, _heads(128), (9, 0)),
    _config("heads-128", 32, 32, 8, 2, _heads(128)),
    _config("heads-256", 32, 16, 8, 1, _heads(256)),
    _config("fp32-128", 32, 32, 8, 2, {"fp32": 128, "fp32 heads": 64}),
    _config("fp32-256", 32, 16, 8, 2, {"fp32": 256}),
    _config("fp32-heads", 32, 16, 8, 1, {"fp32": 256, "fp32 heads": 256}),
]
CONFIGS: list[Config] = [*GENERAL_CONFIGS, *attention_short.CONFIGS]
"""Those of the kernel described above, and of attention_short.py, which a tuning table or `config` may choose."""

CAPABILITIES: dict[str, Any] = {
    "dtypes": DTYPES,
    "min_capability": (8, 0),
    "limits": {"head_dim": (1, 256)},
    "features": (
        *("fewer key heads", "causal", "window", "softcap", "slopes", "packed sequences", "log-sum-exp"),
        *("rope", "qk-norm", "float8_e4m3fn output", "int8 output"),
    ),
}


def problem_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    quantize: torch.dtype | None = None,
    **options: Any,
) -> Problem:
    """The problem of a call of `attention` with these arguments."""
    arguments = kernel_arguments("attention", q, k, v, **_without(HEAD_OPTIONS, options))
    return _problem(q, k, options, arguments, quantize)


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    options: dict[str, Any],
    arguments: dict[str, Any],
    quantize: torch.dtype | None,
) -> Problem:
    names = ("bias", "mask", "slopes", "left", "right", "cu_queries")
    given = [name for name in names if options.get(name) is not None]
    given += ["softcap"] if options.get("softcap") else []
    given += [name for name, tensor in (("rope", "cos"), ("qk-norm", "q_weight")) if options.get(tensor) is not None]
    given += ["shared heads"] if k.shape[2] != q.shape[2] else []
    per_query = any(arguments[name][2] for name in ("bias_strides", "mask_strides"))
    registers = ("softcap", "slopes", "left")  # these take registers as well
    dense = per_query or any(arguments[name] is not None for name in registers)
    heads_change = "rope" in given or "qk-norm" in given
    if q.dtype == torch.float32:
        kind = "fp32 heads" if heads_change else "fp32"
    else:
        kind = "heads" if heads_change else "dense" if dense else "half"
    return Problem(
        q.shape[3], q.shape[1], k.shape[1], q.dtype, capability(q.device), kind, tuple(given), quantize is not None,
        arguments["scale"],
    )  # fmt: skip


def why_not(config: Config, problem: Problem) -> list[str]:
    """Every reason why a config cannot run a problem; empty if it can."""
    if not isinstance(config, AttentionConfig):
        return attention_short.why_not(config, problem)
    reasons = config.too_new(problem.capability)
    columns, widest = sum(head_chunks(problem.head_dim)), config.widest.get(problem.kind)
    if widest is None:
        reasons.append(f"it is not one for {problem.kind} calls")
    elif columns > widest:
        reasons.append(f"{columns} columns of a head are more than {widest}")
    return reasons


def pick_config(problem: Problem) -> AttentionConfig:
    """The first that can run a problem and is meant for so many queries."""
    return next(
        config
        for config in GENERAL_CONFIGS
        if not why_not(config, problem) and (config.most_queries is None or problem.queries <= config.most_queries)
    )


@triton.jit
def _key_tile(
    acc,  # [BLOCK_M, D_MAIN] running sums of weight * v
    acc_rest,  # [BLOCK_M, D_REST]
    row_shift,  # [BLOCK_M, 1] largest score so far (times scale_log2 unless SCALE_FIRST); -inf where none was seen
    row_sum,  # [BLOCK_M, 1] of the weights so far
    q,  # [BLOCK_M, D_MAIN]
    q_rest,  # [BLOCK_M, D_REST]
    k,  # this head's keys and values
    v,
    k_norm,  # see _parts/attention_heads.py
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
    scale_log2,  # what exp2 needs the scores to be multiplied by; positive
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

    # Columns, not vectors: Triton then leaves scores where the product has them, and takes their exponentials once.
    tile_max = tl.max(scores, 1, keep_dims=True)
    if not SCALE_FIRST:
        tile_max *= scale_log2
    new_shift = tl.maximum(row_shift, tile_max)
    shift = tl.where(new_shift == float("-inf"), 0.0, new_shift)  # -inf - -inf would be NaN
    if SCALE_FIRST:  # multiplying before subtracting would overflow for a bias of finfo.min
        weights = tl.exp2((scores - shift) * scale_log2)
        decay = tl.exp2((row_shift - shift) * scale_log2)
    else:  # one fma per score; its shift is rounded once, so that a row's weights share that error
        weights = tl.exp2(tl.fma(scores, scale_log2, -shift))
        decay = tl.exp2(row_shift - shift)
    row_sum = row_sum * decay + tl.sum(weights, 1, keep_dims=True)

    v_tile = load_rows(v, v_stride_n, in_tile, count, 0, D_MAIN, HEAD_DIM, BOUNDED)
    weights = weights.to(v_tile.dtype)
    acc = tl.dot(weights, v_tile, acc * decay, input_precision="ieee")
    if D_REST > 0:
        v_tile = load_rows(v, v_stride_n, in_tile, count, D_MAIN, D_REST, HEAD_DIM, BOUNDED)
        acc_rest = tl.dot(weights, v_tile, acc_rest * decay, input_precision="ieee")
    return acc, acc_rest, new_shift, row_sum


@triton.jit(do_not_specialize=["heads", "query_rows", "key_rows", "longest", "offset", "left", "right", "prefix"])
def _attention_kernel(
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
    q_strides,  # of axes B, N, H
    k_strides,
    v_strides,
    bias_strides,  # of axes B, H, Nq, Nk; 0 where it is broadcast
    mask_strides,
    slopes_stride_b,
    table_strides,  # of axes B, H, N of cos and sin, or None
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
    scale_log2,  # log2(e), times the scale unless SCALE_FIRST; positive
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
    q_stride_b, q_stride_n, q_stride_h = q_strides
    k_stride_b, k_stride_n, k_stride_h = k_strides
    v_stride_b, v_stride_n, v_stride_h = v_strides
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k = bias_strides
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k = mask_strides

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

    rope = (cos, sin, table_strides, prefix)
    if cos is not None:
        table_stride_b, table_stride_h, table_stride_n = table_strides
        table_offset = batch * table_stride_b + head * table_stride_h
        if VECTOR > 1:
            table_offset = tl.multiple_of(table_offset, VECTOR)
            table_stride_n = tl.multiple_of(table_stride_n, VECTOR)
        rope = (cos + table_offset, sin + table_offset, table_stride_n, prefix)
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
    row_shift = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M, 1], tl.float32)

    begin, inner, tail, end = band_tiles(tile * BLOCK_M + offset, left, right, key_count, BLOCK_M, BLOCK_N)
    if left is not None:
        for start in tl.range(begin, inner, BLOCK_N):
            acc, acc_rest, row_shift, row_sum = _key_tile(
                acc, acc_rest, row_shift, row_sum, q_tile, q_rest, k, v, k_norm, rope, bias, mask, slope,
                k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
                start, key_count, positions, left, right, softcap, scale, scale_log2, SCALE_FIRST,
                RMS, INTERLEAVED, HEAD_DIM, D_MAIN, D_REST, BLOCK_N, BOUNDED=True,
            )  # fmt: skip
    for start in tl.range(inner, tail, BLOCK_N):
        acc, acc_rest, row_shift, row_sum = _key_tile(
            acc, acc_rest, row_shift, row_sum, q_tile, q_rest, k, v, k_norm, rope, bias, mask, slope,
            k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
            start, key_count, positions, left, right, softcap, scale, scale_log2, SCALE_FIRST,
            RMS, INTERLEAVED, HEAD_DIM, D_MAIN, D_REST, BLOCK_N, BOUNDED=False,
        )  # fmt: skip
    for start in tl.range(tail, end, BLOCK_TAIL, num_stages=1):
        acc, acc_rest, row_shift, row_sum = _key_tile(
            acc, acc_rest, row_shift, row_sum, q_tile, q_rest, k, v, k_norm, rope, bias, mask, slope,
            k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
            start, key_count, positions, left, right, softcap, scale, scale_log2, SCALE_FIRST,
            RMS, INTERLEAVED, HEAD_DIM, D_MAIN, D_REST, BLOCK_TAIL, BOUNDED=True,
        )  # fmt: skip

    # Store. A query that saw no key has sum 0 and gives zeros.
    norm = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    value, value_rest = acc * norm, acc_rest * norm
    if out_scale is not None:
        tl.static_assert(D_MAIN == HEAD_DIM, "all of a head must lie in one chunk, whose largest value is its scale")
        value, head_scale = in_8_bits(value, out.dtype.element_ty)
        row = (entry * query_rows + first_query + queries) * heads + head
        tl.store(out_scale + row, head_scale, mask=queries < query_count)
    store_tile(out, out_stride_n, queries, query_count, value, value_rest, HEAD_DIM, D_MAIN, D_REST)
    if max_out is not None:
        row = ((entry * heads + head) * query_rows + first_query + queries)[:, None]
        tl.store(max_out + row, row_shift, mask=(queries < query_count)[:, None])
        tl.store(sum_out + row, row_sum, mask=(queries < query_count)[:, None])


@on_its_device
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: bool = False,
    quantize: torch.dtype | None = None,
    config: Config | None = None,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(score) v per head, of a call that `vitfast.ops` has checked.

    Args:
        q: [B, Nq, H, D]. k, v: [B, Nk, Hk, D] with Hk a divisor of H, of q's dtype (fp32, fp16 or bf16); any
            strides with a contiguous last axis. 1 <= D <= 256; Nk = 0 is legal and gives zeros.
        bias: fp32, fp16 or bf16, added to the scaled scores; broadcastable to [B, H, Nq, Nk].
        mask: bool, True where a key may be seen; broadcastable to [B, H, Nq, Nk].
        left, right: query i stands at position i + offset and sees the keys from position - left to position +
            right; None is no limit. right=0 is causal at the top left; with offset=Nk - Nq at the bottom right.
        offset: 0 by default.
        softcap: scaled scores become softcap * tanh(score / softcap), before the bias; 0 is off.
        slopes: fp32 [H] or [B, H], ALiBi: slope * |key - position| is taken off the scores.
        scale: any float; 1 / sqrt(D) by default.
        cu_queries, cu_keys: int32 or int64 [sequences + 1]: B is 1, sequence i has the rows cu[i] to cu[i + 1] - 1 of
            q, and likewise of k and v. Each query's position is aligned at the bottom right of its own sequence.
            Read on the device only. Without bias and mask.
        max_queries, max_keys: at least the longest sequence. Rows beyond it, or of no sequence, are not written.
        q_weight, k_weight, q_bias, k_bias: [D] in fp32 or q's dtype: q and k are normed over each head first, with
            norm_eps (1e-6 by default): LayerNorm, or RMSNorm if rms.
        cos, sin: fp32 or q's dtype, [rows, D], [H, rows, D] or [B, H, rows, D], laid out alike: the last rows of q and
            k are rotated, x * cos + rotate_half(x) * sin, where rotate_half makes channels (a, b) into (-b, a): d and
            d + D / 2, or 2d and 2d + 1 if interleaved. Norm and rotation are done in fp32 and rounded once.
        return_lse: also give the log-sum-exp of each query's scores.
        quantize: torch.float8_e4m3fn or torch.int8: give the output in 8 bits, with the scale of each head of a row;
            D is 64 or 128, without return_lse.
        config: a member of CONFIGS, not the tuning table's or `pick_config`'s choice; without return_lse only.

    Returns:
        [B, Nq, H, D], contiguous, in q's dtype. A query that may see no key gives zeros.
        With return_lse, that and [B, H, Nq] fp32, natural logarithm; -inf for such a query.
        With quantize [B, Nq, H, D] in that dtype and [B, Nq, H] fp32; NaN where a head of a row is not finite.

    Raises:
        ValueError: if a stride, device or config does not fit.
    """
    if return_lse:
        if config is not None:
            raise ValueError(f"attention: config must be None with return_lse, got {config.name}")
        out, stats = attention_forward(q, k, v, **options)
        return out, stats[0] + stats[1].log()
    out, out_scale = _launch(q, k, v, None, options, config, quantize)
    return out if out_scale is None else (out, out_scale)


@on_its_device
def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, and what its backward needs: out and stats [2, B, H, Nq] fp32.

    stats[0] is the largest score of each query (-inf if it may see no key), stats[1] the sum of
    exp(score - largest). Their log-sum-exp alone would not do: for a row whose bias is finfo.min
    throughout it rounds to finfo.min, and the weights of 1 / Nk could not be told from 1.
    """
    batch, query_count, heads, _ = q.shape
    stats = torch.empty((2, batch, heads, query_count), dtype=torch.float32, device=q.device)
    return _launch(q, k, v, stats, options)[0], stats


def _without(names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stats: torch.Tensor | None,
    options: dict[str, Any],
    config: Config | None = None,
    quantize: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out, and its scales if it is in 8 bits."""
    arguments = kernel_arguments("attention", q, k, v, **_without(HEAD_OPTIONS, options))
    arguments |= head_arguments("attention", q, **{name: options[name] for name in HEAD_OPTIONS if name in options})
    packed = arguments["cu_queries"] is not None
    out = torch.empty(q.shape, dtype=quantize or q.dtype, device=q.device)
    out_scale = None
    if quantize is not None:
        out_scale = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, out_scale

    batch, query_count, heads, head_dim = q.shape
    problem = _problem(q, k, options, arguments, quantize)
    if packed:
        batch, query_count = len(arguments["cu_queries"]) - 1, options["max_queries"]
        problem = replace(problem, queries=0)  # a sequence's bits may not depend on the longest beside it
    if stats is None and not packed:
        config = choose("attention", q.device, CONFIGS, problem, why_not, pick_config, config)
    elif config is None:
        config = pick_config(problem)
    if config in attention_short.CONFIGS:
        attention_short.attention_short(out, out_scale, q, k, v, problem.scale, config)
        return out, out_scale
    scale = problem.scale
    # Scaling inside the exponential saves a product per score, but needs scores that are nothing but
    # products, and a positive scale that fp32 does not flush to zero: -inf times 0 is NaN. The backward
    # scales first too, so that it finds the very scores whose maxima these are.
    scale_first = (
        any(arguments[name] is not None for name in ("bias", "softcap", "slopes"))
        or stats is not None
        or q.dtype == torch.float32  # whose scores can be so large that the shift's rounding alone overflows exp2
        or not scale > torch.finfo(torch.float32).tiny
    )
    _attention_kernel[(triton.cdiv(query_count, config.blocks["BLOCK_M"]) * batch * heads,)](
        out=out,
        out_scale=out_scale,
        max_out=None if stats is None else stats[0],
        sum_out=None if stats is None else stats[1],
        **arguments,
        heads=heads,
        longest=query_count,
        scale_log2=LOG2E if scale_first else scale * LOG2E,
        SCALE_FIRST=scale_first,
        BIAS_PER_QUERY=arguments["bias_strides"][2] != 0,
        MASK_PER_QUERY=arguments["mask_strides"][2] != 0,
        VECTOR=vector(head_dim, q, k, v, *(() if arguments["cos"] is None else (arguments["cos"], arguments["sin"]))),
        BLOCK_TAIL=last_block(config.blocks["BLOCK_N"], k.shape[1], arguments),
        **config.options(),
    )
    return out, out_scale
