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

# Where these come from: compiling for sm_80, sm_89, sm_90 and sm_100; each spills no register with the
# epilogues of `compile_cases` and fits the 99 KiB of shared memory of sm_89. None is measured yet. The
# first is for many rows, the second for few, or for swiglu's two accumulators, and the third for those that
# requantise, which takes tiles of one group.
CONFIGS = [
    Config("128x128x128", {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, num_warps=8, num_stages=3),
    Config("64x64x128", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=3),
    Config("64x128x128", {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128}, num_warps=8, num_stages=2),
]


def scale_group(x: Tensor, x_scale: Tensor) -> int:
    """Columns of x that share a scale; 0 where a whole row does, or where x_scale has no such shape."""
    if x_scale.ndim != x.ndim:
        return 0
    return next((group for group in SCALE_GROUPS if triton.cdiv(x.shape[-1], group) == x_scale.shape[-1]), 0)


@dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on: y is M x N, K is summed over.

    `group`: as `scale_group` gives it, 0 for a scale a row.
    """

    M: int
    N: int
    K: int
    dtype: torch.dtype
    gated: bool = False
    requantize: bool = False
    group: int = 0

    @property
    def key(self) -> str:
        """What a tuned choice depends on: the very shape, and what restricts the configs or changes their work."""
        flags = {"gated": self.gated, "requantize": self.requantize, f"groups of {self.group}": self.group > 0}
        shape = f"{self.M}x{self.K}x{self.N}"
        return " ".join([shape, str(self.dtype), *(name for name, on in flags.items() if on)])


def problem_of(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    *_: Any,
    activation: str | None = None,
    requantize: bool = False,
    **__: Any,
) -> Problem:
    """The problem of a call of `quantized_linear` with these arguments."""
    gated, K = activation == "swiglu", x.shape[-1]
    N = weight.shape[0] // 2 if gated else weight.shape[0]
    return Problem(x.numel() // K, N, K, x.dtype, gated, requantize, scale_group(x, x_scale))


def why_not(config: Config, problem: Problem) -> list[str]:
    """Every reason why a config cannot run a problem; empty if it can."""
    reasons = []
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    if problem.requantize and block_n != SCALE_GROUP:
        reasons.append(f"its tiles have other than {SCALE_GROUP} columns, a group of scales")
    if problem.gated and block_m * block_n > 64 * 128:
        reasons.append("it has no room for the two accumulators of swiglu")
    return reasons


def pick_config(problem: Problem, sms: int) -> Config:
    """The large tile where it can run and gives every multiprocessor one, else the first small one that can."""
    large, *small = CONFIGS
    tiles = triton.cdiv(problem.M, large.blocks["BLOCK_M"]) * triton.cdiv(problem.N, large.blocks["BLOCK_N"])
    able = [config for config in (large, *small) if not why_not(config, problem)]
    return next(config for config in able if config is not large or tiles >= sms)


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
    value = acc.to(tl.float32) * tl.load(weight_scale + columns, mask=column_ok, other=0.0)[None, :]
    if ACTIVATION == "swiglu":
        up = up.to(tl.float32) * tl.load(weight_scale + N + columns, mask=column_ok, other=0.0)[None, :]
    if not GROUPED:
        row_scale = tl.load(x_scale + rows, mask=row_ok, other=0.0)[:, None]
        value *= row_scale
        if ACTIVATION == "swiglu":
            up *= row_scale
    value = activate_and_scale(value, up, None, None, None, bias, layer_scale, columns, N, ACTIVATION)
    mask = row_ok[:, None] & column_ok[None, :]
    if residual is not None:
        offsets = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    if y_scale is not None:
        tl.static_assert(BLOCK_N == 128)
        value, group_scale = in_8_bits(value, y.dtype.element_ty)  # beyond N everything was loaded as 0
        tl.store(y_scale + rows.to(tl.int64) * tl.cdiv(N, BLOCK_N) + tile_n, group_scale, mask=row_ok)
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], value.to(y.dtype.element_ty), mask=mask)


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
    shape = problem_of(x, x_scale, weight, activation=activation, requantize=requantize)
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
    tiles = triton.cdiv(M, config.blocks["BLOCK_M"]) * triton.cdiv(N, config.blocks["BLOCK_N"])
    _quantized_linear_kernel[(tiles,)](
        y=y, y_scale=y_scale, x=x_rows, x_scale=x_scale, weight=weight, weight_scale=weight_scale,
        bias=bias, layer_scale=layer_scale, residual=residual_rows,
        x_stride=x_rows.stride(0), weight_stride=weight.stride(0), residual_stride=launch.row_stride(residual_rows),
        M=M, N=N, K=K,
        ACTIVATION=activation or "", PROMOTE=PROMOTE, GROUPED=shape.group > 0, GROUP=GROUP_M,
        **_with_group(config, shape.group).options(),
    )  # fmt: skip
    return y if y_scale is None else (y, y_scale)


def _with_group(config: Config, group: int) -> Config:
    """The config where so many columns of x share a scale: a tile of K is a group, with as much in flight."""
    if not group:
        return config
    stages = config.num_stages * config.blocks["BLOCK_K"] // group
    return replace(config, blocks=config.blocks | {"BLOCK_K": group}, num_stages=stages)
