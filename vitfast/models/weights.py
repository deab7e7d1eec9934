"""What the forward reads: canonical weights cast, folded and packed for one plan, dtype and device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.models.config import ViTConfig
from vitfast.models.plan import PRODUCTS, Plan
from vitfast.models.positions import Positions, positions_for
from vitfast.ops import fold_norm, pack_patch_embed, quantize


@dataclass(frozen=True)
class Norm:
    """Scale and shift of a LayerNorm, [C] each; of an RMSNorm the shift is None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Dense:
    """One product: weight [N, K] (packed as the plan wants it) and bias [N]."""

    weight: Tensor
    bias: Tensor | None
    weight_sum: Tensor | None = None
    """Set where a LayerNorm has been folded into this product."""
    scale: Tensor | None = None
    """[N] fp32, where the weight is quantised."""


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    norm1: Norm
    qkv: Dense
    proj: Dense
    layer_scale1: Tensor | None
    norm2: Norm
    fc1: Dense
    fc2: Dense
    layer_scale2: Tensor | None
    heads: Mapping[str, Any] = field(default_factory=dict)
    """What attention does to q and k, and its scale, by the names of the op's backends."""
    gate: Dense | None = None
    attention_norm: Norm | None = None
    mlp_norm: Norm | None = None
    norm3: Norm | None = None
    """Between norm2 and fc1."""
    post_norm1: Norm | None = None
    post_norm2: Norm | None = None
    """Norms at the ends of the halves, before the sums."""
    padding: Tensor | None = None
    """q, k and v [3 * H * D] of a patch that is missing in a window: their biases."""
    relative: tuple[Tensor, Tensor, Tensor] | None = None
    """Of decomposed relative position: [h, h, D] and [w, w, D], the vectors by row or column of query and of key; and
    [h * w, h + w], ones at a key's row and column."""
    differential: tuple[Tensor, Tensor] | None = None
    """Lambda [1] and the weight [D] of the norm of heads."""


@dataclass(frozen=True)
class AttentionPool:
    """Attention pooling: a learned query over the tokens, and a feed-forward network (see `vit.attention_pool`)."""

    query: Tensor
    kv: Dense
    k_norm: Norm | None
    proj: Dense
    norm: Norm | None
    fc1: Dense | None
    fc2: Dense | None


@dataclass(frozen=True)
class Weights:
    """Canonical weights prepared for one plan, dtype and device."""

    activation: str
    """The config's, or "silu" where the plan turned quick_gelu into it; "" where it is a step after fc1."""
    embed_uint8: Dense | None
    """For uint8 [B, H, W, Cin], mean and std folded in; None if the model's normalisation is unknown."""
    embed_float: Dense | None
    """For normalised float [B, Cin, H, W]; None where a stem makes the tokens."""
    stem: nn.Module | None
    embed_norm: Norm | None
    prefix: Tensor | None
    positions: Positions
    """Of the native image size."""
    exact_positions: Mapping[str, Tensor]
    """What positions of other sizes are computed from, not yet rounded; empty if the model takes one size only."""
    norm_pre: Norm | None
    blocks: tuple[Block | nn.Module, ...]
    """A module where a block has code of its own (see `Checkpoint.own_blocks`)."""
    norm: Norm | None
    neck: nn.Module | None
    pool: AttentionPool | None
    pool_norm: Norm | None
    projection: Dense | None
    head: Dense | None
    head_dist: Dense | None


QUICK_GELU = 1.702
"""x * sigmoid(1.702 x) = silu(1.702 x) / 1.702: the factors may move into the products around it."""


