"""The launches of a forward on a GPU that need not be here: FLOPs, bytes and tiles of each, and its time by a model.

What `vitfast.diagnostics.predict` adds up; it says what the model is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from vitfast.diagnostics.chips import (
    EXP_PER_CLOCK,
    LAUNCH_US,
    SUSTAINED_EIGHT,
    SUSTAINED_MATH,
    SUSTAINED_MEMORY,
    Chip,
    peak_tflops,
)
from vitfast.engine.cases import OPS, Dims
from vitfast.engine.dtypes import QUANTIZED
from vitfast.engine.sites import folds_norms, scales_heads, site_dims
from vitfast.models.config import ViTConfig
from vitfast.models.plan import SITES

if TYPE_CHECKING:
    from vitfast.kernels._parts.launch import Config


@dataclass(frozen=True)
class Launch:
    """The prediction for one kind of launch. Times in microseconds, for one launch; `count` in the forward.

    `site` names the place in the forward, `op` and `dims` the case of `vitfast.engine.cases` that it is.
    """

    site: str
    count: int
    op: str
    dims: Dims
    flops: int
    bytes: int
    config: str
    tile_efficiency: float
    wave_efficiency: float
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


@dataclass(frozen=True)
class _Step:
    """A place in the forward: its name, how often it comes, the op there and its sizes."""

    name: str
    count: int
    op: str
    dims: Dims


def _steps(config: ViTConfig, batch: int, precision: str) -> Iterator[_Step]:
    """The forward in order: with norms folded where they can be, or with products in 8 bits ("fp8" or "int8").

    RMSNorm is predicted as LayerNorm, attention in windows as attention over all tokens. What runs in torch is left
    out: a stem, a neck, a gate, a norm of v and attention pooling.
    """
    folded = folds_norms(config)

    def step(site: str, count: int = 1, name: str = "", **changes: Any) -> _Step:
        entry = SITES[site]
        dims = site_dims(config, entry, batch, precision=precision if entry.quantized else "", folded=folded)
        return _Step(name or site, count, entry.op, {**dims, **changes})

    def norm(name: str, wanted: bool, **changes: Any) -> Iterator[_Step]:
        if wanted:
            yield step("layer_norm", config.depth, name, **changes)

    depth, before = config.depth, config.block != "post" and not folded
    after = config.block in ("post", "sandwich")
    if not config.stem:
        yield step("patch_embed")
    if config.embed_norm:
        yield step("layer_norm", name="embed_norm")
    if config.pre_norm:
        yield step("layer_norm", name="norm_pre")
    if not precision:
        if folded:
            yield step("row_stats")
        yield from norm("norm1", before)
        yield step("qkv", depth)
        yield step("attention", (1 + config.differential) * depth)
        yield from norm("attention_norm", config.attention_norm, width=config.heads * config.head_dim)
        yield step("proj", depth)
        yield from norm("norm1", after)
        yield from norm("norm2", before)
        yield from norm("norm3", config.double_norm)
        yield step("fc1", depth)
        yield from norm("mlp_norm", config.mlp_norm, width=config.mlp_dim)
        yield step("fc2", depth)
        yield from norm("norm2", after)
    else:
        yield step("quantize", depth, "quantize_qkv")
        yield step("quantized_qkv", depth)
        if scales_heads(config):
            yield from (step("attention_quantize", depth), step("proj_head_scales", depth))
        else:
            yield step("attention", depth)
            yield step("quantize", depth, "quantize_proj", width=config.heads * config.head_dim, norm="")
            yield step("quantized_proj", depth)
        yield step("quantize", depth, "quantize_fc1")
        yield from (step("fc1_requantize", depth), step("fc2_group_scales", depth))
    if config.final_norm:
        yield step("layer_norm", name="norm")
    if config.projection_dim or config.num_classes:
        yield step("head")


def launches(config: ViTConfig, batch: int, card: Chip, dtype: torch.dtype, precision: str = "") -> list[Launch]:
    """Every kind of launch of the forward, in order; `precision`: "fp8" or "int8" where products are in 8 bits."""
    rows = [_PREDICTED[step.op](step, card, dtype) for step in _steps(config, batch, precision)]
    return [launch for row in rows for launch in _with_sum(row, card, dtype)]


def backward_launches(config: ViTConfig, batch: int, card: Chip, dtype: torch.dtype) -> list[Launch]:
    """Those of the gradients of the forward's attention. FLOPs are what the kernels multiply: both make the scores."""
    (attention,) = (step for step in _steps(config, batch, "") if step.op == "attention")
    steps = (replace(attention, name=op, op=op) for op in ("attention_dq", "attention_dkdv"))
    return [_attention_backward(step, card, dtype) for step in steps]


