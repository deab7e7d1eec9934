"""The ops that are products with an epilogue: `linear`, `quantized_linear`, `mlp` and `attention_block`.

Each is a public function, which checks its arguments, and a `FusedOp`, from which follows all that torch and the
backends see of it. An operand that all of them should take goes into EPILOGUE, the public functions, `checks` and the
backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from vitfast.ops import checks
from vitfast.ops.checks import out_features
from vitfast.ops.library import empty_stats
from vitfast.ops.reference import SCALE_GROUP
from vitfast.ops.registry import Spec, choose

EPILOGUE = "Tensor? layer_scale=None, Tensor? residual=None"
"""What scales a product and is added to it, in torch's schema language."""

FOLDED_NORM = "Tensor? weight_sum=None, float eps=1e-06"
"""The LayerNorm that `fold_norm` took into the weight."""


class FusedOp:
    """One op with an epilogue, as torch and as the backends see it.

    A torch op has a fixed number of results and takes its arguments by position: there are two of the same arguments,
    `torch.ops.vitfast.<name>` and `<name>_<second>`, whose name says what the second result is. A backend is one
    function that takes them by name, and `<second>=True` to give both.

    Args:
        schema: of the arguments.
        spec: what to ask the registry for a call: gets the arguments by name, and `<second>`.
        fake: the first result, uninitialised: gets the arguments by name.
        second: what the second result is; fake_both: both results, from the first and the arguments by name.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        spec: Callable[..., Spec],
        fake: Callable[..., Tensor],
        second: str,
        fake_both: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        self.names = {False: name, True: f"{name}_{second}"}
        self.spec, self.fake, self.second, self.fake_both = spec, fake, second, fake_both
        self._define(False, f"({schema}) -> Tensor")
        self._define(True, f"({schema}) -> (Tensor, Tensor)")
        arguments = getattr(torch.ops.vitfast, name).default._schema.arguments
        self.defaults = {argument.name: argument.default_value for argument in arguments}

    def __call__(self, arguments: tuple, second: bool, backend: str | None) -> Any:
        """Run on a backend, or as a torch op with None, which torch.compile can trace."""
        if backend is None:
            return getattr(torch.ops.vitfast, self.names[second])(*arguments)
        return self._run(arguments, second, backend)

    def _define(self, second: bool, schema: str) -> None:
        def run(*arguments):
            return self._run(arguments, second, "auto")

        def fake(*arguments):
            named = self._by_name(arguments)
            y = self.fake(**named)
            return self.fake_both(y, **named) if second else y

        op = custom_op(f"vitfast::{self.names[second]}", run, mutates_args=(), schema=schema)
        op.register_fake(fake)

    def _run(self, arguments: tuple, second: bool, backend: str) -> Any:
        named = self._by_name(arguments) | {self.second: second}
        return choose(self.spec(**named), backend).call(**named)

    def _by_name(self, arguments: tuple) -> dict[str, Any]:
        """torch's dispatcher leaves trailing arguments away that equal their defaults."""
        return self.defaults | dict(zip(self.defaults, arguments, strict=False))


_STATS: Any = {"second": "stats", "fake_both": lambda y, **_: (y, empty_stats(y))}

