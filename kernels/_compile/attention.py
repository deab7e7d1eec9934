"""The specialisations of attention to compile without a GPU: bf16, packed qkv, 197 or 577 tokens."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.kernels._compile.case import ARCHS, CompileCase, compile_case
from vitfast.kernels._parts.attention_arguments import Problem, head_chunks
from vitfast.kernels._parts.launch import Config
from vitfast.kernels.attention import _attention_kernel, pick_config

HEAD_DIMS = (64, 72, 80, 88, 96, 128)
BIAS, MASK = {"bias": "*bf16"}, {"mask": "*i1"}
STATS = {"max_out": "*fp32", "sum_out": "*fp32"}
KINDS = {80: "i8", 89: "fp8e4nv", 90: "fp8e4nv", 100: "fp8e4nv"}
"""Chip -> 8-bit type of the output; int8 on the newer ones is among `more_compile_cases`."""
# What the flash-attn functions ask for; and all of it at once.
WINDOW = {"left": "i32", "right": "i32"}
PACKED = {"cu_queries": "*i32", "cu_keys": "*i32"}
SOFTCAP, SLOPES = {"softcap": "fp32"}, {"slopes": "*fp32"}
EVERYTHING = WINDOW | PACKED | SOFTCAP | SLOPES
FEATURES = ((128, {"right": "i32"}), (128, WINDOW), (128, EVERYTHING), (64, EVERYTHING))
# What is done to the heads of q and k.
ROPE = {"cos": "*fp32", "sin": "*fp32", "table_strides": ("i32",) * 3, "prefix": "i32"}
NORM = {**dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"), "*bf16"), "norm_eps": "fp32"}
OPTIONAL = ("bias", "mask", "slopes", "cu_queries", "cu_keys", "left", "right", "softcap")


def compile_cases() -> list[CompileCase]:
    """Head dims, and the features that take registers, at the head dims that have fewest."""
    plain = [(head_dim, tokens) for head_dim in HEAD_DIMS[:-1] for tokens in (197, 577)] + [(128, 197)]
    cases = []
    for arch in ARCHS:
        cases += [_case(head_dim, tokens, arch) for head_dim, tokens in plain]
        cases += [_case(64, 197, arch, **BIAS), _case(64, 197, arch, **MASK)]
        cases += [_case(head_dim, 197, arch, **STATS) for head_dim in HEAD_DIMS]
        cases += [_case(64, 197, arch, **BIAS, **STATS)]
        cases += [_case(head_dim, 577, arch, **extra, **STATS) for head_dim, extra in FEATURES]
        cases += [_case(head_dim, 577, arch, group=4, **WINDOW, **PACKED) for head_dim in (64, 128)]
        cases += [_case(head_dim, 197, arch, **BIAS, **ROPE, **NORM) for head_dim in (64, 128)]
    return cases + [case for arch, kind in KINDS.items() for case in _cases_in_8_bits(arch, kind)]


def more_compile_cases() -> list[CompileCase]:
    """Other head dims, forms of RoPE and qk-norm, 8-bit types: cases that take long, for the full tests only."""
    cases = []
    for arch in ARCHS:
        cases += [_case(head_dim, 197, arch, **ROPE, **NORM) for head_dim in HEAD_DIMS]
        cases += [_case(64, 197, arch, interleaved=interleaved, **ROPE) for interleaved in (False, True)]
        cases += [_case(72, 197, arch, interleaved=True, **ROPE, **NORM), _case(64, 197, arch, **NORM)]
    return cases + [case for arch in (90, 100) for case in _cases_in_8_bits(arch, "i8")]


def _cases_in_8_bits(arch: int, kind: str) -> list[CompileCase]:
    out = {"out": f"*{kind}", "out_scale": "*fp32"}
    return [_case(*shape, arch, **out) for shape in ((64, 197), (64, 577), (128, 197))]


def _case(
    head_dim: int, tokens: int, arch: int, group: int = 1, interleaved: bool = False, **extra: Any
) -> CompileCase:
    kind = "half"
    if extra.keys() & {"bias", "mask", "softcap", "slopes", "left"}:
        kind = "dense"
    if extra.keys() & {"cos", "q_weight"}:
        kind = "heads"
    queries = 0 if "cu_keys" in extra else tokens
    config = pick_config(Problem(head_dim, queries, tokens, torch.bfloat16, divmod(arch, 10), kind))
    absent = {"out_scale", "max_out", "sum_out", *ROPE, *NORM} - extra.keys()
    constants = {
        "SCALE_FIRST": bool(extra.keys() & {"bias", "max_out", "softcap", "slopes"}),
        "BIAS_PER_QUERY": "bias" in extra,
        "MASK_PER_QUERY": "mask" in extra,
        "RMS": False,
        "INTERLEAVED": interleaved,
        **dict.fromkeys(absent),
    }
    return attention_case(
        _attention_kernel,
        config,
        kernel="attention",
        name=config.name + "_in_8_bits" * ("out_scale" in extra),
        head_dim=head_dim,
        arch=arch,
        group=group,
        extra=extra,
        constants=constants,
        pointers=("out", "q", "k", "v"),
        strided=("q", "k", "v"),
        walked=config.blocks["BLOCK_N"],
        tile={"M": config.blocks["BLOCK_M"], "N": 16},  # the last key tile is as narrow as the keys left
    )


def attention_case(
    fn: Any,
    config: Config,
    *,
    kernel: str,
    name: str,
    head_dim: int,
    arch: int,
    group: int,
    extra: dict[str, Any],
    constants: dict[str, Any],
    pointers: tuple[str, ...],
    strided: tuple[str, ...],
    walked: int,
    tile: dict[str, int],
) -> CompileCase:
    """A case of one of the three kernels. `extra`: types of the optional arguments that are given."""
    main, rest = head_chunks(head_dim)
    banded = bool(extra.keys() & {"left", "right", "cu_keys"})
    types: dict[str, Any] = dict.fromkeys(pointers, "*bf16")
    types |= dict.fromkeys(("delta", "row_max", "row_sum"), "*fp32") | {"scale": "fp32", "scale_log2": "fp32"}
    types |= {f"{tensor}_strides": ("i32",) * 3 for tensor in strided}
    types |= {
        f"{tensor}_strides": (*("i32",) * 3, "constexpr" if tensor in extra else "i32") for tensor in ("bias", "mask")
    }
    tables = ("cos", "sin", *(f"table_strides.{axis}" for axis in range(3))) if "cos" in extra else ()
    weights = [name for name in NORM if name in extra and name != "norm_eps"]
    return compile_case(
        fn,
        config,
        kernel=kernel,
        name=name,
        types=types | extra,
        constexprs={
            **constants,
            **dict.fromkeys(option for option in OPTIONAL if option not in extra),
            **{f"{tensor}_strides.3": 1 for tensor in ("bias", "mask") if tensor in extra},
            "GROUP": group,
            "VECTOR": 8,
            "HEAD_DIM": head_dim,
            "D_MAIN": main,
            "D_REST": rest,
            "BLOCK_TAIL": walked if banded else 16,
        },
        aligned=(*pointers, *(f"{tensor}_strides.{axis}" for tensor in strided for axis in (0, 1)), *tables, *weights),
        archs=(arch,),
        tile=tile,
    )
