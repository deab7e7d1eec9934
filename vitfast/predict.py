"""How long each launch of a forward should take on a GPU that need not be here. A model, no measurement.

A launch takes the longest of three times, plus a constant for starting it:

    math     FLOPs / (peak * SUSTAINED_MATH) / tile share / wave share
    memory   bytes / (bandwidth * SUSTAINED_MEMORY), each operand and result moved once
    exp      exponentials / (multiprocessors * 16 per clock), in attention only

Tile share is the useful part of the tiles that cover the output; wave share the part of the last
round of tiles in which multiprocessors have work. The three are taken to overlap perfectly and L2
to serve every reread, so a prediction is a bound from below for these tiles, not for the hardware.
(The roofline of Williams, Waterman, Patterson 2009, with quantisation.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from vitfast.config import ViTConfig
from vitfast.planner import site_spec

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vitfast.kernels._common import Config

SUSTAINED_MATH = 0.80
SUSTAINED_MEMORY = 0.90
"""Shares of the data sheet's peaks that a large product and a large copy sustain. Assumptions, of the
size usually seen on an H100; a card's own roofs, measured, should replace them."""

LAUNCH_US = 1.3
"""Microseconds between dependent kernels of a CUDA graph. An assumption as well."""

EXP_PER_CLOCK = 16
"""exp2 a clock and multiprocessor (CUDA C++ Programming Guide, arithmetic instruction throughput)."""