def launches_of(op: str, dims: Dims, card: Chip, dtype: torch.dtype) -> list[Launch]:
    """The launches of one case of an op, as `vitfast.engine.cases` describes it: one, or two where K is in parts."""
    return _with_sum(_PREDICTED[op](_Step(op, 1, op, dims), card, dtype), card, dtype)


def _with_sum(row: Launch, card: Chip, dtype: torch.dtype) -> list[Launch]:
    """A launch; where it is a product with K in parts, also the one that adds these up and does the epilogue."""
    from vitfast.kernels.linear import CONFIGS, SUM_CONFIG, split_of

    split = next((split_of(tile) for tile in CONFIGS if tile.name == row.config), 1)
    if row.op != "linear" or split == 1:
        return [row]
    m, k, n = row.dims["M"], row.dims["K"], row.dims["N"]
    partial = 4 * split * m * n
    operands = dtype.itemsize * k * (m + n)
    moved = row.bytes - operands + partial  # what the epilogue moves, and the parts once more
    sums = Launch(
        f"{row.site}_sum", row.count, "linear_sum", row.dims, 0, moved, SUM_CONFIG.name, 1, 1, 0,
        _memory_us(card, moved), 0,
    )  # fmt: skip
    return [replace(row, bytes=operands + partial, memory_us=_memory_us(card, operands + partial)), sums]


def _math_us(card: Chip, dtype: torch.dtype, work: float, efficiency: float) -> float:
    peak, sustained = peak_tflops(card, dtype), SUSTAINED_EIGHT if dtype.itemsize == 1 else SUSTAINED_MATH
    if peak is None:
        raise ValueError(f"{card.name} has no products in {dtype}")
    return work / (peak * 1e6 * sustained * efficiency)


def _memory_us(card: Chip, moved: int) -> float:
    return moved / (card.memory_gb_s * 1e3 * SUSTAINED_MEMORY)


