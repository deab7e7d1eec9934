"""ViTConfig: every architectural fact the forward pass needs, and the canonical weight names.

Every checkpoint family (timm, transformers, torchvision, ...) is translated into this one
description by `vitfast.models.checkpoints`; `vitfast.models.vit` reads nothing else.

Canonical weights (a flat dict; C width, H heads, D head dim, F hidden width, P prefix tokens,
L = grid[0] * grid[1] patch tokens, R = F, or 2F when the activation is gated, Q channels of the pooled vector):

    patch_embed.weight [C, in_channels, ph, pw]     patch_embed.bias [C]            (optional; unless stem)
    embed_norm.{weight,bias} [C]                                                    (if embed_norm)
    prefix             [P, C]   CLS, then distillation, then register tokens, each with its own
                                position embedding already added                     (if P > 0)
    position           [L, C]   position embedding of the patch tokens, row-major   (if position)
    position_rows [R, C], position_columns [S, C]   by a patch's row and column, added   (if position_sides is (R, S))
    rope   [1, 1, 2, D/2], or [blocks, H, 2, D/2] if rope_learned: radians that channel pair d of a head
                                turns by for a step down and for a step to the right (if rope)
    relative_position  [S, H, T]  by (row, column) of query less key from -(rows - 1) on, row-major, then
                                CLS to patch, patch to CLS, CLS to CLS where there is a CLS token;
                                S is 1 if shared, else one a block                  (if relative_position)
    norm_pre.{weight,bias} [C]                                                      (if pre_norm)
    blocks.{i}.norm1.{weight,bias} [C]
    blocks.{i}.qkv.weight [3*H*D, C]  rows ordered q, k, v     .bias [3*H*D]        (optional)
    blocks.{i}.q_norm.{weight,bias}, blocks.{i}.k_norm.{weight,bias} [D]            (if qk_norm)
    blocks.{i}.gate.weight [H*D, C]   .bias [H*D]                                   (if gated_attention)
    blocks.{i}.relative_rows [2*h - 1, D], blocks.{i}.relative_columns [2*w - 1, D]   by row or column of query less
                                key from -(h - 1) on, in a block that sees h x w patches  (if relative_position is
                                decomposed)
    blocks.{i}.lambda [1]       blocks.{i}.head_norm.weight [D]                     (if differential)
    blocks.{i}.attention_norm.{weight,bias} [H*D]                                   (if attention_norm)
    blocks.{i}.proj.weight [C, H*D]   .bias [C]                                     (optional)
    blocks.{i}.layer_scale1 [C]                                                     (if layer_scale)
    blocks.{i}.norm2.{weight,bias} [C]
    blocks.{i}.norm3.{weight,bias} [C]                                              (if double_norm)
    blocks.{i}.fc1.weight [R, C]  gated: gate rows first, then up rows   .bias [R]  (optional)
    blocks.{i}.mlp_norm.{weight,bias} [F]                                           (if mlp_norm)
    blocks.{i}.fc2.weight [C, F]  .bias [C]                                         (optional)
    blocks.{i}.layer_scale2 [C]                                                     (if layer_scale)
    blocks.{i}.post_norm1.{weight,bias}, blocks.{i}.post_norm2.{weight,bias} [C]    (if block is sandwich)
    norm.{weight,bias} [C]       over all tokens, before pooling                    (if final_norm)
    pool.query [Q]  the learned query, projected    pool.kv.weight [2*Q, C]  .bias [2*Q]  (if pool is map or map_all)
    pool.proj.weight [Q, Q]  .bias [Q]    pool.k_norm.{weight,bias} [Q / pool_heads]  (if pool_qk_norm)
    pool.norm.{weight,bias} [Q]    pool.fc1, pool.fc2 as in a block                 (if pool_mlp_dim)
    pool_norm.{weight,bias} [Q]  over the pooled vector (timm's fc_norm)            (if pool_norm)
    projection.weight [E, Q]     pooled vector -> embedding (CLIP)   .bias [E] (optional)  (if projection_dim)
    head.weight [classes, Q or 2Q]  head.bias [classes]                                (if num_classes)
    head_dist.weight, head_dist.bias   as head, on the distillation token           (if distilled)

The bias of a norm is optional everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vitfast.models import schema

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu", "geglu", "geglu_tanh")
"""gelu is the erf form; quick_gelu is x * sigmoid(1.702 x); swiglu is silu(gate) * up, geglu gelu(gate) * up."""
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""Gated activations -> the gate's."""

