"""act(norm(x) W1ᵀ + b1) W2ᵀ + b2, times layer_scale, plus residual, without writing the hidden rows.

    norm: LayerNorm folded into W1, as in `linear`; mean and variance are those of the rows here, which are whole
    stats: (mean, M2) pairs of y, as `linear` writes them
    x [M, C], W1 [F, C] ("swiglu": [2F, C], gate rows first), W2 [C, F] -> y [M, C]

One kernel where the hidden tile fits on chip, else two `linear`: for C <= 384 in a 16-bit dtype a
program keeps its rows of x and an fp32 accumulator [BLOCK_M, C], and walks over chunks of the hidden
axis: product with a chunk of W1, activation, product with the same chunk of W2. Wider C, and float32,
go through `vitfast.kernels.linear` twice.

Fused: the folded LayerNorm, both products, both biases, the activation, LayerScale, the residual and row statistics;
so a small model's block is four launches, or two with `attention_block`, and the whole rows are read and written once.
Dtypes: float32, float16, bfloat16; fp32 accumulation, the hidden chunk rounded to x's dtype between the products.
Bound by FLOPs and by the bytes of W1 and W2, which every program reads from L2.

Sources: Vaswani et al. 2017 (the feed-forward block); Shazeer 2020 (SwiGLU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels._parts import launch
from vitfast.kernels._parts.activation import activate, silu
from vitfast.kernels._parts.epilogue import STATS_TILE
from vitfast.kernels._parts.launch import DTYPES, Config
from vitfast.kernels._parts.whole_rows import MAX_WIDTH, column_tiles, load_block, moments, product, store
from vitfast.kernels.layer_norm import row_stats
from vitfast.kernels.linear import linear

# From compiling for sm_80, sm_90 and sm_100: the accumulator [BLOCK_M, C] takes at most 96 registers
# of a thread, and BLOCK_F is the longest chunk of the hidden axis that leaves no spill and lets two
# chunks of W1 and W2 into shared memory. The name has the largest C. Wider than 192, the folded norm costs
# registers: a shorter chunk then, and none is short enough for swiglu. None is measured yet.
CONFIGS = [
    Config("width192", {"BLOCK_M": 128, "BLOCK_F": 64}, 8, 2, (9, 0)),
    Config("width192_swiglu", {"BLOCK_M": 128, "BLOCK_F": 32}, 8, 2, (9, 0)),
    Config("width192_sm80", {"BLOCK_M": 128, "BLOCK_F": 16}, 8, 3),
    Config("width384", {"BLOCK_M": 64, "BLOCK_F": 32}, 8, 2),
    Config("width384_norm", {"BLOCK_M": 64, "BLOCK_F": 16}, 8, 3),
    Config("width384_swiglu", {"BLOCK_M": 64, "BLOCK_F": 16}, 8, 2),
]

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")

CAPABILITIES: dict[str, Any] = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {}}


@dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on: C, and what is fused; not the rows, for a row's bits may not."""

    C: int
    dtype: torch.dtype
    gated: bool
    norm: bool
    capability: tuple[int, int]

    @property
    def key(self) -> str:
        """What a tuned choice depends on: not on the rows, for configs differ in their order of summation."""
        return " ".join([str(self.C), str(self.dtype), *(["gated"] if self.gated else [])])


def problem_of(x: Tensor, *_: Any, activation: str = "gelu", weight_sum: Tensor | None = None, **__: Any) -> Problem:
    """The problem of a call of `mlp` with these arguments."""
    gated, norm = activation == "swiglu", weight_sum is not None
    return Problem(x.shape[-1], x.dtype, gated, norm, launch.capability(x.device))


def _fits(problem: Problem) -> bool:
    """Whether one kernel can do it: a folded norm before swiglu spills beyond C = 192."""
    widest = 192 if problem.gated and problem.norm else MAX_WIDTH
    return widest >= problem.C and problem.dtype != torch.float32


def is_one_kernel(problem: Problem) -> bool:
    """Whether mlp is one kernel for this C, or two `linear`.

    Beyond C = 192 a folded norm or swiglu leave registers for chunks of 16 hidden units alone. On Hopper these are
    products of 8 columns, which read four times the operands that shared memory gives meanwhile, and the assembler
    makes them wait for each other.
    """
    poor = problem.C > 192 and problem.capability[0] == 9 and (problem.norm or problem.gated)
    return _fits(problem) and not poor


def why_not(config: Config, problem: Problem) -> list[str]:
    """Every reason why a config cannot run a problem; empty if it can."""
    reasons = config.too_new(problem.capability)
    if not _fits(problem):
        reasons.append(f"it needs C <= {MAX_WIDTH} in 16 bits, got {problem.C} in {problem.dtype}")
    return reasons


def pick_config(problem: Problem) -> Config:
    """The config where `is_one_kernel`: the first that is wide enough and spills no register."""
    by_name = {config.name: config for config in CONFIGS}
    if problem.C > 192:
        return by_name["width384_swiglu" if problem.gated else "width384_norm" if problem.norm else "width384"]
    if problem.capability < (9, 0):
        return by_name["width192_sm80"]
    return by_name["width192_swiglu" if problem.gated else "width192"]


