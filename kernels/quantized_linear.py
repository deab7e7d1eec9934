"""act((x Wᵀ) * x_scale * weight_scale + b) * layer_scale + residual, x and W in 8 bits.

    x [M, K] with x_scale [M], W [N, K] with weight_scale [N] -> y [M, N]
    "swiglu": W [2F, K], gate rows first, y [M, F] = silu(gate) * up
    groups: x_scale [M, ceil(K / G)], one for each G = 128 or 64 columns of a row of x
    requantize: y in x's dtype with y_scale [M, ceil(N / 128)], the groups of the product that follows

Fused: scales, bias, activation, LayerScale and residual, in fp32; y is rounded once. x and W are
float8_e4m3fn or int8, the sums fp32 or int32; y, bias, layer_scale and residual are fp32, fp16 or bf16.
Hopper's FP8 products keep about 14 bits of a running sum; it is therefore moved to fp32 registers every
PROMOTE products, and it is there that scales of groups are applied, one multiplication more a sum. What `requantize`
writes has groups of a tile's columns, so that the program which computes them can scale them: a scale for the whole
row would need all tiles of the row, and a pass over y. Groups of 64 are heads of `attention`. A tile of K is a group:
at 64 it is half as deep, two of the tensor cores' instructions, and twice as many are in flight. Two products in a
tile of 128 would be the same instructions on operands that had to be cut first; groups of 32, one instruction each,
would be scaled for as long as they are multiplied. Bound by FLOPs at ViT widths, by the bytes of y and residual at
small K.

Sources: LLM.int8() (Dettmers et al. 2022), scales of rows and columns applied to the sum; DeepSeek-V3's
technical report (2024), sections 3.3.1 and 3.3.2, scales of 1 x 128 groups and promotion of FP8 sums.
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
from vitfast.kernels._parts.eight_bits import SCALE_GROUPS, in_8_bits
from vitfast.kernels._parts.epilogue import GROUP_M, activate_and_scale, tile_origin
from vitfast.kernels._parts.launch import Config

__all__ = [
    "ACTIVATIONS",
    "CAPABILITIES",
    "CONFIGS",
    "Problem",
    "pick_config",
    "problem_of",
    "quantized_linear",
    "why_not",
]

CAPABILITIES: dict[str, Any] = {
    "dtypes": ("float8_e4m3fn", "int8"),
    "min_capability": (8, 0),
    "limits": {},
    "features": ("scale groups", "scale groups of 64", "swiglu"),
}

PROMOTE = 128
SCALE_GROUP = 128
"""Columns that share a scale where `requantize` made them; the last group covers what is left."""


def _config(name: str, m: int, n: int, warps: int, stages: int, since: tuple[int, int] = (8, 0)) -> Config:
    return Config(name, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 128}, warps, stages, since)


# Where these come from: compiling for sm_80, sm_89, sm_90 and sm_100; each spills no register with the
# epilogues of `_compile/quantized_linear.py` and fits the 99 KiB of shared memory of sm_89, or for TMA leaves room for
# a second program on a multiprocessor of sm_90. None is measured yet.
TMA_CONFIGS = [
    _config("tma_128x128x128", 128, 128, 8, 3, (9, 0)),
    _config("tma_64x128x128", 64, 128, 4, 4, (9, 0)),
]
# The first is for many rows, the second for few, or for swiglu's two accumulators, and the third for those that
# requantise, which takes tiles of one group.
POINTER_CONFIGS = [
    _config("128x128x128", 128, 128, 8, 3),
    _config("64x64x128", 64, 64, 4, 3),
    _config("64x128x128", 64, 128, 8, 2),
]
CONFIGS = TMA_CONFIGS + POINTER_CONFIGS


def scale_group(x: Tensor, x_scale: Tensor) -> int:
    """Columns of x that share a scale; 0 where a whole row does, or where x_scale has no such shape."""
    if x_scale.ndim != x.ndim:
        return 0
    return next((group for group in SCALE_GROUPS if triton.cdiv(x.shape[-1], group) == x_scale.shape[-1]), 0)


@dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on: y is M x N, K is summed over.

    `group`: as `scale_group` gives it, 0 for a scale a row; `tma`: as `uses_tma` says.
    """

    M: int
    N: int
    K: int
    dtype: torch.dtype
    gated: bool = False
    requantize: bool = False
    group: int = 0
    tma: bool = False

    @property
    def key(self) -> str:
        """What a tuned choice depends on: the very shape, and what restricts the configs or changes their work."""
        flags = {"gated": self.gated, "requantize": self.requantize, f"groups of {self.group}": self.group > 0}
        flags |= {"tma": self.tma}
        shape = f"{self.M}x{self.K}x{self.N}"
        return " ".join([shape, str(self.dtype), *(name for name, on in flags.items() if on)])


