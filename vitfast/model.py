"""The Vision Transformer forward, written once, in terms of the ops a plan has chosen.

"An Image Is Worth 16x16 Words" (Dosovitskiy et al. 2020) and its pre-norm descendants: DeiT
(distillation token), CLIP (a norm before the blocks, a projection after), DINOv2 (LayerScale,
register tokens, SwiGLU). `Weights` is what the forward reads: canonical weights (see
`vitfast.config`) in the order and form the plan wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.ops import fold_norm, pack_patch_embed, quantize
from vitfast.output import Output

SITES = (
    "patch_embed", "layer_norm", "row_stats", "qkv", "attention", "proj", "attention_block", "fc1", "fc2", "mlp",
    "head",
)  # fmt: skip
"""Where the forward calls an op; qkv, proj, fc1, fc2 and head are all `linear`, at their own shapes."""

PRODUCTS = ("qkv", "proj", "fc1", "fc2")
"""The products of a block: those that can be quantised."""
HIDDEN_SITES = ("hidden_fc1", "hidden_fc2")
"""fc1 and fc2 of a quantised MLP that hands its hidden rows on in 8 bits, with scales of groups: no pass between."""
MIXED_SITES = ("mixed_attention", "mixed_proj")
"""attention and proj of a quantised model whose attention writes 8 bits, with a scale for each head: no pass between.
Where the head dim is one of `ops.SCALE_GROUPS`."""
QUANTIZED_SITES = ("quantize", *(f"quantized_{site}" for site in PRODUCTS), *HIDDEN_SITES, *MIXED_SITES)
"""Where the forward of a quantised model calls an op; the products are `quantized_linear`."""


@dataclass(frozen=True)
class Plan:
    """The implementation of each site, and how the forward is put together.

    Every callable has the signature of the op's reference. `packs` turn the [N, K] weights of some
    sites into the form that the site's callable wants; patch_embed's is told of the images, too.
    `fold_norm`: LayerNorm is applied as a correction inside the following product, from statistics
    the previous product wrote.
    `fuse_attention`: qkv, attention and proj run as the one op `attention_block`, likewise with `fold_norm`.
    `fuse_mlp`: fc1, activation and fc2 run as the one op `mlp`, norm and statistics included if `fold_norm`.
    `quick_gelu_as_silu`: the 1.702 of x * sigmoid(1.702 x) moves into fc1 and its inverse into fc2, for backends
    that fuse SiLU only.
    `quantized`: the dtype in which the products of the blocks are computed, None for that of the model;
    the products named in `keep` ("blocks.3.fc2") are left as they are.
    `measured`: what the choices were made by, for each site that had one (see `vitfast.planner.measure`).
    """

    calls: Mapping[str, Callable[..., Tensor]]
    backends: Mapping[str, str]
    fold_norm: bool = False
    fuse_attention: bool = False
    fuse_mlp: bool = False
    quick_gelu_as_silu: bool = False
    packs: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    quantized: torch.dtype | None = None
    keep: frozenset[str] = frozenset()
    measured: Mapping[str, Any] = field(default_factory=dict)


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


def arrange(
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

    def get(name: str) -> Tensor | None:
        tensor = weights.get(name)
        return None if tensor is None else tensor.detach().to(device, dtype).contiguous()

    def norm(name: str) -> Norm | None:
        weight, bias = get(f"{name}.weight"), get(f"{name}.bias")
        return None if weight is None or bias is None else Norm(weight, bias)

    def pack(site: str, weight: Tensor, **layout: Any) -> Tensor:
        return plan.packs[site](weight, **layout) if site in plan.packs else weight

    def dense(name: str, site: str) -> Dense | None:
        weight = get(f"{name}.weight")
        if plan.quantized and site in PRODUCTS and name not in plan.keep:
            exact = weights[f"{name}.weight"].detach().to(device, torch.float32)
            values, scale = quantize(exact, dtype=plan.quantized, backend="torch")
            return Dense(pack(f"quantized_{site}", values), get(f"{name}.bias"), scale=scale)
        return None if weight is None else Dense(pack(site, weight), get(f"{name}.bias"))

    def normed(name: str, before: str, site: str) -> Dense | None:
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
        norm_pre=norm("norm_pre"),
        blocks=blocks,
        norm=norm("norm"),
        pool_norm=norm("pool_norm"),
        projection=dense("projection", "head"),
        head=dense("head", "head"),
        head_dist=dense("head_dist", "head"),
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


def forward(config: ViTConfig, weights: Weights, position: Tensor | None, images: Tensor, plan: Plan) -> Output:
    """Run the model on uint8 [B, H, W, Cin] or normalised float [B, Cin, H, W] images.

    Args:
        position: [L, C] for this image size (`weights.position`, or that resized).
    """
    embed = weights.embed_uint8 if images.dtype == torch.uint8 else weights.embed_float
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
