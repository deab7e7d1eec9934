"""timm's vision towers of language models: Qwen3-VL's, DeepSeek's and Gemma 4's, as encoders and as classifiers.

The projector at their end (merger, aligner, pooler) runs as it is, as the neck.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitfast.models.checkpoints import live, timm_blocks, timm_rope, timm_stem
from vitfast.models.checkpoints.source import Checkpoint, Source, require
from vitfast.models.checkpoints.timm_blocks import DROP, NORM, PATH, absent, norm_of, read_norm
from vitfast.models.config import ViTConfig

_ENCODERS = {"Qwen3Vit": "merger", "DeepseekVit": "aligner", "Gemma4Vit": "pooler"}
"""What the classes' names begin with -> where the neck is."""
SUPPORTED = tuple(f"{start}{end}" for start in _ENCODERS for end in ("Encoder", "Classifier"))

_CLIPPED = ("Gemma4ClippableLinear",)
_ANATOMY: live.Anatomy = {
    **{f"{start}Classifier": {"norm": (*NORM, "Identity"), "head_drop": DROP}
       for start in _ENCODERS},
    **{f"{start}Encoder": {"patch_embed": ("PatchEmbed",), "rope": timm_rope.KINDS, "blocks": ("ModuleList",),
                           "norm": NORM} for start in ("Qwen3Vit", "DeepseekVit")},
    "Gemma4VitEncoder": {
        "patch_embed": ("Gemma4PatchEmbed",), "rotary_emb": ("Gemma4RotaryEmbedding2D",), "blocks": ("ModuleList",),
    },
    "PatchEmbed": {"proj": ("Conv2d",), "norm": ("Identity",)},
    "Qwen3VitEncoder.blocks": {"*": ("EvaBlock",)},
    "DeepseekVitEncoder.blocks": {"*": ("DeepseekVitBlock",)},
    "Gemma4VitEncoder.blocks": {"*": ("Gemma4Block",)},
    "Gemma4PatchEmbed": {"input_proj": ("Linear",)},
    "Gemma4Block": {
        **dict.fromkeys(("norm1", "norm2", "norm3", "norm4"), ("RmsNorm",)),
        "attn": ("Gemma4Attention",), "mlp": ("Gemma4GatedMlp",), "drop_path": PATH,
    },
    "Gemma4Attention": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), _CLIPPED),
        **dict.fromkeys(("q_norm", "k_norm", "v_norm"), ("RmsNorm",)),
        **dict.fromkeys(("attn_drop", "proj_drop"), DROP),
    },
    "Gemma4GatedMlp": {
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), _CLIPPED), "act": ("GELU", "GELUTanh"), "drop": DROP,
    },
    "Gemma4ClippableLinear": {"linear": ("Linear",)},
    **timm_blocks.ANATOMY,
}  # fmt: skip


class Pooler(nn.Module):
    """Gemma 4's pooling of patches to fewer tokens: means of squares, times the root of the width, standardised."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.side, self.factor = encoder.pooler.pooling_kernel_size, encoder.pooler.root_hidden_size
        for name in ("std_bias", "std_scale"):
            self.register_buffer(name, copy.deepcopy(getattr(encoder, name)))

    def forward(self, patches: Tensor) -> Tensor:
        """Tokens [B, h, w, C] of patches [B, rows, columns, C]."""
        made = F.avg_pool2d(patches.permute(0, 3, 1, 2).float(), self.side).permute(0, 2, 3, 1)
        made = made.to(patches.dtype) * self.factor
        return made if self.std_bias is None else (made - self.std_bias) * self.std_scale


class Joined(nn.Module):
    """A merger or aligner, whose tokens are in rows already."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, patches: Tensor) -> Tensor:
        """Tokens [B, 1, M, E] of patches [B, rows, columns, C]."""
        return self.inner(patches)[:, None]


def _parts(module: Any) -> tuple[Any, str, Any]:
    """The encoder, what its class's name begins with, and the neck that is in use, or None."""
    encoder = getattr(module, "encoder", module)
    start = next(start for start in _ENCODERS if type(encoder).__name__ == f"{start}Encoder")
    neck = getattr(encoder, _ENCODERS[start])
    return encoder, start, None if start == "Gemma4Vit" and encoder.global_pool != "soft" else neck


