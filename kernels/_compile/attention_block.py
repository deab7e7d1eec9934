"""Every config of attention_block at its largest width, with all that is fused, for each head dim."""

from __future__ import annotations

from vitfast.kernels._compile.case import CompileCase, compile_case
from vitfast.kernels._parts.launch import Config
from vitfast.kernels._parts.whole_rows import column_tiles
from vitfast.kernels.attention_block import CONFIGS, HEAD_DIMS, _attention_block_kernel

TYPES = dict.fromkeys(("y_stats", "weight_sum"), "*fp32") | dict.fromkeys(("scale_log2", "eps"), "fp32")
TYPES |= dict.fromkeys(
    ("y", "qkv", "x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "layer_scale", "residual"), "*bf16"
)


def compile_cases() -> list[CompileCase]:
    """All of them, where `pick_config` has them."""
    return [_case(config, head_dim) for config in CONFIGS for head_dim in HEAD_DIMS]


def _case(config: Config, head_dim: int) -> CompileCase:
    large, small = column_tiles(192 if config.name.startswith("width192") else 384)
    return compile_case(
        _attention_block_kernel,
        config,
        kernel="attention_block",
        name=f"{config.name} D={head_dim}",
        types=TYPES,
        constexprs={"HEAD_DIM": head_dim, "C0": large, "C1": small},
        unaligned=("N", "heads", "scale_log2", "eps"),
        archs=(80,) if config.name.endswith("sm80") else (90, 100),
        tile={"M": config.blocks["BLOCK_M"], "N": config.blocks["BLOCK_N"]},
    )
