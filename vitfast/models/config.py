"""ViTConfig: every architectural fact the forward pass needs, and the canonical weight names.

Every checkpoint family (timm, transformers, torchvision, ...) is translated into this one
description by `vitfast.models.checkpoints`; `vitfast.models.vit` reads nothing else.

Canonical weights (a flat dict; C width, H heads, D head dim, F hidden width, P prefix tokens,
L = grid[0] * grid[1] patch tokens, R = F, or 2F when the activation is gated):

    patch_embed.weight [C, in_channels, ph, pw]     patch_embed.bias [C]            (optional)
    prefix             [P, C]   CLS, then distillation, then register tokens, each with its own
                                position embedding already added                     (if P > 0)
    position           [L, C]   position embedding of the patch tokens, row-major   (if position)
    norm_pre.{weight,bias} [C]                                                      (if pre_norm)
    blocks.{i}.norm1.{weight,bias} [C]
    blocks.{i}.qkv.weight [3*H*D, C]  rows ordered q, k, v     .bias [3*H*D]        (optional)
    blocks.{i}.proj.weight [C, H*D]   .bias [C]                                     (optional)
    blocks.{i}.layer_scale1 [C]                                                     (if layer_scale)
    blocks.{i}.norm2.{weight,bias} [C]
    blocks.{i}.fc1.weight [R, C]  gated: gate rows first, then up rows   .bias [R]  (optional)
    blocks.{i}.fc2.weight [C, F]  .bias [C]                                         (optional)
    blocks.{i}.layer_scale2 [C]                                                     (if layer_scale)
    norm.{weight,bias} [C]       over all tokens, before pooling                    (if final_norm)
    pool_norm.{weight,bias} [C]  over the pooled vector (timm's fc_norm)            (if pool_norm)
    projection.weight [E, C]     pooled vector -> embedding, no bias (CLIP)         (if projection_dim)
    head.weight [classes, C or 2C]  head.bias [classes]                                (if num_classes)
    head_dist.weight, head_dist.bias   as head, on the distillation token           (if distilled)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vitfast.models import schema

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")
"""gelu is the erf form; quick_gelu is x * sigmoid(1.702 x); swiglu is silu(gate) * up."""

POOLS = ("cls", "avg", "avg_all", "cls_dist", "none")
"""How tokens become one vector: the CLS token; the mean of the patch tokens; the mean of all
tokens; the mean of CLS and distillation token (the embedding of a distilled DeiT); or not at all
(then `embedding` is the CLS token)."""


OFF_GRID = ("refuse", "crop", "pad")
"""What becomes of an image whose sides are no multiples of the patch's: it is refused (torchvision; timm without
dynamic_img_pad); rows and columns past the last whole patch are cut off (transformers); or it is padded with zeros, at
the bottom and on the right, to the next whole patch (timm's dynamic_img_pad)."""

Sides = Annotated[tuple[int, int], schema.sides(1, 65_536)]
Width = Annotated[int, schema.whole(1, 65_536)]
Depth = Annotated[int, schema.whole(1, 1_024)]
Heads = Annotated[int, schema.whole(1, 4_096)]
Hidden = Annotated[int, schema.whole(1, 1_048_576)]
Channels = Annotated[int, schema.whole(1, 1_024)]
Tokens = Annotated[int, schema.whole(0, 65_536)]
Classes = Annotated[int, schema.whole(0, 10_000_000)]
Eps = Annotated[float, schema.number(0, 1)]
Flag = Annotated[bool, schema.FLAG]


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of one Vision Transformer encoder. Sizes are in pixels or in tokens' channels.

    Raises:
        ValueError: if a field is out of its domain; the message names field, value and domain.
    """

    image_size: Sides
    """Native (height, width), on the patch grid; `position` has one row per patch of this size."""
    patch_size: Sides
    width: Width
    depth: Depth
    heads: Heads
    mlp_dim: Hidden
    in_channels: Channels = 3
    head_dim: Annotated[int, schema.whole(0, 65_536)] = 0
    """0 means width // heads."""
    activation: Annotated[str, schema.one_of(*ACTIVATIONS)] = "gelu"
    norm_eps: Eps = 1e-6
    prefix_tokens: Tokens = 1
    """CLS + distillation + register tokens."""
    class_token: Flag = True
    position: Flag = True
    pre_norm: Flag = False
    """A LayerNorm between embedding and blocks (CLIP)."""
    layer_scale: Flag = False
    final_norm: Flag = True
    pool: Annotated[str, schema.one_of(*POOLS)] = "cls"
    pool_norm: Flag = False
    distilled: Flag = False
    projection_dim: Annotated[int, schema.whole(0, 65_536)] = 0
    num_classes: Classes = 0
    head_concat_mean: Flag = False
    """The head reads [CLS, mean of patch tokens] of width 2C (DINOv2 classifiers)."""
    dynamic_size: Flag = False
    """Whether images of another size are accepted, the position embedding being resized."""
    off_grid: Annotated[str, schema.one_of(*OFF_GRID)] = "refuse"
    position_antialias: Flag = True
    """timm resizes with antialiasing, transformers and the original DINOv2 without."""
    position_offset: Annotated[float, schema.number(0, 1)] = 0.0
    """Added to the target grid before the scale factor is computed (original DINOv2: 0.1)."""
    name: Annotated[str, schema.TEXT] = ""

    def __post_init__(self) -> None:
        if problems := schema.problems(ViTConfig, vars(self), "ViTConfig."):
            raise ValueError("; ".join(problems))
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.head_dim == 0:
            raise ValueError(f"ViTConfig.heads must be at most the width {self.width}, got {self.heads}")
        if self.class_token and self.prefix_tokens < 1:
            raise ValueError("ViTConfig.class_token needs prefix_tokens >= 1, got 0")
        if not self.class_token and self.pool in ("cls", "cls_dist", "none"):
            raise ValueError(f"ViTConfig.pool={self.pool!r} needs a class token, got class_token=False")
        if self.pool == "cls_dist" and self.prefix_tokens < 2:
            raise ValueError(f"ViTConfig.pool='cls_dist' needs prefix_tokens >= 2, got {self.prefix_tokens}")
        self.grid(self.image_size)

    @property
    def gated(self) -> bool:
        """Whether fc1 holds a gate and an up projection."""
        return self.activation == "swiglu"

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patches (rows, columns) of an image of (height, width) pixels.

        Raises:
            ValueError: if a side is not a positive multiple of the patch side.
        """
        (height, width), (ph, pw) = image_size, self.patch_size
        if height < ph or width < pw or height % ph or width % pw:
            raise ValueError(f"image size {height}x{width} is not a positive multiple of the patch size {ph}x{pw}")
        return height // ph, width // pw

    def fit(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) on the patch grid that an image of (height, width) is cropped or padded to.

        Raises:
            ValueError: if the model refuses sizes off the grid, or nothing is left.
        """
        (height, width), (ph, pw) = image_size, self.patch_size
        if self.off_grid == "crop":
            height, width = height // ph * ph, width // pw * pw
        elif self.off_grid == "pad":
            height, width = -(-height // ph) * ph, -(-width // pw) * pw
        if height < 1 or width < 1:
            raise ValueError(f"image size {image_size[0]}x{image_size[1]} is less than one patch of {ph}x{pw}")
        self.grid((height, width))
        return height, width

    def tokens(self, image_size: tuple[int, int] | None = None) -> int:
        """Sequence length N (prefix and patches) for an image size, the native one by default."""
        rows, columns = self.grid(image_size or self.image_size)
        return self.prefix_tokens + rows * columns

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Canonical weight name -> (shape, required). The one list that loading checks against."""
        c, hd, f = self.width, self.heads * self.head_dim, self.mlp_dim
        rows, columns = self.grid(self.image_size)
        shapes: dict[str, tuple[tuple[int, ...], bool]] = {
            "patch_embed.weight": ((c, self.in_channels, *self.patch_size), True),
            "patch_embed.bias": ((c,), False),
        }

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = ((c,), True)

        def dense(name: str, out: int, inp: int, *, bias: bool = False) -> None:
            shapes[f"{name}.weight"] = ((out, inp), True)
            shapes[f"{name}.bias"] = ((out,), bias)

        if self.prefix_tokens:
            shapes["prefix"] = ((self.prefix_tokens, c), True)
        if self.position:
            shapes["position"] = ((rows * columns, c), True)
        if self.pre_norm:
            norm("norm_pre")
        for i in range(self.depth):
            norm(f"blocks.{i}.norm1")
            dense(f"blocks.{i}.qkv", 3 * hd, c)
            dense(f"blocks.{i}.proj", c, hd)
            norm(f"blocks.{i}.norm2")
            dense(f"blocks.{i}.fc1", 2 * f if self.gated else f, c)
            dense(f"blocks.{i}.fc2", c, f)
            if self.layer_scale:
                shapes[f"blocks.{i}.layer_scale1"] = shapes[f"blocks.{i}.layer_scale2"] = ((c,), True)
        if self.final_norm:
            norm("norm")
        if self.pool_norm:
            norm("pool_norm")
        if self.projection_dim:
            shapes["projection.weight"] = ((self.projection_dim, c), True)
        if self.num_classes:
            dense("head", self.num_classes, 2 * c if self.head_concat_mean else c)
            if self.distilled:
                dense("head_dist", self.num_classes, c)
        return shapes


def _vit(name: str, image: int, patch: int, width: int, depth: int, heads: int, mlp_dim: int) -> ViTConfig:
    return ViTConfig((image, image), (patch, patch), width, depth, heads, mlp_dim, num_classes=1000, name=name)


NAMED = {
    config.name: config
    for config in (
        _vit("vit_tiny_patch16_224", 224, 16, 192, 12, 3, 768),
        _vit("vit_small_patch16_224", 224, 16, 384, 12, 6, 1536),
        _vit("vit_base_patch16_224", 224, 16, 768, 12, 12, 3072),
        _vit("vit_base_patch16_384", 384, 16, 768, 12, 12, 3072),
        _vit("vit_large_patch16_224", 224, 16, 1024, 24, 16, 4096),
        _vit("vit_large_patch16_384", 384, 16, 1024, 24, 16, 4096),
        _vit("vit_large_patch14_518", 518, 14, 1024, 24, 16, 4096),
        _vit("vit_huge_patch14_224", 224, 14, 1280, 32, 16, 5120),
    )
}
"""Architectures by timm's names, for benchmarks and predictions, which need no weights."""
