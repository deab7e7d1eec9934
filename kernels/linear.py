"""act(norm(x) Wᵀ + b) * layer_scale + residual, in one pass over the output.

    x [M, K], W [N, K] -> y [M, N]; "swiglu": W [2F, K], gate rows first, y [M, F] = silu(gate) * up
    norm: LayerNorm folded into the product, rstd * (x Wᵀ - mean * weight_sum), where mean and rstd
          come from per-128-column (mean, M2) pairs of x, combined by Chan's formula
    stats: the same pairs of y, as stored, for the LayerNorm that follows

Fused: the folded LayerNorm, bias, activation, LayerScale, residual and row statistics; nothing is
written but y and the statistics. Dtypes: float32, float16, bfloat16; fp32 accumulation and epilogue
(float32 multiplies in full precision, not TF32). Bound by FLOPs at ViT widths and M in the
thousands, by the bytes of W at small M.

Two kernels share the epilogue, both persistent in grouped order (tiles that run together share operands in L2):
`_linear_tma_kernel` moves tiles with the tensor memory accelerator (sm_90 and later, 16-bit dtypes, rows of a multiple
of 16 bytes); `_linear_kernel` takes everything else. With few rows there are fewer tiles than multiprocessors: K may
then be split among programs, which write bare fp32 sums, and `_linear_sum_kernel` adds these up, split after split, and
does the epilogue. There are no atomics: the bits are the same every time.

Sources: Ba, Kiros, Hinton 2016 (LayerNorm); Chan, Golub, LeVeque 1979 (combining statistics);
Shazeer 2020 (SwiGLU); Touvron et al. 2021 (LayerScale).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vitfast.kernels._parts import launch
from vitfast.kernels._parts.activation import ACTIVATIONS
from vitfast.kernels._parts.epilogue import (
    GROUP_M,
    STATS_TILE,
    activate_and_scale,
    combine_stats,
    store_stats,
    tile_origin,
)
from vitfast.kernels._parts.launch import DTYPES, Config

__all__ = ["ACTIVATIONS", "CAPABILITIES", "CONFIGS", "Problem", "linear", "pick_config", "problem_of", "why_not"]

CAPABILITIES: dict[str, Any] = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {}}

SPLITS = (4, 8)
"""Into how many ranges a config may split K."""


def _config(name: str, m: int, n: int, k: int, warps: int, stages: int, since: tuple[int, int] = (8, 0)) -> Config:
    return Config(name, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages, since)


def _splitting(config: Config) -> list[Config]:
    return [
        replace(config, name=f"{config.name}_split{count}", blocks={**config.blocks, "SPLIT_K": count})
        for count in SPLITS
    ]


# Where these come from: compiling for sm_80, sm_90 and sm_100. Each is the largest tile of its kind
# that spills no register with the epilogues of `_compile/linear.py`, with as many stages as fit in shared
# memory, and smaller tiles that spread less work over more multiprocessors. Of a "pair" two programs fit on a
# multiprocessor of sm_90, one in its epilogue while the other multiplies. None is measured yet.
TMA_CONFIGS = [
    _config("tma_128x256x64", 128, 256, 64, 8, 3, (9, 0)),
    _config("tma_128x128x64", 128, 128, 64, 8, 4, (9, 0)),
    _config("tma_128x128x64_pair", 128, 128, 64, 4, 2, (9, 0)),
    _config("tma_64x128x64", 64, 128, 64, 4, 4, (9, 0)),
    _config("tma_64x64x64", 64, 64, 64, 4, 4, (9, 0)),
]
PAIR = TMA_CONFIGS[2]
TMA_CONFIGS += _splitting(TMA_CONFIGS[3])
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
"""How the sums of a split are added up: tiles of whole row statistics, and few rows, so that there are many."""

MULTIPLY_ADDS_PER_US = 3_000_000
"""Of one multiprocessor, to set what a split costs against what it saves: an H100's, by its data sheet."""
OPERAND = 104
"""Multiply-adds in the time that one operand takes from L2 to a multiprocessor: 2 bytes at the 39 a clock that each of
132 gets of an H200's L2 (`vitfast.diagnostics.code_times.L2_BYTES_PER_CLOCK`), against 2048 multiply-adds a clock."""
EPILOGUE = 272
"""The same for one element of the output: 17 instructions, as many as the epilogues of `_compile/linear.py` have on
average on sm_90, at 128 a clock."""
ALONE = 64
"""As OPERAND, where few multiprocessors ask: the 64 bytes a clock that one of them can take."""
LAUNCH_US = 1.3
"""What one launch more costs in a CUDA graph. An assumption, as the next."""
PARTIAL_BYTES_PER_US = 60_000
"""Of partial sums, written to L2 and read back, for one multiprocessor while all do it."""
SPLIT_SAVES = 0.25
"""The share that a split must save to be picked: with it the last bits depend on how many rows there are."""


@dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on: y is M x N, K is summed over.

    `tma`: as `uses_tma` says; `hopper`: whether the compute capability is 9.
    """

    M: int
    N: int
    K: int
    dtype: torch.dtype
    tma: bool
    gated: bool = False
    stats: bool = False
    hopper: bool = True

    @property
    def key(self) -> str:
        """What a tuned choice depends on: the very shape, and what restricts the configs.

        16-bit configs all have one BLOCK_K, so that a tuned choice changes no order of summation, but for those
        that split K.
        """
        flags = {"tma": self.tma, "gated": self.gated, "stats": self.stats}
        shape = f"{self.M}x{self.K}x{self.N}"
        return " ".join([shape, str(self.dtype), *(name for name, on in flags.items() if on)])


def problem_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    stats: bool = False,
    **_: Any,
) -> Problem:
    """The problem of a call of `linear` with these arguments."""
    gated = activation == "swiglu"
    x = launch.rows_view("linear", "x", x)
    residual = None if residual is None else launch.rows_view("linear", "residual", residual)
    (M, K), N = x.shape, weight.shape[0] // 2 if gated else weight.shape[0]
    hopper = launch.capability(x.device)[0] == 9
    return Problem(M, N, K, x.dtype, uses_tma(N, x, weight, residual), gated, stats, hopper)


def uses_tma(N: int, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> bool:
    """Whether `_linear_tma_kernel` can run on these matrices [rows, columns] and an output of N columns.

    The tensor memory accelerator came with sm_90 and wants rows that start at multiples of 16 bytes.
    """
    if launch.capability(x.device) < (9, 0) or x.dtype == torch.float32:
        return False
    whole = N * x.element_size() % 16 == 0
    return whole and all(launch.fits_tma(t) for t in (x, weight, residual) if t is not None)


def split_of(config: Config) -> int:
    """Into how many ranges a config splits K."""
    return config.blocks.get("SPLIT_K", 1)


def why_not(config: Config, problem: Problem) -> list[str]:
    """Every reason why a config cannot run a problem; empty if it can."""
    reasons = []
    block_n, split = config.blocks["BLOCK_N"], split_of(config) > 1
    if (config in FLOAT32_CONFIGS) != (problem.dtype == torch.float32):
        reasons.append(f"it is not one for {problem.dtype}")
    if config in TMA_CONFIGS and not problem.tma:
        reasons.append("it needs compute capability 9.0, a 16-bit dtype and 16-byte aligned rows")
    if config is PAIR and problem.stats and not problem.hopper:
        reasons.append("with stats it spills registers of other chips than Hopper")
    if problem.stats and not split and block_n % STATS_TILE:
        reasons.append(f"its tiles have no multiple of {STATS_TILE} columns, as stats need")
    if problem.gated and split:
        reasons.append("it splits K, which swiglu's two sums cannot")
    # Two accumulators of more than 64 columns spill. With statistics, which need 128, they do: no ViT asks for that.
    elif problem.gated and block_n > (STATS_TILE if problem.stats else 64):
        reasons.append("it has no room for the two accumulators of swiglu")
    return reasons


def worth_trying(config: Config, problem: Problem, sms: int) -> bool:
    """Whether a config that can run a problem may be the fastest on `sms` multiprocessors.

    Where rows allow it, tiles come in by TMA: the others are for what it cannot read. K is split only where there are
    fewer tiles than multiprocessors.
    """
    if problem.tma and config not in TMA_CONFIGS:
        return False
    tiles = triton.cdiv(problem.M, config.blocks["BLOCK_M"]) * triton.cdiv(problem.N, config.blocks["BLOCK_N"])
    return split_of(config) == 1 or tiles < sms


def pick_config(problem: Problem, sms: int) -> Config:
    """The tile that keeps the busiest of `sms` multiprocessors busy for the shortest time, by a model.

    A tile takes as long as its operands come in, or as its products and then its epilogue, if that is more; a second
    program of 4 warps on the multiprocessor hides all epilogues but the last. Where there are fewer tiles than
    multiprocessors K may be split, at the price of one more launch and of writing and reading the partial sums, if that
    saves SPLIT_SAVES.
    """

    def price(config: Config) -> float:
        block_m, block_n, block_k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
        split = split_of(config)
        tiles = triton.cdiv(problem.M, block_m) * triton.cdiv(problem.N, block_n)
        rounds = triton.cdiv(tiles * split, sms)
        steps = triton.cdiv(triton.cdiv(problem.K, block_k), split)
        operand = max(ALONE, OPERAND * min(tiles * split, sms) / sms)
        products, operands = block_m * block_n, operand * (block_m + block_n)
        product = steps * block_k * max(products, operands)
        epilogue = EPILOGUE * block_m * block_n
        if split > 1:
            partial_us = rounds * block_m * block_n * 8 / PARTIAL_BYTES_PER_US
            return (rounds * product + MULTIPLY_ADDS_PER_US * (LAUNCH_US + partial_us)) / (1 - SPLIT_SAVES)
        if config.num_warps == 4:
            return rounds * max(product, epilogue) + epilogue
        return rounds * max(product, steps * block_k * products + epilogue)

    able = (config for config in CONFIGS if not why_not(config, problem))
    return min((config for config in able if worth_trying(config, problem, sms)), key=price)


@triton.jit
def _finish(
    y, y_stats, acc, up, bias, layer_scale, residual, row_stats, weight_sum, rows, first_column, residual_stride,
    M, N, K, eps, ACTIVATION: tl.constexpr, STATS_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The whole epilogue of a tile of at most 128 columns, and its store."""
    columns = first_column + tl.arange(0, BLOCK_N)
    row_ok = rows < M
    mean, rstd = None, None
    if row_stats is not None:
        mean, rstd = combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK)
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32
    value = activate_and_scale(acc, up, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION, EXACT)
    mask = row_ok[:, None] & (columns < N)[None, :]
    if residual is not None:
        offsets = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    value = value.to(y.dtype.element_ty)
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], value, mask=mask)
    if y_stats is not None:
        store_stats(y_stats, value, rows, row_ok, first_column, N, ACTIVATION == "swiglu")


