"""The LayerNorm kernels in bf16 at the widths of ViT-Ti, B and H (strides and widths multiples of 16)."""

from __future__ import annotations

from vitfast.kernels._compile.case import ARCHS, CompileCase, compile_case
from vitfast.kernels._parts.epilogue import STATS_TILE
from vitfast.kernels._parts.launch import Config
from vitfast.kernels.layer_norm import STATS_CONFIG, _layer_norm_kernel, _row_stats_kernel, pick_config

WIDTHS = (192, 768, 1280)
TYPES = {"stats": "*fp32", "eps": "fp32"}
TYPES |= dict.fromkeys(("y", "total", "x", "residual", "weight", "bias"), "*bf16")


def compile_cases() -> list[CompileCase]:
    """With and without residual at each width, and the statistics."""
    cases = []
    for width in WIDTHS:
        config = pick_config(width)
        cases += [_case("layer_norm", config, ("total", "residual")), _case("add_layer_norm", config, ())]
    return [*cases, _case("row_stats", STATS_CONFIG, ())]


def _case(kernel: str, config: Config, absent: tuple[str, ...]) -> CompileCase:
    return compile_case(
        _row_stats_kernel if kernel == "row_stats" else _layer_norm_kernel,
        config,
        kernel=kernel,
        name=config.name,
        types=TYPES,
        constexprs=dict.fromkeys(absent),
        unaligned=("rows", "tiles", "eps"),
        archs=ARCHS,
        tile={"M": config.blocks.get("BLOCK_ROWS", 1), "C": config.blocks.get("BLOCK_COLUMNS", STATS_TILE)},
    )
