"""Tile shapes of the linear kernels, as data, and the rule that picks one."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from vitfast.kernels import _common
from vitfast.kernels._common import STATS_TILE, Config

GROUP_M = 8
"""Tile rows in a group: the tiles that run at the same time read few rows of x and few of W."""


SPLITS = (4, 8)
"""Into how many parts a config may cut K."""


def _config(name: str, m: int, n: int, k: int, warps: int, stages: int, since: tuple[int, int] = (8, 0)) -> Config:
    return Config(name, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages, since)


def _splitting(config: Config) -> list[Config]:
    return [
        replace(config, name=f"{config.name}_split{parts}", blocks={**config.blocks, "SPLIT_K": parts})
        for parts in SPLITS
    ]


# Where these come from: compiling for sm_80, sm_90 and sm_100. Each is the largest tile of its kind
# that spills no register with the epilogues of `compile_cases`, with as many stages as fit in shared
# memory, and smaller tiles that spread less work over more multiprocessors. None is measured yet.
TMA_CONFIGS = [
    _config("tma_128x256x64", 128, 256, 64, 8, 3, (9, 0)),
    _config("tma_128x128x64", 128, 128, 64, 8, 4, (9, 0)),
    _config("tma_64x128x64", 64, 128, 64, 4, 4, (9, 0)),
    _config("tma_64x64x64", 64, 64, 64, 4, 4, (9, 0)),
]
TMA_CONFIGS += _splitting(TMA_CONFIGS[2])
POINTER_CONFIGS = [
    _config("128x128x64", 128, 128, 64, 8, 3),
    _config("128x64x64", 128, 64, 64, 8, 3),
    _config("64x128x64", 64, 128, 64, 8, 3),
    _config("64x64x64", 64, 64, 64, 4, 4),
]
POINTER_CONFIGS += _splitting(POINTER_CONFIGS[3])
# float32 in full precision runs on the ordinary multiply-add units, which hold their operands in
# registers: hence the short sides.
FLOAT32_CONFIGS = [
    _config("float32_64x128x16", 64, 128, 16, 8, 3),
    _config("float32_32x64x32", 32, 64, 32, 4, 3),
]
CONFIGS = TMA_CONFIGS + POINTER_CONFIGS + FLOAT32_CONFIGS

SUM_CONFIG = Config("sum", {"BLOCK_M": 8, "BLOCK_N": 128}, num_warps=4, num_stages=1)
"""How the parts of a split are added up: tiles of whole row statistics, and few rows, so that there are many."""

MULTIPLY_ADDS_PER_US = 3_000_000
"""Of one multiprocessor, to set what a split costs against what it saves: an H100's, by its data sheet."""
LAUNCH_US = 1.3
"""What one launch more costs in a CUDA graph. An assumption, as the next."""
PARTIAL_BYTES_PER_US = 60_000
"""Of partial sums, written to L2 and read back, for one multiprocessor while all do it."""
SPLIT_SAVES = 0.25
"""The share that a split must save to be picked: with it the last bits depend on how many rows there are."""