_LINEAR = FusedOp(
    "linear",
    f"Tensor x, Tensor weight, Tensor? bias=None, str? activation=None, {EPILOGUE}, Tensor? row_stats=None, "
    f"{FOLDED_NORM}",
    spec=lambda x, weight, **_: checks.linear_spec(x, weight),
    fake=lambda x, weight, activation, **_: x.new_empty((*x.shape[:-1], out_features(weight, activation))),
    **_STATS,
)


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(norm(x) @ weightᵀ + bias) * layer_scale + residual, in one pass over the output.

    Args:
        x: [..., K]. weight: [N, K], or [2F, K] with gate rows first for "swiglu" (output [..., F]).
        activation: None, "gelu" (erf), "gelu_tanh", "quick_gelu", "silu" or "swiglu".
        layer_scale: [N]. residual: of the output's shape.
        row_stats: [M, ceil(K / 128), 2] of x, as `row_stats` gives: LayerNorm of x is applied as
            a correction of the product; weight, weight_sum and bias are then those of `fold_norm`.
        eps: of that LayerNorm.
        stats: also return `row_stats` of the output (as stored), computed in the epilogue.

    Returns:
        [..., N] in x's dtype, or that and [M, ceil(N / 128), 2] fp32.

    Raises:
        ValueError: if a shape or dtype does not fit, or the activation is unknown.
    """
    checks.check_linear(x, weight, bias, activation, layer_scale, residual, row_stats, weight_sum, stats=stats)
    arguments = (x, weight, bias, activation, layer_scale, residual, row_stats, weight_sum, eps)
    return _LINEAR(arguments, stats, backend)


def _fake_requantized(y: Tensor, *, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    groups = -(-y.shape[-1] // SCALE_GROUP)
    return y.new_empty(y.shape, dtype=x.dtype), y.new_empty((*y.shape[:-1], groups), dtype=torch.float32)


_QUANTIZED_LINEAR = FusedOp(
    "quantized_linear",
    "Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation, "
    "Tensor? layer_scale, Tensor? residual, ScalarType dtype",
    spec=lambda x, x_scale, weight, activation, requantize, **_: checks.quantized_linear_spec(
        x, x_scale, weight, activation, requantize
    ),
    fake=lambda x, weight, activation, dtype, **_: x.new_empty(
        (*x.shape[:-1], out_features(weight, activation)), dtype=dtype
    ),
    second="requantize",
    fake_both=_fake_requantized,
)


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
    arguments = (x, x_scale, weight, weight_scale, bias, activation, layer_scale, residual, dtype)
    checks.check_quantized_linear(*arguments)
    return _QUANTIZED_LINEAR(arguments, requantize, backend)


_MLP = FusedOp(
    "mlp",
    "Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str activation='gelu', "
    f"{EPILOGUE}, {FOLDED_NORM}",
    spec=lambda x, fc1_weight, **_: checks.mlp_spec(x, fc1_weight),
    fake=lambda x, **_: x.new_empty(x.shape),
    **_STATS,
)


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(norm(x) @ fc1ᵀ + b1) @ fc2ᵀ + b2, times layer_scale, plus residual; the hidden row stays on chip.

    Args:
        x: [..., C]. fc1_weight: [F, C] ([2F, C] for "swiglu"). fc2_weight: [C, F].
        weight_sum: [F] (or [2F]) fp32: LayerNorm of x is applied as a correction of fc1's product; fc1_weight,
            weight_sum and fc1_bias are then those of `fold_norm`, as in `linear`. eps: of that LayerNorm.
        stats: also return `row_stats` of the output, as `linear` does.

    Returns:
        [..., C] in x's dtype, or that and [M, ceil(C / 128), 2] fp32.

    Raises:
        ValueError: if a shape or dtype does not fit, or the activation is unknown.
    """
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    checks.check_mlp(x, *weights, activation, layer_scale, residual, weight_sum)
    return _MLP((x, *weights, activation, layer_scale, residual, weight_sum, eps), stats, backend)


_ATTENTION_BLOCK = FusedOp(
    "attention_block",
    "Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, SymInt heads, "
    f"{EPILOGUE}, {FOLDED_NORM}",
    spec=lambda x, proj_weight, heads, **_: checks.attention_block_spec(x, proj_weight, heads),
    fake=lambda x, **_: x.new_empty(x.shape),
    **_STATS,
)


def attention_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    heads: int,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention(norm(x) @ qkvᵀ + b) @ projᵀ + b', times layer_scale, plus residual: the first half of a block.

    Args:
        x: [B, N, C]. qkv_weight: [3 * heads * D, C], rows ordered q, k, v. proj_weight: [C, heads * D].
        heads: of attention, which is `attention` of an image's tokens among themselves, without its options.
        weight_sum: [3 * heads * D] fp32: LayerNorm of x is applied as a correction of the first product; qkv_weight,
            weight_sum and qkv_bias are then those of `fold_norm`, as in `linear`. eps: of that LayerNorm.
        stats: also return `row_stats` of the output, as `linear` does.

    Returns:
        [B, N, C] in x's dtype, or that and [B * N, ceil(C / 128), 2] fp32.

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    checks.check_attention_block(x, *weights, heads, layer_scale, residual, weight_sum)
    return _ATTENTION_BLOCK((x, *weights, heads, layer_scale, residual, weight_sum, eps), stats, backend)
