"""Rows in 8 bits with one scale each, after a LayerNorm or as they are.

    values[m] = round(r[m] * (L / amax[m])),  scale[m] = amax[m] / L,  amax[m] = max |r[m]|
    r[m] = x[m], or (x[m] - mean[m]) / sqrt(var[m] + eps) * weight + bias

x is [M, K] (fp32, fp16 or bf16), values [M, K] float8_e4m3fn (L = 448) or int8 (L = 127), scale [M] fp32.
Everything is computed in fp32, rounding is to nearest even, and a normalised row is quantised before it is
rounded to anything else. A row with NaN or infinity gets a NaN scale, so that what comes of it is NaN.

Bound by bytes: a row is read once and written once, in half the bytes of a 16-bit dtype.

Source: per-row dynamic scales as in LLM.int8() (Dettmers et al. 2022, vector-wise quantisation).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels import _common
from vitfast.kernels._common import CompileCase
from vitfast.kernels.layer_norm import CONFIGS, MAX_COLUMNS, _moments, pick_config

CAPABILITIES: dict[str, Any] = {
    "dtypes": ("float8_e4m3fn", "int8"),
    "min_capability": (8, 0),
    "limits": {"width": (1, MAX_COLUMNS)},
}


@triton.jit
def in_8_bits(value, kind: tl.constexpr):
    """Rows of fp32 [R, K], masked columns 0, in `kind` with a scale each [R]."""
    LARGEST: tl.constexpr = 448.0 if kind == tl.float8e4nv else 127.0
    amax = tl.maximum(tl.max(tl.abs(value), axis=1), 7.888609052210118e-31)  # 2^-100: no division by zero
    nan = tl.sum(value * 0.0, axis=1)  # 0 for finite rows, which a maximum does not tell
    value = value * (LARGEST / amax)[:, None]
    if kind == tl.int8:
        # Adding and taking away 1.5 * 2^23 rounds to nearest even; a NaN has no integer, its scale says it.
        value = tl.where(value == value, (value + 12582912.0) - 12582912.0, 0.0)
    return value.to(kind), amax / LARGEST + nan


@triton.jit
def _quantize_kernel(
    values,  # [M, K] contiguous, float8_e4m3fn or int8
    scale,  # [M] fp32
    x,  # [M, K], rows stride_x apart
    weight,  # [K], or None without LayerNorm
    bias,  # [K], or None
    stride_x,
    rows,
    columns,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # Locate
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    row_ok, column_ok = row < rows, column < columns
    mask = row_ok[:, None] & column_ok
    start = row.to(tl.int64)[:, None]

    # Load
    value = tl.load(x + start * stride_x + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]

    # Compute
    if weight is not None:
        gain = tl.load(weight + column, mask=column_ok, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)
        _, deviation, squares = _moments(value, mask, columns)
        value = deviation * tl.rsqrt(squares / columns + eps)[:, None] * gain + shift
    value, row_scale = in_8_bits(value, values.dtype.element_ty)

    # Store
    tl.store(values + start * columns + column, value, mask=mask)
    tl.store(scale + row, row_scale, mask=row_ok)


@_common.on_its_device
def quantize(
    x: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`vitfast.ops.quantize` on CUDA: values [..., K] in `dtype` and scale [...] in fp32, both contiguous.

    x: fp32, fp16 or bf16, rows at one stride; norm_weight, norm_bias: [K] in x's dtype, both or neither.

    Raises:
        ValueError: if a shape, dtype, stride or device does not fit, or K exceeds `MAX_COLUMNS`.
    """
    op = "quantize"
    _common.check_device(op, x=x, norm_weight=norm_weight, norm_bias=norm_bias)
    _common.check_dtype(op, x=x)
    if dtype not in (torch.float8_e4m3fn, torch.int8):
        raise ValueError(f"{op}: dtype must be torch.float8_e4m3fn or torch.int8, got {dtype}")
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x must have a non-empty last axis, got shape {tuple(x.shape)}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError(f"{op}: norm_weight and norm_bias go together; only one was given")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _common.check_shape(op, name, tensor, (x.shape[-1],))
        _common.check_dtype(op, x.dtype, **{name: tensor})
        _common.check_last_contiguous(op, **{name: tensor})
    rows = _common.rows_view(op, "x", x)
    config = pick_config(x.shape[-1])
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rows.shape[0]:
        _quantize_kernel[(triton.cdiv(rows.shape[0], config.blocks["BLOCK_ROWS"]),)](
            values,
            scale,
            rows,
            norm_weight,
            norm_bias,
            rows.stride(0),
            rows.shape[0],
            rows.shape[1],
            eps,
            **config.options(),
        )
    return values, scale


def compile_cases() -> list[CompileCase]:
    """bf16 rows to both dtypes at every config, with and without LayerNorm."""
    return [
        _compile_case(config, kind, norm) for config in CONFIGS for kind in ("fp8e4nv", "i8") for norm in (True, False)
    ]


def _compile_case(config: _common.Config, kind: str, norm: bool) -> CompileCase:
    constexprs = {**config.blocks, **({} if norm else {"weight": None, "bias": None})}
    kinds = {"values": f"*{kind}", "scale": "*fp32", "eps": "fp32"} | dict.fromkeys(("x", "weight", "bias"), "*bf16")
    signature = {name: kinds.get(name, "i32") for name in _quantize_kernel.arg_names if name not in constexprs}
    return CompileCase(
        kernel="quantize",
        config=f"{config.name}_{kind}" + "_norm" * norm,
        fn=_quantize_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name in signature if name not in ("rows", "eps")),
        archs=(89, 90, 100) if kind == "fp8e4nv" else (80, 90, 100),
        tile={"M": config.blocks["BLOCK_ROWS"], "C": config.blocks["BLOCK_COLUMNS"]},
    )