def uses_tma(width: int, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> bool:
    """Whether `_linear_tma_kernel` can run on these matrices [rows, columns] and an output this wide.

    The tensor memory accelerator came with sm_90 and wants rows that start at multiples of 16 bytes.
    """
    if _common.capability(x.device) < (9, 0) or x.dtype == torch.float32:
        return False
    step = 16 // x.element_size()
    return width % step == 0 and all(
        t.stride(0) % step == 0 and t.stride(0) >= t.shape[1] and t.stride(1) == 1 and t.data_ptr() % 16 == 0
        for t in (x, weight, residual)
        if t is not None
    )


def widest_tile(*, gated: bool, stats: bool = False) -> int:
    """Largest BLOCK_N that spills no register: "gated" has two accumulators.

    With statistics, which need 128 columns, a gated tile does spill; no ViT asks for that.
    """
    if not gated:
        return 256
    return 128 if stats else 64


def split_of(config: Config) -> int:
    """Into how many parts a config cuts K."""
    return config.blocks.get("SPLIT_K", 1)


def pick_config(
    rows: int,
    width: int,
    dtype: torch.dtype,
    *,
    inner: int,
    tma: bool,
    sms: int,
    gated: bool = False,
    stats: bool = False,
) -> Config:
    """The tile that keeps the busiest of `sms` multiprocessors busy for the shortest time.

    The output is rows x width, K is `inner`. A tile costs its multiply-adds per step of K, BLOCK_M *
    BLOCK_N, plus 64 for each of the BLOCK_M + BLOCK_N operands it reads (an assumption, not a measurement);
    the price of a config is that cost times K times the tiles that the busiest multiprocessor gets. Where
    there are fewer tiles than multiprocessors K may be split, at the price of one more launch and of writing and
    reading the partial sums, if that saves SPLIT_SAVES. Row statistics need tiles of a multiple of 128 columns,
    where K is not split.
    """
    pool = FLOAT32_CONFIGS if dtype == torch.float32 else TMA_CONFIGS if tma else POINTER_CONFIGS
    widest = widest_tile(gated=gated, stats=stats)

    def tiles(config: Config) -> int:
        return triton.cdiv(rows, config.blocks["BLOCK_M"]) * triton.cdiv(width, config.blocks["BLOCK_N"])

    def able(config: Config) -> bool:
        if split_of(config) > 1:
            return not gated and tiles(config) < sms
        return config.blocks["BLOCK_N"] <= widest and not (stats and config.blocks["BLOCK_N"] % STATS_TILE)

    def price(config: Config) -> float:
        block_m, block_n, split = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"], split_of(config)
        turns = triton.cdiv(tiles(config) * split, sms)
        steps = triton.cdiv(triton.cdiv(inner, config.blocks["BLOCK_K"]), split)
        product = turns * steps * config.blocks["BLOCK_K"] * (block_m * block_n + 64 * (block_m + block_n))
        if split == 1:
            return product
        partial_us = turns * block_m * block_n * 8 / PARTIAL_BYTES_PER_US
        return (product + MULTIPLY_ADDS_PER_US * (LAUNCH_US + partial_us)) / (1 - SPLIT_SAVES)

    return min(filter(able, pool), key=price)


def tuning_key(
    rows: int, inner: int, width: int, dtype: torch.dtype, *, tma: bool, gated: bool = False, stats: bool = False
) -> str:
    """What a tuned choice depends on: the very shape, and what restricts the configs.

    16-bit configs all have one BLOCK_K, so that a tuned choice changes no order of summation, but for those
    that split K.
    """
    flags = {"tma": tma, "gated": gated, "stats": stats}
    return " ".join([f"{rows}x{inner}x{width}", str(dtype), *(name for name, on in flags.items() if on)])


def check_config(config: Config, dtype: torch.dtype, tma: bool, gated: bool, stats: bool) -> None:
    """Raise ValueError if a config cannot run this call."""
    if (config in FLOAT32_CONFIGS) != (dtype == torch.float32):
        raise ValueError(f"linear: config {config.name} is not one for {dtype}")
    if config in TMA_CONFIGS and not tma:
        raise ValueError(
            f"linear: config {config.name} needs compute capability 9.0, a 16-bit dtype and 16-byte aligned rows"
        )
    if stats and split_of(config) == 1 and config.blocks["BLOCK_N"] % STATS_TILE:
        raise ValueError(
            f"linear: config {config.name} has tiles of no multiple of {STATS_TILE} columns, as stats need"
        )
    if gated and split_of(config) > 1:
        raise ValueError(f"linear: config {config.name} splits K, which swiglu's two sums cannot")
    if gated and config.blocks["BLOCK_N"] > 128:
        raise ValueError(f"linear: config {config.name} has no room for the two accumulators of swiglu")
