"""softmax(q kᵀ * scale + bias) v per head, without forming the [Nq, Nk] matrix in memory.

    q [B, Nq, H, D], k, v [B, Nk, Hk, D]  ->  out [B, Nq, H, D];  fp32, fp16 or bf16, fp32 accumulation
    quantize: out in float8_e4m3fn or int8, with a scale [B, Nq, H] for each head of a row: D = 64 or 128

Reads strided views, so the packed qkv [B, N, 3, H, D] of a linear layer goes in as it is. Additive
bias and bool mask are broadcast by strides of 0, a key head serves H / Hk query heads, and a query
that may see no key gives zeros. A query may be limited to a band of keys (causal masking and windows);
scores may be capped and ALiBi added (see _attention_scores); sequences of different lengths may lie
packed one after another. The heads of q and k may be normed and rotated (RoPE) as they are loaded (see
_attention_heads).

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

from typing import Any

import torch
import triton

from vitfast.kernels import _common, attention_short
from vitfast.kernels._attention_arguments import (
    CAPABILITIES,
    HEAD_OPTIONS,
    LOG2E,
    head_arguments,
    kernel_arguments,
    last_block,
    vector,
)
from vitfast.kernels._attention_cases import forward_cases
from vitfast.kernels._attention_configs import CONFIGS as GENERAL_CONFIGS
from vitfast.kernels._attention_configs import pick_config
from vitfast.kernels._attention_forward import attention_forward_kernel
from vitfast.kernels._common import SCALE_GROUPS, CompileCase, Config, capability, on_its_device

__all__ = ["CAPABILITIES", "CONFIGS", "attention", "attention_forward", "compile_cases", "tuning_key"]

CONFIGS = [*GENERAL_CONFIGS, *attention_short.CONFIGS]
"""Those of the kernel described above, and of attention_short.py, which a tuning table or `config` may choose."""


def tuning_key(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> str:
    """What a tuned choice depends on: not on the batch, so that an image's bits do not either."""
    given = _given(q, k, options) + (["in 8 bits"] if options.get("quantize") is not None else [])
    return " ".join([str(q.shape[3]), f"{q.shape[1]}x{k.shape[1]}", str(q.dtype), *given])


