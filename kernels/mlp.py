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

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels import _common
from vitfast.kernels._common import DTYPES, CompileCase, Config, activate, silu
from vitfast.kernels.linear import linear

# From compiling for sm_80, sm_90 and sm_100: the accumulator [BLOCK_M, C] takes at most 96 registers
# of a thread, and BLOCK_F is the longest chunk of the hidden axis that leaves no spill and lets two
# chunks of W1 and W2 into shared memory. The name has the largest C. None is measured yet.
CONFIGS = [
    Config("width192", {"BLOCK_M": 128, "BLOCK_F": 64}, 8, 2, (9, 0)),
    Config("width192_swiglu", {"BLOCK_M": 128, "BLOCK_F": 32}, 8, 2, (9, 0)),
    Config("width192_sm80", {"BLOCK_M": 128, "BLOCK_F": 16}, 8, 3),
    Config("width384", {"BLOCK_M": 64, "BLOCK_F": 32}, 8, 2),
    Config("width384_swiglu", {"BLOCK_M": 64, "BLOCK_F": 16}, 8, 2),
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


def pick_config(width: int, *, gated: bool, capability: tuple[int, int]) -> Config:
    """The config for C = `width` <= MAX_WIDTH: the first that is wide enough and spills no register."""
    by_name = {config.name: config for config in CONFIGS}
    if width > 192:
        return by_name["width384_swiglu" if gated else "width384"]
    if capability < (9, 0):
        return by_name["width192_sm80"]
    return by_name["width192_swiglu" if gated else "width192"]


def tuning_key(width: int, dtype: torch.dtype, *, gated: bool) -> str:
    """What a tuned choice depends on: not on the rows, for configs differ in their order of summation."""
    return " ".join([str(width), str(dtype), *(["gated"] if gated else [])])


def _check(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, layer_scale, residual) -> None:
    """What `vitfast.ops` checks too: this launcher is also called by itself."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if fc1_weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != fc1_weight.shape[1] or x.shape[-1] < 1:
        raise ValueError(
            "mlp: x [..., C] and fc1_weight [F, C] with C >= 1 do not fit: "
            f"{tuple(x.shape)} and {tuple(fc1_weight.shape)}"
        )
    units, width = fc1_weight.shape
    if activation == "swiglu" and units % 2:
        raise ValueError(f"mlp: swiglu needs an even number of fc1_weight rows, got {units}")
    _common.check_shape("mlp", "fc1_bias", fc1_bias, (units,))
    _common.check_shape("mlp", "fc2_weight", fc2_weight, (width, units // 2 if activation == "swiglu" else units))
    _common.check_shape("mlp", "fc2_bias", fc2_bias, (width,))
    _common.check_shape("mlp", "layer_scale", layer_scale, (width,))
    _common.check_shape("mlp", "residual", residual, tuple(x.shape))
    tensors = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    tensors["layer_scale"] = layer_scale
    _common.check_dtype("mlp", x=x)
    _common.check_dtype("mlp", x.dtype, residual=residual, **tensors)
    _common.check_last_contiguous("mlp", **tensors)


@_common.on_its_device
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
    config: Config | None = None,
) -> Tensor:
    """`vitfast.ops.mlp` on CUDA: one kernel for C <= MAX_WIDTH in a 16-bit dtype, else two `linear`.

    Args:
        x: [..., C], rows at one stride. fc1_weight: [F, C] ([2F, C] for "swiglu"); fc2_weight: [C, F].
        residual: of x's shape, rows at one stride.
        config: a member of CONFIGS instead of the tuning table's or `pick_config`'s choice, for the one-kernel form.

    Returns:
        [..., C] in x's dtype, contiguous.

    Raises:
        ValueError: for a shape, dtype, stride, device or activation that does not fit.
    """
    device = _common.check_device(
        "mlp", x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight,
        fc2_bias=fc2_bias, layer_scale=layer_scale, residual=residual,
    )  # fmt: skip
    _check(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, layer_scale, residual)
    width, units = fc2_weight.shape
    if width > MAX_WIDTH or x.dtype == torch.float32:
        if config is not None:
            raise ValueError(f"mlp: config {config.name} needs C <= {MAX_WIDTH} in 16 bits, got {width} in {x.dtype}")
        hidden = cast(Tensor, linear(x, fc1_weight, fc1_bias, activation=activation))
        return cast(Tensor, linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=residual))

    x_rows = _common.rows_view("mlp", "x", x)
    residual_rows = None if residual is None else _common.rows_view("mlp", "residual", residual)
    y = x.new_empty(x.shape)
    rows = x_rows.shape[0]
    if not rows:
        return y
    gated = activation == "swiglu"
    if config is None:
        config = _common.tuned("mlp", device, CONFIGS, tuning_key(width, x.dtype, gated=gated)) or pick_config(
            width, gated=gated, capability=_common.capability(device)
        )
    large, small = column_tiles(width)
    _mlp_kernel[(triton.cdiv(rows, config.blocks["BLOCK_M"]),)](
        y, x_rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, residual_rows,
        x_rows.stride(0), fc1_weight.stride(0), fc2_weight.stride(0),
        0 if residual_rows is None else residual_rows.stride(0),
        rows, width, units, ACTIVATION=activation, C0=large, C1=small, **config.blocks,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


def compile_cases() -> list[CompileCase]:
    """Every config at its largest width and its activations, with biases, LayerScale and residual."""
    return [
        _compile_case(config, activation)
        for config in CONFIGS
        for activation in ("gelu", "swiglu")
        if config.name.endswith("swiglu") == (activation == "swiglu") or config.name == "width192_sm80"
    ]


def _compile_case(config: Config, activation: str) -> CompileCase:
    tensors = ("y", "x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale", "residual")
    sizes = ("x_stride", "fc1_stride", "fc2_stride", "residual_stride", "M", "C", "F")
    large, small = column_tiles(192 if config.name.startswith("width192") else 384)
    return CompileCase(
        kernel="mlp",
        config=config.name if config.name.endswith("swiglu") else f"{config.name}_{activation}",
        fn=_mlp_kernel,
        signature=dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sizes, "i32"),
        constexprs={"ACTIVATION": activation, "C0": large, "C1": small, **config.blocks},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name in (*tensors, *sizes) if name != "M"),
        archs=tuple(arch for arch in (80, 90, 100) if divmod(arch, 10) >= config.min_capability),
        tile={"M": config.blocks["BLOCK_M"], "F": config.blocks["BLOCK_F"]},
    )
