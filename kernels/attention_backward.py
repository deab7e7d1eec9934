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

import torch
import triton

from vitfast.kernels._attention_common import CAPABILITIES, broadcast, check_attention, strides, vector
from vitfast.kernels._attention_configs import BACKWARD_CONFIGS as CONFIGS
from vitfast.kernels._attention_configs import head_chunks, pick_backward_config
from vitfast.kernels._attention_dkdv import attention_dkdv_kernel
from vitfast.kernels._attention_dq import attention_dq_kernel
from vitfast.kernels._common import (
    CompileCase,
    Config,
    capability,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_shape,
    on_its_device,
)

__all__ = ["CAPABILITIES", "CONFIGS", "attention_backward", "compile_cases"]


def _check(dout, q, k, v, out, stats, bias, mask, bias_grad) -> None:
    op = "attention_backward"
    check_attention(op, q, k, v, bias, mask)
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
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `attention` with respect to q, k, v and the bias.

    Args:
        dout: [B, Nq, H, D], the gradient of out; of q's dtype, any strides with a contiguous last axis.
        q, k, v, bias, mask, causal, scale: as the forward took them.
        out: [B, Nq, H, D] and stats: [2, B, H, Nq] fp32, as `attention_forward` returned them.
        bias_grad: also give the gradient of the bias. It passes through an fp32 buffer of
            4 * B * H * Nq * Nk bytes, whatever the bias is broadcast along.

    Returns:
        dq [B, Nq, H, D], dk, dv [B, Nk, H, D], contiguous, in q's dtype; dbias of the bias's shape and
        dtype, or None. The same bits on every run. A query that may see no key contributes nothing.

    Raises:
        ValueError: if a shape, dtype, stride or device does not fit.
    """
    _check(dout, q, k, v, out, stats, bias, mask, bias_grad)
    batch, query_count, heads, head_dim = q.shape
    key_count = k.shape[1]
    shape = (batch, heads, query_count, key_count)
    bias_strides = broadcast("attention_backward", "bias", bias, shape)
    mask_strides = broadcast("attention_backward", "mask", mask, shape)
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    delta = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
    dscores = None
    if bias_grad:  # of a causal call, half is never visited
        allocate = torch.zeros if causal else torch.empty
        dscores = allocate(shape, dtype=torch.float32, device=q.device)

    chip = capability(q.device)
    main, rest = head_chunks(head_dim)
    dense = bias is not None or mask is not None
    scale = float(head_dim**-0.5 if scale is None else scale)
    constants = {
        "CAUSAL": causal,
        "VECTOR": vector(head_dim, dout, q, k, v, out),
        "HEAD_DIM": head_dim,
        "D_MAIN": main,
        "D_REST": rest,
    }
    inputs = (q, k, v, bias, mask)
    sizes = (
        *(stride for tensor in (dout, q, k, v) for stride in strides(tensor)[:3]),
        *bias_strides,
        *mask_strides,
        heads,
        query_count,
        key_count,
        scale,
    )
    if dq.numel():
        per_query = bias_strides[2] != 0 or mask_strides[2] != 0 or bias_grad
        config = pick_backward_config("dq", head_dim, q.dtype, per_query, chip)
        attention_dq_kernel[(triton.cdiv(query_count, config.blocks["BLOCK_M"]) * batch * heads,)](
            dq,
            delta,
            dscores,
            dout,
            out,
            stats[0],
            stats[1],
            *inputs,
            *sizes,
            **constants,
            BIAS_PER_QUERY=bias_strides[2] != 0,
            MASK_PER_QUERY=mask_strides[2] != 0,
            BLOCK_TAIL=_tail(config.blocks["BLOCK_N"], key_count, causal),
            **_options(config),
        )
    if dk.numel():
        config = pick_backward_config("dkdv", head_dim, q.dtype, dense, chip)
        attention_dkdv_kernel[(triton.cdiv(key_count, config.blocks["BLOCK_N"]) * batch * heads,)](
            dk,
            dv,
            dout,
            delta,
            stats[0],
            stats[1],
            *inputs,
            *sizes,
            **constants,
            BLOCK_TAIL=_tail(config.blocks["BLOCK_M"], query_count, causal),
            **_options(config),
        )
    if dscores is None or bias is None:
        return dq, dk, dv, None
    return dq, dk, dv, dscores.sum_to_size(bias.shape).to(bias.dtype)


def _tail(block: int, count: int, causal: bool) -> int:
    """Width of the tiles that need masks: a causal call has many, any other one, of what is left."""
    return block if causal else min(block, max(16, triton.next_power_of_2(count % block)))


def _options(config: Config) -> dict[str, int]:
    return config.blocks | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def compile_cases() -> list[CompileCase]:
    """The specialisations that models train with, to compile without a GPU: bf16, packed qkv, 197 tokens."""
    bias, mask, dbias = {"bias": "*bf16"}, {"mask": "*i1"}, {"bias": "*bf16", "dbias": "*fp32"}
    cases = []
    for arch in (80, 90, 100):
        for kernel in ("dq", "dkdv"):
            cases += [_compile_case(kernel, head_dim, arch) for head_dim in (64, 72, 80, 88, 96, 128)]
            cases += [_compile_case(kernel, 64, arch, **extra) for extra in (bias, mask)]
        cases.append(_compile_case("dq", 64, arch, **dbias))
    return cases


def _compile_case(kernel: str, head_dim: int, arch: int, **extra: str) -> CompileCase:
    config = pick_backward_config(kernel, head_dim, torch.bfloat16, bool(extra), divmod(arch, 10))
    main, rest = head_chunks(head_dim)
    constexprs = {
        "CAUSAL": False,
        "VECTOR": 8,
        "HEAD_DIM": head_dim,
        "D_MAIN": main,
        "D_REST": rest,
        "BLOCK_TAIL": 16,
        **config.blocks,
    }
    tensors = ("dq", "delta", "dbias", "out") if kernel == "dq" else ("dk", "dv", "delta")
    if kernel == "dq":
        constexprs |= {"BIAS_PER_QUERY": "bias" in extra, "MASK_PER_QUERY": "mask" in extra}
    for name in ("bias", "mask"):
        constexprs |= {f"{name}_stride_k": 1} if name in extra else {name: None}
    if kernel == "dq" and "dbias" not in extra:
        constexprs["dbias"] = None
    types = dict.fromkeys((*tensors, "dout", "q", "k", "v"), "*bf16") | {"scale": "fp32"}
    types |= dict.fromkeys(("delta", "row_max", "row_sum"), "*fp32") | extra
    fn = attention_dq_kernel if kernel == "dq" else attention_dkdv_kernel
    aligned = [name for name in ("dq", "dk", "dv", "dout", "out", "q", "k", "v") if name in fn.arg_names]
    aligned += [f"{name}_stride_{axis}" for name in ("dout", "q", "k", "v") for axis in "bn"]
    sides = {"M": config.blocks["BLOCK_M"], "N": 16} if kernel == "dq" else {"N": config.blocks["BLOCK_N"], "M": 16}
    return CompileCase(
        kernel=f"attention_{kernel}",
        config=config.name,
        fn=fn,
        signature={name: types.get(name, "i32") for name in fn.arg_names if name not in constexprs},
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(aligned),
        archs=(arch,),
        tile=sides,  # the last tile walked over is as narrow as what is left
    )
