"""The Vision Transformer forward, written once, in terms of the ops a plan has chosen.

"An Image Is Worth 16x16 Words" (Dosovitskiy et al. 2020) and its pre-norm descendants: DeiT
(distillation token), CLIP (a norm before the blocks, a projection after), DINOv2 (LayerScale,
register tokens, SwiGLU). `Weights` is what the forward reads: canonical weights (see
`vitfast.models.config`) in the order and form the plan wants them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vitfast.models.config import ViTConfig
from vitfast.models.output import Output
from vitfast.models.plan import LinearOp, Plan, QuantizedLinearOp
from vitfast.models.weights import Block, Dense, Norm, Weights

State: TypeAlias = "tuple[Tensor, Tensor | None]"
"""The residual stream [B, N, C], and its row statistics where the next product wants them."""


def forward(config: ViTConfig, weights: Weights, position: Tensor | None, images: Tensor, plan: Plan) -> Output:
    """Run the model on uint8 [B, H, W, Cin] or normalised float [B, Cin, H, W] images.

    Args:
        position: [L, C] for this image size (`weights.position`, or that resized).
    """
    uint8 = images.dtype == torch.uint8
    embed = weights.embed_uint8 if uint8 else weights.embed_float
    assert embed is not None, "uint8 images need a known normalisation; Runner.check has seen to it"
    x = plan.patch_embed(
        images, embed.weight, embed.bias, position, weights.prefix, patch_size=config.patch_size, channels_last=uint8
    )
    if weights.norm_pre:
        x = plan.layer_norm(x, weights.norm_pre.weight, weights.norm_pre.bias, config.norm_eps)
    run_block = block_function(plan)
    stats = first_stats(plan, x)
    for i, block in enumerate(weights.blocks):
        x, stats = run_block(config, weights.activation, block, x, stats, plan, last=i == config.depth - 1)
    if weights.norm:
        x = plan.layer_norm(x, weights.norm.weight, weights.norm.bias, config.norm_eps)
    return _head(config, weights, x, plan)


def block_function(plan: Plan) -> Callable[..., State]:
    """The block as this plan runs it: `folded_block`, `fused_block` or `quantized_block`."""
    if plan.quantized is not None:
        return quantized_block
    return fused_block if plan.fused else folded_block


def first_stats(plan: Plan, x: Tensor) -> Tensor | None:
    """Row statistics for the first block; later ones have them from the block before."""
    return plan.row_stats(x) if plan.row_stats and plan.fold_norm and not plan.attention_block else None


def folded_block(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, *, last: bool
) -> State:
    """A launch for each op: five with folded norms, seven where the plan has norms of their own."""
    x, stats = _attention_half(config, block, x, stats, plan, want_stats=plan.fold_norm)
    return _mlp_half(config, activation, block, x, stats, plan, want_stats=plan.fold_norm and not last)


def fused_block(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, *, last: bool
) -> State:
    """One half in one launch, or each: two to four with folded norms. A fused half finds its row statistics itself."""
    want_stats = plan.fold_norm and plan.mlp is None
    if plan.attention_block is None:
        x, stats = _attention_half(config, block, x, stats, plan, want_stats=want_stats)
    else:
        normed, folded = _normed(config, plan, x, block.norm1, block.qkv)
        qkv, proj = block.qkv, block.proj
        made = plan.attention_block(
            normed, qkv.weight, qkv.bias, proj.weight, proj.bias, heads=config.heads, layer_scale=block.layer_scale1,
            residual=x, stats=want_stats, **folded,
        )  # fmt: skip
        x, stats = made if want_stats else (made, None)
    want_stats = plan.fold_norm and plan.attention_block is None and not last
    if plan.mlp is None:
        return _mlp_half(config, activation, block, x, stats, plan, want_stats=want_stats)
    normed, folded = _normed(config, plan, x, block.norm2, block.fc1)
    fc1, fc2 = block.fc1, block.fc2
    made = plan.mlp(
        normed, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=activation, layer_scale=block.layer_scale2,
        residual=x, stats=want_stats, **folded,
    )  # fmt: skip
    return made if want_stats else (made, None)


def quantized_block(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, *, last: bool
) -> State:
    """Products in 8 bits, but for those left alone: seven launches where attention and fc1 write 8 bits themselves."""
    qkv = _either(config, plan, plan.quantized_qkv, plan.qkv, x, block.qkv, block.norm1)
    q, k, v = _split(config, qkv)
    epilogue: dict[str, Any] = {"layer_scale": block.layer_scale1, "residual": x}
    proj, fc1, fc2 = block.proj, block.fc1, block.fc2
    if plan.attention_quantize is not None and proj.scale is not None:
        values, scale = plan.attention_quantize(q, k, v, quantize=plan.quantized)
        values = values.view(*x.shape[:2], -1)
        x = plan.proj_head_scales(values, scale, proj.weight, proj.scale, proj.bias, dtype=x.dtype, **epilogue)
    else:
        mixed = plan.attention(q, k, v).view(*x.shape[:2], -1)
        x = _either(config, plan, plan.quantized_proj, plan.proj, mixed, proj, **epilogue)
    epilogue = {"layer_scale": block.layer_scale2, "residual": x}
    if plan.fc1_requantize is not None and fc1.scale is not None and fc2.scale is not None:
        values, scale = _quantize(config, plan, x, block.norm2)
        values, scale = plan.fc1_requantize(
            values, scale, fc1.weight, fc1.scale, fc1.bias, dtype=x.dtype, activation=activation, requantize=True
        )
        x = plan.fc2_group_scales(values, scale, fc2.weight, fc2.scale, fc2.bias, dtype=x.dtype, **epilogue)
    else:
        hidden = _either(config, plan, plan.quantized_fc1, plan.fc1, x, fc1, block.norm2, activation=activation)
        x = _either(config, plan, plan.quantized_fc2, plan.fc2, hidden, fc2, **epilogue)
    return x, None


def _attention_half(
    config: ViTConfig, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, *, want_stats: bool
) -> State:
    """Attention with its products; `want_stats`: also the row statistics that fc1 wants."""
    normed, folded = _normed(config, plan, x, block.norm1, block.qkv)
    if plan.fold_norm:
        folded["row_stats"] = stats
    q, k, v = _split(config, plan.qkv(normed, block.qkv.weight, block.qkv.bias, **folded))
    mixed = plan.attention(q, k, v).view(*x.shape[:2], -1)
    epilogue: dict[str, Any] = {"layer_scale": block.layer_scale1, "residual": x, "stats": want_stats}
    made = plan.proj(mixed, block.proj.weight, block.proj.bias, **epilogue)
    return made if want_stats else (made, None)


def _mlp_half(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, *, want_stats: bool
) -> State:
    """The feed-forward network; `want_stats`: also the row statistics that the next block's qkv wants."""
    normed, folded = _normed(config, plan, x, block.norm2, block.fc1)
    if plan.fold_norm:
        folded["row_stats"] = stats
    hidden = plan.fc1(normed, block.fc1.weight, block.fc1.bias, activation=activation, **folded)
    epilogue: dict[str, Any] = {"layer_scale": block.layer_scale2, "residual": x, "stats": want_stats}
    made = plan.fc2(hidden, block.fc2.weight, block.fc2.bias, **epilogue)
    return made if want_stats else (made, None)


