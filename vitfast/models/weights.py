"""What the forward reads: canonical weights cast, folded and packed for one plan, dtype and device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.models.config import ViTConfig
from vitfast.models.plan import PRODUCTS, Plan
from vitfast.ops import fold_norm, pack_patch_embed, quantize


@dataclass(frozen=True)
class Norm:
    """Scale and shift of a LayerNorm, [C] each."""

    weight: Tensor
    bias: Tensor


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
    """One pre-norm transformer block."""

    norm1: Norm
    qkv: Dense
    proj: Dense
    layer_scale1: Tensor | None
    norm2: Norm
    fc1: Dense
    fc2: Dense
    layer_scale2: Tensor | None


@dataclass(frozen=True)
class Weights:
    """Canonical weights arranged for one plan, dtype and device."""

    activation: str
    """The config's, or "silu" where the plan turned quick_gelu into it."""
    embed_uint8: Dense | None
    """For uint8 [B, H, W, Cin], mean and std folded in; None if the model's normalisation is unknown."""
    embed_float: Dense
    """For normalised float [B, Cin, H, W]."""
    prefix: Tensor | None
    position: Tensor | None
    norm_pre: Norm | None
    blocks: tuple[Block, ...]
    norm: Norm | None
    pool_norm: Norm | None
    projection: Dense | None
    head: Dense | None
    head_dist: Dense | None


def prepare_weights(
    config: ViTConfig,
    weights: Mapping[str, Tensor],
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Weights:
    """Cast, move, fold and pack canonical weights once. Folding is done in float64, before the cast."""

    def cast(name: str) -> Tensor:
        return weights[name].detach().to(device, dtype).contiguous()

    def get(name: str) -> Tensor | None:
        return cast(name) if name in weights else None

    def norm(name: str) -> Norm:
        return Norm(cast(f"{name}.weight"), cast(f"{name}.bias"))

    def optional_norm(name: str) -> Norm | None:
        return norm(name) if f"{name}.weight" in weights else None

    def pack(site: str, weight: Tensor, **layout: Any) -> Tensor:
        return plan.packs[site](weight, **layout) if site in plan.packs else weight

    def dense(name: str, site: str) -> Dense:
        if plan.quantized and site in PRODUCTS and name not in plan.keep:
            exact = weights[f"{name}.weight"].detach().to(device, torch.float32)
            values, scale = quantize(exact, dtype=plan.quantized, backend="torch")
            return Dense(pack(f"quantized_{site}", values), get(f"{name}.bias"), scale=scale)
        return Dense(pack(site, cast(f"{name}.weight")), get(f"{name}.bias"))

    def optional_head(name: str) -> Dense | None:
        return dense(name, "head") if f"{name}.weight" in weights else None

    def normed(name: str, before: str, site: str) -> Dense:
        if not plan.fold_norm:
            return dense(name, site)
        bias = weights.get(f"{name}.bias")
        folded, total, shift = fold_norm(
            weights[f"{name}.weight"].detach().to(device, torch.float32),
            None if bias is None else bias.detach().to(device, torch.float32),
            weights[f"{before}.weight"].detach().to(device, torch.float32),
            weights[f"{before}.bias"].detach().to(device, torch.float32),
            dtype=dtype,
        )
        return Dense(pack(site, folded), shift, total)

    def embed(*, uint8: bool, channels_last: bool) -> Dense:
        bias = weights.get("patch_embed.bias")
        weight, shift = pack_patch_embed(
            weights["patch_embed.weight"].detach().to(device),
            None if bias is None else bias.detach().to(device),
            mean=mean if uint8 else None,
            std=std if uint8 else None,
            dtype=dtype,
            uint8=uint8,
            channels_last=channels_last,
        )
        layout = {"patch_size": config.patch_size, "channels_last": channels_last, "uint8": uint8}
        return Dense(pack("patch_embed", weight, **layout), shift)

    activation = config.activation
    if activation == "quick_gelu" and plan.quick_gelu_as_silu:
        activation, weights = "silu", _quick_gelu_as_silu(config, weights)
    blocks = tuple(
        Block(
            norm1=norm(f"blocks.{i}.norm1"),
            qkv=normed(f"blocks.{i}.qkv", f"blocks.{i}.norm1", "qkv"),
            proj=dense(f"blocks.{i}.proj", "proj"),
            layer_scale1=get(f"blocks.{i}.layer_scale1"),
            norm2=norm(f"blocks.{i}.norm2"),
            fc1=normed(f"blocks.{i}.fc1", f"blocks.{i}.norm2", "fc1"),
            fc2=dense(f"blocks.{i}.fc2", "fc2"),
            layer_scale2=get(f"blocks.{i}.layer_scale2"),
        )
        for i in range(config.depth)
    )
    return Weights(
        activation=activation,
        embed_uint8=embed(uint8=True, channels_last=True) if mean and std else None,
        embed_float=embed(uint8=False, channels_last=False),
        prefix=get("prefix"),
        position=get("position"),
        norm_pre=optional_norm("norm_pre"),
        blocks=blocks,
        norm=optional_norm("norm"),
        pool_norm=optional_norm("pool_norm"),
        projection=optional_head("projection"),
        head=optional_head("head"),
        head_dist=optional_head("head_dist"),
    )


def _quick_gelu_as_silu(config: ViTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """x * sigmoid(1.702 x) = silu(1.702 x) / 1.702, the factors moved into the products around it."""
    scaled = dict(weights)
    for i in range(config.depth):
        for name in (f"blocks.{i}.fc1.weight", f"blocks.{i}.fc1.bias"):
            if name in weights:
                scaled[name] = (weights[name].double() * 1.702).to(weights[name].dtype)
        name = f"blocks.{i}.fc2.weight"
        scaled[name] = (weights[name].double() / 1.702).to(weights[name].dtype)
    return scaled


def resize_position(
    position: Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool, offset: float = 0.0
) -> Tensor:
    """Resample a position embedding [rows * columns, C] to another grid, bicubic, in fp32.

    Args:
        antialias: timm's convention if True; transformers' and the original DINOv2's if False.
        offset: added to the new grid's sides before the scale factor is formed, as the original
            DINOv2 does (0.1); 0 resizes to the exact size.
    """
    if old == new:
        return position
    grid = position.float().view(1, *old, -1).permute(0, 3, 1, 2)
    if offset:
        factor = ((new[0] + offset) / old[0], (new[1] + offset) / old[1])
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=new, mode="bicubic", antialias=antialias, align_corners=False)
    if tuple(grid.shape[2:]) != new:
        raise ValueError(f"position embedding {old} resized to {tuple(grid.shape[2:])}, expected {new}")
    return grid.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(position.dtype).contiguous()
