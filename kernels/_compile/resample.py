"""Both axes."""

from __future__ import annotations

from vitfast.kernels._compile.case import ARCHS, CompileCase, compile_case
from vitfast.kernels.resample import CONFIGS, _resample_kernel


def compile_cases() -> list[CompileCase]:
    """All of them."""
    return [
        compile_case(
            _resample_kernel,
            config,
            kernel="resample",
            name=config.name,
            types={"out": "*u8", "images": "*u8", "first": "*i64", "weights": "*i32"},
            constexprs={},
            aligned=("out", "images", "first", "weights"),
            archs=ARCHS,
            tile={"M": config.blocks["BLOCK_ROWS"], "C": config.blocks["BLOCK_COLUMNS"]},
        )
        for config in CONFIGS.values()
    ]
