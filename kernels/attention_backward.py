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

from typing import Any

import torch
import triton

from vitfast.kernels._attention_arguments import CAPABILITIES, kernel_arguments, last_block, strides, vector
from vitfast.kernels._attention_cases import backward_cases
from vitfast.kernels._attention_configs import BACKWARD_CONFIGS as CONFIGS
from vitfast.kernels._attention_configs import pick_backward_config
from vitfast.kernels._attention_dkdv import attention_dkdv_kernel
from vitfast.kernels._attention_dq import attention_dq_kernel
from vitfast.kernels._common import (
    CompileCase,
    capability,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_shape,
    on_its_device,
)

__all__ = ["CAPABILITIES", "CONFIGS", "attention_backward", "compile_cases"]


def _check(dout, q, out, stats, bias, bias_grad) -> None:
    op = "attention_backward"
    check_shape(op, "dout", dout, tuple(q.shape))
    check_shape(op, "out", out, tuple(q.shape))
    check_shape(op, "stats", stats, (2, q.shape[0], q.shape[2], q.shape[1]))
    check_dtype(op, q.dtype, dout=dout, out=out)
    check_dtype(op, torch.float32, stats=stats)
    check_last_contiguous(op, dout=dout)
    for name, tensor in (("out", out), ("stats", stats)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")
    check_device(op, q=q, dout=dout, out=out, stats=stats)
    if bias_grad and bias is None:
        raise ValueError(f"{op}: bias_grad is {bias_grad}, but no bias was given")


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
        ValueError: if a shape, dtype, stride, device or number does not fit.
    """
    arguments = kernel_arguments("attention_backward", q, k, v, **options)
    bias = arguments["bias"]
    _check(dout, q, out, stats, bias, bias_grad)
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
    dout_strides = dict(zip(("dout_stride_b", "dout_stride_n", "dout_stride_h"), strides(dout)[:3], strict=True))
    arguments |= dout_strides | {
        "dout": dout,
        "delta": delta,
        "row_max": stats[0],
        "row_sum": stats[1],
        "VECTOR": vector(head_dim, dout, q, k, v, out),
    }
    if dq.numel():
        bias_per_query, mask_per_query = arguments["bias_stride_q"] != 0, arguments["mask_stride_q"] != 0
        per_query = bias_per_query or mask_per_query or bias_grad or scores_change
        config = pick_backward_config("dq", head_dim, q.dtype, per_query, chip)
        attention_dq_kernel[(triton.cdiv(query_count, config.blocks["BLOCK_M"]) * batch * heads,)](
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
        config = pick_backward_config(
            "dkdv", head_dim, q.dtype, dense, chip, irregular=banded or packed, shared=heads != key_heads
        )
        attention_dkdv_kernel[(triton.cdiv(key_count, config.blocks["BLOCK_N"]) * batch * key_heads,)](
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


def compile_cases() -> list[CompileCase]:
    """The specialisations to compile without a GPU."""
    return backward_cases()
