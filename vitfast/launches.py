"""The launches of a forward on a GPU that need not be here: FLOPs, bytes and tiles of each, and its time by a model.

What `vitfast.predict` adds up; it says what the model is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vitfast.config import ViTConfig
from vitfast.sites import scales_heads, site_spec

if TYPE_CHECKING:
    from vitfast.kernels._parts.launch import Config

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
QUANTIZED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""The products of the blocks in 8 bits, all else in bf16, as `vitfast.load` has it."""


def peak_tflops(card: Chip, dtype: torch.dtype) -> float | None:
    """The data sheet's peak for products in a dtype; None if the chip has none."""
    peaks = {torch.float32: card.fp32_tflops, torch.float8_e4m3fn: card.fp8_tflops, torch.int8: card.int8_tflops}
    return peaks.get(dtype, card.half_tflops)


@dataclass(frozen=True)
class Launch:
    """The prediction for one kind of launch. Times in microseconds, for one launch; `count` in the forward."""

    site: str
    count: int
    flops: int
    bytes: int
    config: str
    tile_share: float
    wave_share: float
    math_us: float
    memory_us: float
    exp_us: float

    @property
    def bound(self) -> str:
        """Which of the three times is the longest."""
        times = {"math": self.math_us, "memory": self.memory_us, "exp": self.exp_us}
        return max(times, key=lambda kind: times[kind])

    @property
    def time_us(self) -> float:
        """Predicted microseconds of one launch, its start included."""
        return max(self.math_us, self.memory_us, self.exp_us) + LAUNCH_US


def launches(
    config: ViTConfig, batch: int, card: Chip, dtype: torch.dtype, quantized: torch.dtype | None = None
) -> list[Launch]:
    """Every kind of launch of the forward, in order: with folded norms, or with quantised products."""
    depth = config.depth
    rows = [_patch_embed(config, batch, card, dtype)]
    if config.pre_norm:
        rows.append(_pass(config, "norm_pre", 1, batch, card, dtype, passes=2))
    if quantized is None:
        rows.append(_pass(config, "row_stats", 1, batch, card, dtype, passes=1))
    for site in ("qkv", "proj", "fc1", "fc2"):
        handed_on = site == "fc2" or (site == "proj" and scales_heads(config))  # fc1 or attention has written 8 bits
        if quantized is not None and not handed_on:
            rows.append(_quantize(config, site, depth, batch, card, dtype, norm=site in ("qkv", "fc1")))
        epilogue = {"residual": site in ("proj", "fc2"), "gated": site == "fc1" and config.gated}
        rows.append(_product(config, site, depth, batch, card, dtype, quantized, **epilogue))
        if site == "qkv":
            rows.append(_attention(config, depth, batch, card, dtype, quantized))
    if config.final_norm:
        rows.append(_pass(config, "norm", 1, batch, card, dtype, passes=2))
    if config.projection_dim or config.num_classes:
        rows.append(_product(config, "head", 1, batch, card, dtype))
    return [launch for row in rows for launch in _with_sum(config, row, batch, card, dtype)]


def _with_sum(config: ViTConfig, row: Launch, batch: int, card: Chip, dtype: torch.dtype) -> list[Launch]:
    """A launch; where it is a product with K in parts, also the one that adds these up and does the epilogue."""
    from vitfast.kernels.linear import CONFIGS, SUM_CONFIG, split_of

    split = next((split_of(tile) for tile in CONFIGS if tile.name == row.config), 1)
    if split == 1:
        return [row]
    dims = site_spec(config, row.site, batch, torch.device("cpu"), dtype).dims
    partial = 4 * split * dims["rows"] * dims["width"]
    operands = dtype.itemsize * dims["inner"] * (dims["rows"] + dims["width"])
    moved = row.bytes - operands + partial  # what the epilogue moves, and the parts once more
    sums = Launch(f"{row.site}_sum", row.count, 0, moved, SUM_CONFIG.name, 1, 1, 0, _memory_us(card, moved), 0)
    return [replace(row, bytes=operands + partial, memory_us=_memory_us(card, operands + partial)), sums]


