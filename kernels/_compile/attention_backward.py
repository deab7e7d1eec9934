"""The specialisations of attention's backward to compile without a GPU: bf16, packed qkv."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.kernels._compile.attention import BIAS, FEATURES, HEAD_DIMS, MASK, PACKED, WINDOW, attention_case
from vitfast.kernels._compile.case import ARCHS, CompileCase
from vitfast.kernels.attention_backward import _attention_dkdv_kernel, _attention_dq_kernel, pick_config


def compile_cases() -> list[CompileCase]:
    """Both kernels, as `_compile/attention.py` has the forward."""
    cases = []
    for arch in ARCHS:
        for kernel in ("dq", "dkdv"):
            cases += [_case(kernel, head_dim, arch) for head_dim in HEAD_DIMS]
            cases += [_case(kernel, 64, arch, **extra) for extra in (BIAS, MASK)]
            cases += [_case(kernel, head_dim, arch, **extra) for head_dim, extra in FEATURES]
            cases += [_case(kernel, head_dim, arch, group=4, **WINDOW, **PACKED) for head_dim in (64, 128)]
        cases.append(_case("dq", 64, arch, **BIAS, dbias="*fp32"))
    return cases


def _case(kernel: str, head_dim: int, arch: int, group: int = 1, **extra: Any) -> CompileCase:
    dense = bool(extra.keys() & {"bias", "mask", "softcap", "slopes"})
    irregular = bool(extra.keys() & {"left", "right", "cu_keys"})
    config = pick_config(kernel, head_dim, torch.bfloat16, dense, divmod(arch, 10), irregular, group > 1)
    dq = kernel == "dq"
    constants: dict[str, Any] = {}
    if dq:
        constants = {"BIAS_PER_QUERY": "bias" in extra, "MASK_PER_QUERY": "mask" in extra}
        constants |= dict.fromkeys({"dbias"} - extra.keys())
    return attention_case(
        _attention_dq_kernel if dq else _attention_dkdv_kernel,
        config,
        kernel=f"attention_{kernel}",
        name=config.name,
        head_dim=head_dim,
        arch=arch,
        group=group,
        extra=extra,
        constants=constants,
        pointers=("dq", "dout", "out", "q", "k", "v") if dq else ("dk", "dv", "dout", "q", "k", "v"),
        strided=("dout", "q", "k", "v"),
        walked=config.blocks["BLOCK_N" if dq else "BLOCK_M"],
        tile={"M": config.blocks["BLOCK_M"], "N": 16} if dq else {"N": config.blocks["BLOCK_N"], "M": 16},
    )
