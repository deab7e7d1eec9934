"""The Vision Transformer forward, written once, in terms of the ops a plan has chosen.

"An Image Is Worth 16x16 Words" (Dosovitskiy et al. 2020) and its pre-norm descendants: DeiT
(distillation token), CLIP (a norm before the blocks, a projection after), DINOv2 (LayerScale,
register tokens, SwiGLU), EVA-02 and DINOv3 (rotary positions), SigLIP (attention pooling), BEiT (relative
positions). `Weights` is what the forward reads: canonical weights (see
`vitfast.models.config`) in the order and form the plan wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.models.config import DIFFERENTIAL_EPS, ViTConfig
from vitfast.models.output import Output
from vitfast.models.plan import LinearOp, Plan, QuantizedLinearOp
from vitfast.models.positions import Positions
from vitfast.models.weights import AttentionPool, Block, Dense, Norm, Weights
from vitfast.ops import reference

State: TypeAlias = "tuple[Tensor, Tensor | None]"
"""The residual stream [B, N, C], and its row statistics where the next product wants them."""


Place: TypeAlias = "dict[str, Any]"
"""What a block's attention is given of positions (see `Positions.of_block`)."""


def forward(
    config: ViTConfig, weights: Weights, positions: Positions, images: Tensor, plan: Plan, layers: Sequence[int] = ()
) -> Output:
    """Run the model on uint8 [B, H, W, Cin] or normalised float [B, Cin, H, W] images.

    Args:
        positions: those of this image size (`weights.positions`, or what `positions_for` makes).
        layers: of which blocks the output is to be kept, as it is, in `Output.layers`.
    """
    x = embed(config, weights, positions, images, plan)
    run: Callable[..., State] = fused_block if plan.fused else folded_block
    if plan.quantized is not None:
        run = quantized_block
    stats, kept = first_stats(plan, x), {}
    for i, block in enumerate(weights.blocks):
        if isinstance(block, nn.Module):
            x, stats = own_block(block, x, plan)
        else:
            place = positions.of_block(config, i)
            x, stats = run(config, weights.activation, block, x, stats, plan, place, last=i == config.depth - 1)
        if i in layers:
            kept[i] = x
    output = head(config, weights, final_norm(config, weights, x, plan), plan, positions.grid)
    return replace(output, layers=tuple(kept[i] for i in layers)) if layers else output


def run_block(
    config: ViTConfig, weights: Weights, i: int, x: Tensor, stats: Tensor | None, plan: Plan, place: Place
) -> State:
    """Block i by itself, as `forward` runs it."""
    block = weights.blocks[i]
    if isinstance(block, nn.Module):
        return own_block(block, x, plan)
    run: Callable[..., State] = fused_block if plan.fused else folded_block
    if plan.quantized is not None:
        run = quantized_block
    last = i == config.depth - 1
    return run(config, weights.activation, block, x, stats, plan, place, last=last)


def own_block(block: nn.Module, x: Tensor, plan: Plan) -> State:
    """A block that has code of its own (see `Checkpoint.own_blocks`), as the module it is."""
    x = block(x).contiguous()  # attention of torchvision's gives tokens first, which norms of ours do not read
    return x, first_stats(plan, x)


def final_norm(config: ViTConfig, weights: Weights, x: Tensor, plan: Plan) -> Tensor:
    """The norm over all tokens after the blocks, where the model has one."""
    return _norm(config, plan, x, weights.norm) if weights.norm else x


def embed(config: ViTConfig, weights: Weights, positions: Positions, images: Tensor, plan: Plan) -> Tensor:
    """Images to the tokens [B, N, C] that the first block reads."""
    x = _embed(config, weights, positions, images, plan)
    return _norm(config, plan, x, weights.norm_pre) if weights.norm_pre else x


