"""Every config of linear with every epilogue of a ViT block that it serves, at K = 6 to 8 tiles of statistics."""

from __future__ import annotations

from typing import Any

import torch

from vitfast.kernels._compile.case import CompileCase, archs_of, compile_case
from vitfast.kernels._parts.epilogue import GROUP_M
from vitfast.kernels._parts.launch import Config
from vitfast.kernels.linear import (
    CONFIGS,
    FLOAT32_CONFIGS,
    SUM_CONFIG,
    TMA_CONFIGS,
    Problem,
    _linear_kernel,
    _linear_sum_kernel,
    _linear_tma_kernel,
    split_of,
    why_not,
)

# Epilogue -> activation and the optional tensors present: the products of a ViT block.
EPILOGUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gelu": ("gelu", ("bias",)),
    "norm_gelu": ("gelu", ("bias", "row_stats", "weight_sum")),
    "residual_stats": ("", ("y_stats", "bias", "layer_scale", "residual")),
    "norm_swiglu": ("swiglu", ("bias", "row_stats", "weight_sum")),
}
PARTIAL: tuple[str, tuple[str, ...]] = ("", ())
"""A config that splits K has no epilogue; the kernel that adds up its sums has them."""


def compile_cases() -> list[CompileCase]:
    """All of them: products, then the sums of a split."""
    products = [
        _product_case(config, name)
        for config in CONFIGS
        for name in (EPILOGUES if split_of(config) == 1 else {"part": PARTIAL})
        if _archs(config, name)
    ]
    return products + [_sum_case(name) for name in EPILOGUES if "swiglu" not in name]


def _archs(config: Config, epilogue: str) -> tuple[int, ...]:
    return tuple(arch for arch in archs_of(config) if not why_not(config, _problem(config, epilogue, arch)))


def _problem(config: Config, epilogue: str, arch: int) -> Problem:
    activation, present = EPILOGUES.get(epilogue, PARTIAL)
    dtype = torch.float32 if config in FLOAT32_CONFIGS else torch.bfloat16
    tma = config in TMA_CONFIGS
    return Problem(50432, 3072, 768, dtype, tma, activation == "swiglu", "y_stats" in present, arch == 90)


def _product_case(config: Config, epilogue: str) -> CompileCase:
    activation, present = EPILOGUES.get(epilogue, PARTIAL)
    outputs = ("partial",) if epilogue == "part" else ("y",)
    tma, element = config in TMA_CONFIGS, "fp32" if config in FLOAT32_CONFIGS else "bf16"
    m, n, k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    tensors = dict.fromkeys(("y", "x", "weight", "bias", "layer_scale", "residual"), f"*{element}")
    if tma:
        blocks = {"y": (m, min(n, 128)), "residual": (m, min(n, 128)), "x": (m, k), "weight": (min(n, 128), k)}
        tensors |= {name: f"tensordesc<{element}[{rows},{columns}]>" for name, (rows, columns) in blocks.items()}
    return _case(
        _linear_tma_kernel if tma else _linear_kernel,
        config,
        "linear",
        epilogue,
        tensors,
        {
            "ACTIVATION": activation,
            "STATS_BLOCK": 1 if epilogue == "part" else 8,
            "GROUP": GROUP_M,
            "SPLIT_K": split_of(config),
        },
        (*outputs, "x", "weight", *present),
        {"M": m, "N": n, "K": k},
        _archs(config, epilogue),
    )


def _sum_case(epilogue: str) -> CompileCase:
    activation, present = EPILOGUES[epilogue]
    tensors = dict.fromkeys(("y", "bias", "layer_scale", "residual"), "*bf16")
    constants = {"ACTIVATION": activation, "STATS_BLOCK": 8, "SPLIT_K": 8}
    tile = {"M": SUM_CONFIG.blocks["BLOCK_M"], "N": SUM_CONFIG.blocks["BLOCK_N"]}
    present = ("y", "partial", *present)
    return _case(
        _linear_sum_kernel, SUM_CONFIG, "linear_sum", epilogue, tensors, constants, present, tile, archs_of(SUM_CONFIG)
    )


def _case(
    fn: Any,
    config: Config,
    kernel: str,
    epilogue: str,
    tensors: dict[str, str],
    constants: dict[str, Any],
    present: tuple[str, ...],
    tile: dict[str, int],
    archs: tuple[int, ...],
) -> CompileCase:
    tensors = tensors | dict.fromkeys(("y_stats", "partial", "row_stats", "weight_sum"), "*fp32")
    kinds = {name: kind for name, kind in tensors.items() if name in present}
    descriptors = [name for name, kind in kinds.items() if kind[0] != "*"]
    return compile_case(
        fn,
        config,
        kernel=kernel,
        name=f"{config.name}_{epilogue}",
        types=kinds | {"eps": "fp32"},
        constexprs=constants | {name: None for name in tensors if name in fn.arg_names and name not in present},
        unaligned=("M", "eps", *descriptors),
        archs=archs,
        tile=tile,
    )
