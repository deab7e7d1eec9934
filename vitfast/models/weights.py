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
    """Canonical weights prepared for one plan, dtype and device."""

    activation: str
    """The config's, or "silu" where the plan turned quick_gelu into it."""
    embed_uint8: Dense | None
    """For uint8 [B, H, W, Cin], mean and std folded in; None if the model's normalisation is unknown."""
    embed_float: Dense
    """For normalised float [B, Cin, H, W]."""
    prefix: Tensor | None
    position: Tensor | None
    """Of the native image size, in the model's dtype."""
    exact_position: Tensor | None
    """The same in fp32, to be resized and then rounded; None if the model takes one size only."""
    norm_pre: Norm | None
    blocks: tuple[Block, ...]
    norm: Norm | None
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

    def norm(name: str) -> Norm:
        return Norm(cast(f"{name}.weight"), cast(f"{name}.bias"))

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
        folded, total, shift = fold_norm(weight, bias, exact(f"{before}.weight"), exact(f"{before}.bias"), dtype=dtype)
        return Dense(pack(site, folded), shift, total)

    def embed(*, uint8: bool, channels_last: bool) -> Dense:
        weight, shift = pack_patch_embed(
            exact("patch_embed.weight"),
            exact_bias("patch_embed.bias"),
            mean=mean if uint8 else None,
            std=std if uint8 else None,
            dtype=dtype,
            uint8=uint8,
            channels_last=channels_last,
        )
        layout = {"patch_size": config.patch_size, "channels_last": channels_last, "uint8": uint8}
        return Dense(pack("patch_embed", weight, **layout), shift)

    as_silu = config.activation == "quick_gelu" and plan.quick_gelu_as_silu
    factor = QUICK_GELU if as_silu else 1.0
    blocks = tuple(
        Block(
            norm1=norm(f"blocks.{i}.norm1"),
            qkv=normed(f"blocks.{i}.qkv", f"blocks.{i}.norm1", "qkv"),
            proj=dense(f"blocks.{i}.proj", "proj"),
            layer_scale1=get(f"blocks.{i}.layer_scale1"),
            norm2=norm(f"blocks.{i}.norm2"),
            fc1=normed(f"blocks.{i}.fc1", f"blocks.{i}.norm2", "fc1", factor),
            fc2=dense(f"blocks.{i}.fc2", "fc2", 1 / factor),
            layer_scale2=get(f"blocks.{i}.layer_scale2"),
        )
        for i in range(config.depth)
    )
    position, resized = get("position"), None
    if position is not None and config.dynamic_size:
        resized = position if dtype in (torch.float32, torch.float64) else exact("position").float().clone()
    return Weights(
        activation="silu" if as_silu else config.activation,
        embed_uint8=embed(uint8=True, channels_last=True) if mean and std else None,
        embed_float=embed(uint8=False, channels_last=False),
        prefix=get("prefix"),
        position=position,
        exact_position=resized,
        norm_pre=optional_norm("norm_pre"),
        blocks=blocks,
        norm=optional_norm("norm"),
        pool_norm=optional_norm("pool_norm"),
        projection=optional_head("projection"),
        head=optional_head("head"),
        head_dist=optional_head("head_dist"),
    )


def resize_position(
    position: Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool, offset: float = 0.0
) -> Tensor:
    """Resample a position embedding [rows * columns, C] to another grid, bicubic, in fp32; in its own dtype.

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
