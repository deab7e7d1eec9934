"""Every config of attention_short at the most keys it may have, and at 197: bf16, packed qkv."""

from __future__ import annotations

from vitfast.kernels._compile.case import CompileCase, compile_case
from vitfast.kernels._parts.eight_bits import SCALE_GROUPS
from vitfast.kernels._parts.launch import Config
from vitfast.kernels.attention_short import (
    CONFIGS,
    MOST_KEYS,
    MOST_KEYS_IN_8_BITS,
    _attention_short_kernel,
    key_tiles,
)

CHIPS = ((8, 0), (9, 0), (10, 0))
KINDS = {(8, 0): ("i8",), (9, 0): ("fp8e4nv", "i8"), (10, 0): ("fp8e4nv", "i8")}


def compile_cases() -> list[CompileCase]:
    """Those with an output in bf16."""
    cases = []
    for config in CONFIGS:
        for chip in CHIPS:
            for head_dim, most in MOST_KEYS[config.name].get(chip, {}).items():
                for tokens in sorted({most, 197} if head_dim == 64 and most > 197 else {most}):
                    cases.append(_case(config, head_dim, tokens, 10 * chip[0] + chip[1]))
    return cases


def more_compile_cases() -> list[CompileCase]:
    """The same with 8-bit output, for head dims that have it: for the full tests only."""
    cases = []
    for config in CONFIGS:
        for chip, kinds in KINDS.items():
            for head_dim, most in MOST_KEYS[config.name].get(chip, {}).items():
                if head_dim in SCALE_GROUPS:
                    tokens = min(most, MOST_KEYS_IN_8_BITS.get(config.name, most)) if head_dim == 64 else most
                    cases += [_case(config, head_dim, tokens, 10 * chip[0] + chip[1], kind) for kind in kinds]
    return cases


def _case(config: Config, head_dim: int, tokens: int, arch: int, kind: str = "bf16") -> CompileCase:
    keys = key_tiles(tokens)
    types = dict.fromkeys(("q", "k", "v"), "*bf16") | {"out": f"*{kind}", "out_scale": "*fp32", "scale_log2": "fp32"}
    types |= dict.fromkeys(("q_strides", "k_strides", "v_strides"), ("i32",) * 3)
    return compile_case(
        _attention_short_kernel,
        config,
        kernel="attention_short",
        name=f"{config.name} D={head_dim} N={tokens}" + f" {kind}" * (kind != "bf16"),
        types=types,
        constexprs={
            "VECTOR": 8,
            "HEAD_DIM": head_dim,
            **{f"KEYS_{i}": keys[i] for i in range(3)},
            **({"out_scale": None} if kind == "bf16" else {}),
        },
        aligned=("out", "q", "k", "v", *(f"{name}_strides.{axis}" for name in "qkv" for axis in (0, 1))),
        archs=(arch,),
        tile={"M": config.blocks["BLOCK_M"], "N": 16},
    )
