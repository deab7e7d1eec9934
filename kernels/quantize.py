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

from vitfast.kernels._parts import launch
from vitfast.kernels._parts.eight_bits import in_8_bits
from vitfast.kernels.layer_norm import MAX_COLUMNS, _moments, pick_config

CAPABILITIES: dict[str, Any] = {
    "dtypes": ("float8_e4m3fn", "int8"),
    "min_capability": (8, 0),
    "limits": {"width": (1, MAX_COLUMNS)},
}


@triton.jit
def _quantize_kernel(
    values,  # [M, K] contiguous, float8_e4m3fn or int8
    scale,  # [M] fp32
    x,  # [M, K], rows x_stride apart
    weight,  # [K], or None without LayerNorm
    bias,  # [K], or None
    x_stride,
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
    value = tl.load(x + start * x_stride + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]

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


@launch.on_its_device
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
        ValueError: if a stride or device does not fit, or K exceeds `MAX_COLUMNS`.
    """
    op = "quantize"
    launch.check_device(op, x=x, norm_weight=norm_weight, norm_bias=norm_bias)
    launch.check_last_contiguous(op, norm_weight=norm_weight, norm_bias=norm_bias)
    rows = launch.rows_view(op, "x", x)
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