def flops(config: ViTConfig, site: str, batch: int) -> int:
    """FLOPs (two per multiply-add) that one call of a site needs; padding does not count, nor do passes."""
    dims = site_spec(config, site, batch, torch.device("cpu"), torch.float32).dims
    tokens = config.tokens()
    if "inner" in dims:
        return 2 * dims["rows"] * dims["inner"] * dims["width"]
    if site == "mlp":
        return 2 * dims["rows"] * dims["width"] * (dims["hidden"] + config.mlp_dim)
    if site == "attention":
        return 4 * batch * config.heads * tokens * tokens * config.head_dim
    if site == "patch_embed":
        return 2 * batch * (tokens - config.prefix_tokens) * dims["patch"] * dims["width"]
    return 0


def _math_us(card: Chip, dtype: torch.dtype, work: float, share: float) -> float:
    peak, sustained = peak_tflops(card, dtype), SUSTAINED_EIGHT if dtype.itemsize == 1 else SUSTAINED_MATH
    if peak is None:
        raise ValueError(f"{card.name} has no products in {dtype}")
    return work / (peak * 1e6 * sustained * share)


def _memory_us(card: Chip, moved: int) -> float:
    return moved / (card.memory_gb_s * 1e3 * SUSTAINED_MEMORY)


def _covering(extent: int, block: int) -> int:
    return -(-extent // block)


def _wave_share(tiles: int, slots: int) -> float:
    return tiles / (_covering(tiles, slots) * slots)


def _tiled(
    site: str, count: int, work: int, moved: int, m: int, n: int, tile: Config, card: Chip, dtype: torch.dtype
) -> Launch:
    """A product whose [m, n] output is cut into tiles; tiles of 4 warps run two to a multiprocessor."""
    block_m, block_n = tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"]
    tiles = _covering(m, block_m) * _covering(n, block_n)
    tile_share = m * n / (tiles * block_m * block_n)
    wave_share = _wave_share(tiles * tile.blocks.get("SPLIT_K", 1), card.multiprocessors * (8 // tile.num_warps))
    return Launch(
        site=site,
        count=count,
        flops=work,
        bytes=moved,
        config=tile.name,
        tile_share=tile_share,
        wave_share=wave_share,
        math_us=_math_us(card, dtype, work, tile_share * wave_share),
        memory_us=_memory_us(card, moved),
        exp_us=0.0,
    )


def _product(
    config: ViTConfig,
    site: str,
    count: int,
    batch: int,
    card: Chip,
    dtype: torch.dtype,
    quantized: torch.dtype | None = None,
    *,
    residual: bool = False,
    gated: bool = False,
) -> Launch:
    from vitfast.kernels import linear, quantized_linear

    dims = site_spec(config, site, batch, torch.device("cpu"), dtype).dims
    m, k, n = dims["rows"], dims["inner"], dims["width"]
    out = n // 2 if gated else n
    around = dtype.itemsize * (n + (m * out if residual else 0))  # bias and residual
    if quantized is not None:
        mixed = site == "proj" and scales_heads(config)
        name = f"hidden_{site}" if site in ("fc1", "fc2") else f"mixed_{site}" if mixed else f"quantized_{site}"
        group = {"hidden_fc2": quantized_linear.SCALE_GROUP, "mixed_proj": config.head_dim}.get(name, k)
        problem = quantized_linear.Problem(
            m, out, k, quantized, gated, requantize=name == "hidden_fc1", group=group if group < k else 0,
            tma=card.capability >= (9, 0) and k % 16 == 0 and out % 16 == 0,
        )  # fmt: skip
        tile = quantized_linear.pick_config(problem, card.multiprocessors)
        x_scales = _covering(k, group)
        moved = around + m * k + n * k + 4 * (m * x_scales + n)  # operands and their scales
        if name == "hidden_fc1":
            moved += m * out + 4 * m * _covering(out, quantized_linear.SCALE_GROUP)
        else:
            moved += dtype.itemsize * m * out
        return _tiled(name, count, flops(config, site, batch), moved, m, out, tile, card, quantized)
    tma = card.capability >= (9, 0) and dtype != torch.float32 and k % 8 == 0 and out % 8 == 0
    tile = linear.pick_config(linear.Problem(m, out, k, dtype, tma, gated, residual), card.multiprocessors)
    moved = around + dtype.itemsize * (m * k + n * k + m * out)
    return _tiled(site, count, flops(config, site, batch), moved, m, out, tile, card, dtype)


def _quantize(
    config: ViTConfig, site: str, count: int, batch: int, card: Chip, dtype: torch.dtype, *, norm: bool
) -> Launch:
    """The pass that quantises the rows before a product: read in `dtype`, written in 8 bits with a scale each."""
    from vitfast.kernels.layer_norm import pick_config

    dims = site_spec(config, site, batch, torch.device("cpu"), dtype).dims
    m, k = dims["rows"], dims["inner"]
    moved = m * k * (dtype.itemsize + 1) + 4 * m + (2 * k * dtype.itemsize if norm else 0)
    return Launch(f"quantize_{site}", count, 0, moved, pick_config(k).name, 1.0, 1.0, 0.0, _memory_us(card, moved), 0.0)


def _patch_embed(config: ViTConfig, batch: int, card: Chip, dtype: torch.dtype) -> Launch:
    from vitfast.kernels.patch_embed import pick_config

    height, width = config.image_size
    patches = config.tokens() - config.prefix_tokens
    inner = config.in_channels * config.patch_size[0] * config.patch_size[1]
    tile = pick_config(batch * patches, config.width, torch.uint8, dtype, card.multiprocessors)
    moved = batch * height * width * config.in_channels + dtype.itemsize * (
        config.width * (inner + 1) + (patches + batch * config.tokens()) * config.width
    )
    work = flops(config, "patch_embed", batch)
    return _tiled("patch_embed", 1, work, moved, batch * patches, config.width, tile, card, dtype)


def _attention(
    config: ViTConfig, count: int, batch: int, card: Chip, dtype: torch.dtype, quantized: torch.dtype | None = None
) -> Launch:
    """With quantised products and a head dim that allows it, in 8 bits and with a scale for each head of a row."""
    from vitfast.kernels._parts.attention_arguments import Problem, head_chunks
    from vitfast.kernels.attention import pick_config

    tokens, heads = config.tokens(), config.heads
    kind = "fp32" if dtype == torch.float32 else "half"
    tile = pick_config(Problem(config.head_dim, tokens, tokens, dtype, card.capability, kind))
    block_m, block_n = tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"]
    whole, left = divmod(tokens, block_n)
    keys = whole * block_n + (max(16, 1 << (left - 1).bit_length()) if left else 0)
    programs = _covering(tokens, block_m) * batch * heads
    queries = _covering(tokens, block_m) * block_m
    tile_share = tokens * tokens * config.head_dim / (queries * keys * sum(head_chunks(config.head_dim)))
    wave_share = _wave_share(programs, card.multiprocessors * (8 // tile.num_warps))
    mixed = quantized is not None and scales_heads(config)
    rows, width = batch * tokens, heads * config.head_dim
    moved = rows * (dtype.itemsize * 3 * width + (width + 4 * heads if mixed else dtype.itemsize * width))
    work = flops(config, "attention", batch)
    exponentials = batch * heads * queries * keys
    return Launch(
        site="mixed_attention" if mixed else "attention",
        count=count,
        flops=work,
        bytes=moved,
        config=tile.name,
        tile_share=tile_share,
        wave_share=wave_share,
        math_us=_math_us(card, dtype, work, tile_share * wave_share),
        memory_us=_memory_us(card, moved),
        exp_us=exponentials / (card.multiprocessors * EXP_PER_CLOCK * card.clock_ghz * 1e3),
    )


def _pass(
    config: ViTConfig, site: str, count: int, batch: int, card: Chip, dtype: torch.dtype, *, passes: int
) -> Launch:
    """A launch that reads all tokens once, and writes them if `passes` is 2."""
    from vitfast.kernels.layer_norm import STATS_CONFIG, pick_config

    moved = dtype.itemsize * passes * batch * config.tokens() * config.width
    tile = STATS_CONFIG if site == "row_stats" else pick_config(config.width)
    return Launch(site, count, 0, moved, tile.name, 1.0, 1.0, 0.0, _memory_us(card, moved), 0.0)
