"""Every config of mlp at its largest width and its activations, with all that is fused."""

from __future__ import annotations

from vitfast.kernels._compile.case import CompileCase, archs_of, compile_case
from vitfast.kernels._parts.launch import Config
from vitfast.kernels._parts.whole_rows import column_tiles
from vitfast.kernels.mlp import CONFIGS, _mlp_kernel

TYPES = {"y_stats": "*fp32", "weight_sum": "*fp32", "eps": "fp32"} | dict.fromkeys(
    ("y", "x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale", "residual"), "*bf16"
)

NOT_HOPPER = ("width384_norm", "width384_swiglu")


def compile_cases() -> list[CompileCase]:
    """All of them; the config for sm_80 serves both activations."""
    return [
        _case(config, activation)
        for config in CONFIGS
        for activation in ("gelu", "swiglu")
        if config.name.endswith("swiglu") == (activation == "swiglu") or config.name == "width192_sm80"
    ]


def _case(config: Config, activation: str) -> CompileCase:
    absent = {"weight_sum": None} if config.name in ("width384", "width384_swiglu") else {}
    # As `is_one_kernel` has it: those with short chunks are not for Hopper.
    archs = tuple(arch for arch in archs_of(config) if arch != 90 or config.name not in NOT_HOPPER)
    large, small = column_tiles(192 if config.name.startswith("width192") else 384)
    return compile_case(
        _mlp_kernel,
        config,
        kernel="mlp",
        name=config.name if config.name.endswith("swiglu") else f"{config.name}_{activation}",
        types=TYPES,
        constexprs={"ACTIVATION": activation, "C0": large, "C1": small, **absent},
        unaligned=("M", "eps"),
        archs=archs,
        tile={"M": config.blocks["BLOCK_M"], "F": config.blocks["BLOCK_F"]},
    )
