"""Every config of patch_embed with all of the epilogue, for 3-channel images and widths that 16 divides."""

from __future__ import annotations

from typing import Any

from vitfast.kernels._compile.case import ARCHS, CompileCase, compile_case
from vitfast.kernels._parts.launch import Config
from vitfast.kernels.patch_embed import CONFIGS, _patch_embed_kernel

VARIANTS = {  # name: pixel and weight type, patch side, channels last
    "uint8_nhwc_16": ("u8", "bf16", 16, True),
    "bf16_nchw_16": ("bf16", "bf16", 16, False),
    "uint8_nhwc_14": ("u8", "bf16", 14, True),
    "bf16_nchw_14": ("bf16", "bf16", 14, False),
    "fp32_nchw_16": ("fp32", "bf16", 16, False),
    "uint8_nhwc_16_fp32": ("u8", "fp32", 16, True),
    "fp32_nchw_16_fp32": ("fp32", "fp32", 16, False),
}


def compile_cases() -> list[CompileCase]:
    """Of each variant the configs with the BLOCK_K that its dtypes have."""
    cases = []
    for name, (pixel, element, side, channels_last) in VARIANTS.items():
        block_k = 16 if element == "fp32" else 32 if pixel == "fp32" else 64
        for config in CONFIGS:
            if config.blocks["BLOCK_K"] == block_k:
                cases.append(_case(config, name, pixel, element, side, channels_last))
    return cases


def _case(config: Config, name: str, pixel: str, element: str, side: int, channels_last: bool) -> CompileCase:
    types: dict[str, Any] = dict.fromkeys(("out", "weight", "bias", "position", "prefix"), f"*{element}")
    types["images"] = f"*{pixel}"
    types["image_strides"] = ("i32", "i32", "i32" if channels_last else "constexpr")
    types["k_strides"] = ("i32", "i32", "constexpr")
    constants: dict[str, Any] = {"PATCH_H": side, "PATCH_W": side, "K": 3 * side * side, "STEP": 16}
    constants |= {"MIDDLE": side, "INNER": 3 * side if channels_last else side, "k_strides.2": 1}
    constants |= {} if channels_last else {"image_strides.2": 1}
    return compile_case(
        _patch_embed_kernel,
        config,
        kernel="patch_embed",
        name=f"{config.name}_{name}",
        types=types,
        constexprs=constants,
        unaligned=("M", "patches", "grid_width", "prefix_tokens", "image_strides", "k_strides"),
        archs=ARCHS,
        tile={axis: config.blocks[f"BLOCK_{axis}"] for axis in "MNK"},
    )