def problem_of(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    *_: Any,
    activation: str | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    requantize: bool = False,
    **__: Any,
) -> Problem:
    """The problem of a call of `quantized_linear` with these arguments."""
    gated, group = activation == "swiglu", scale_group(x, x_scale)
    x = launch.rows_view("quantized_linear", "x", x)
    residual = None if residual is None else launch.rows_view("quantized_linear", "residual", residual)
    (M, K), N = x.shape, weight.shape[0] // 2 if gated else weight.shape[0]
    tma = uses_tma(N, x, weight, residual, x.dtype if requantize else dtype)
    return Problem(M, N, K, x.dtype, gated, requantize, group, tma)


def uses_tma(N: int, x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `_quantized_linear_tma_kernel` can run on these matrices and an output of N columns in this dtype."""
    if launch.capability(x.device) < (9, 0) or N * dtype.itemsize % 16:
        return False
    return all(launch.fits_tma(t) for t in (x, weight, residual) if t is not None)


def why_not(config: Config, problem: Problem) -> list[str]:
    """Every reason why a config cannot run a problem; empty if it can."""
    reasons = []
    if config in TMA_CONFIGS and not problem.tma:
        reasons.append("it needs compute capability 9.0 and 16-byte aligned rows")
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    if problem.requantize and block_n != SCALE_GROUP:
        reasons.append(f"its tiles have other than {SCALE_GROUP} columns, a group of scales")
    if problem.gated and (block_m * block_n > 64 * 128 or config in TMA_CONFIGS):
        reasons.append("it has no room for the two accumulators of swiglu")
    return reasons


def pick_config(problem: Problem, sms: int) -> Config:
    """The first that can run the problem, if its tiles are small or give every multiprocessor one."""

    def tiles(config: Config) -> int:
        return triton.cdiv(problem.M, config.blocks["BLOCK_M"]) * triton.cdiv(problem.N, config.blocks["BLOCK_N"])

    able = [config for config in CONFIGS if not why_not(config, problem)]
    return next((config for config in able if config.blocks["BLOCK_M"] == 64 or tiles(config) >= sms), able[-1])


@triton.jit
def _rescale(
    acc, up, x_scale, weight_scale, bias, layer_scale, rows, columns, M, N,
    ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """From sums to act(product * x_scale * weight_scale + bias) * layer_scale, in fp32."""
    row_ok, column_ok = rows < M, columns < N
    value = acc.to(tl.float32) * tl.load(weight_scale + columns, mask=column_ok, other=0.0)[None, :]
    if ACTIVATION == "swiglu":
        up = up.to(tl.float32) * tl.load(weight_scale + N + columns, mask=column_ok, other=0.0)[None, :]
    if not GROUPED:
        row_scale = tl.load(x_scale + rows, mask=row_ok, other=0.0)[:, None]
        value *= row_scale
        if ACTIVATION == "swiglu":
            up *= row_scale
    return activate_and_scale(value, up, None, None, None, bias, layer_scale, columns, N, ACTIVATION, EXACT)


@triton.jit
def _quantized_linear_kernel(
    y,  # [M, N]
    y_scale,  # [M, ceil(N / 128)] fp32 if y is in x's dtype, else None
    x,  # [M, K] float8_e4m3fn or int8
    x_scale,  # [M] fp32, or [M, ceil(K / BLOCK_K)] if GROUPED
    weight,  # [N, K], or [2N, K] for swiglu, in x's dtype
    weight_scale,  # [N] or [2N] fp32
    bias,  # [N] or [2N], or None
    layer_scale,  # [N], or None
    residual,  # [M, N], or None
    x_stride,
    weight_stride,
    residual_stride,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PROMOTE: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Locate.
    tile_m, tile_n = tile_origin(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.arange(0, BLOCK_K)
    row_ok, column_ok = rows < M, columns < N
    x_tile = x + rows.to(tl.int64)[:, None] * x_stride + offsets_k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_tile = weight + columns.to(tl.int64)[None, :] * weight_stride + offsets_k[:, None]  # [BLOCK_K, BLOCK_N]
    up_tile = weight + (columns.to(tl.int64) + N)[None, :] * weight_stride + offsets_k[:, None]

    # Load and compute.
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    ACC: tl.constexpr = tl.float32 if GROUPED else SUM
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    up = None
    if ACTIVATION == "swiglu":
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in tl.range(0, K, BLOCK_K):
        k_ok = offsets_k < K - k
        a = tl.load(x_tile + k, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        b = tl.load(weight_tile + k, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        if GROUPED:  # the tile is a group
            group = rows.to(tl.int64) * tl.cdiv(K, BLOCK_K) + k // BLOCK_K
            group_scale = tl.load(x_scale + group, mask=row_ok, other=0.0)[:, None]
            acc += tl.dot(a, b, out_dtype=SUM).to(tl.float32) * group_scale
        else:
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=PROMOTE, out_dtype=SUM)
        if ACTIVATION == "swiglu":
            c = tl.load(up_tile + k, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
            if GROUPED:
                up += tl.dot(a, c, out_dtype=SUM).to(tl.float32) * group_scale
            else:
                up = tl.dot(a, c, up, max_num_imprecise_acc=PROMOTE, out_dtype=SUM)

    # Epilogue and store.
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32 or y_scale is not None  # scales are in fp32
    value = _rescale(acc, up, x_scale, weight_scale, bias, layer_scale, rows, columns, M, N, ACTIVATION, GROUPED, EXACT)
    mask = row_ok[:, None] & column_ok[None, :]
    if residual is not None:
        offsets = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    if y_scale is not None:
        tl.static_assert(BLOCK_N == 128)
        value, group_scale = in_8_bits(value, y.dtype.element_ty)  # beyond N everything was loaded as 0
        tl.store(y_scale + rows.to(tl.int64) * tl.cdiv(N, BLOCK_N) + tile_n, group_scale, mask=row_ok)
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _quantized_linear_tma_kernel(
    y,  # descriptor of [M, N], blocks [BLOCK_M, BLOCK_N]
    y_scale,  # [M, ceil(N / 128)] fp32 if y is in x's dtype, else None
    x,  # descriptor of [M, K] float8_e4m3fn or int8, blocks [BLOCK_M, BLOCK_K]
    x_scale,  # [M] fp32, or [M, ceil(K / BLOCK_K)] if GROUPED
    weight,  # descriptor of [N, K] in x's dtype, blocks [BLOCK_N, BLOCK_K]
    weight_scale,  # [N] fp32
    bias,  # [N], or None
    layer_scale,  # [N], or None
    residual,  # descriptor like y's, or None
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PROMOTE: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SUM: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    ACC: tl.constexpr = tl.float32 if GROUPED else SUM
    EXACT: tl.constexpr = y.dtype == tl.float32 or y_scale is not None  # scales are in fp32
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Locate.
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, GROUP)
        first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)

        # Load (beyond the tensors: zeros) and compute.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for k in tl.range(0, K, BLOCK_K):
            a, b = x.load([first_row, k]), weight.load([first_column, k]).T
            if GROUPED:  # the tile is a group
                group = rows.to(tl.int64) * tl.cdiv(K, BLOCK_K) + k // BLOCK_K
                group_scale = tl.load(x_scale + group, mask=rows < M, other=0.0)[:, None]
                acc += tl.dot(a, b, out_dtype=SUM).to(tl.float32) * group_scale
            else:
                acc = tl.dot(a, b, acc, max_num_imprecise_acc=PROMOTE, out_dtype=SUM)

        # Epilogue and store (beyond y: dropped).
        if residual is not None:  # before the scales are applied: loaded after, registers of sm_100 spill
            kept = residual.load([first_row, first_column])
        value = _rescale(
            acc, None, x_scale, weight_scale, bias, layer_scale, rows, columns, M, N, ACTIVATION, GROUPED, EXACT
        )
        if residual is not None:
            value += kept.to(tl.float32)
        if y_scale is not None:
            tl.static_assert(BLOCK_N == 128)
            value, group_scale = in_8_bits(value, y.dtype)  # beyond N everything was loaded as 0
            tl.store(y_scale + rows.to(tl.int64) * tl.cdiv(N, BLOCK_N) + tile_n, group_scale, mask=rows < M)
        y.store([first_row, first_column], value.to(y.dtype))


@launch.on_its_device
def quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    requantize: bool = False,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vitfast.ops.quantized_linear` on CUDA, with arguments that it has checked.

    Args:
        x: [..., K], rows at one stride. x_scale: contiguous. weight: [N, K] ([2F, K] for "swiglu"), rows at any stride.
        residual: of the output's shape, rows at one stride.
        config: a member of CONFIGS, not the tuning table's or `pick_config`'s choice.

    Returns:
        [..., N] in `dtype`, contiguous; with `requantize` in x's dtype, and its scales [..., ceil(N / 128)].

    Raises:
        ValueError: for a stride, device or config that does not fit.
    """
    op = "quantized_linear"
    device = launch.check_device(
        op, x=x, x_scale=x_scale, weight=weight, weight_scale=weight_scale,
        bias=bias, layer_scale=layer_scale, residual=residual,
    )  # fmt: skip
    launch.check_last_contiguous(op, weight=weight, weight_scale=weight_scale, bias=bias, layer_scale=layer_scale)
    launch.check_contiguous(op, x_scale=x_scale)
    shape = problem_of(x, x_scale, weight, activation=activation, residual=residual, dtype=dtype, requantize=requantize)
    M, N, K = shape.M, shape.N, shape.K
    x_rows = launch.rows_view(op, "x", x)
    residual_rows = None if residual is None else launch.rows_view(op, "residual", residual)
    y = x.new_empty((*x.shape[:-1], N), dtype=x.dtype if requantize else dtype)
    y_scale = None
    if requantize:
        y_scale = x.new_empty((*x.shape[:-1], triton.cdiv(N, SCALE_GROUP)), dtype=torch.float32)
    if not M or not N:
        return y if y_scale is None else (y, y_scale)
    pick = functools.partial(pick_config, sms=launch.num_sms(device))
    config = launch.choose(op, device, CONFIGS, shape, why_not, pick, config)
    tma, config = config in TMA_CONFIGS, _with_group(config, shape.group)
    block_m, block_n, block_k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    options = {
        "y_scale": y_scale, "x_scale": x_scale, "weight_scale": weight_scale, "bias": bias, "layer_scale": layer_scale,
        "M": M, "N": N, "K": K, "ACTIVATION": activation or "", "PROMOTE": PROMOTE, "GROUPED": shape.group > 0,
        "GROUP": GROUP_M, **config.options(),
    }  # fmt: skip
    if tma:
        stored = [block_m, block_n]
        _quantized_linear_tma_kernel[(min(tiles, launch.num_sms(device) * (8 // config.num_warps)),)](
            y=TensorDescriptor.from_tensor(y.view(-1, N), stored),
            x=TensorDescriptor.from_tensor(x_rows, [block_m, block_k]),
            weight=TensorDescriptor.from_tensor(weight, [block_n, block_k]),
            residual=None if residual_rows is None else TensorDescriptor.from_tensor(residual_rows, stored),
            **options,
        )
    else:
        _quantized_linear_kernel[(tiles,)](
            y=y, x=x_rows, weight=weight, residual=residual_rows, x_stride=x_rows.stride(0),
            weight_stride=weight.stride(0), residual_stride=launch.row_stride(residual_rows), **options,
        )  # fmt: skip
    return y if y_scale is None else (y, y_scale)


def _with_group(config: Config, group: int) -> Config:
    """The config where so many columns of x share a scale: a tile of K is a group, with as much in flight."""
    if not group:
        return config
    stages = config.num_stages * config.blocks["BLOCK_K"] // group
    return replace(config, blocks=config.blocks | {"BLOCK_K": group}, num_stages=stages)