def translate(module: Any, name: str) -> Checkpoint:
    """Config, weights and neck of a module of one of the `SUPPORTED` classes.

    Raises:
        CheckpointError: naming the feature that cannot be represented, the part that is not timm's own, or the
            tensors that do not fit.
    """
    config = config_of(module, name)
    encoder, start, neck = _parts(module)
    projector = _ENCODERS[start]
    if encoder is not module:
        live.composed(module, _ANATOMY, ("torch.nn.", "timm."), name, skip=("head", "encoder"))
    live.composed(encoder, _ANATOMY, ("torch.nn.", "timm."), name, skip=(projector,))
    state = {key.removeprefix("encoder."): tensor for key, tensor in module.state_dict().items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith((f"{projector}.", "std_"))}
    source = Source(state, name)
    if start == "Gemma4Vit":
        _read_gemma(source, config, encoder)
    else:
        source.dense("patch_embed", "patch_embed.proj.", bias=encoder.patch_embed.proj.bias is not None)
        if config.position:
            source.tokens(config, [], "pos_embed", covered=0)
        timm_rope.read(source, config, encoder.rope, f"{name}: rope")
        for i, block in enumerate(encoder.blocks):
            timm_blocks.read_block(source, config, i, block)
    if config.final_norm:
        read_norm(source, "norm", "norm.", encoder.norm)
    if config.pool_norm:
        read_norm(source, "pool_norm", "norm.", module.norm)
    if config.num_classes:
        linear, inner = live.linear_head(module.head, f"{name}: head")
        assert linear is not None
        source.dense("head", f"head.{inner}", bias=linear.bias is not None)
    weights = source.finish(config, (r".*\.(input|output)_(min|max)",))
    made: nn.Module | None = None
    if neck is not None:
        made = Pooler(encoder) if start == "Gemma4Vit" else Joined(copy.deepcopy(neck))
    return Checkpoint(config, weights, neck=made)


def config_of(module: Any, name: str) -> ViTConfig:
    """The architecture of a module of one of the `SUPPORTED` classes.

    Raises:
        CheckpointError: naming the feature that cannot be represented.
    """
    encoder, start, neck = _parts(module)
    classifier = encoder is not module
    head, _ = live.linear_head(module.head, f"{name}: head") if classifier else (None, "")
    pool = module.global_pool if classifier or neck is None else "avg"
    require(pool == "avg" or (head is None and (not classifier or absent(module.norm))), "a head for each token", name)
    facts = _gemma_facts(encoder, name) if start == "Gemma4Vit" else _facts(encoder, name)
    normed = classifier and not absent(module.norm)
    if normed:
        found = norm_of(module.norm, f"{name}: norm")
        require(found == (facts["norm"], facts["norm_eps"]), f"another norm ({found}) after pooling", name)
    joined = {"Qwen3Vit": "merge_size", "DeepseekVit": "downsample_ratio", "Gemma4Vit": "pooling_kernel_size"}[start]
    if neck is not None:
        side = getattr(neck, joined)
        facts |= {"neck": type(neck).__name__, "neck_patches": (side, side), "neck_whole": start != "DeepseekVit"}
        facts |= {"pool_dim": getattr(neck, "out_features", 0)}
    return ViTConfig(
        **facts,
        depth=len(encoder.blocks),
        prefix_tokens=0,
        class_token=False,
        pool="avg" if pool == "avg" else "none",
        pool_norm=normed,
        num_classes=head.out_features if head is not None else 0,
        dynamic_size=True,
        name=name,
    )


def _facts(encoder: Any, name: str) -> dict[str, Any]:
    """Of Qwen3-VL's and DeepSeek's encoders."""
    embed = encoder.patch_embed
    live.patches(embed.proj, f"{name}: patch_embed.proj")
    facts = timm_stem.patch_facts(embed)
    every = {timm_blocks.facts_of(block, f"{name}: blocks.{i}") for i, block in enumerate(encoder.blocks)}
    require(len(every) == 1, f"differing blocks ({len(every)} kinds)", f"{name}: blocks")
    block = every.pop()
    turned = timm_rope.facts(encoder.rope, f"{name}: rope")
    kept = block.interleaved == turned["rope_interleaved"]
    require(kept, "rotary embedding in one layout, rotation in the other", f"{name}: rope")
    own = {key: value for key, value in block._asdict().items() if key != "interleaved"}
    norm = getattr(encoder, "norm", None)
    if norm is not None:
        found = norm_of(norm, f"{name}: norm")
        require(found == (block.norm, block.norm_eps), f"another norm ({found}) at the end", name)
    if position := getattr(encoder, "pos_embed_grid_size", 0):
        patch = facts["patch_size"]
        facts |= {"image_size": (position * patch[0], position * patch[1]), "position_interpolation": "bilinear"}
        facts |= {"position_align_corners": True, "position_antialias": False}
    off_grid = "pad" if embed.dynamic_img_pad else "refuse"
    return {**facts, **own, **turned, "position": bool(position), "final_norm": norm is not None, "off_grid": off_grid}


