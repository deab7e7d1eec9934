"""GPUs by their data sheets, and the shares of these peaks that predictions take to be sustained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUSTAINED_MATH = 0.80
SUSTAINED_MEMORY = 0.90
"""Shares of the data sheet's peaks that a large product and a large copy sustain. Assumptions, of the
size usually seen on an H100; a card's own roofs, measured, should replace them."""

SUSTAINED_EIGHT = 0.68
"""The same of products of 8-bit operands, which reach the power limit sooner: 1350 of an H100's 1979 TFLOP/s, the rate
that DeepGEMM (DeepSeek, 2025) announced for FP8 with promoted sums. At K = 768 less is to be expected."""

LAUNCH_US = 1.3
"""Microseconds between dependent kernels of a CUDA graph. An assumption as well."""

EXP_PER_CLOCK = 16
"""exp2 a clock and multiprocessor (CUDA C++ Programming Guide, arithmetic instruction throughput)."""


@dataclass(frozen=True)
class Chip:
    """A GPU's peaks from its data sheet: dense TFLOP/s (no sparsity; None if it has none), GB/s, boost clock in GHz."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    half_tflops: float
    fp8_tflops: float | None
    int8_tflops: float | None
    fp32_tflops: float
    memory_gb_s: float
    clock_ghz: float
    source: str


CHIPS = {
    "a100": Chip("A100 SXM 80 GB", (8, 0), 108, 312, None, 624, 19.5, 2039, 1.41, "NVIDIA A100 data sheet, 2021"),
    "l40s": Chip("L40S", (8, 9), 142, 362, 733, 733, 91.6, 864, 2.52, "NVIDIA L40S data sheet, 2023"),
    "h100": Chip("H100 SXM", (9, 0), 132, 989, 1979, 1979, 67, 3350, 1.83, "NVIDIA H100 data sheet, 2023"),
    "h200": Chip("H200 SXM", (9, 0), 132, 989, 1979, 1979, 67, 4800, 1.83, "NVIDIA H200 data sheet, 2024"),
    "b200": Chip("B200", (10, 0), 148, 2250, 4500, 4500, 75, 8000, 1.85, "NVIDIA Blackwell data sheet, 2024"),
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def peak_tflops(card: Chip, dtype: torch.dtype) -> float | None:
    """The data sheet's peak for products in a dtype; None if the chip has none."""
    peaks = {torch.float32: card.fp32_tflops, torch.float8_e4m3fn: card.fp8_tflops, torch.int8: card.int8_tflops}
    return peaks.get(dtype, card.half_tflops)
