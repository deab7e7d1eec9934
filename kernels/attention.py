"""softmax(q kᵀ * scale + bias) v per head, without forming the [Nq, Nk] matrix in memory.

    q [B, Nq, H, D], k, v [B, Nk, H, D]  ->  out [B, Nq, H, D];  fp32, fp16 or bf16, fp32 accumulation

Reads strided views, so the packed qkv [B, N, 3, H, D] of a linear layer goes in as it is. Additive
bias and bool mask are broadcast by strides of 0, causal masking is aligned at the top left, and a
query that may see no key gives zeros.

One program holds a tile of queries and walks over tiles of keys with the online softmax (Milakov
and Gimelshein 2018; Dao et al. 2022). Key tiles that lie wholly inside need no mask; what is left
(5 keys of 197, 1 of 257) is one narrow tile of its own. Any D up to 256: it is cut into up to two
power-of-two chunks (72 = 64 + 16), because padding 72 to 128 would waste 44 % of the products.

Bound by the tensor cores and the exponentials for long sequences, by bytes for N below about 200.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitfast.kernels._attention_common import (
    CAPABILITIES,
    LOG2E,
    broadcast,
    check_attention,
    load_rows,
    load_scores,
    load_tile,
    store_tile,
    strides,
    vector,
)
from vitfast.kernels._attention_configs import CONFIGS, head_chunks, pick_config
from vitfast.kernels._common import CompileCase, capability, on_its_device

__all__ = ["CAPABILITIES", "CONFIGS", "attention", "attention_forward", "compile_cases"]


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
    bias,  # [BLOCK_M or 1, 1] pointers to this head's rows, or None
    mask,
    k_stride_n,
    v_stride_n,
    bias_stride_k,
    mask_stride_k,
    start,  # first key of this tile
    key_count,
    queries,  # [BLOCK_M] indices
    scale,
    unit,  # what exp2 needs the scores to be multiplied by; positive
    SCALE_FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Take one tile of keys into the online softmax."""
    in_tile = tl.arange(0, BLOCK_N)
    left = key_count - start
    first = tl.cast(start, tl.int64)
    k += first * k_stride_n
    v += first * v_stride_n

    k_tile = load_rows(k, k_stride_n, in_tile, left, 0, D_MAIN, HEAD_DIM, BOUNDED)
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
    if D_REST > 0:
        k_tile = load_rows(k, k_stride_n, in_tile, left, D_MAIN, D_REST, HEAD_DIM, BOUNDED)
        scores = tl.dot(q_rest, tl.trans(k_tile), scores, input_precision="ieee")

    if SCALE_FIRST:
        scores = scores * scale
    if bias is not None:
        scores += load_scores(bias, bias_stride_k, start, in_tile, left, BOUNDED).to(tl.float32)
    if mask is not None:
        seen = load_scores(mask, mask_stride_k, start, in_tile, left, BOUNDED)
        scores = tl.where(seen != 0, scores, float("-inf"))
    if BOUNDED:
        scores = tl.where((in_tile < left)[None, :], scores, float("-inf"))
    if CAUSAL:
        scores = tl.where((start + in_tile)[None, :] <= queries[:, None], scores, float("-inf"))

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

    v_tile = load_rows(v, v_stride_n, in_tile, left, 0, D_MAIN, HEAD_DIM, BOUNDED)
    weights = weights.to(v_tile.dtype)
    acc = tl.dot(weights, v_tile, acc * decay[:, None], input_precision="ieee")
    if D_REST > 0:
        v_tile = load_rows(v, v_stride_n, in_tile, left, D_MAIN, D_REST, HEAD_DIM, BOUNDED)
        acc_rest = tl.dot(weights, v_tile, acc_rest * decay[:, None], input_precision="ieee")
    return acc, acc_rest, new_shift, row_sum


