"""What makes tokens of images in timm's models: patch convolutions, and stems, which run as the modules they are."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import ViTConfig

KINDS = ("HybridEmbed", "HybridEmbedWithSize")
"""Stems: classes that give tokens of whole patches."""


class Stem(nn.Module):
    """A stem whose output is tokens [B, L, C], whether it gives these or a map [B, C, h, w]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """Tokens of normalised images [B, Cin, H, W]."""
        made = self.inner(images)
        return made.flatten(2).transpose(1, 2) if made.ndim == 4 else made


def patch_facts(embed: Any) -> dict[str, Any]:
    """The fields of ViTConfig about a patch convolution."""
    patch = embed.proj.kernel_size
    grid = [side // p for side, p in zip(embed.img_size, patch, strict=True)]
    return {
        "image_size": (grid[0] * patch[0], grid[1] * patch[1]),
        "patch_size": patch,
        "width": embed.proj.out_channels,
        "in_channels": embed.proj.in_channels,
    }


def naflex_facts(embeds: Any, where: str) -> dict[str, Any]:
    """The fields of ViTConfig about NaFlex's embeddings: patches of whole images, and their positions.

    Raises:
        CheckpointError: naming what cannot be represented.
    """
    require(embeds.norm_input is None, "a norm of the pixels", where)
    kind = embeds.pos_embed_type
    require(kind in ("learned", "factorized", "none"), f"position embeddings of the kind {kind}", where)
    require(embeds.pos_embed_grid_size is not None, "an undefined image size", where)
    mode = embeds.pos_embed_interp_mode
    require(mode in ("bicubic", "bilinear"), f"positions resized by {mode}", where)
    patch, grid = embeds.patch_size, embeds.pos_embed_grid_size
    return {
        "image_size": (grid[0] * patch[0], grid[1] * patch[1]),
        "patch_size": tuple(patch),
        "width": embeds.embed_dim,
        "in_channels": embeds.in_chans,
        # Rows and columns apart are resized by lines, and the sum of both is what bilinear resizing makes of the sum.
        "position_interpolation": "bilinear" if kind == "factorized" else mode,
        "position_antialias": kind != "factorized" and embeds.pos_embed_antialias,
        "position_align_corners": kind != "factorized" and bool(embeds.pos_embed_align_corners),
        "position_square": embeds.pos_embed_ar_preserving,
    }


def read_naflex(source: Source, config: ViTConfig, embeds: Any) -> None:
    """Take the weights of NaFlex's embeddings."""
    height, width = config.patch_size
    if embeds.is_linear:
        last = embeds.channels_last
        order = (height, width, config.in_channels) if last else (config.in_channels, height, width)

        def as_kernel(weight: Tensor) -> Tensor:
            rows = weight.unflatten(1, order)
            return rows.permute(0, 3, 1, 2).contiguous() if last else rows

        kernel = (config.width, config.in_channels, height, width)
        flat = {"embeds.proj.weight": (config.width, height * width * config.in_channels)}
        source.derive("patch_embed.weight", kernel, as_kernel, flat)
        if embeds.proj.bias is not None:
            source.copy("patch_embed.bias", "embeds.proj.bias")
    else:
        source.dense("patch_embed", "embeds.proj.", bias=embeds.proj.bias is not None)
    tokens = [f"embeds.{key}" for key in ("cls_token", "reg_token") if getattr(embeds, key) is not None]
    source.tokens(config, tokens, None, covered=0)
    if config.position:
        rows, columns = config.grid(config.image_size)
        if embeds.pos_embed_type == "factorized":
            sides = {"embeds.pos_embed_y": (1, rows, config.width), "embeds.pos_embed_x": (1, columns, config.width)}
            shape = (rows * columns, config.width)
            source.derive("position", shape, lambda y, x: (y[0][:, None] + x[0][None]).flatten(0, 1), sides)
            return
        given = {"embeds.pos_embed": (1, rows, columns, config.width)}
        source.derive("position", (rows * columns, config.width), lambda t: t.flatten(0, 2), given)


def stem_facts(embed: Any, where: str) -> dict[str, Any]:
    """The fields of ViTConfig about a stem.

    Raises:
        CheckpointError: for a stem that is not known.
    """
    kind = type(embed).__name__
    require(kind in KINDS and type(embed).__module__.startswith("timm."), "a stem other than PatchEmbed", where)
    require(embed.flatten, "a stem that keeps its map", where)
    grid, size = embed.grid_size, embed.img_size
    whole = all(side % n == 0 for side, n in zip(size, grid, strict=True))
    require(whole, f"an image of {size[0]}x{size[1]} for {grid[0]}x{grid[1]} tokens", where)
    first = next(part for part in embed.modules() if isinstance(part, nn.Conv2d))
    proj = embed.proj
    width = proj.out_channels if isinstance(proj, nn.Conv2d) else embed.feature_dim
    return {
        "image_size": tuple(size),
        "patch_size": tuple(side // n for side, n in zip(size, grid, strict=True)),
        "width": width,
        "in_channels": first.in_channels,
        "stem": kind,
    }


def stem(module: Any) -> nn.Module:
    """A copy of a model's stem."""
    return Stem(copy.deepcopy(module.patch_embed)).eval()
