"""What makes tokens of images in timm's models: patch convolutions, and stems, which run as the modules they are."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from vitfast.models.checkpoints.source import require

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
