"""Quantised bf16 rows in both dtypes at every config, with and without LayerNorm."""

from __future__ import annotations

from vitfast.kernels._compile.case import ARCHS, CompileCase, compile_case
from vitfast.kernels._parts.launch import Config
from vitfast.kernels.layer_norm import CONFIGS
from vitfast.kernels.quantize import _quantize_kernel


def compile_cases() -> list[CompileCase]:
    """All of them."""
    return [_case(config, kind, norm) for config in CONFIGS for kind in ("fp8e4nv", "i8") for norm in (True, False)]


def _case(config: Config, kind: str, norm: bool) -> CompileCase:
    types = {"values": f"*{kind}", "scale": "*fp32", "eps": "fp32"} | dict.fromkeys(("x", "weight", "bias"), "*bf16")
    return compile_case(
        _quantize_kernel,
        config,
        kernel="quantize",
        name=f"{config.name}_{kind}" + "_norm" * norm,
        types=types,
        constexprs={} if norm else {"weight": None, "bias": None},
        unaligned=("rows", "eps"),
        archs=(89, 90, 100) if kind == "fp8e4nv" else ARCHS,
        tile={"M": config.blocks["BLOCK_ROWS"], "C": config.blocks["BLOCK_COLUMNS"]},
    )