def _embed(config: ViTConfig, weights: Weights, positions: Positions, images: Tensor, plan: Plan) -> Tensor:
    """Images to tokens [B, N, C]: one launch, but where a stem makes the patches' tokens or a norm follows them."""
    uint8 = images.dtype == torch.uint8
    position, prefix = positions.embedding, weights.prefix
    if weights.stem is not None:
        x = weights.stem(images)
    else:
        dense = weights.embed_uint8 if uint8 else weights.embed_float
        assert dense is not None, "uint8 images need a known normalisation; Runner.check has seen to it"
        added = (None, None) if weights.embed_norm else (position, prefix)
        x = plan.patch_embed(
            images, dense.weight, dense.bias, *added, patch_size=config.patch_size, channels_last=uint8
        )
        if not weights.embed_norm:
            return x
    if weights.embed_norm:
        x = _norm(config, plan, x, weights.embed_norm)
    if position is not None:
        x = x + position
    return x if prefix is None else torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)


def first_stats(plan: Plan, x: Tensor) -> Tensor | None:
    """Row statistics for a block that has none from the block before."""
    return plan.row_stats(x) if plan.row_stats and plan.fold_norm and not plan.attention_block else None


def folded_block(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, place: Place,
    *, last: bool,
) -> State:  # fmt: skip
    """A launch for each op: five with folded norms, seven where the plan has norms of their own."""
    want = plan.fold_norm and not last
    if config.block == "parallel":  # both halves read the same x, whose statistics serve both
        y, _ = _attention_half(config, block, x, stats, plan, place, want_stats=False)
        return _mlp_half(config, activation, block, x, stats, plan, residual=y, want_stats=want)
    x, stats = _attention_half(config, block, x, stats, plan, place, want_stats=plan.fold_norm)
    return _mlp_half(config, activation, block, x, stats, plan, residual=x, want_stats=want)


def fused_block(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, place: Place,
    *, last: bool,
) -> State:  # fmt: skip
    """One half in one launch, or each: two to four with folded norms. A fused half finds its row statistics itself."""
    want_stats = plan.fold_norm and plan.mlp is None
    if plan.attention_block is None:
        x, stats = _attention_half(config, block, x, stats, plan, place, want_stats=want_stats)
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
        return _mlp_half(config, activation, block, x, stats, plan, residual=x, want_stats=want_stats)
    normed, folded = _normed(config, plan, x, block.norm2, block.fc1)
    fc1, fc2 = block.fc1, block.fc2
    made = plan.mlp(
        normed, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=activation, layer_scale=block.layer_scale2,
        residual=x, stats=want_stats, **folded,
    )  # fmt: skip
    return made if want_stats else (made, None)


def quantized_block(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, place: Place,
    *, last: bool,
) -> State:  # fmt: skip
    """Products in 8 bits, but for those left alone: seven launches where attention and fc1 write 8 bits themselves."""
    qkv = _either(config, plan, plan.quantized_qkv, plan.qkv, x, block.qkv, block.norm1)
    q, k, v = _split(config, qkv)
    options = {**block.heads, **place}
    epilogue: dict[str, Any] = {"layer_scale": block.layer_scale1, "residual": x}
    proj, fc1, fc2 = block.proj, block.fc1, block.fc2
    if plan.attention_quantize is not None and proj.scale is not None:
        values, scale = plan.attention_quantize(q, k, v, quantize=plan.quantized, **options)
        values = values.view(*x.shape[:2], -1)
        x = plan.proj_head_scales(values, scale, proj.weight, proj.scale, proj.bias, dtype=x.dtype, **epilogue)
    else:
        mixed = plan.attention(q, k, v, **options).view(*x.shape[:2], -1)
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
    config: ViTConfig, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, place: Place, *, want_stats: bool
) -> State:
    """Attention with its products; `want_stats`: also the row statistics that fc1 wants."""
    normed, folded = _normed(config, plan, x, block.norm1, block.qkv)
    if plan.fold_norm:
        folded["row_stats"] = stats
    mixed = _attend(config, block, plan.qkv(normed, block.qkv.weight, block.qkv.bias, **folded), plan, place)
    if block.attention_norm:
        mixed = _norm(config, plan, mixed, block.attention_norm)
    if block.gate:
        mixed = mixed * F.linear(normed, block.gate.weight, block.gate.bias).sigmoid()
    return _second(config, plan, plan.proj, mixed, block.proj, block.layer_scale1, block.post_norm1, x, want_stats)