@triton.jit
def _k_range(job, tiles, K, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Number of a job -> its tile, its split, and where the split begins and ends in K."""
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    split = job // tiles
    return job % tiles, split, split * length, tl.minimum((split + 1) * length, K)


@triton.jit
def _store_partial(partial, acc, split, rows, columns, M, N):
    """One split's sums, [BLOCK_M, BLOCK_N] fp32."""
    offsets = (split.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
    tl.store(partial + offsets, acc, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _linear_kernel(
    y,  # [M, N], or None
    y_stats,  # [M, ceil(N / 128), 2] fp32, or None
    partial,  # [SPLIT_K, M, N] fp32, or None; if given it takes the bare sums, and there is no epilogue
    x,  # [M, K]
    weight,  # [N, K], or [2N, K] for swiglu
    bias,  # [N] or [2N], or None
    layer_scale,  # [N], or None
    residual,  # [M, N], or None
    row_stats,  # [M, ceil(K / 128), 2] fp32, or None
    weight_sum,  # [N] or [2N] fp32, or None
    x_stride,
    weight_stride,
    residual_stride,
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tl.static_assert(BLOCK_N <= 128)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for job in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLIT_K, tl.num_programs(0)):
        # Locate.
        tile, split, first_k, last_k = job, 0, 0, K
        if SPLIT_K > 1:
            tile, split, first_k, last_k = _k_range(job, tiles_m * tiles_n, K, SPLIT_K, BLOCK_K)
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, GROUP)
        first_column = tile_n * BLOCK_N
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        offsets_k = tl.arange(0, BLOCK_K)
        row_ok, column_ok = rows < M, columns < N
        x_tile = x + rows.to(tl.int64)[:, None] * x_stride + offsets_k[None, :]  # [BLOCK_M, BLOCK_K]
        weight_tile = weight + columns.to(tl.int64)[None, :] * weight_stride + offsets_k[:, None]  # [BLOCK_K, BLOCK_N]
        up_tile = weight + (columns.to(tl.int64) + N)[None, :] * weight_stride + offsets_k[:, None]

        # Load and compute.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = None
        if ACTIVATION == "swiglu":
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(first_k, last_k, BLOCK_K):
            k_ok = offsets_k < K - k
            a = tl.load(x_tile + k, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            b = tl.load(weight_tile + k, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if ACTIVATION == "swiglu":
                c = tl.load(up_tile + k, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
                up = tl.dot(a, c, up, input_precision="ieee")

        # Epilogue and store.
        if partial is not None:
            _store_partial(partial, acc, split, rows, columns, M, N)
        else:
            _finish(
                y, y_stats, acc, up, bias, layer_scale, residual, row_stats, weight_sum, rows, first_column,
                residual_stride, M, N, K, eps, ACTIVATION, STATS_BLOCK, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _linear_tma_kernel(
    y,  # descriptor of [M, N], blocks [BLOCK_M, min(BLOCK_N, 128)], or None
    y_stats,  # [M, ceil(N / 128), 2] fp32, or None
    partial,  # [SPLIT_K, M, N] fp32, or None; if given it takes the bare sums, and there is no epilogue
    x,  # descriptor of [M, K], blocks [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [N, K], or [2N, K] for swiglu, blocks [min(BLOCK_N, 128), BLOCK_K]
    bias,  # [N] or [2N], or None
    layer_scale,  # [N], or None
    residual,  # descriptor like y's, or None
    row_stats,  # [M, ceil(K / 128), 2] fp32, or None
    weight_sum,  # [N] or [2N] fp32, or None
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 256 columns are two accumulators of 128, each with an epilogue of its own: half the registers, one tile of row
    # statistics, and a layout that need not change. swiglu's second accumulator has the rows of W that are `up`.
    HALF_N: tl.constexpr = min(BLOCK_N, 128)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    TWO: tl.constexpr = GATED or BLOCK_N == 256
    tl.static_assert(not GATED or BLOCK_N <= 128)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for job in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLIT_K, tl.num_programs(0)):
        # Locate.
        tile, split, first_k, last_k = job, 0, 0, K
        if SPLIT_K > 1:
            tile, split, first_k, last_k = _k_range(job, tiles_m * tiles_n, K, SPLIT_K, BLOCK_K)
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, GROUP)
        first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N

        # Load (beyond the tensors: zeros) and compute.
        acc = tl.zeros((BLOCK_M, HALF_N), dtype=tl.float32)
        second, second_row = None, 0
        if TWO:
            second = tl.zeros((BLOCK_M, HALF_N), dtype=tl.float32)
            second_row = first_column + (N if GATED else HALF_N)
        for k in tl.range(first_k, last_k, BLOCK_K):
            a = x.load([first_row, k])
            acc = tl.dot(a, weight.load([first_column, k]).T, acc)
            if TWO:
                second = tl.dot(a, weight.load([second_row, k]).T, second)

        # Epilogue and store (beyond y: dropped).
        rows = first_row + tl.arange(0, BLOCK_M)
        if partial is not None:
            _store_partial(partial, acc, split, rows, first_column + tl.arange(0, BLOCK_N), M, N)
        else:
            row_ok = rows < M
            mean, rstd = None, None
            if row_stats is not None:
                mean, rstd = combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK)
            halves = (acc, second)
            for half in tl.static_range(BLOCK_N // HALF_N):
                column = first_column + half * HALF_N
                columns = column + tl.arange(0, HALF_N)
                value = activate_and_scale(
                    halves[half], second, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION,
                    EXACT=False,  # TMA is for 16 bits
                )  # fmt: skip
                if residual is not None:
                    value += residual.load([first_row, column]).to(tl.float32)
                value = value.to(y.dtype)
                y.store([first_row, column], value)
                if y_stats is not None:
                    store_stats(y_stats, value, rows, row_ok, column, N, GATED)


@triton.jit
def _linear_sum_kernel(
    y,  # [M, N]
    y_stats,  # [M, ceil(N / 128), 2] fp32, or None
    partial,  # [SPLIT_K, M, N] fp32
    bias,  # [N], or None
    layer_scale,  # [N], or None
    residual,  # [M, N], or None
    row_stats,  # [M, ceil(K / 128), 2] fp32, or None
    weight_sum,  # [N] fp32, or None
    residual_stride,
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Locate.
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % tiles_n * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)

    # Load and add up, first split first.
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        offsets = (rows.to(tl.int64) + split * M)[:, None] * N + columns[None, :]
        acc += tl.load(partial + offsets, mask=mask, other=0.0)

    # Epilogue and store.
    _finish(
        y, y_stats, acc, None, bias, layer_scale, residual, row_stats, weight_sum, rows, first_column, residual_stride,
        M, N, K, eps, ACTIVATION, STATS_BLOCK, BLOCK_N,
    )  # fmt: skip


@launch.on_its_device
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_stats: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vitfast.ops.linear` on CUDA, with arguments that it has checked; see the module for what is fused.

    Args:
        x: [..., K], rows at one stride. weight: [N, K] ([2F, K] for "swiglu"), rows at any stride.
        residual: of the output's shape, rows at one stride.
        config: a member of CONFIGS, not the tuning table's or `pick_config`'s choice.

    Returns:
        [..., N] in x's dtype, contiguous; with `stats` also [M, ceil(N / 128), 2] fp32.

    Raises:
        ValueError: for a stride, device or config that does not fit.
    """
    device = launch.check_device(
        "linear", x=x, weight=weight, bias=bias, layer_scale=layer_scale,
        residual=residual, row_stats=row_stats, weight_sum=weight_sum,
    )  # fmt: skip
    launch.check_last_contiguous("linear", weight=weight, bias=bias, layer_scale=layer_scale, weight_sum=weight_sum)
    launch.check_contiguous("linear", row_stats=row_stats)
    x_rows = launch.rows_view("linear", "x", x)
    residual_rows = None if residual is None else launch.rows_view("linear", "residual", residual)
    shape = problem_of(x, weight, activation=activation, residual=residual, stats=stats)
    M, N, K = shape.M, shape.N, shape.K
    y = x.new_empty((*x.shape[:-1], N))
    y_stats = x.new_empty((M, triton.cdiv(N, STATS_TILE), 2), dtype=torch.float32) if stats else None
    if not M or not N:
        return (y, y_stats) if y_stats is not None else y

    sms = launch.num_sms(device)
    pick = functools.partial(pick_config, sms=sms)
    config = launch.choose("linear", device, CONFIGS, shape, why_not, pick, config)
    split = split_of(config)
    partial = x.new_empty((split, M, N), dtype=torch.float32) if split > 1 else None
    epilogue = {
        "bias": bias, "layer_scale": layer_scale, "row_stats": row_stats, "weight_sum": weight_sum,
        "eps": eps, "ACTIVATION": activation or "",
        "STATS_BLOCK": triton.next_power_of_2(triton.cdiv(K, STATS_TILE)),
    }  # fmt: skip
    if partial is None:
        _product(config, sms, (y, y_stats, None), x_rows, weight, residual_rows, epilogue)
        return (y, y_stats) if y_stats is not None else y
    bare = {**dict.fromkeys(epilogue), "eps": eps, "ACTIVATION": "", "STATS_BLOCK": 1}
    _product(config, sms, (None, None, partial), x_rows, weight, None, bare)
    sum_m, sum_n = SUM_CONFIG.blocks["BLOCK_M"], SUM_CONFIG.blocks["BLOCK_N"]
    _linear_sum_kernel[(triton.cdiv(M, sum_m) * triton.cdiv(N, sum_n),)](
        y, y_stats, partial, residual=residual_rows, residual_stride=launch.row_stride(residual_rows),
        M=M, N=N, K=K, SPLIT_K=split, **epilogue, **SUM_CONFIG.options(),
    )  # fmt: skip
    return (y, y_stats) if y_stats is not None else y


def _product(
    config: Config,
    sms: int,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    epilogue: dict[str, Any],
) -> None:
    """Launch the kernel of a config on matrices. `outputs`: y, y_stats and partial, as the kernels take them."""
    y, y_stats, partial = outputs
    (M, K), N = x.shape, (y if partial is None else partial).shape[-1]
    block_m, block_n, block_k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    split = split_of(config)
    jobs = triton.cdiv(M, block_m) * triton.cdiv(N, block_n) * split
    # Tiles of 4 warps leave room for a second program, which works while the first is in its epilogue.
    programs = min(jobs, sms * (8 // config.num_warps))
    options = {**epilogue, "M": M, "N": N, "K": K, "GROUP": GROUP_M, **config.options(), "SPLIT_K": split}
    if config in TMA_CONFIGS:
        stored = [block_m, min(block_n, 128)]
        _linear_tma_kernel[(programs,)](
            y=None if y is None else TensorDescriptor.from_tensor(y.view(-1, N), stored),
            y_stats=y_stats,
            partial=partial,
            x=TensorDescriptor.from_tensor(x, [block_m, block_k]),
            weight=TensorDescriptor.from_tensor(weight, [min(block_n, 128), block_k]),
            residual=None if residual is None else TensorDescriptor.from_tensor(residual, stored),
            **options,
        )
    else:
        _linear_kernel[(programs,)](
            y=y, y_stats=y_stats, partial=partial, x=x, weight=weight, residual=residual,
            x_stride=x.stride(0), weight_stride=weight.stride(0), residual_stride=launch.row_stride(residual),
            **options,
        )  # fmt: skip
