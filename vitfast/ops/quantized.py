"""The ops on 8-bit operands: `quantize` and `quantized_linear`, public functions and what torch sees of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from vitfast.ops import checks
from vitfast.ops.reference import SCALE_GROUP
from vitfast.ops.registry import choose


def quantize(
    x: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of x, or of its LayerNorm, in 8 bits with one scale a row: x ≈ values * scale.

    The row's largest magnitude becomes 448 in float8_e4m3fn, 127 in int8; rounding is to nearest
    even. The LayerNorm is that of `layer_norm`, in fp32 and not rounded before it is quantised.

    Args:
        x: [..., K]. norm_weight, norm_bias: [K] in x's dtype, both or neither.
        dtype: torch.float8_e4m3fn or torch.int8.

    Returns:
        values [..., K] in `dtype`, and scale [...] in fp32. A row with NaN or infinity has a NaN scale.

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    checks.check_quantize(x, norm_weight, norm_bias, dtype)
    if backend is None:
        return torch.ops.vitfast.quantize(x, norm_weight, norm_bias, eps, dtype)
    return choose(checks.quantize_spec(x, dtype), backend).call(x, norm_weight, norm_bias, eps, dtype=dtype)


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
    backend: str | None = None,
) -> Any:
    """`linear` of quantised operands: act(x @ weightᵀ * x_scale * weight_scale + bias) * layer_scale + residual.

    Args:
        x: [..., K], x_scale: [...], as `quantize` gives them; or [..., ceil(K / 128)], one for each 128 columns, as
            `requantize` gives them; or [..., ceil(K / 64)]. `attention` gives one for each head of 64 or 128 columns.
        weight: [N, K] in x's dtype, weight_scale: [N], as `quantize(weight)` gives them; [2F, K] and [2F] for "swiglu".
        activation: as in `linear`. bias: [N]. layer_scale: [N]. residual: of the output's shape.
        dtype: of the output, bias, layer_scale and residual. Sums are int32 for int8 and fp32 for fp8.
        requantize: give the output as an operand of the next product, rounded to x's dtype and to nothing before.

    Returns:
        [..., N] in `dtype`, rounded once; with `requantize` values [..., N] in x's dtype and a scale for each 128
        columns, [..., ceil(N / 128)] in fp32.

    Raises:
        ValueError: if a shape or dtype does not fit, or the activation is unknown.
    """
    checks.check_quantized_linear(x, x_scale, weight, weight_scale, bias, activation, layer_scale, residual, dtype)
    if backend is None:
        ops = torch.ops.vitfast
        run = ops.quantized_linear_requantize if requantize else ops.quantized_linear
        return run(x, x_scale, weight, weight_scale, bias, activation, layer_scale, residual, dtype)
    epilogue = (bias, activation, layer_scale, residual, dtype)
    return _call(backend, requantize, x, x_scale, weight, weight_scale, *epilogue)


def _call(backend, requantize, x, x_scale, weight, weight_scale, bias, activation, layer_scale, residual, dtype) -> Any:
    options = {"activation": activation, "layer_scale": layer_scale, "residual": residual, "dtype": dtype}
    run = choose(checks.quantized_linear_spec(x, x_scale, weight, activation, requantize), backend).call
    return run(x, x_scale, weight, weight_scale, bias, **options, **({"requantize": True} if requantize else {}))


@custom_op("vitfast::quantize", mutates_args=())
def _quantize(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return choose(checks.quantize_spec(x, dtype)).call(x, norm_weight, norm_bias, eps, dtype=dtype)


@_quantize.register_fake
def _(x, norm_weight, norm_bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@custom_op("vitfast::quantized_linear", mutates_args=())
def _quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    epilogue = (bias, activation, layer_scale, residual, dtype)
    return _call("auto", False, x, x_scale, weight, weight_scale, *epilogue)


@_quantized_linear.register_fake
def _(x, x_scale, weight, weight_scale, bias, activation, layer_scale, residual, dtype):
    return x.new_empty((*x.shape[:-1], _width(weight, activation)), dtype=dtype)


@custom_op("vitfast::quantized_linear_requantize", mutates_args=())
def _quantized_linear_requantize(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    epilogue = (bias, activation, layer_scale, residual, dtype)
    return _call("auto", True, x, x_scale, weight, weight_scale, *epilogue)


@_quantized_linear_requantize.register_fake
def _(x, x_scale, weight, weight_scale, bias, activation, layer_scale, residual, dtype):
    width = _width(weight, activation)
    groups = (width + SCALE_GROUP - 1) // SCALE_GROUP
    return x.new_empty((*x.shape[:-1], width)), x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


def _width(weight: Tensor, activation: str | None) -> int:
    return weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