def _attend(config: ViTConfig, block: Block, qkv: Tensor, plan: Plan, place: Place) -> Tensor:
    """Attention of packed rows [B, N, 3 * H * D]: [B, N, H * D]."""
    if windows := place.get("windows"):
        return windows.join(_attend(config, block, windows.cut(qkv, block.padding), plan, {}), len(qkv))
    q, k, v = _split(config, qkv)
    if config.v_norm:
        v = F.rms_norm(v, v.shape[-1:], eps=config.norm_eps)
    if block.differential:
        mixed = _differential(config, *block.differential, (q, k, v), plan, {**block.heads, **place})
    elif block.relative:
        mixed = _decomposed(config, *block.relative, (q, k, v), plan)
    else:
        mixed = plan.attention(q, k, v, **block.heads, **place)
    return mixed.flatten(2)


def _differential(
    config: ViTConfig, factor: Tensor, weight: Tensor, qkv: tuple[Tensor, ...], plan: Plan, options: Place
) -> Tensor:
    """Two softmaxes, of the halves of q and k, one less a share of the other. Half of q is zeros in each."""
    q, k, v = qkv
    first, second = q.chunk(2, dim=-1)
    half = first.shape[-1]
    mixed = plan.attention(F.pad(first, (0, half)), k, v, **options)
    mixed = mixed - factor * plan.attention(F.pad(second, (half, 0)), k, v, **options)
    return F.rms_norm(mixed, mixed.shape[-1:], weight, DIFFERENTIAL_EPS)


def _decomposed(
    config: ViTConfig, rows: Tensor, columns: Tensor, ones: Tensor, qkv: tuple[Tensor, ...], plan: Plan
) -> Tensor:
    """With a bias by relative row and column, whose values are further channels of q, met by ones in k: so no tensor of
    N x N is made."""
    q, k, v = qkv
    sides, scale = (len(rows), len(columns)), config.attention_scale or config.head_dim**-0.5
    cells = q.unflatten(1, sides)
    down, right = torch.einsum("byxhd,ykd->byxhk", cells, rows), torch.einsum("byxhd,xkd->byxhk", cells, columns)
    added = torch.cat([down, right], dim=-1).flatten(1, 2) / scale
    q, k = torch.cat([q, added], dim=-1), torch.cat([k, ones[:, None].expand(*k.shape[:3], -1)], dim=-1)
    return plan.attention(q, k, F.pad(v, (0, sum(sides))), scale=scale)[..., : config.head_dim]


def _mlp_half(
    config: ViTConfig, activation: str, block: Block, x: Tensor, stats: Tensor | None, plan: Plan, *,
    residual: Tensor, want_stats: bool,
) -> State:  # fmt: skip
    """The feed-forward network of x, added to `residual`; `want_stats`: also the row statistics for the next qkv."""
    normed, folded = _normed(config, plan, x, block.norm2, block.fc1)
    if plan.fold_norm:
        folded["row_stats"] = stats
    if block.norm3:
        normed = _norm(config, plan, normed, block.norm3)
    hidden = plan.fc1(normed, block.fc1.weight, block.fc1.bias, activation=activation or None, **folded)
    if not activation:
        hidden = reference.activate(hidden, config.activation)
    if block.mlp_norm:
        hidden = _norm(config, plan, hidden, block.mlp_norm)
    scale, norm = block.layer_scale2, block.post_norm2
    return _second(config, plan, plan.fc2, hidden, block.fc2, scale, norm, residual, want_stats)


def _second(
    config: ViTConfig, plan: Plan, product: LinearOp, x: Tensor, dense: Dense, layer_scale: Tensor | None,
    norm: Norm | None, residual: Tensor, want_stats: bool,
) -> State:  # fmt: skip
    """The product that ends a half, and the sum; with norms at the end of a half, the norm between the two."""
    if norm:
        return residual + _norm(config, plan, product(x, dense.weight, dense.bias), norm), None
    made = product(x, dense.weight, dense.bias, layer_scale=layer_scale, residual=residual, stats=want_stats)
    return made if want_stats else (made, None)