def _normed(config: ViTConfig, plan: Plan, x: Tensor, norm: Norm, first: Dense) -> tuple[Tensor, dict[str, Any]]:
    """x after its LayerNorm; or, where that is folded into the product `first`, x and what tells the product so."""
    if plan.fold_norm:
        return x, {"weight_sum": first.weight_sum, "eps": config.norm_eps}
    return plan.layer_norm(x, norm.weight, norm.bias, config.norm_eps), {}


def _split(config: ViTConfig, qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v [B, N, H, D] of packed rows [B, N, 3 * H * D], as views."""
    return qkv.view(*qkv.shape[:2], 3, config.heads, config.head_dim).unbind(2)


def _quantize(config: ViTConfig, plan: Plan, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """The rows of x, or of its LayerNorm, in 8 bits."""
    weight, bias = (norm.weight, norm.bias) if norm else (None, None)
    return plan.quantize(x, weight, bias, config.norm_eps, dtype=plan.quantized)


def _either(
    config: ViTConfig, plan: Plan, quantized: QuantizedLinearOp, plain: LinearOp,
    x: Tensor, dense: Dense, norm: Norm | None = None, **epilogue: Any,
) -> Tensor:  # fmt: skip
    """A product, after a LayerNorm if there is one: in 8 bits where its weight is, else plain."""
    if dense.scale is not None:
        values, scale = _quantize(config, plan, x, norm)
        return quantized(values, scale, dense.weight, dense.scale, dense.bias, dtype=x.dtype, **epilogue)
    if norm:
        x = plan.layer_norm(x, norm.weight, norm.bias, config.norm_eps)
    return plain(x, dense.weight, dense.bias, **epilogue)


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
        pooled = plan.layer_norm(pooled, weights.pool_norm.weight, weights.pool_norm.bias, config.norm_eps)
    embedding = plan.head(pooled, weights.projection.weight, None) if weights.projection else pooled
    logits = None
    if weights.head:
        features = torch.cat([pooled, patches.mean(dim=1)], dim=1) if config.head_concat_mean else pooled
        if weights.head_dist:
            first = plan.head(tokens[:, 0].contiguous(), weights.head.weight, weights.head.bias)
            second = plan.head(tokens[:, 1].contiguous(), weights.head_dist.weight, weights.head_dist.bias)
            logits = (first + second) / 2
        else:
            logits = plan.head(features, weights.head.weight, weights.head.bias)
    return Output(tokens, embedding, logits)
