"""timm's SAM image encoder: attention in windows, decomposed relative position, and a neck that runs as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from vitfast.models.checkpoints import live, timm_blocks, timm_stem
from vitfast.models.checkpoints.source import Checkpoint, Source, require
from vitfast.models.checkpoints.timm_blocks import DROP, NORM, absent, is_a, one_norm, read_norm
from vitfast.models.config import ViTConfig

SUPPORTED = ("VisionTransformerSAM",)
_ANATOMY: live.Anatomy = {
    **timm_blocks.ANATOMY,
    "VisionTransformerSAM": {
        "patch_embed": ("PatchEmbed",),
        "pos_drop": DROP,
        "patch_drop": ("PatchDropout", "Identity"),
        "norm_pre": (*NORM, "Identity"),
        "blocks": ("Sequential",),
    },
    "VisionTransformerSAM.blocks": {"*": ("Block",)},
    "PatchEmbed": {"proj": ("Conv2d",), "norm": ("Identity",)},
}


class Neck(nn.Module):
    """A neck of convolutions, which take and give maps of channels first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, patches: Tensor) -> Tensor:
        """Tokens [B, rows, columns, E] of patches [B, rows, columns, C]."""
        return self.inner(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def translate(module: Any, name: str) -> Checkpoint:
    """Config, weights and neck.

    Raises:
        CheckpointError: naming the feature that cannot be represented, the part that is not timm's own, or the
            tensors that do not fit.
    """
    config = config_of(module, name)
    live.composed(module, _ANATOMY, ("torch.nn.", "timm."), name, skip=("neck", "head"))
    source = Source({key: t for key, t in module.state_dict().items() if not key.startswith("neck.")}, name)
    source.dense("patch_embed", "patch_embed.proj.", bias=module.patch_embed.proj.bias is not None)
    if config.position:
        rows, columns = config.grid(config.image_size)
        table = {"pos_embed": (1, rows, columns, config.width)}
        source.derive("position", (rows * columns, config.width), lambda t: t.flatten(0, 2), table)
    if config.pre_norm:
        read_norm(source, "norm_pre", "norm_pre.", module.norm_pre)
    for i, block in enumerate(module.blocks):
        timm_blocks.read_block(source, config, i, block)
        if config.relative_position:
            source.copy(f"blocks.{i}.relative_rows", f"blocks.{i}.attn.rel_pos_h")
            source.copy(f"blocks.{i}.relative_columns", f"blocks.{i}.attn.rel_pos_w")
    if config.num_classes:
        source.dense("head", "head.fc.", bias=module.head.fc.bias is not None)
    return Checkpoint(config, source.finish(config), neck=Neck(copy.deepcopy(module.neck)))


def config_of(module: Any, name: str) -> ViTConfig:
    """The architecture.

    Raises:
        CheckpointError: naming the feature that cannot be represented.
    """
    embed, blocks, head = module.patch_embed, list(module.blocks), module.head
    live.patches(embed.proj, f"{name}: patch_embed.proj")
    require(is_a(head, "ClassifierHead"), f"{type(head).__name__} as head", name)
    fc = head.fc if isinstance(head.fc, nn.Linear) else None
    require(head.global_pool.pool_type == "avg", f"global_pool={head.global_pool.pool_type!r}", name)
    windows = {block.window_size for block in blocks} - {0}
    require(len(windows) < 2, f"windows that differ ({sorted(windows)})", name)
    every = {_facts_of(block, f"{name}: blocks.{i}") for i, block in enumerate(blocks)}
    require(len(every) == 1, f"differing blocks ({len(every)} kinds)", f"{name}: blocks")
    heads, mlp_dim, act, layer_scale, relative, norm, eps = every.pop()
    return ViTConfig(
        **timm_stem.patch_facts(embed),
        depth=len(blocks),
        heads=heads,
        mlp_dim=mlp_dim,
        activation=act,
        norm=norm,
        norm_eps=eps,
        layer_scale=layer_scale,
        prefix_tokens=0,
        class_token=False,
        position=module.pos_embed is not None,
        relative_position="decomposed" if relative else "",
        window=max(windows, default=0),
        global_blocks=tuple(i for i, block in enumerate(blocks) if not block.window_size),
        pre_norm=not absent(module.norm_pre),
        final_norm=False,
        neck=type(module.neck).__name__,
        pool="avg",
        pool_dim=module.num_features,
        num_classes=fc.out_features if fc is not None else 0,
        dynamic_size=False,
        name=name,
    )


def _facts_of(block: Any, where: str) -> tuple[Any, ...]:
    """What must be the same in every block."""
    attention = block.attn
    known = is_a(block, "Block") and type(block).__module__.endswith("vision_transformer_sam")
    require(known, f"{type(block).__name__} (a block of this class)", where)
    require(attention.rope is None, "rotary embedding", where)
    require(absent(attention.q_norm) and absent(attention.k_norm), "a norm of q and k", where)
    require(absent(getattr(block.mlp, "norm", None)), "a norm in the MLP", where)
    norm, eps = one_norm({"norm1": block.norm1, "norm2": block.norm2}, where)
    gated, act = timm_blocks.mlp_facts(block.mlp, f"{where}.mlp")
    require(not gated, "a gated MLP", where)
    scales = [not absent(part) for part in (block.ls1, block.ls2)]
    require(scales[0] == scales[1], "LayerScale in one half of a block only", where)
    return attention.num_heads, block.mlp.fc1.out_features, act, scales[0], attention.use_rel_pos, norm, eps
