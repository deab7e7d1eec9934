"""`torch.ops.vitfast.*`: the ops as torch sees them, with schemas and fakes for torch.compile.

Each takes the first able backend in default order. There is no autograd yet: a backward through
one of these raises, as torch does for an op without a registered gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from vitfast.ops import checks
from vitfast.ops.reference import STATS_TILE
from vitfast.ops.registry import Spec, choose


def _fresh(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """A custom op may not return (a view of) an input; reference ops can for identity cases."""
    if any(t is not None and t.data_ptr() == result.data_ptr() for t in inputs):
        return result.clone()
    return result


@custom_op("vitfast::patch_embed", mutates_args=())
def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    patch_size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    call = choose(checks.patch_embed_spec(images, weight)).call
    size = (patch_size[0], patch_size[1])
    return call(images, weight, bias, position, prefix, patch_size=size, channels_last=channels_last)


@patch_embed.register_fake
def _(images, weight, bias, position, prefix, patch_size, channels_last):
    height, width = images.shape[1:3] if channels_last else images.shape[2:4]
    tokens = (height // patch_size[0]) * (width // patch_size[1])
    if prefix is not None:
        tokens = tokens + prefix.shape[0]
    return weight.new_empty(images.shape[0], tokens, weight.shape[0])


@custom_op("vitfast::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    return choose(Spec.of("layer_norm", x, width=x.shape[-1])).call(x, weight, bias, eps)


@layer_norm.register_fake
def _(x, weight, bias, eps=1e-6):
    return x.new_empty(x.shape)


@custom_op("vitfast::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return choose(Spec.of("add_layer_norm", x, width=x.shape[-1])).call(x, residual, weight, bias, eps)


@add_layer_norm.register_fake
def _(x, residual, weight, bias, eps=1e-6):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _stats_like(x: Tensor, width: int) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1], -(-width // STATS_TILE), 2), dtype=torch.float32)


@custom_op("vitfast::row_stats", mutates_args=())
def row_stats(x: Tensor) -> Tensor:
    return choose(Spec.of("row_stats", x, width=x.shape[-1])).call(x)


@row_stats.register_fake
def _(x):
    return _stats_like(x, x.shape[-1])


def _call_linear(stats, x, weight, bias, activation, layer_scale, residual, row_stats, weight_sum, eps) -> Any:
    return choose(checks.linear_spec(x, weight)).call(
        x,
        weight,
        bias,
        activation=activation,
        layer_scale=layer_scale,
        residual=residual,
        row_stats=row_stats,
        weight_sum=weight_sum,
        eps=eps,
        stats=stats,
    )


@custom_op("vitfast::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_stats: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    return _call_linear(False, x, weight, bias, activation, layer_scale, residual, row_stats, weight_sum, eps)


def _linear_out(x: Tensor, weight: Tensor, activation: str | None) -> Tensor:
    width = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    return x.new_empty((*x.shape[:-1], width))


@linear.register_fake
def _(x, weight, bias=None, activation=None, layer_scale=None, residual=None, row_stats=None, weight_sum=None, eps=0):
    return _linear_out(x, weight, activation)


@custom_op("vitfast::linear_stats", mutates_args=())
def linear_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_stats: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    return _call_linear(True, x, weight, bias, activation, layer_scale, residual, row_stats, weight_sum, eps)


@linear_stats.register_fake
def _(x, weight, bias=None, activation=None, layer_scale=None, residual=None, row_stats=None, weight_sum=None, eps=0):
    y = _linear_out(x, weight, activation)
    return y, _stats_like(y, y.shape[-1])


@custom_op("vitfast::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    call = choose(checks.attention_spec(q, k)).call
    return _fresh(call(q, k, v, bias=bias, mask=mask, causal=causal, scale=scale), q, k, v)


@attention.register_fake
def _(q, k, v, bias=None, mask=None, causal=False, scale=None):
    return q.new_empty(q.shape)


@custom_op("vitfast::mlp", mutates_args=())
def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return choose(checks.mlp_spec(x, fc1_weight)).call(
        x,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        activation=activation,
        layer_scale=layer_scale,
        residual=residual,
    )


@mlp.register_fake
def _(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation="gelu", layer_scale=None, residual=None):
    return x.new_empty(x.shape)
