"""The Vision Transformer forward, written once, in terms of the ops a plan has chosen.

"An Image Is Worth 16x16 Words" (Dosovitskiy et al. 2020) and its pre-norm descendants: DeiT
(distillation token), CLIP (a norm before the blocks, a projection after), DINOv2 (LayerScale,
register tokens, SwiGLU). `Weights` is what the forward reads: canonical weights (see
`vitfast.models.config`) in the order and form the plan wants them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitfast.models.config import ViTConfig
from vitfast.models.output import Output
from vitfast.models.plan import Plan
from vitfast.models.weights import Block, Dense, Norm, Weights


def forward(config: ViTConfig, weights: Weights, position: Tensor | None, images: Tensor, plan: Plan) -> Output:
    """Run the model on uint8 [B, H, W, Cin] or normalised float [B, Cin, H, W] images.

    Args:
        position: [L, C] for this image size (`weights.position`, or that resized).
    """
    embed = weights.embed_uint8 if images.dtype == torch.uint8 else weights.embed_float
    assert embed is not None  # the engine refuses uint8 where the normalisation is unknown
    x = plan.calls["patch_embed"](
        images,
        embed.weight,
        embed.bias,
        position,
        weights.prefix,
        patch_size=config.patch_size,
        channels_last=images.dtype == torch.uint8,
    )
    if weights.norm_pre:
        x = plan.calls["layer_norm"](x, weights.norm_pre.weight, weights.norm_pre.bias, config.norm_eps)
    stats = plan.calls["row_stats"](x) if plan.fold_norm and not plan.fuse_attention else None
    for i, block in enumerate(weights.blocks):
        last = i == config.depth - 1
        x, stats = run_block(config, weights.activation, block, x, stats, plan, last=last)
    if weights.norm:
        x = plan.calls["layer_norm"](x, weights.norm.weight, weights.norm.bias, config.norm_eps)
    return _head(config, weights, x, plan)


def run_block(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, *, last: bool
) -> tuple[Tensor, Tensor | None]:
    """One pre-norm block; five launches with folded norms, two to four if a half is one launch, seven in 8 bits."""
    x, stats = _attention_half(config, block, x, stats, plan)
    return _mlp_half(config, activation, block, x, stats, plan, last=last)


def _attention_half(
    config: ViTConfig, block: Block, x: Tensor, stats: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """Attention with its products, and the statistics that fc1 wants."""
    calls = plan.calls
    want_stats: dict[str, Any] = {"stats": True} if plan.fold_norm and not plan.fuse_mlp else {}
    epilogue: dict[str, Any] = {"layer_scale": block.layer_scale1}
    if plan.fuse_attention:
        options = {"heads": config.heads, **epilogue, **want_stats}
        return _fused(config, plan, "attention_block", x, block.norm1, block.qkv, block.proj, **options)
    qkv = _product(config, plan, "qkv", x, block.qkv, block.norm1, stats)
    q, k, v = qkv.view(*x.shape[:2], 3, config.heads, config.head_dim).unbind(2)
    if "mixed_attention" in calls and block.proj.scale is not None:
        mixed, scale = calls["mixed_attention"](q, k, v, quantize=plan.quantized)
        mixed = mixed.view(*x.shape[:2], -1)
        return _quantized_product(calls["mixed_proj"], mixed, scale, block.proj, x.dtype, **epilogue, residual=x), None
    mixed = calls["attention"](q, k, v).view(*x.shape[:2], -1)
    made = _product(config, plan, "proj", mixed, block.proj, **epilogue, residual=x, **want_stats)
    return made if want_stats else (made, None)


def _mlp_half(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, *, last: bool
) -> tuple[Tensor, Tensor | None]:
    """The feed-forward network, and the statistics that the next block's qkv wants."""
    calls = plan.calls
    want_stats: dict[str, Any] = {"stats": True} if plan.fold_norm and not plan.fuse_attention and not last else {}
    if plan.fuse_mlp:
        options = {"activation": activation, "layer_scale": block.layer_scale2, **want_stats}
        return _fused(config, plan, "mlp", x, block.norm2, block.fc1, block.fc2, **options)
    if "hidden_fc1" in calls and block.fc1.scale is not None and block.fc2.scale is not None:
        values, scale = _quantized(config, plan, x, block.norm2)
        values, scale = _quantized_product(
            calls["hidden_fc1"], values, scale, block.fc1, x.dtype, activation=activation, requantize=True
        )
        run, epilogue = calls["hidden_fc2"], {"layer_scale": block.layer_scale2, "residual": x}
        return _quantized_product(run, values, scale, block.fc2, x.dtype, **epilogue), None
    hidden = _product(config, plan, "fc1", x, block.fc1, block.norm2, stats, activation=activation)
    made = _product(config, plan, "fc2", hidden, block.fc2, layer_scale=block.layer_scale2, residual=x, **want_stats)
    return made if want_stats else (made, None)