def _normed(config: ViTConfig, plan: Plan, x: Tensor, norm: Norm, first: Dense) -> tuple[Tensor, dict[str, Any]]:
    """x after the norm before a half, if it has one; or, where that is folded into the product `first`, x and what
    tells the product so."""
    if config.block == "post":
        return x, {}
    if plan.fold_norm:
        return x, {"weight_sum": first.weight_sum, "eps": config.norm_eps}
    return _norm(config, plan, x, norm), {}


def _norm(config: ViTConfig, plan: Plan, x: Tensor, norm: Norm) -> Tensor:
    """A norm that is folded into nothing; RMSNorm is torch's."""
    if norm.bias is None:
        return F.rms_norm(x, x.shape[-1:], norm.weight, config.norm_eps)
    return plan.layer_norm(x, norm.weight, norm.bias, config.norm_eps)


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
        x = _norm(config, plan, x, norm)
    return plain(x, dense.weight, dense.bias, **epilogue)


def head(config: ViTConfig, weights: Weights, tokens: Tensor, plan: Plan, grid: tuple[int, int]) -> Output:
    """Pool, norm, project and classify. A few rows only, so no fusion is worth having here."""
    patches, neck = tokens[:, config.prefix_tokens :], None
    if weights.neck is not None:
        patches = neck = weights.neck(patches.unflatten(1, grid)).flatten(1, -2)
    if weights.pool:
        pooled = attention_pool(config, weights.pool, tokens if config.pool == "map_all" else patches, plan)
    elif config.pool == "cls_dist":
        pooled = (tokens[:, 0] + tokens[:, 1]) / 2
    elif config.pool == "max":
        pooled = patches.amax(dim=1)
    elif config.pool == "avg_max":
        pooled = (patches.amax(dim=1) + patches.mean(dim=1)) / 2
    elif config.pool == "avg_all":
        pooled = tokens.mean(dim=1)
    elif config.pool == "cls" or (config.pool == "none" and config.class_token):
        pooled = tokens[:, 0].contiguous()
    else:
        pooled = patches.mean(dim=1)
    if weights.pool_norm:
        pooled = _norm(config, plan, pooled, weights.pool_norm)
    projection = weights.projection
    embedding = plan.head(pooled, projection.weight, projection.bias) if projection else pooled
    logits = None
    if weights.head:
        features = torch.cat([pooled, patches.mean(dim=1)], dim=1) if config.head_concat_mean else pooled
        if weights.head_dist:
            first = plan.head(tokens[:, 0].contiguous(), weights.head.weight, weights.head.bias)
            second = plan.head(tokens[:, 1].contiguous(), weights.head_dist.weight, weights.head_dist.bias)
            logits = (first + second) / 2
        else:
            logits = plan.head(features, weights.head.weight, weights.head.bias)
    return Output(tokens, embedding, logits, neck=neck)


def attention_pool(config: ViTConfig, pool: AttentionPool, tokens: Tensor, plan: Plan) -> Tensor:
    """Pool tokens [B, N, C] to [B, Q] by attention of a learned query, then a feed-forward network (SigLIP's MAP head).

    In torch: one query an image is no work for a kernel.
    """
    heads = (config.pool_heads, config.pooled_dim // config.pool_heads)
    k, v = F.linear(tokens, pool.kv.weight, pool.kv.bias).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
    if pool.k_norm:
        k = _norm(config, plan, k.contiguous(), pool.k_norm)
    q = pool.query.view(1, heads[0], 1, heads[1]).expand(len(tokens), -1, -1, -1)
    pooled = F.scaled_dot_product_attention(q, k, v).flatten(1)
    pooled = F.linear(pooled, pool.proj.weight, pool.proj.bias)
    if pool.fc1 and pool.fc2:
        normed = _norm(config, plan, pooled, pool.norm) if pool.norm else pooled
        hidden = reference.activate(F.linear(normed, pool.fc1.weight, pool.fc1.bias), config.pool_activation)
        pooled = pooled + F.linear(hidden, pool.fc2.weight, pool.fc2.bias)
    return pooled
