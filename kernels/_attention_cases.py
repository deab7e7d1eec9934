"""The specialisations of the attention kernels to compile without a GPU: bf16, packed qkv, 197 or 577 tokens."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.kernels._attention_configs import head_chunks, pick_backward_config, pick_config
from vitfast.kernels._attention_dkdv import attention_dkdv_kernel
from vitfast.kernels._attention_dq import attention_dq_kernel
from vitfast.kernels._attention_forward import attention_forward_kernel
from vitfast.kernels._common import CompileCase, Config

ARCHS = (80, 90, 100)
HEAD_DIMS = (64, 72, 80, 88, 96, 128)
BIAS, MASK = {"bias": "*bf16"}, {"mask": "*i1"}
STATS = {"max_out": "*fp32", "sum_out": "*fp32"}
KINDS = {80: "i8", 89: "fp8e4nv", 90: "fp8e4nv", 100: "fp8e4nv"}
"""Chip -> 8-bit type of the output; int8 on the newer ones is among `more_forward_cases`."""
# What the flash-attn functions ask for; and all of it at once.
WINDOW = {"left": "i32", "right": "i32"}
PACKED = {"cu_queries": "*i32", "cu_keys": "*i32"}
SOFTCAP, SLOPES = {"softcap": "fp32"}, {"slopes": "*fp32"}
EVERYTHING = WINDOW | PACKED | SOFTCAP | SLOPES
FEATURES = ((128, {"right": "i32"}), (128, WINDOW), (128, EVERYTHING), (64, EVERYTHING))
# What is done to the heads of q and k.
ROPE = {"cos": "*fp32", "sin": "*fp32", **dict.fromkeys(("table_stride_b", "table_stride_h", "table_stride_n"), "i32"),
        "prefix": "i32"}  # fmt: skip
NORM = {**dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"), "*bf16"), "norm_eps": "fp32"}
_HEADS = (*ROPE, *NORM)
_OPTIONAL = ("bias", "mask", "slopes", "cu_queries", "cu_keys", "left", "right", "softcap")


def forward_cases() -> list[CompileCase]:
    plain = [(head_dim, tokens) for head_dim in HEAD_DIMS[:-1] for tokens in (197, 577)] + [(128, 197)]
    cases = []
    for arch in ARCHS:
        cases += [_forward_case(head_dim, tokens, arch) for head_dim, tokens in plain]
        cases += [_forward_case(64, 197, arch, **BIAS), _forward_case(64, 197, arch, **MASK)]
        cases += [_forward_case(head_dim, 197, arch, **STATS) for head_dim in HEAD_DIMS]
        cases += [_forward_case(64, 197, arch, **BIAS, **STATS)]
        cases += [_forward_case(head_dim, 577, arch, **extra, **STATS) for head_dim, extra in FEATURES]
        cases += [_forward_case(head_dim, 577, arch, group=4, **WINDOW, **PACKED) for head_dim in (64, 128)]
        cases += [_forward_case(head_dim, 197, arch, **BIAS, **ROPE, **NORM) for head_dim in (64, 128)]
    return cases + [case for arch, kind in KINDS.items() for case in _cases_in_8_bits(arch, kind)]


def more_forward_cases() -> list[CompileCase]:
    """Other head dims, forms of RoPE and qk-norm, 8-bit types: cases that take long, for the full tests only."""
    cases = []
    for arch in ARCHS:
        cases += [_forward_case(head_dim, 197, arch, **ROPE, **NORM) for head_dim in HEAD_DIMS]
        cases += [_forward_case(64, 197, arch, interleaved=interleaved, **ROPE) for interleaved in (False, True)]
        cases += [_forward_case(72, 197, arch, interleaved=True, **ROPE, **NORM), _forward_case(64, 197, arch, **NORM)]
    return cases + [case for arch in (90, 100) for case in _cases_in_8_bits(arch, "i8")]


def _cases_in_8_bits(arch: int, kind: str) -> list[CompileCase]:
    out = {"out": f"*{kind}", "out_scale": "*fp32"}
    return [_forward_case(*shape, arch, **out) for shape in ((64, 197), (64, 577), (128, 197))]


def backward_cases() -> list[CompileCase]:
    cases = []
    for arch in ARCHS:
        for kernel in ("dq", "dkdv"):
            cases += [_backward_case(kernel, head_dim, arch) for head_dim in HEAD_DIMS]
            cases += [_backward_case(kernel, 64, arch, **extra) for extra in (BIAS, MASK)]
            cases += [_backward_case(kernel, head_dim, arch, **extra) for head_dim, extra in FEATURES]
            cases += [_backward_case(kernel, head_dim, arch, group=4, **WINDOW, **PACKED) for head_dim in (64, 128)]
        cases.append(_backward_case("dq", 64, arch, **BIAS, dbias="*fp32"))
    return cases


def _forward_case(
    head_dim: int, tokens: int, arch: int, group: int = 1, interleaved: bool = False, **extra: str
) -> CompileCase:
    dense = bool(extra.keys() & {"bias", "mask", "softcap", "slopes", "left"})
    tokens = 0 if "cu_keys" in extra else tokens
    heads_change = bool(extra.keys() & {"cos", "q_weight"})
    config = pick_config(head_dim, tokens, torch.bfloat16, dense, divmod(arch, 10), heads_change)
    absent = {"out_scale", "max_out", "sum_out", *_HEADS} - extra.keys()
    constexprs = {
        "SCALE_FIRST": bool(extra.keys() & {"bias", "max_out", "softcap", "slopes"}),
        "BIAS_PER_QUERY": "bias" in extra,
        "MASK_PER_QUERY": "mask" in extra,
        "RMS": False,
        "INTERLEAVED": interleaved,
    }
    pointers = ("out", "q", "k", "v")
    tile = {"M": config.blocks["BLOCK_M"], "N": 16}  # the last key tile is as narrow as the keys left
    return _case("attention", attention_forward_kernel, config, head_dim, arch, group, extra, absent, constexprs,
                 pointers, "qkv", config.blocks["BLOCK_N"], tile)  # fmt: skip


def _backward_case(kernel: str, head_dim: int, arch: int, group: int = 1, **extra: str) -> CompileCase:
    dense = bool(extra.keys() & {"bias", "mask", "softcap", "slopes"})
    irregular = bool(extra.keys() & {"left", "right", "cu_keys"})
    config = pick_backward_config(kernel, head_dim, torch.bfloat16, dense, divmod(arch, 10), irregular, group > 1)
    blocks = config.blocks
    if kernel == "dq":
        constexprs = {"BIAS_PER_QUERY": "bias" in extra, "MASK_PER_QUERY": "mask" in extra}
        absent = {"dbias"} - extra.keys()
        tile = {"M": blocks["BLOCK_M"], "N": 16}
        return _case("attention_dq", attention_dq_kernel, config, head_dim, arch, group, extra, absent, constexprs,
                     ("dq", "dout", "out", "q", "k", "v"), ("dout", "q", "k", "v"), blocks["BLOCK_N"],
                     tile)  # fmt: skip
    tile = {"N": blocks["BLOCK_N"], "M": 16}
    return _case("attention_dkdv", attention_dkdv_kernel, config, head_dim, arch, group, extra, set(), {},
                 ("dk", "dv", "dout", "q", "k", "v"), ("dout", "q", "k", "v"), blocks["BLOCK_M"], tile)  # fmt: skip


def _case(
    kernel: str,
    fn: Any,
    config: Config,
    head_dim: int,
    arch: int,
    group: int,
    extra: dict[str, str],
    absent: set[str],
    constexprs: dict[str, Any],
    pointers: tuple[str, ...],
    strided: Any,
    walked: int,
    tile: dict[str, int],
) -> CompileCase:
    main, rest = head_chunks(head_dim)
    banded = bool(extra.keys() & {"left", "right", "cu_keys"})
    constexprs = {
        **constexprs,
        **dict.fromkeys({*_OPTIONAL, *absent} - extra.keys()),
        **{f"{name}_stride_k": 1 for name in ("bias", "mask") if name in extra},
        "GROUP": group,
        "VECTOR": 8,
        "HEAD_DIM": head_dim,
        "D_MAIN": main,
        "D_REST": rest,
        "BLOCK_TAIL": walked if banded else 16,
        **config.blocks,
    }
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("delta", "row_max", "row_sum"), "*fp32")
    types |= {"scale": "fp32", "unit": "fp32"} | extra
    strides = [f"{name}_stride_{axis}" for name in strided for axis in "bn"]
    strides += [name for name in _HEADS if name in extra and not name.startswith(("prefix", "norm"))]
    return CompileCase(
        kernel=kernel,
        config=config.name + "_in_8_bits" * ("out_scale" in extra),
        fn=fn,
        signature={name: types.get(name, "i32") for name in fn.arg_names if name not in constexprs},
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=(*pointers, *strides),
        archs=(arch,),
        tile=tile,
    )