def _fused(
    config: ViTConfig, plan: Plan, site: str, x: Tensor, norm: Norm, first: Dense, second: Dense, **options: Any
) -> Any:
    """Half a block as one op: a LayerNorm, folded or before it, two products and what is between, the residual."""
    normed = x
    if plan.fold_norm:
        options |= {"weight_sum": first.weight_sum, "eps": config.norm_eps}
    else:
        normed = plan.calls["layer_norm"](x, norm.weight, norm.bias, config.norm_eps)
    made = plan.calls[site](normed, first.weight, first.bias, second.weight, second.bias, residual=x, **options)
    return made if "stats" in options else (made, None)


def _quantized(config: ViTConfig, plan: Plan, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """The rows of x, or of its LayerNorm, in 8 bits."""
    affine = (norm.weight, norm.bias) if norm else (None, None)
    values, scale = plan.calls["quantize"](x, *affine, config.norm_eps, dtype=plan.quantized)
    return values, scale


def _quantized_product(
    run: Callable[..., Any], values: Tensor, scale: Tensor, dense: Dense, dtype: torch.dtype, **epilogue: Any
) -> Any:
    return run(values, scale, dense.weight, dense.scale, dense.bias, dtype=dtype, **epilogue)


def _product(
    config: ViTConfig,
    plan: Plan,
    site: str,
    x: Tensor,
    dense: Dense,
    norm: Norm | None = None,
    row_stats: Tensor | None = None,
    **epilogue: Any,
) -> Any:
    """A product, after a LayerNorm if there is one: folded, quantised with the rows, or before it."""
    if dense.scale is not None:
        values, scale = _quantized(config, plan, x, norm)
        return _quantized_product(plan.calls[f"quantized_{site}"], values, scale, dense, x.dtype, **epilogue)
    if plan.fold_norm and norm:
        return plan.calls[site](
            x,
            dense.weight,
            dense.bias,
            row_stats=row_stats,
            weight_sum=dense.weight_sum,
            eps=config.norm_eps,
            **epilogue,
        )
    if norm:
        x = plan.calls["layer_norm"](x, norm.weight, norm.bias, config.norm_eps)
    return plan.calls[site](x, dense.weight, dense.bias, **epilogue)


def _head(config: ViTConfig, weights: Weights, tokens: Tensor, plan: Plan) -> Output:
    """Pool, norm, project and classify. A few rows only, so no fusion is worth having here."""
    patches = tokens[:, config.prefix_tokens :]
    if config.pool == "avg":
        pooled = patches.mean(dim=1)
    elif config.pool == "avg_all":
        pooled = tokens.mean(dim=1)
    elif config.pool == "cls_dist":
        pooled = (tokens[:, 0] + tokens[:, 1]) / 2
    else:
        pooled = tokens[:, 0].contiguous()
    if weights.pool_norm:
        pooled = plan.calls["layer_norm"](pooled, weights.pool_norm.weight, weights.pool_norm.bias, config.norm_eps)
    linear = plan.calls["head"]
    embedding = linear(pooled, weights.projection.weight, None) if weights.projection else pooled
    logits = None
    if weights.head:
        features = torch.cat([pooled, patches.mean(dim=1)], dim=1) if config.head_concat_mean else pooled
        if weights.head_dist:
            first = linear(tokens[:, 0].contiguous(), weights.head.weight, weights.head.bias)
            second = linear(tokens[:, 1].contiguous(), weights.head_dist.weight, weights.head_dist.bias)
            logits = (first + second) / 2
        else:
            logits = linear(features, weights.head.weight, weights.head.bias)
    return Output(tokens, embedding, logits)