def _given(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> list[str]:
    """What a call asks beyond softmax(q kᵀ * scale) v."""
    names = ("bias", "mask", "slopes", "left", "right", "cu_queries")
    given = [name for name in names if options.get(name) is not None]
    given += ["softcap"] if options.get("softcap") else []
    given += [name for name, tensor in (("rope", "cos"), ("qk-norm", "q_weight")) if options.get(tensor) is not None]
    return given + (["shared heads"] if k.shape[2] != q.shape[2] else [])


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
    """softmax(score) v per head.

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
            k are rotated, x * cos + turn(x) * sin, where turn makes channels (a, b) into (-b, a): d and d + D / 2, or
            2d and 2d + 1 if interleaved. Norm and rotation are done in fp32 and rounded once.
        return_lse: also give the log-sum-exp of each query's scores.
        quantize: torch.float8_e4m3fn or torch.int8: give the output in 8 bits, with the scale of each head of a row;
            D is 64 or 128, without return_lse.
        config: a member of CONFIGS, not the tuning table's or `pick_config`'s choice; without return_lse only.

    Returns:
        [B, Nq, H, D], contiguous, in q's dtype. A query that may see no key gives zeros.
        With return_lse, that and [B, H, Nq] fp32, natural logarithm; -inf for such a query.
        With quantize [B, Nq, H, D] in that dtype and [B, Nq, H] fp32; NaN where a head of a row is not finite.

    Raises:
        ValueError: if a shape, dtype, stride, device or number does not fit.
    """
    if return_lse:
        if config is not None:
            raise ValueError(f"attention: config must be None with return_lse, got {config.name}")
        if quantize is not None:
            raise ValueError(f"attention: quantize must be None with return_lse, got {quantize}")
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
    batch, query_count, heads, _ = q.shape if q.ndim == 4 else (0, 0, 0, 0)  # _launch refuses other shapes
    stats = torch.empty((2, batch, heads, query_count), dtype=torch.float32, device=q.device)
    return _launch(q, k, v, stats, options)[0], stats


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
    head_options = {name: options[name] for name in HEAD_OPTIONS if name in options}
    options = {name: value for name, value in options.items() if name not in HEAD_OPTIONS}
    arguments = kernel_arguments("attention", q, k, v, **options)
    packed = arguments["cu_queries"] is not None
    arguments |= head_arguments("attention", q, k, **head_options, packed=packed)
    out_scale = None
    if quantize is not None:
        if quantize not in (torch.float8_e4m3fn, torch.int8):
            raise ValueError(f"attention: quantize must be torch.float8_e4m3fn or torch.int8, got {quantize}")
        if q.shape[3] not in SCALE_GROUPS:
            allowed = " or ".join(map(str, sorted(SCALE_GROUPS)))
            raise ValueError(f"attention: quantize needs a head dim of {allowed}, got {q.shape[3]}")
        out_scale = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=quantize or q.dtype, device=q.device)
    if not out.numel():
        return out, out_scale

    batch, query_count, heads, head_dim = q.shape
    if packed:
        batch, query_count = len(arguments["cu_queries"]) - 1, options["max_queries"]
    if config is None and stats is None and not packed:
        key = tuning_key(q, k, options | head_options | {"quantize": quantize})
        config = _common.tuned("attention", q.device, CONFIGS, key)
    if config in attention_short.CONFIGS:
        _check_short(q, k, options | head_options, arguments["scale"], config, quantize is not None)
        attention_short.launch(out, out_scale, q, k, v, arguments["scale"], config)
        return out, out_scale
    bias_per_query, mask_per_query = arguments["bias_stride_q"] != 0, arguments["mask_stride_q"] != 0
    scores_change = arguments["softcap"] is not None or arguments["slopes"] is not None
    config = config or pick_config(
        head_dim,
        0 if packed else query_count,  # a sequence's bits may not depend on the longest beside it
        q.dtype,
        bias_per_query or mask_per_query or scores_change or arguments["left"] is not None,  # too few registers
        capability(q.device),
        arguments["cos"] is not None or arguments["q_weight"] is not None,
    )
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    scale = arguments["scale"]
    # Scaling inside the exponential saves a product per score, but needs scores that are nothing but
    # products, and a positive scale that fp32 does not flush to zero: -inf times 0 is NaN. The backward
    # scales first too, so that it finds the very scores whose maxima these are.
    scale_first = (
        arguments["bias"] is not None
        or scores_change
        or stats is not None
        or q.dtype == torch.float32  # whose scores can be so large that the shift's rounding alone overflows exp2
        or not scale > torch.finfo(torch.float32).tiny
    )
    attention_forward_kernel[(triton.cdiv(query_count, block_m) * batch * heads,)](
        out=out,
        out_scale=out_scale,
        max_out=None if stats is None else stats[0],
        sum_out=None if stats is None else stats[1],
        **arguments,
        heads=heads,
        longest=query_count,
        unit=LOG2E if scale_first else scale * LOG2E,
        SCALE_FIRST=scale_first,
        BIAS_PER_QUERY=bias_per_query,
        MASK_PER_QUERY=mask_per_query,
        VECTOR=vector(head_dim, q, k, v, *(() if arguments["cos"] is None else (arguments["cos"], arguments["sin"]))),
        BLOCK_TAIL=last_block(block_n, k.shape[1], arguments),
        **config.options(),
    )
    return out, out_scale


def _check_short(
    q: torch.Tensor, k: torch.Tensor, options: dict[str, Any], scale: float, config: Config, in_8_bits: bool
) -> None:
    """Raise ValueError unless attention_short.py can run this call."""
    reasons = attention_short.why_not(config, q.shape[3], k.shape[1], q.dtype, capability(q.device), in_8_bits)
    if given := _given(q, k, options):
        reasons.append(f"it has no {', no '.join(given)}")
    if not scale > torch.finfo(torch.float32).tiny:
        reasons.append(f"the scale must be positive, got {scale}")
    if reasons:
        raise ValueError(f"attention: config {config.name} cannot run this call: {'; '.join(reasons)}")


def compile_cases() -> list[CompileCase]:
    """The specialisations to compile without a GPU."""
    return forward_cases()