@triton.jit(do_not_specialize=["heads", "query_count", "key_count"])
def _attention_kernel(
    out,  # [B, Nq, H, D] contiguous
    max_out,  # [B, H, Nq] fp32: the largest score of each query, or None; with SCALE_FIRST only
    sum_out,  # [B, H, Nq] fp32: sum of exp(score - largest), or None
    q,  # [B, Nq, H, D]
    k,  # [B, Nk, H, D]
    v,  # [B, Nk, H, D]
    bias,  # [B, H, Nq, Nk], any strides, or None
    mask,  # [B, H, Nq, Nk] bool, any strides, or None
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
    unit,  # log2(e), times the scale unless SCALE_FIRST; positive
    SCALE_FIRST: tl.constexpr,  # scale before maxima are taken: with a bias or max_out, or a scale <= 0
    BIAS_PER_QUERY: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    CAUSAL: tl.constexpr,
    VECTOR: tl.constexpr,  # elements by which every stride and pointer of q, k, v, out is aligned
    HEAD_DIM: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # keys per tile where masks are needed
):
    # Locate: query tiles of one head are neighbours, so that they share its keys in L2.
    tiles = tl.cdiv(query_count, BLOCK_M)
    program = tl.program_id(0)
    tile = program % tiles
    head = ((program // tiles) % heads).to(tl.int64)
    batch = ((program // tiles) // heads).to(tl.int64)
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_offset = batch * q_stride_b + head * q_stride_h
    k_offset = batch * k_stride_b + head * k_stride_h
    v_offset = batch * v_stride_b + head * v_stride_h
    out_offset = (batch * query_count * heads + head) * HEAD_DIM
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

    # Load.
    q_tile, q_rest = load_tile(q, q_stride_n, queries, query_count, HEAD_DIM, D_MAIN, D_REST, True)

    # Compute.
    acc = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, D_REST if D_REST > 0 else 1], tl.float32)
    row_shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    whole = key_count // BLOCK_N * BLOCK_N
    if CAUSAL:  # keys that every query of this tile sees
        whole = tl.minimum(whole, tile * BLOCK_M // BLOCK_N * BLOCK_N)
    for start in tl.range(0, whole, BLOCK_N):
        acc, acc_rest, row_shift, row_sum = _key_tile(
            acc, acc_rest, row_shift, row_sum, q_tile, q_rest, k, v, bias, mask,
            k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
            start, key_count, queries, scale, unit, SCALE_FIRST,
            HEAD_DIM, D_MAIN, D_REST, BLOCK_N, BOUNDED=False, CAUSAL=False,
        )  # fmt: skip
    # The rest: the last few keys, or the tiles on the diagonal; those above it are skipped.
    end = tl.minimum(key_count, (tile + 1) * BLOCK_M) if CAUSAL else key_count
    for start in tl.range(whole, end, BLOCK_TAIL):
        acc, acc_rest, row_shift, row_sum = _key_tile(
            acc, acc_rest, row_shift, row_sum, q_tile, q_rest, k, v, bias, mask,
            k_stride_n, v_stride_n, bias_stride_k, mask_stride_k,
            start, key_count, queries, scale, unit, SCALE_FIRST,
            HEAD_DIM, D_MAIN, D_REST, BLOCK_TAIL, BOUNDED=True, CAUSAL=CAUSAL,
        )  # fmt: skip

    # Store. A query that saw no key has sum 0 and gives zeros.
    norm = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    store_tile(out, out_stride_n, queries, query_count, acc * norm[:, None], acc_rest * norm[:, None],
               HEAD_DIM, D_MAIN, D_REST)  # fmt: skip
    if max_out is not None:
        row = (batch * heads + head) * query_count + queries
        tl.store(max_out + row, row_shift, mask=queries < query_count)
        tl.store(sum_out + row, row_sum, mask=queries < query_count)


@on_its_device
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ * scale + bias) v per head.

    Args:
        q: [B, Nq, H, D]. k, v: [B, Nk, H, D], of q's dtype (fp32, fp16 or bf16); any strides with a
            contiguous last axis. 1 <= D <= 256; Nk = 0 is legal and gives zeros.
        bias: fp32, fp16 or bf16, added to the scaled scores; broadcastable to [B, H, Nq, Nk].
        mask: bool, True where a key may be seen; broadcastable to [B, H, Nq, Nk].
        causal: query i sees keys 0..i.
        scale: any float; 1 / sqrt(D) by default.
        return_lse: also give the log-sum-exp of each query's scores.

    Returns:
        [B, Nq, H, D], contiguous, in q's dtype. A query that may see no key gives zeros.
        With return_lse, that and [B, H, Nq] fp32, natural logarithm; -inf for such a query.

    Raises:
        ValueError: if a shape, dtype, stride or device does not fit.
    """
    if return_lse:
        out, stats = attention_forward(q, k, v, bias=bias, mask=mask, causal=causal, scale=scale)
        return out, stats[0] + stats[1].log()
    return _launch(q, k, v, bias, mask, causal, scale, None)


@on_its_device
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, and what its backward needs: out and stats [2, B, H, Nq] fp32.

    stats[0] is the largest score of each query (-inf if it may see no key), stats[1] the sum of
    exp(score - largest). Their log-sum-exp alone would not do: for a row whose bias is finfo.min
    throughout it rounds to finfo.min, and the weights of 1 / Nk could not be told from 1.
    """
    batch, query_count, heads, _ = q.shape if q.ndim == 4 else (0, 0, 0, 0)  # _launch refuses other shapes
    stats = torch.empty((2, batch, heads, query_count), dtype=torch.float32, device=q.device)
    return _launch(q, k, v, bias, mask, causal, scale, stats), stats


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    stats: torch.Tensor | None,
) -> torch.Tensor:
    check_attention("attention", q, k, v, bias, mask)
    batch, query_count, heads, head_dim = q.shape
    key_count = k.shape[1]
    shape = (batch, heads, query_count, key_count)
    bias_strides = broadcast("attention", "bias", bias, shape)
    mask_strides = broadcast("attention", "mask", mask, shape)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out

    per_query = bias_strides[2] != 0 or mask_strides[2] != 0
    config = pick_config(head_dim, query_count, q.dtype, per_query, capability(q.device))
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    main, rest = head_chunks(head_dim)
    tail = block_n if causal else min(block_n, max(16, triton.next_power_of_2(key_count % block_n)))
    scale = float(head_dim**-0.5 if scale is None else scale)
    # Scaling inside the exponential saves a product per score, but needs a positive scale, and one
    # that fp32 does not flush to zero: -inf times 0 is NaN. The backward scales first too, so that
    # it finds the very scores whose maxima these are.
    scale_first = bias is not None or stats is not None or not scale > torch.finfo(torch.float32).tiny
    grid = (triton.cdiv(query_count, block_m) * batch * heads,)
    _attention_kernel[grid](
        out,
        None if stats is None else stats[0],
        None if stats is None else stats[1],
        q,
        k,
        v,
        bias,
        mask,
        *strides(q)[:3],
        *strides(k)[:3],
        *strides(v)[:3],
        *bias_strides,
        *mask_strides,
        heads,
        query_count,
        key_count,
        scale,
        LOG2E if scale_first else scale * LOG2E,
        SCALE_FIRST=scale_first,
        BIAS_PER_QUERY=bias_strides[2] != 0,
        MASK_PER_QUERY=mask_strides[2] != 0,
        CAUSAL=causal,
        VECTOR=vector(head_dim, q, k, v),
        HEAD_DIM=head_dim,
        D_MAIN=main,
        D_REST=rest,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_TAIL=tail,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def compile_cases() -> list[CompileCase]:
    """The specialisations that models use, to compile without a GPU: bf16, packed qkv."""
    plain = [(head_dim, tokens) for head_dim in (64, 72, 80, 88, 96) for tokens in (197, 577)] + [(128, 197)]
    cases = []
    for arch in (80, 90, 100):
        cases += [_compile_case(head_dim, tokens, arch) for head_dim, tokens in plain]
        cases += [_compile_case(64, 197, arch, bias="*bf16"), _compile_case(64, 197, arch, mask="*i1")]
        stats = {"max_out": "*fp32", "sum_out": "*fp32"}
        cases += [_compile_case(head_dim, 197, arch, **stats) for head_dim in (64, 72, 80, 88, 96, 128)]
        cases += [_compile_case(64, 197, arch, bias="*bf16", **stats)]
    return cases


def _compile_case(head_dim: int, tokens: int, arch: int, **extra: str) -> CompileCase:
    config = pick_config(head_dim, tokens, torch.bfloat16, bool(extra.keys() & {"bias", "mask"}), divmod(arch, 10))
    main, rest = head_chunks(head_dim)
    constexprs = {
        "SCALE_FIRST": bool(extra.keys() & {"bias", "max_out"}),
        "BIAS_PER_QUERY": "bias" in extra,
        "MASK_PER_QUERY": "mask" in extra,
        "CAUSAL": False,
        "VECTOR": 8,
        "HEAD_DIM": head_dim,
        "D_MAIN": main,
        "D_REST": rest,
        "BLOCK_TAIL": 16,
        **config.blocks,
    }
    for name in ("bias", "mask"):
        constexprs |= {f"{name}_stride_k": 1} if name in extra else {}
    constexprs |= dict.fromkeys({"bias", "mask", "max_out", "sum_out"} - extra.keys())
    types = dict.fromkeys(("out", "q", "k", "v"), "*bf16") | {"scale": "fp32", "unit": "fp32"} | extra
    strides = (f"{name}_stride_{axis}" for name in "qkv" for axis in "bn")
    return CompileCase(
        kernel="attention",
        config=config.name,
        fn=_attention_kernel,
        signature={name: types.get(name, "i32") for name in _attention_kernel.arg_names if name not in constexprs},
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=("out", "q", "k", "v", *strides),
        archs=(arch,),
        tile={"M": config.blocks["BLOCK_M"], "N": 16},  # the last key tile is as narrow as the keys left
    )