def _covering(extent: int, block: int) -> int:
    return -(-extent // block)


def _wave_efficiency(tiles: int, slots: int) -> float:
    return tiles / (_covering(tiles, slots) * slots)


def _tiled(step: _Step, moved: int, m: int, n: int, tile: Config, card: Chip, dtype: torch.dtype) -> Launch:
    """A product whose [m, n] output is cut into tiles; tiles of 4 warps run two to a multiprocessor."""
    block_m, block_n = tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"]
    tiles, work = _covering(m, block_m) * _covering(n, block_n), OPS[step.op].flops(step.dims)
    tile_efficiency = m * n / (tiles * block_m * block_n)
    slots = card.multiprocessors * (8 // tile.num_warps)
    wave_efficiency = _wave_efficiency(tiles * tile.blocks.get("SPLIT_K", 1), slots)
    return Launch(
        site=step.name,
        count=step.count,
        op=step.op,
        dims=step.dims,
        flops=work,
        bytes=moved,
        config=tile.name,
        tile_efficiency=tile_efficiency,
        wave_efficiency=wave_efficiency,
        math_us=_math_us(card, dtype, work, tile_efficiency * wave_efficiency),
        memory_us=_memory_us(card, moved),
        exp_us=0.0,
    )


def _linear(step: _Step, card: Chip, dtype: torch.dtype) -> Launch:
    from vitfast.kernels import linear

    m, k, out, epilogue = step.dims["M"], step.dims["K"], step.dims["N"], step.dims["epilogue"].split()
    gated, residual = "swiglu" in epilogue, "residual" in epilogue
    n = 2 * out if gated else out
    tma = card.capability >= (9, 0) and dtype != torch.float32 and k % 8 == 0 and out % 8 == 0
    problem = linear.Problem(m, out, k, dtype, tma, gated, residual, card.capability[0] == 9)
    tile = linear.pick_config(problem, card.multiprocessors)
    moved = dtype.itemsize * (m * k + n * k + n + m * out + (m * out if residual else 0))
    return _tiled(step, moved, m, out, tile, card, dtype)


def _quantized_linear(step: _Step, card: Chip, dtype: torch.dtype) -> Launch:
    from vitfast.kernels import quantized_linear

    m, k, out, epilogue = step.dims["M"], step.dims["K"], step.dims["N"], step.dims["epilogue"].split()
    gated, requantize = "swiglu" in epilogue, "requantize" in epilogue
    n = 2 * out if gated else out
    group = quantized_linear.SCALE_GROUP if "groups" in epilogue else 64 if "heads" in epilogue else k
    kind = QUANTIZED[step.dims["precision"]]
    problem = quantized_linear.Problem(
        m, out, k, kind, gated, requantize=requantize, group=group if group < k else 0,
        tma=card.capability >= (9, 0) and k % 16 == 0 and out % 16 == 0,
    )  # fmt: skip
    tile = quantized_linear.pick_config(problem, card.multiprocessors)
    moved = m * k + n * k + 4 * (m * _covering(k, group) + n)  # operands and their scales
    moved += dtype.itemsize * (n + (m * out if "residual" in epilogue else 0))
    if requantize:
        moved += m * out + 4 * m * _covering(out, quantized_linear.SCALE_GROUP)
    else:
        moved += dtype.itemsize * m * out
    return _tiled(step, moved, m, out, tile, card, kind)


def _patch_embed(step: _Step, card: Chip, dtype: torch.dtype) -> Launch:
    from vitfast.kernels.patch_embed import pick_config

    op, batch, width = OPS[step.op], step.dims["batch"], step.dims["width"]
    inner = op.spec(step.dims)["patch"]
    patches = op.flops(step.dims) // (2 * batch * inner * width)
    tile = pick_config(batch * patches, width, torch.uint8, dtype, card.multiprocessors)
    tokens = patches + step.dims.get("prefix", 1)
    moved = batch * patches * inner + dtype.itemsize * width * (inner + 1 + patches + batch * tokens)
    return _tiled(step, moved, batch * patches, width, tile, card, dtype)


def _attention(step: _Step, card: Chip, dtype: torch.dtype) -> Launch:
    """In 8 bits with a scale for each head of a row, where the next product reads that."""
    from vitfast.kernels._parts.attention_arguments import Problem
    from vitfast.kernels.attention import pick_config

    batch, tokens, heads, head_dim = (step.dims[name] for name in ("batch", "tokens", "heads", "head_dim"))
    kind = "fp32" if dtype == torch.float32 else "half"
    tile = pick_config(Problem(head_dim, tokens, tokens, dtype, card.capability, kind))
    rows, width = batch * tokens, heads * head_dim
    in_8_bits = "to" in step.dims.get("variant", "").split()
    moved = rows * (dtype.itemsize * 3 * width + (width + 4 * heads if in_8_bits else dtype.itemsize * width))
    return _over_tokens(step, OPS["attention"].flops(step.dims), moved, tile, "MN", card, dtype)


def _attention_backward(step: _Step, card: Chip, dtype: torch.dtype) -> Launch:
    """`attention_dq` multiplies three times, and moves q, k, v, out, dout and dq; `attention_dkdv` four times.

    That one moves q, k, v, dout, dk and dv. Both move three numbers a row in fp32: its maximum, its sum and delta.
    """
    from vitfast.kernels.attention_backward import pick_config

    kernel = step.op.removeprefix("attention_")
    batch, tokens, heads, head_dim = (step.dims[name] for name in ("batch", "tokens", "heads", "head_dim"))
    tile = pick_config(kernel, head_dim, dtype, False, card.capability)
    products, axes = {"dq": (3, "MN"), "dkdv": (4, "NM")}[kernel]
    moved = batch * tokens * heads * (6 * dtype.itemsize * head_dim + 3 * 4)
    return _over_tokens(step, OPS["attention"].flops(step.dims) // 2 * products, moved, tile, axes, card, dtype)


def _over_tokens(step: _Step, work: int, moved: int, tile: Config, axes: str, card: Chip, dtype: torch.dtype) -> Launch:
    """Of programs with a tile of tokens each, of axis axes[0], that walk over all tokens in tiles of axes[1]."""
    from vitfast.kernels._parts.attention_arguments import head_chunks

    batch, tokens, heads, head_dim = (step.dims[name] for name in ("batch", "tokens", "heads", "head_dim"))
    own, walked = (tile.blocks[f"BLOCK_{axis}"] for axis in axes)
    whole, left = divmod(tokens, walked)
    seen = whole * walked + (max(16, 1 << (left - 1).bit_length()) if left else 0)
    tiles = _covering(tokens, own)
    tile_efficiency = tokens * tokens * head_dim / (tiles * own * seen * sum(head_chunks(head_dim)))
    wave_efficiency = _wave_efficiency(tiles * batch * heads, card.multiprocessors * (8 // tile.num_warps))
    exponentials = batch * heads * tiles * own * seen
    return Launch(
        site=step.name,
        count=step.count,
        op=step.op,
        dims=step.dims,
        flops=work,
        bytes=moved,
        config=tile.name,
        tile_efficiency=tile_efficiency,
        wave_efficiency=wave_efficiency,
        math_us=_math_us(card, dtype, work, tile_efficiency * wave_efficiency),
        memory_us=_memory_us(card, moved),
        exp_us=exponentials / (card.multiprocessors * EXP_PER_CLOCK * card.clock_ghz * 1e3),
    )


def _along_rows(step: _Step, moved: int, config: str, card: Chip) -> Launch:
    """A launch that only moves rows."""
    return Launch(
        step.name, step.count, step.op, step.dims, 0, moved, config, 1.0, 1.0, 0.0, _memory_us(card, moved), 0.0
    )


def _layer_norm(step: _Step, card: Chip, dtype: torch.dtype) -> Launch:
    from vitfast.kernels.layer_norm import pick_config

    rows, width = step.dims["rows"], step.dims["width"]
    return _along_rows(step, 2 * dtype.itemsize * rows * width, pick_config(width).name, card)


def _row_stats(step: _Step, card: Chip, dtype: torch.dtype) -> Launch:
    from vitfast.kernels.layer_norm import STATS_CONFIG

    return _along_rows(step, dtype.itemsize * step.dims["rows"] * step.dims["width"], STATS_CONFIG.name, card)


def _quantize(step: _Step, card: Chip, dtype: torch.dtype) -> Launch:
    """The pass that quantises rows before a product: read in `dtype`, written in 8 bits with a scale each."""
    from vitfast.kernels.layer_norm import pick_config

    rows, width = step.dims["rows"], step.dims["width"]
    moved = rows * width * (dtype.itemsize + 1) + 4 * rows + (2 * width * dtype.itemsize if step.dims["norm"] else 0)
    return _along_rows(step, moved, pick_config(width).name, card)


_PREDICTED = {
    "patch_embed": _patch_embed,
    "layer_norm": _layer_norm,
    "row_stats": _row_stats,
    "linear": _linear,
    "attention": _attention,
    "quantize": _quantize,
    "quantized_linear": _quantized_linear,
}
"""Of each op of a step, what predicts its launch."""
