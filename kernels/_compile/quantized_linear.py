"""Both dtypes of quantized_linear in every config with every epilogue of a ViT block that it serves, bf16 around."""

from __future__ import annotations

from typing import Any

from vitfast.kernels._compile.case import ARCHS, CompileCase, compile_case
from vitfast.kernels._parts.epilogue import GROUP_M
from vitfast.kernels._parts.launch import Config
from vitfast.kernels.quantized_linear import (
    CONFIGS,
    POINTER_CONFIGS,
    PROMOTE,
    TMA_CONFIGS,
    _quantized_linear_kernel,
    _quantized_linear_tma_kernel,
    _with_group,
)

# Epilogue -> activation and the optional tensors present: the products of a ViT block. groups: of 128, fc2's; heads:
# groups of 64, proj's.
EPILOGUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bias": ("", ("bias",)),
    "gelu": ("gelu", ("bias",)),
    "gelu_requantize": ("gelu", ("bias", "y_scale")),
    "residual": ("", ("bias", "layer_scale", "residual")),
    "residual_groups": ("", ("bias", "layer_scale", "residual")),
    "residual_heads": ("", ("bias", "layer_scale", "residual")),
    "swiglu": ("swiglu", ("bias",)),
    "swiglu_requantize": ("swiglu", ("bias", "y_scale")),
}
GROUPS = {"residual_groups": 128, "residual_heads": 64}


def compile_cases() -> list[CompileCase]:
    """Where `pick_config` has them."""
    large, small, one_group = POINTER_CONFIGS
    served = {config.name: set(EPILOGUES) - {"swiglu", "swiglu_requantize"} for config in TMA_CONFIGS}
    served |= {large.name: set(EPILOGUES) - {"swiglu", "swiglu_requantize"}}
    served |= {small.name: {name for name in EPILOGUES if "requantize" not in name}}
    served |= {one_group.name: {name for name in EPILOGUES if "requantize" in name}}
    return [
        _case(config, kind, epilogue)
        for config in CONFIGS
        for kind in ("fp8e4nv", "i8")
        for epilogue in EPILOGUES
        if epilogue in served[config.name]
    ]


def _case(config: Config, kind: str, epilogue: str) -> CompileCase:
    activation, present = EPILOGUES[epilogue]
    group, tma = GROUPS.get(epilogue, 0), config in TMA_CONFIGS
    config = _with_group(config, group)
    m, n, k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    kinds = {"y": kind if "y_scale" in present else "bf16", "x": kind, "weight": kind, "residual": "bf16"}
    types = {name: f"*{element}" for name, element in kinds.items()}
    if tma:
        blocks = {"y": (m, n), "residual": (m, n), "x": (m, k), "weight": (n, k)}
        types = {name: f"tensordesc<{kinds[name]}[{rows},{columns}]>" for name, (rows, columns) in blocks.items()}
    types |= dict.fromkeys(("bias", "layer_scale"), "*bf16")
    types |= dict.fromkeys(("x_scale", "weight_scale", "y_scale"), "*fp32")
    constants: dict[str, Any] = {"ACTIVATION": activation, "PROMOTE": PROMOTE, "GROUPED": group > 0, "GROUP": GROUP_M}
    constants |= {name: None for name in ("y_scale", "bias", "layer_scale", "residual") if name not in present}
    archs = (89, 90, 100) if kind == "fp8e4nv" else ARCHS
    return compile_case(
        _quantized_linear_tma_kernel if tma else _quantized_linear_kernel,
        config,
        kernel="quantized_linear",
        name=f"{config.name}_{kind}_{epilogue}",
        types=types,
        constexprs=constants,
        unaligned=("M", *(kinds if tma else ())),
        archs=tuple(arch for arch in archs if divmod(arch, 10) >= config.min_capability),
        tile={"M": m, "N": n, "K": k},
    )
