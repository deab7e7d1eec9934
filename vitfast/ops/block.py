"""The op `attention_block`: the public function and what torch sees of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from vitfast.ops import checks
from vitfast.ops.reference import STATS_TILE
from vitfast.ops.registry import choose


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
    checks.check_attention_block(
        x, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, layer_scale, residual, weight_sum
    )
    arguments = (x, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, layer_scale, residual, weight_sum, eps)
    if backend is not None:
        return _call(backend, stats, *arguments)
    op = torch.ops.vitfast.attention_block_stats if stats else torch.ops.vitfast.attention_block
    return op(*arguments)


def _call(
    backend, stats, x, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, layer_scale, residual, weight_sum, eps
) -> Any:
    options = {"layer_scale": layer_scale, "residual": residual, "weight_sum": weight_sum, "eps": eps, "stats": stats}
    run = choose(checks.attention_block_spec(x, proj_weight, heads), backend).call
    return run(x, qkv_weight, qkv_bias, proj_weight, proj_bias, heads=heads, **options)


@custom_op("vitfast::attention_block", mutates_args=())
def _attention_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    heads: int,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    return _call("auto", False, x, *weights, heads, layer_scale, residual, weight_sum, eps)


@_attention_block.register_fake
def _(x, *weights_and_options):
    return x.new_empty(x.shape)


@custom_op("vitfast::attention_block_stats", mutates_args=())
def _attention_block_stats(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    heads: int,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    return _call("auto", True, x, *weights, heads, layer_scale, residual, weight_sum, eps)


@_attention_block_stats.register_fake
def _(x, *weights_and_options):
    stats = x.new_empty((x.shape[0] * x.shape[1], -(-x.shape[2] // STATS_TILE), 2), dtype=torch.float32)
    return x.new_empty(x.shape), stats