POOLS = ("cls", "avg", "avg_all", "max", "avg_max", "cls_dist", "map", "map_all", "none")
"""How tokens become one vector: the CLS token; the mean of the patch tokens; the mean of all
tokens; their maximum, or the mean of that and their mean; the mean of CLS and distillation token (the embedding of a
distilled DeiT); attention of a learned query over the patch tokens, or all tokens (MAP); or not at all
(then `embedding` is the CLS token, or the mean of the patch tokens where there is none)."""

NORMS = ("layer_norm", "rms_norm")

BLOCKS = ("pre", "post", "sandwich", "parallel")
"""Where a block has its norms: x + f(norm(x)), half after half; x + norm(f(x)); x + norm(f(norm(x))); or both halves of
the same norm(x)."""

DIFFERENTIAL_EPS = 1e-5
"""Of the norm of heads in differential attention."""

ROPE_GRIDS = ("", "index", "span", "centered")
"""Coordinates of rotary position embedding, along each side of s patches: none; 0 to s - 1; -1 to 1; or the patches'
centres, from -1 to 1 at the image's edges."""


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
    norm: Annotated[str, schema.one_of(*NORMS)] = "layer_norm"
    norm_eps: Eps = 1e-6
    block: Annotated[str, schema.one_of(*BLOCKS)] = "pre"
    prefix_tokens: Tokens = 1
    """CLS + distillation + register tokens."""
    class_token: Flag = True
    position: Flag = True
    position_sides: Annotated[tuple[int, int], schema.sides(0, 65_536)] = (0, 0)
    """Rows and columns that have a position embedding each, added up (Gemma 4); (0, 0): there are none such."""
    stem: Annotated[str, schema.TEXT] = ""
    """What makes tokens of images where it is no patch convolution: the class of a module that runs as it is."""
    embed_norm: Flag = False
    """A norm of the patch embeddings, before position and prefix tokens (AIMv2)."""
    rope: Annotated[str, schema.one_of(*ROPE_GRIDS)] = ""
    """Rotary position embedding of the patch tokens: its coordinates."""
    rope_interleaved: Flag = False
    """Channels 2d and 2d + 1 of a head are rotated together, not d and d + D / 2."""
    rope_learned: Flag = False
    """Each head of each block has frequencies of its own."""
    rope_offset: Annotated[float, schema.number(-65_536, 65_536)] = 0.0
    """Added to coordinates in patches."""
    rope_reference: Annotated[tuple[int, int], schema.sides(0, 65_536)] = (0, 0)
    """Grid (rows, columns) that coordinates are stretched to (EVA-02); (0, 0) leaves them."""
    relative_position: Annotated[str, schema.one_of("", "shared", "blocks", "decomposed")] = ""
    """A learned bias of the scores by relative position, the same in all blocks or one for each; or the products of
    the query with a vector for the relative row and one for the relative column (SAM)."""
    window: Annotated[int, schema.whole(0, 65_536)] = 0
    """Attention is within windows of so many rows and columns of patches; 0: over all tokens. Patches that are missing
    in the last windows are zeros after the norm."""
    global_blocks: Annotated[tuple[int, ...], schema.WHOLES] = ()
    """Blocks without windows."""
    qk_norm: Annotated[str, schema.one_of("", *NORMS)] = ""
    """A norm of each head of q and k."""
    v_norm: Flag = False
    """RMSNorm of each head of v, without weight."""
    differential: Flag = False
    """Softmax of the products of the first halves of q and k, less lambda times that of the second; then RMSNorm of
    each head ("Differential Transformer", Ye et al. 2024)."""
    attention_scale: Annotated[float, schema.number(0, 1e6)] = 0.0
    """Of the scores; 0 means 1 / sqrt(head_dim)."""
    gated_attention: Flag = False
    """What attention gives is multiplied by sigmoid(gate(norm1(x)))."""
    attention_norm: Flag = False
    """A norm of what attention gives, before the projection."""
    mlp_norm: Flag = False
    """A norm of the hidden activations, before fc2."""
    double_norm: Flag = False
    """Another norm after norm2, before fc1 (ViTamin)."""
    pre_norm: Flag = False
    """A LayerNorm between embedding and blocks (CLIP)."""
    layer_scale: Flag = False
    final_norm: Flag = True
    neck: Annotated[str, schema.TEXT] = ""
    """What makes other tokens of the patches' after the final norm: the class of a module that runs as it is."""
    neck_patches: Annotated[tuple[int, int], schema.sides(1, 65_536)] = (1, 1)
    """Patches (rows, columns) that one token of the neck stands for."""
    neck_whole: Flag = False
    """The neck takes no grid that leaves patches over."""
    pool: Annotated[str, schema.one_of(*POOLS)] = "cls"
    pool_dim: Annotated[int, schema.whole(0, 65_536)] = 0
    """Channels of the pooled vector, and of the neck's tokens; 0 means the width."""
    pool_heads: Annotated[int, schema.whole(0, 4_096)] = 0
    """Heads of attention pooling."""
    pool_qk_norm: Annotated[str, schema.one_of("", *NORMS)] = ""
    pool_mlp_dim: Annotated[int, schema.whole(0, 1_048_576)] = 0
    """Hidden width of the feed-forward network that attention pooling ends with; 0 is none."""
    pool_activation: Annotated[str, schema.one_of(*ACTIVATIONS)] = "gelu"
    pool_norm: Flag = False
    distilled: Flag = False
    projection_dim: Annotated[int, schema.whole(0, 65_536)] = 0
    num_classes: Classes = 0
    head_concat_mean: Flag = False
    """The head reads [CLS, mean of patch tokens] of width 2C (DINOv2 classifiers)."""
    dynamic_size: Flag = False
    """Whether images of another size are accepted, the position embedding being resized."""
    off_grid: Annotated[str, schema.one_of(*OFF_GRID)] = "refuse"
    position_interpolation: Annotated[str, schema.one_of("bicubic", "bilinear")] = "bicubic"
    position_align_corners: Flag = False
    position_square: Flag = False
    """Resized to a square on the grid's longer side, of which the grid's part is taken (NaFlex, RADIO)."""
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
        if not self.class_token and self.pool in ("cls", "cls_dist"):
            raise ValueError(f"ViTConfig.pool={self.pool!r} needs a class token, got class_token=False")
        if self.pool == "cls_dist" and self.prefix_tokens < 2:
            raise ValueError(f"ViTConfig.pool='cls_dist' needs prefix_tokens >= 2, got {self.prefix_tokens}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"ViTConfig.rope needs an even head_dim, got {self.head_dim}")
        if self.attention_pool and (self.pool_heads < 1 or self.pooled_dim % self.pool_heads):
            raise ValueError(f"ViTConfig.pool_heads must divide the width {self.pooled_dim}, got {self.pool_heads}")
        if self.pool_mlp_dim and self.pool_activation in GATED:
            raise ValueError(f"ViTConfig.pool_activation must not be gated, got {self.pool_activation!r}")
        if self.relative_position and self.prefix_tokens != self.class_token:
            raise ValueError(
                f"ViTConfig.relative_position knows a class token only, got {self.prefix_tokens} of prefix"
            )
        for name in ("window", "relative_position"):
            asked = getattr(self, name)
            if asked not in (0, "", "shared", "blocks") and (self.prefix_tokens or self.dynamic_size):
                raise ValueError(
                    f"ViTConfig.{name}={asked!r}: windows and decomposed relative position are of patches alone, "
                    "at one size"
                )
        if self.differential and (self.head_dim % 2 or self.qk_norm):
            raise ValueError(
                f"ViTConfig.differential={self.differential} needs an even head_dim, and no qk_norm; "
                f"got {self.head_dim} and {self.qk_norm!r}"
            )
        if self.relative_position == "decomposed" and self.attention_dim > 256:
            raise ValueError(f"ViTConfig: attention over {self.attention_dim} channels, at most 256 can be run")
        self.grid(self.image_size)

    def sides(self, block: int) -> tuple[int, int]:
        """Rows and columns of patches that a block's attention sees, at the native size."""
        windowed = self.window and block not in self.global_blocks
        return (self.window, self.window) if windowed else self.grid(self.image_size)

    @property
    def attention_dim(self) -> int:
        """Channels of a head's products: head_dim, and one for each row and column where these have a bias."""
        if self.relative_position != "decomposed":
            return self.head_dim
        return self.head_dim + max(sum(self.sides(i)) for i in range(self.depth))

    @property
    def plain_attention(self) -> bool:
        """Whether attention is softmax of scaled products, and nothing stands between it and its products."""
        special = (self.rope, self.relative_position, self.qk_norm, self.gated_attention, self.attention_norm)
        return not any((*special, self.v_norm, self.differential, self.window, self.attention_scale))

    @property
    def attention_pool(self) -> bool:
        """Whether tokens are pooled by attention."""
        return self.pool in ("map", "map_all")

    @property
    def pooled_dim(self) -> int:
        """Channels of the pooled vector."""
        return self.pool_dim or self.width

    @property
    def embedding_dim(self) -> int:
        """Channels of the embedding."""
        return self.projection_dim or self.pooled_dim

    @property
    def gated(self) -> bool:
        """Whether fc1 holds a gate and an up projection."""
        return self.activation in GATED

    @property
    def fused_activation(self) -> str:
        """The activation that fc1 does itself; "" where it is a step of its own."""
        return "" if self.activation in ("geglu", "geglu_tanh") else self.activation

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

    def neck_tokens(self, image_size: tuple[int, int]) -> int:
        """Tokens that the neck makes of images of (height, width)."""
        (rows, columns), (down, right) = self.grid(image_size), self.neck_patches
        return -(-rows // down) * -(-columns // right)

    def tokens(self, image_size: tuple[int, int] | None = None) -> int:
        """Sequence length N (prefix and patches) for an image size, the native one by default."""
        rows, columns = self.grid(image_size or self.image_size)
        return self.prefix_tokens + rows * columns

    def weight_shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Canonical weight name -> (shape, required). The one list that loading checks against."""
        c, hd, f, pooled = self.width, self.heads * self.head_dim, self.mlp_dim, self.pooled_dim
        rows, columns = self.grid(self.image_size)
        shapes: dict[str, tuple[tuple[int, ...], bool]] = {}

        def norm(name: str, width: int = c) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = ((width,), True), ((width,), False)

        def dense(name: str, out: int, inp: int, *, bias: bool = False) -> None:
            shapes[f"{name}.weight"] = ((out, inp), True)
            shapes[f"{name}.bias"] = ((out,), bias)

        if not self.stem:
            shapes["patch_embed.weight"] = ((c, self.in_channels, *self.patch_size), True)
            shapes["patch_embed.bias"] = ((c,), False)
        if self.embed_norm:
            norm("embed_norm")
        if self.rope:
            per = (self.depth, self.heads) if self.rope_learned else (1, 1)
            shapes["rope"] = ((*per, 2, self.head_dim // 2), True)
        if self.relative_position in ("shared", "blocks"):
            steps = (2 * rows - 1) * (2 * columns - 1) + 3 * self.class_token
            tables = 1 if self.relative_position == "shared" else self.depth
            shapes["relative_position"] = ((tables, self.heads, steps), True)
        if self.prefix_tokens:
            shapes["prefix"] = ((self.prefix_tokens, c), True)
        if self.position:
            shapes["position"] = ((rows * columns, c), True)
        for name, side in zip(("position_rows", "position_columns"), self.position_sides, strict=True):
            if side:
                shapes[name] = ((side, c), True)
        if self.pre_norm:
            norm("norm_pre")
        for i in range(self.depth):
            norm(f"blocks.{i}.norm1")
            dense(f"blocks.{i}.qkv", 3 * hd, c)
            for name in ("q_norm", "k_norm") if self.qk_norm else ():
                norm(f"blocks.{i}.{name}", self.head_dim)
            if self.gated_attention:
                dense(f"blocks.{i}.gate", hd, c)
            if self.attention_norm:
                norm(f"blocks.{i}.attention_norm", hd)
            if self.relative_position == "decomposed":
                for name, side in zip(("rows", "columns"), self.sides(i), strict=True):
                    shapes[f"blocks.{i}.relative_{name}"] = ((2 * side - 1, self.head_dim), True)
            if self.differential:
                shapes[f"blocks.{i}.lambda"] = ((1,), True)
                shapes[f"blocks.{i}.head_norm.weight"] = ((self.head_dim,), True)
            dense(f"blocks.{i}.proj", c, hd)
            norm(f"blocks.{i}.norm2")
            dense(f"blocks.{i}.fc1", 2 * f if self.gated else f, c)
            if self.double_norm:
                norm(f"blocks.{i}.norm3")
            if self.mlp_norm:
                norm(f"blocks.{i}.mlp_norm", f)
            dense(f"blocks.{i}.fc2", c, f)
            for name in ("post_norm1", "post_norm2") if self.block == "sandwich" else ():
                norm(f"blocks.{i}.{name}")
            if self.layer_scale:
                shapes[f"blocks.{i}.layer_scale1"] = shapes[f"blocks.{i}.layer_scale2"] = ((c,), True)
        if self.final_norm:
            norm("norm")
        if self.attention_pool:
            shapes["pool.query"] = ((pooled,), True)
            dense("pool.kv", 2 * pooled, c)
            if self.pool_qk_norm:
                norm("pool.k_norm", pooled // self.pool_heads)
            dense("pool.proj", pooled, pooled)
            if self.pool_mlp_dim:
                norm("pool.norm", pooled)
                dense("pool.fc1", self.pool_mlp_dim, pooled)
                dense("pool.fc2", pooled, self.pool_mlp_dim)
        if self.pool_norm:
            norm("pool_norm", pooled)
        if self.projection_dim:
            dense("projection", self.projection_dim, pooled)
        if self.num_classes:
            dense("head", self.num_classes, 2 * pooled if self.head_concat_mean else pooled)
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