@dataclass(frozen=True)
class Chip:
    """A GPU's peaks from its data sheet: dense TFLOP/s (no sparsity), GB/s, boost clock in GHz."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    half_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    clock_ghz: float
    source: str


CHIPS = {
    "a100": Chip("A100 SXM 80 GB", (8, 0), 108, 312, 19.5, 2039, 1.41, "NVIDIA A100 data sheet, 2021"),
    "l40s": Chip("L40S", (8, 9), 142, 362, 91.6, 864, 2.52, "NVIDIA L40S data sheet, 2023"),
    "h100": Chip("H100 SXM", (9, 0), 132, 989, 67, 3350, 1.83, "NVIDIA H100 data sheet, 2023"),
    "h200": Chip("H200 SXM", (9, 0), 132, 989, 67, 4800, 1.83, "NVIDIA H200 data sheet, 2024"),
    "b200": Chip("B200", (10, 0), 148, 2250, 75, 8000, 1.85, "NVIDIA Blackwell data sheet, 2024"),
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def predict(config: ViTConfig, *, batch: int, chip: str, dtype: str = "bf16") -> dict[str, Any]:
    """Predict every launch of the forward from uint8 pixels, norms folded, and the sum.

    Args:
        batch: images. chip: a key of CHIPS. dtype: "bf16", "fp16" or "fp32".

    Returns:
        What json.dumps accepts: model, batch, chip, dtype, `predicted` (always True), `assumptions`,
        `launches` (rows as Launch, with bound, time_us and share of the whole), gflop_per_image,
        time_us, images_per_s, and `math_share`: useful FLOP/s over the data sheet's peak.

    Raises:
        ValueError: for an unknown chip or dtype, or a batch below 1; the message lists what is allowed.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, got {chip!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    card = CHIPS[chip]
    launches = _launches(config, batch, card, DTYPES[dtype])
    total = sum(launch.count * launch.time_us for launch in launches)
    flops = sum(launch.count * launch.flops for launch in launches)
    peak = card.fp32_tflops if dtype == "fp32" else card.half_tflops
    return {
        "model": config.name,
        "batch": batch,
        "chip": asdict(card),
        "dtype": dtype,
        "predicted": True,
        "assumptions": {
            "sustained_math": SUSTAINED_MATH,
            "sustained_memory": SUSTAINED_MEMORY,
            "launch_us": LAUNCH_US,
            "exp_per_clock": EXP_PER_CLOCK,
        },
        "launches": [
            {**asdict(launch), "bound": launch.bound, "time_us": launch.time_us,
             "share": launch.count * launch.time_us / total}
            for launch in launches
        ],
        "gflop_per_image": flops / batch / 1e9,
        "time_us": total,
        "images_per_s": batch / total * 1e6,
        "math_share": flops / total / peak / 1e6,
    }  # fmt: skip


def add_occupancy(prediction: dict[str, Any], config: ViTConfig) -> None:
    """Compile each launch's kernel for the chip; add to its row `occupancy`, as `inspect.compute_occupancy`, or None.

    The compile case with the launch's config is taken, and with the epilogue nearest to its own. `occupancy_note`
    says why one is not known: Triton is missing or interpreting, or there is no such case.
    """
    from vitfast import inspect

    major, minor = prediction["chip"]["capability"]
    arch, prediction["occupancy_note"] = f"sm_{major}{minor}", ""
    for row in prediction["launches"]:
        row["occupancy"] = None
    for row in prediction["launches"]:
        try:
            file, kernel, name, constexprs = _compiled(row, config)
            case = inspect.find_case(file, kernel, name, arch, **constexprs)
        except RuntimeError as error:
            prediction["occupancy_note"] = str(error)
            return
        if case is None:
            prediction["occupancy_note"] = f"no compile case of {row['site']}, config {row['config']}, for {arch}"
        else:
            row["occupancy"] = inspect.inspect_case(case, arch)["occupancy"]


def _compiled(row: dict[str, Any], config: ViTConfig) -> tuple[str, str, str, dict[str, Any]]:
    """File, kernel and name of a launch's compile case, and constexprs that it must have."""
    site, name = row["site"], row["config"]
    if site in ("norm", "norm_pre", "row_stats"):
        return "layer_norm", "row_stats" if site == "row_stats" else "layer_norm", name, {}
    if site == "patch_embed":
        return site, site, f"{name}_uint8_nhwc_{config.patch_size[0]}", {}
    if site == "attention":
        return site, site, name, {"HEAD_DIM": config.head_dim, "bias": None, "mask": None, "max_out": None}
    product = site.removesuffix("_sum")
    epilogue = {"proj": "residual_stats", "fc2": "residual_stats", "head": "gelu"}.get(product, "norm_gelu")
    if site != product:
        return "linear", "linear_sum", f"{name}_{epilogue}", {}
    if "_split" in name:
        epilogue = "part"
    if site == "fc1" and config.gated:
        epilogue = "norm_swiglu"
    return "linear", "linear", f"{name}_{epilogue}", {}


def _launches(config: ViTConfig, batch: int, card: Chip, dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch of the forward with folded norms, in order."""
    depth = config.depth
    rows = [_patch_embed(config, batch, card, dtype)]
    if config.pre_norm:
        rows.append(_pass(config, "norm_pre", 1, batch, card, dtype, passes=2))
    rows.append(_pass(config, "row_stats", 1, batch, card, dtype, passes=1))
    rows.append(_product(config, "qkv", depth, batch, card, dtype))
    rows.append(_attention(config, depth, batch, card, dtype))
    rows.append(_product(config, "proj", depth, batch, card, dtype, residual=True))
    rows.append(_product(config, "fc1", depth, batch, card, dtype, gated=config.gated))
    rows.append(_product(config, "fc2", depth, batch, card, dtype, residual=True))
    if config.final_norm:
        rows.append(_pass(config, "norm", 1, batch, card, dtype, passes=2))
    if config.projection_dim or config.num_classes:
        rows.append(_product(config, "head", 1, batch, card, dtype))
    return [launch for row in rows for launch in _with_sum(config, row, batch, card, dtype)]


def _with_sum(config: ViTConfig, row: Launch, batch: int, card: Chip, dtype: torch.dtype) -> list[Launch]:
    """A launch; where it is a product with K in parts, also the one that adds these up and does the epilogue."""
    from vitfast.kernels._linear_configs import CONFIGS, SUM_CONFIG, split_of

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
    peak = card.fp32_tflops if dtype == torch.float32 else card.half_tflops
    return work / (peak * 1e6 * SUSTAINED_MATH * share)


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
    *,
    residual: bool = False,
    gated: bool = False,
) -> Launch:
    from vitfast.kernels._linear_configs import pick_config

    dims = site_spec(config, site, batch, torch.device("cpu"), dtype).dims
    m, k, n = dims["rows"], dims["inner"], dims["width"]
    out = n // 2 if gated else n
    tma = card.capability >= (9, 0) and dtype != torch.float32 and k % 8 == 0 and out % 8 == 0
    tile = pick_config(m, out, dtype, inner=k, tma=tma, sms=card.multiprocessors, gated=gated, stats=residual)
    moved = dtype.itemsize * (m * k + n * k + n + m * out * (2 if residual else 1))
    return _tiled(site, count, flops(config, site, batch), moved, m, out, tile, card, dtype)


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


def _attention(config: ViTConfig, count: int, batch: int, card: Chip, dtype: torch.dtype) -> Launch:
    from vitfast.kernels._attention_configs import head_chunks, pick_config

    tokens, heads = config.tokens(), config.heads
    tile = pick_config(config.head_dim, tokens, dtype, False, card.capability)
    block_m, block_n = tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"]
    whole, left = divmod(tokens, block_n)
    keys = whole * block_n + (max(16, 1 << (left - 1).bit_length()) if left else 0)
    programs = _covering(tokens, block_m) * batch * heads
    queries = _covering(tokens, block_m) * block_m
    tile_share = tokens * tokens * config.head_dim / (queries * keys * sum(head_chunks(config.head_dim)))
    wave_share = _wave_share(programs, card.multiprocessors * (8 // tile.num_warps))
    moved = dtype.itemsize * 4 * batch * tokens * heads * config.head_dim
    work = flops(config, "attention", batch)
    exponentials = batch * heads * queries * keys
    return Launch(
        site="attention",
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


def render(prediction: dict[str, Any]) -> list[RenderableType]:
    """The prediction as a table for a person, with what was measured beside it where there is something."""
    from rich import box
    from rich.table import Table

    chip = prediction["chip"]
    table = Table(
        title=f"predicted, not measured: {prediction['model']} batch {prediction['batch']} {prediction['dtype']} "
        f"on {chip['name']}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    measured = any("measured_us" in row for row in prediction["launches"])
    for column in ("launch", "config"):
        table.add_column(column, overflow="fold")
    for column in (
        "times", "GFLOP", "MB", "tile", "wave", "blocks\nan SM", "math\nµs", "memory\nµs", "exp\nµs", "bound", "µs",
        "share", *(["measured\nµs"] if measured else []),
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in prediction["launches"]:
        occupancy = row.get("occupancy")
        cells = [
            row["site"],
            row["config"],
            str(row["count"]),
            f"{row['flops'] / 1e9:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['tile_share']:.0%}",
            f"{row['wave_share']:.0%}",
            str(occupancy["blocks_per_sm"]) if occupancy else "?",
            f"{row['math_us']:.1f}",
            f"{row['memory_us']:.1f}",
            f"{row['exp_us']:.1f}",
            row["bound"],
            f"{row['time_us']:.1f}",
            f"{row['share']:.1%}",
        ]
        table.add_row(*cells, *([f"{row['measured_us']:.1f}"] if "measured_us" in row else []))
    lines: list[Any] = [
        table,
        f"predicted: {prediction['time_us'] / 1e3:.2f} ms, {prediction['images_per_s']:,.0f} img/s; "
        f"{prediction['gflop_per_image']:.1f} GFLOP an image; {prediction['math_share']:.0%} of the data sheet's peak "
        f"({chip['source']})",
    ]
    if "measured_images_per_s" in prediction:
        lines.append(
            f"measured: {prediction['measured_images_per_s']:,.0f} img/s ({prediction['measured_in']}), "
            f"{prediction['measured_images_per_s'] / prediction['images_per_s']:.0%} of what is predicted"
        )
    if note := prediction.get("occupancy_note"):
        lines.append(f"blocks an SM are not all known: {note}")
    return lines
