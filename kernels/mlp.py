"""act(x W1ᵀ + b1) W2ᵀ + b2, times layer_scale, plus residual, without writing the hidden rows.

    x [M, C], W1 [F, C] ("swiglu": [2F, C], gate rows first), W2 [C, F] -> y [M, C]

One kernel where the hidden tile fits on chip, else two `linear`: for C <= 384 in a 16-bit dtype a
program keeps its rows of x and an fp32 accumulator [BLOCK_M, C], and walks over chunks of the hidden
axis: product with a chunk of W1, activation, product with the same chunk of W2. Wider C, and float32,
go through `vitfast.kernels.linear` twice. Power-of-two tiles cover C as a large and a small one
(192 = 128 + 64, 384 = 256 + 128), so that little is padded.

Fused: both products, both biases, the activation, LayerScale and the residual. Dtypes: float32,
float16, bfloat16; fp32 accumulation, the hidden chunk rounded to x's dtype between the products.
Bound by FLOPs and by the bytes of W1 and W2, which every program reads from L2.

Sources: Vaswani et al. 2017 (the feed-forward block); Shazeer 2020 (SwiGLU).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels import _common
from vitfast.kernels._common import DTYPES, CompileCase, Config, activate, silu
from vitfast.kernels.linear import linear

# From compiling for sm_80, sm_90 and sm_100: the accumulator [BLOCK_M, C] takes at most 96 registers
# of a thread, and BLOCK_F is the longest chunk of the hidden axis that leaves no spill and lets two
# chunks of W1 and W2 into shared memory. "width" is the largest C. None is measured yet.
CONFIGS = [
    Config("width192", {"BLOCK_M": 128, "BLOCK_F": 64}, 8, 2),
    Config("width384", {"BLOCK_M": 64, "BLOCK_F": 32}, 8, 2),
]

MAX_WIDTH = 384
"""Largest C of the one-kernel form."""

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")

CAPABILITIES: dict[str, Any] = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {}}


@triton.jit
def _load_rows(tensor, rows, row_ok, columns, C, stride):
    """[rows, columns] of a matrix of C columns."""
    mask = row_ok[:, None] & (columns < C)[None, :]
    return tl.load(tensor + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _hidden(x0, x1, weight, bias, units, unit_ok, columns0, columns1, C, stride, C1: tl.constexpr):
    """One chunk of x W1ᵀ + b1: [BLOCK_M, BLOCK_F] fp32; `units` are rows of W1."""
    acc = tl.dot(x0, _load_rows(weight, units, unit_ok, columns0, C, stride).T)
    if C1 > 0:
        acc = tl.dot(x1, _load_rows(weight, units, unit_ok, columns1, C, stride).T, acc)
    if bias is not None:
        acc += tl.load(bias + units, mask=unit_ok, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _store(y, acc, bias, layer_scale, residual, residual_stride, rows, row_ok, columns, C):
    """Bias, LayerScale and residual of one column tile, and its store."""
    column_ok = columns < C
    if bias is not None:
        acc += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if layer_scale is not None:
        acc *= tl.load(layer_scale + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc += _load_rows(residual, rows, row_ok, columns, C, residual_stride).to(tl.float32)
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def _mlp_kernel(
    y,  # [M, C]
    x,  # [M, C]
    fc1_weight,  # [F, C], or [2F, C] for swiglu
    fc1_bias,  # [F] or [2F], or None
    fc2_weight,  # [C, F]
    fc2_bias,  # [C], or None
    layer_scale,  # [C], or None
    residual,  # [M, C], or None
    x_stride,
    fc1_stride,
    fc2_stride,
    residual_stride,
    M,
    C,
    F,
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
    x0 = _load_rows(x, rows, row_ok, columns0, C, x_stride)
    x1 = x0
    if C1 > 0:
        x1 = _load_rows(x, rows, row_ok, columns1, C, x_stride)

    # Compute, one chunk of hidden units at a time.
    acc0 = tl.zeros((BLOCK_M, C0), dtype=tl.float32)
    if C1 > 0:
        acc1 = tl.zeros((BLOCK_M, C1), dtype=tl.float32)
    for first in tl.range(0, F, BLOCK_F):
        units = first + tl.arange(0, BLOCK_F)
        unit_ok = units < F
        hidden = _hidden(x0, x1, fc1_weight, fc1_bias, units, unit_ok, columns0, columns1, C, fc1_stride, C1)
        if ACTIVATION == "swiglu":
            up = _hidden(x0, x1, fc1_weight, fc1_bias, units + F, unit_ok, columns0, columns1, C, fc1_stride, C1)
            hidden = silu(hidden) * up
        else:
            hidden = activate(hidden, ACTIVATION)
        hidden = hidden.to(x0.dtype)
        acc0 = tl.dot(hidden, _load_rows(fc2_weight, columns0, columns0 < C, units, F, fc2_stride).T, acc0)
        if C1 > 0:
            acc1 = tl.dot(hidden, _load_rows(fc2_weight, columns1, columns1 < C, units, F, fc2_stride).T, acc1)

    # Store.
    _store(y, acc0, fc2_bias, layer_scale, residual, residual_stride, rows, row_ok, columns0, C)
    if C1 > 0:
        _store(y, acc1, fc2_bias, layer_scale, residual, residual_stride, rows, row_ok, columns1, C)


def column_tiles(width: int) -> tuple[int, int]:
    """Two powers of two whose sum covers `width` with little to spare; the second may be 0.

    The smaller is at least 16, the shortest side of a matrix-multiply tile.
    """
    large = max(16, 1 << (width.bit_length() - 1))
    if large >= width:
        return large, 0
    small = max(16, triton.next_power_of_2(width - large))
    return (2 * large, 0) if small == large else (large, small)


def pick_config(width: int) -> Config:
    """The config for rows of `width` <= MAX_WIDTH: as many rows as the accumulator's registers allow."""
    return CONFIGS[0] if width <= 192 else CONFIGS[1]


def compile_cases() -> list[CompileCase]:
    """Every config at its width, with biases, LayerScale and residual."""
    cases = []
    for config, width in zip(CONFIGS, (192, 384), strict=True):
        for activation in ("gelu", "swiglu"):
            names = ("y", "x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale", "residual")
            signature = dict.fromkeys(names, "*bf16")
            signature |= dict.fromkeys(
                ("x_stride", "fc1_stride", "fc2_stride", "residual_stride", "M", "C", "F"), "i32"
            )
            large, small = column_tiles(width)
            cases.append(
                CompileCase(
                    kernel="mlp",
                    config=f"{config.name}_{activation}",
                    fn=_mlp_kernel,
                    signature=signature,
                    constexprs={"ACTIVATION": activation, "C0": large, "C1": small, **config.blocks},
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    aligned=tuple(name for name in signature if name != "M"),
                    tile={"M": config.blocks["BLOCK_M"], "F": config.blocks["BLOCK_F"]},
                )
            )
    return cases