def _gemma_facts(encoder: Any, name: str) -> dict[str, Any]:
    embed, block = encoder.patch_embed, encoder.blocks[0]
    attention, patch = block.attn, embed.patch_size
    for i, other in enumerate(encoder.blocks):
        where = f"{name}: blocks.{i}"
        same = (other.attn.num_heads, other.attn.head_dim) == (attention.num_heads, attention.head_dim)
        require(same and other.attn.num_kv_heads == attention.num_heads, "grouped or differing heads", where)
        norms = {f"norm{j}": getattr(other, f"norm{j}") for j in range(1, 5)}
        norms |= {f"attn.{key}_norm": getattr(other.attn, f"{key}_norm") for key in "qkv"}
        require(timm_blocks.one_norm(norms, where)[1] == block.norm1.eps, "norms that differ between blocks", where)
        require(timm_blocks.activation(other.mlp.act, where) == "gelu_tanh", "a gate that is no tanh GELU", where)
    for path, part in encoder.named_modules():
        if type(part).__name__ in _CLIPPED and part.use_clipped:
            limits = [part.input_min, part.input_max, part.output_min, part.output_max]
            idle = all(limit.device.type == "meta" or bool(limit.isinf()) for limit in limits)
            require(idle, "products that are clipped (set_clamp_enabled(False) turns that off)", f"{name}: {path}")
    rows, columns = 768 // patch[0], 768 // patch[1]  # of the images that Gemma 4 is trained on
    return {
        "image_size": (rows * patch[0], columns * patch[1]),
        "patch_size": tuple(patch),
        "in_channels": embed.input_proj.in_features // (patch[0] * patch[1]),
        "width": embed.embed_dim,
        "heads": attention.num_heads,
        "head_dim": attention.head_dim,
        "mlp_dim": block.mlp.gate_proj.linear.out_features,
        "activation": "geglu_tanh",
        "norm": "rms_norm",
        "norm_eps": block.norm1.eps,
        "block": "sandwich",
        "qk_norm": "rms_norm",
        "v_norm": True,
        "attention_scale": 1.0,
        "rope": "index",
        "position": False,
        "position_sides": (embed.position_embedding_size, embed.position_embedding_size),
        "final_norm": False,
    }


def _read_gemma(source: Source, config: ViTConfig, encoder: Any) -> None:
    """Take all weights.

    Images from 0 to 1 are stretched to -1 to 1: the patch embedding does that here. Each half of a head is rotated by
    itself, the first by columns: channels are put in the order in which the two halves of a head are rotated.
    """
    width, (height, side), table = config.width, config.patch_size, encoder.patch_embed.position_embedding_size
    kernel = (width, config.in_channels, height, side)
    flat = {"patch_embed.input_proj.weight": (width, config.in_channels * height * side)}
    source.derive("patch_embed.weight", kernel, lambda weight: 2 * weight.view(kernel), flat)
    source.derive("patch_embed.bias", (width,), lambda weight: -weight.sum(1), flat)
    tables = {"patch_embed.position_embedding_table": (2, table, width)}
    source.derive("position_columns", (table, width), lambda both: both[0], tables)
    source.derive("position_rows", (table, width), lambda both: both[1], tables)
    turns = encoder.rotary_emb.inv_freq.detach().float()
    half, quarter = config.head_dim // 2, config.head_dim // 4
    rope = torch.stack([torch.cat([turns * 0, turns]), torch.cat([turns, turns * 0])])
    require(turns.numel() == quarter, f"rotary frequencies for {4 * turns.numel()} channels", source.what)
    source.derive("rope", (1, 1, 2, half), lambda: rope[None, None], {})
    order = torch.arange(config.head_dim).view(2, 2, quarter).transpose(0, 1).flatten()
    inner = config.heads * config.head_dim

    def ordered(*parts: Tensor) -> Tensor:
        q, k, v = parts
        return torch.cat([*(t.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1) for t in (q, k)), v])

    for i in range(config.depth):
        ours = theirs = f"blocks.{i}."
        for mine, name in (("norm1", "norm1"), ("post_norm1", "norm2"), ("norm2", "norm3"), ("post_norm2", "norm4")):
            source.copy(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
        products = {f"{theirs}attn.{key}_proj.linear.weight": (inner, width) for key in "qkv"}
        source.derive(f"{ours}qkv.weight", (3 * inner, width), ordered, products)
        for name in ("q_norm", "k_norm"):
            norm = {f"{theirs}attn.{name}.weight": (config.head_dim,)}
            source.derive(f"{ours}{name}.weight", (config.head_dim,), lambda weight: weight[order], norm)
        source.copy(f"{ours}proj.weight", f"{theirs}attn.o_proj.linear.weight")
        source.copy(f"{ours}fc1.weight", *(f"{theirs}mlp.{name}_proj.linear.weight" for name in ("gate", "up")))
        source.copy(f"{ours}fc2.weight", f"{theirs}mlp.down_proj.linear.weight")