def prepare_weights(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    stem: nn.Module | None = None,
    own_blocks: Mapping[int, nn.Module] | None = None,
    neck: nn.Module | None = None,
) -> Weights:
    """Cast, move, fold and pack canonical weights once; the result shares no memory with them.

    Whatever is scaled or folded is so in fp32 at least, and rounded once to `dtype`, whichever dtype the weights are
    stored in.
    """

    def exact(name: str, factor: float = 1.0) -> Tensor:
        """A weight on the device, times a factor, not yet rounded to `dtype`."""
        tensor = weights[name].detach().to(device)
        return tensor if factor == 1.0 else tensor.double() * factor

    def exact_bias(name: str, factor: float = 1.0) -> Tensor | None:
        return exact(name, factor) if name in weights else None

    def cast(name: str, factor: float = 1.0) -> Tensor:
        made = exact(name, factor).to(dtype).contiguous()
        return made.clone() if made.data_ptr() == weights[name].data_ptr() else made

    def get(name: str, factor: float = 1.0) -> Tensor | None:
        return cast(name, factor) if name in weights else None

    def shift(name: str) -> Tensor:
        """The bias of a norm: zeros where it has none."""
        return weights.get(f"{name}.bias", torch.zeros_like(weights[f"{name}.weight"])).detach().to(device)

    def norm(name: str, kind: str = config.norm) -> Norm:
        return Norm(cast(f"{name}.weight"), None if kind == "rms_norm" else shift(name).to(dtype, copy=True))

    def optional_norm(name: str) -> Norm | None:
        return norm(name) if f"{name}.weight" in weights else None

    def pack(site: str, weight: Tensor, **layout: Any) -> Tensor:
        return plan.packs[site](weight, **layout) if site in plan.packs else weight

    def dense(name: str, site: str, factor: float = 1.0, bias_factor: float = 1.0) -> Dense:
        bias = get(f"{name}.bias", bias_factor)
        if plan.quantized and site in PRODUCTS and name not in plan.skip_quantize:
            values, scale = quantize(exact(f"{name}.weight", factor).float(), dtype=plan.quantized, backend="torch")
            return Dense(pack(f"quantized_{site}", values), bias, scale=scale)
        return Dense(pack(site, cast(f"{name}.weight", factor)), bias)

    def optional_head(name: str) -> Dense | None:
        return dense(name, "head") if f"{name}.weight" in weights else None

    def normed(name: str, before: str, site: str, factor: float = 1.0) -> Dense:
        if not plan.fold_norm:
            return dense(name, site, factor, factor)
        weight, bias = exact(f"{name}.weight", factor), exact_bias(f"{name}.bias", factor)
        folded, total, bias = fold_norm(weight, bias, exact(f"{before}.weight"), shift(before), dtype=dtype)
        return Dense(pack(site, folded), bias, total)

    def embed(*, uint8: bool, channels_last: bool) -> Dense:
        weight, offset = pack_patch_embed(
            exact("patch_embed.weight"),
            exact_bias("patch_embed.bias"),
            mean=mean if uint8 else None,
            std=std if uint8 else None,
            dtype=dtype,
            uint8=uint8,
            channels_last=channels_last,
        )
        layout = {"patch_size": config.patch_size, "channels_last": channels_last, "uint8": uint8}
        return Dense(pack("patch_embed", weight, **layout), offset)

    def plain(name: str) -> Dense:
        return Dense(cast(f"{name}.weight"), get(f"{name}.bias"))

    def relative(i: int) -> tuple[Tensor, Tensor, Tensor]:
        (rows, columns), made = config.sides(i), []
        for name, side in (("rows", rows), ("columns", columns)):
            at = torch.arange(side, device=device)
            made.append(cast(f"blocks.{i}.relative_{name}")[at[:, None] - at[None] + side - 1])
        down, right = (torch.eye(side, device=device, dtype=dtype) for side in (rows, columns))
        ones = torch.cat([down.repeat_interleave(columns, 0), right.repeat(rows, 1)], dim=1)
        return made[0], made[1], ones

    def ends(i: int, half: int) -> Norm | None:
        if config.block not in ("post", "sandwich"):
            return None
        return norm(f"blocks.{i}.{'norm' if config.block == 'post' else 'post_norm'}{half}")

    def moved(part: nn.Module) -> nn.Module:
        return copy.deepcopy(part).to(device, dtype).eval().requires_grad_(False)

    def heads(block: str) -> dict[str, Any]:
        options: dict[str, Any] = {"scale": config.attention_scale} if config.attention_scale else {}
        if config.qk_norm:
            q, k = (norm(f"{block}.{name}", config.qk_norm) for name in ("q_norm", "k_norm"))
            options |= {"q_weight": q.weight, "k_weight": k.weight, "q_bias": q.bias, "k_bias": k.bias}
            options |= {"norm_eps": config.norm_eps, "rms": config.qk_norm == "rms_norm"}
        return options

    def attention_pool() -> AttentionPool:
        return AttentionPool(
            query=cast("pool.query"),
            kv=plain("pool.kv"),
            k_norm=norm("pool.k_norm", config.pool_qk_norm) if config.pool_qk_norm else None,
            proj=plain("pool.proj"),
            norm=optional_norm("pool.norm"),
            fc1=plain("pool.fc1") if config.pool_mlp_dim else None,
            fc2=plain("pool.fc2") if config.pool_mlp_dim else None,
        )

    as_silu = config.activation == "quick_gelu" and plan.quick_gelu_as_silu and not config.mlp_norm
    factor = QUICK_GELU if as_silu else 1.0

    def block(i: int) -> Block:
        return Block(
            norm1=norm(f"blocks.{i}.norm1"),
            qkv=normed(f"blocks.{i}.qkv", f"blocks.{i}.norm1", "qkv"),
            proj=dense(f"blocks.{i}.proj", "proj"),
            layer_scale1=get(f"blocks.{i}.layer_scale1"),
            norm2=norm(f"blocks.{i}.norm2"),
            fc1=normed(f"blocks.{i}.fc1", f"blocks.{i}.norm2", "fc1", factor),
            fc2=dense(f"blocks.{i}.fc2", "fc2", 1 / factor),
            layer_scale2=get(f"blocks.{i}.layer_scale2"),
            heads=heads(f"blocks.{i}"),
            gate=plain(f"blocks.{i}.gate") if config.gated_attention else None,
            attention_norm=optional_norm(f"blocks.{i}.attention_norm"),
            mlp_norm=optional_norm(f"blocks.{i}.mlp_norm"),
            norm3=optional_norm(f"blocks.{i}.norm3"),
            post_norm1=ends(i, 1),
            post_norm2=ends(i, 2),
            padding=get(f"blocks.{i}.qkv.bias") if config.window else None,
            relative=relative(i) if config.relative_position == "decomposed" else None,
            differential=(
                (cast(f"blocks.{i}.lambda"), cast(f"blocks.{i}.head_norm.weight")) if config.differential else None
            ),
        )

    own = own_blocks or {}
    placed = {
        name: exact(name).to(torch.promote_types(weights[name].dtype, torch.float32), copy=True)
        for name in ("position", "position_rows", "position_columns", "rope", "relative_position")
        if name in weights
    }
    return Weights(
        activation="silu" if as_silu else config.fused_activation,
        embed_uint8=embed(uint8=True, channels_last=True) if mean and std and not config.stem else None,
        embed_float=None if config.stem else embed(uint8=False, channels_last=False),
        stem=moved(stem) if stem is not None else None,
        embed_norm=optional_norm("embed_norm"),
        prefix=get("prefix"),
        positions=positions_for(config, placed, config.image_size, dtype, device),
        exact_positions=placed if config.dynamic_size else {},
        norm_pre=optional_norm("norm_pre"),
        blocks=tuple(moved(own[i]) if i in own else block(i) for i in range(config.depth)),
        norm=optional_norm("norm"),
        neck=moved(neck) if neck is not None else None,
        pool=attention_pool() if config.attention_pool else None,
        pool_norm=optional_norm("pool_norm"),
        projection=optional_head("projection"),
        head=optional_head("head"),
        head_dist=optional_head("head_dist"),
    )