@triton.jit
def _mlp_kernel(
    y,  # [M, C]
    y_stats,  # [M, ceil(C / 128), 2] fp32, or None
    x,  # [M, C]
    fc1_weight,  # [F, C], or [2F, C] for swiglu
    fc1_bias,  # [F] or [2F], or None
    fc2_weight,  # [C, F]
    fc2_bias,  # [C], or None
    layer_scale,  # [C], or None
    residual,  # [M, C], or None
    weight_sum,  # [F] or [2F] fp32: norm(x) is folded into fc1; or None
    x_stride,
    fc1_stride,
    fc2_stride,
    residual_stride,
    M,
    C,
    F,
    eps,
    ACTIVATION: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # Locate. Columns 0..C0 and C0..C0 + C1 (none if C1 is 0).
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    columns0 = tl.arange(0, C0)
    columns1 = columns0
    if C1 > 0:
        columns1 = C0 + tl.arange(0, C1)

    # Load the rows of x, once.
    x0 = load_block(x, rows, row_ok, columns0, C, x_stride)
    x1 = x0
    if C1 > 0:
        x1 = load_block(x, rows, row_ok, columns1, C, x_stride)
    mean, rstd = None, None
    if weight_sum is not None:
        mean, rstd = moments(x0, x1, columns0, columns1, C, eps, C1)

    # Compute, one chunk of hidden units at a time.
    acc0 = tl.zeros((BLOCK_M, C0), dtype=tl.float32)
    if C1 > 0:
        acc1 = tl.zeros((BLOCK_M, C1), dtype=tl.float32)
    for first in tl.range(0, F, BLOCK_F):
        units = first + tl.arange(0, BLOCK_F)
        unit_ok = units < F
        hidden = product(
            x0, x1, mean, rstd, fc1_weight, weight_sum, fc1_bias, units, unit_ok, columns0, columns1, C, fc1_stride, C1
        )
        if ACTIVATION == "swiglu":
            up = product(
                x0, x1, mean, rstd, fc1_weight, weight_sum, fc1_bias, units + F, unit_ok, columns0, columns1, C,
                fc1_stride, C1,
            )  # fmt: skip
            hidden = silu(hidden) * up
        else:
            hidden = activate(hidden, ACTIVATION, EXACT=True)  # the short form spills at C = 384 on sm_90
        hidden = hidden.to(x0.dtype)
        acc0 = tl.dot(hidden, load_block(fc2_weight, columns0, columns0 < C, units, F, fc2_stride).T, acc0)
        if C1 > 0:
            acc1 = tl.dot(hidden, load_block(fc2_weight, columns1, columns1 < C, units, F, fc2_stride).T, acc1)

    # Store.
    store(y, y_stats, acc0, fc2_bias, layer_scale, residual, residual_stride, rows, row_ok, 0, columns0, C)
    if C1 > 0:
        store(y, y_stats, acc1, fc2_bias, layer_scale, residual, residual_stride, rows, row_ok, C0, columns1, C)


@launch.on_its_device
def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vitfast.ops.mlp` on CUDA, with arguments that it has checked: one kernel where `is_one_kernel`, else two.

    Args:
        x: [..., C], rows at one stride. fc1_weight: [F, C] ([2F, C] for "swiglu"); fc2_weight: [C, F].
        residual: of x's shape, rows at one stride.
        weight_sum: [F] or [2F] fp32, where a LayerNorm of x is folded into fc1.
        config: a member of CONFIGS instead of the tuning table's or `pick_config`'s choice, for the one-kernel form.

    Returns:
        [..., C] in x's dtype, contiguous; with `stats` also [M, ceil(C / 128), 2] fp32.

    Raises:
        ValueError: for a stride, device or config that does not fit.
    """
    device = launch.check_device(
        "mlp", x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight,
        fc2_bias=fc2_bias, layer_scale=layer_scale, residual=residual, weight_sum=weight_sum,
    )  # fmt: skip
    launch.check_last_contiguous(
        "mlp", fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias,
        layer_scale=layer_scale, weight_sum=weight_sum,
    )  # fmt: skip
    shape = problem_of(x, activation=activation, weight_sum=weight_sum)
    C, F = fc2_weight.shape
    if config is None and not is_one_kernel(shape):
        stats_of_x = row_stats(x) if shape.norm else None
        hidden = cast(
            Tensor,
            linear(
                x, fc1_weight, fc1_bias, activation=activation, row_stats=stats_of_x, weight_sum=weight_sum, eps=eps
            ),
        )
        return linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=residual, stats=stats)

    x_rows = launch.rows_view("mlp", "x", x)
    residual_rows = None if residual is None else launch.rows_view("mlp", "residual", residual)
    y = x.new_empty(x.shape)
    M = x_rows.shape[0]
    y_stats = x.new_empty((M, triton.cdiv(C, STATS_TILE), 2), dtype=torch.float32) if stats else None
    if not M:
        return (y, y_stats) if y_stats is not None else y
    config = launch.choose("mlp", device, CONFIGS, shape, why_not, pick_config, config)
    large, small = column_tiles(C)
    _mlp_kernel[(triton.cdiv(M, config.blocks["BLOCK_M"]),)](
        y, y_stats, x_rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, residual_rows, weight_sum,
        x_rows.stride(0), fc1_weight.stride(0), fc2_weight.stride(0), launch.row_stride(residual_rows),
        M, C, F, eps, ACTIVATION=activation, C0=large, C1=small,
        **config.options(),
    )  # fmt: skip
    return (y, y_stats) if y_stats is not None else y
