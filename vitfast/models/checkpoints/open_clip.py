"""OpenAI's CLIP and open_clip: the vision tower, from a state dict or a folder with open_clip_config.json.

`tokens` are all tokens after `ln_post`; `embedding` is the projected image embedding, not scaled to unit length. A
state dict gives all sizes but three things, which the config says or the name: the head width (64), the activation
(quick_gelu in OpenAI's weights) and where a norm stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from vitfast.images.preprocess import Preprocess
from vitfast.models import schema
from vitfast.models.checkpoints import files, state_dicts
from vitfast.models.checkpoints.preprocess import attempt
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError, Source, read_settings, require
from vitfast.models.config import Flag, ViTConfig

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MARKER = "visual.conv1.weight"

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TEXT = (
    r"(transformer|token_embedding|ln_final|text)\..*",
    r"positional_embedding|text_projection|logit_scale|logit_bias|attn_mask",
    r"input_resolution|context_length|vocab_size",
)
"""Names of the text tower, and what both share."""


@dataclass(frozen=True)
class _Vision:
    """What is read of `vision_cfg`."""

    head_width: Annotated[int, schema.whole(1, 65_536)] = 64
    timm_model_name: Annotated[str, schema.TEXT] = ""
    attentional_pool: Annotated[Any, schema.Domain("false, or a kind of pooling", lambda v: True)] = False
    global_average_pool: Flag = False
    pool_type: Annotated[str, schema.TEXT] = "tok"
    final_ln_after_pool: Flag = False
    no_ln_pre: Flag = False
    pos_embed_type: Annotated[str, schema.TEXT] = "learnable"


@dataclass(frozen=True)
class _Preprocess:
    """What is read of `preprocess_cfg`."""

    size: Annotated[Any, schema.side_or_sides(1, 65_536)] = None
    mean: Annotated[Any, schema.Domain("a list of numbers", lambda v: isinstance(v, (list, tuple)))] = OPENAI_MEAN
    std: Annotated[Any, schema.Domain("a list of numbers", lambda v: isinstance(v, (list, tuple)))] = OPENAI_STD
    interpolation: Annotated[str, schema.TEXT] = "bicubic"
    resize_mode: Annotated[str, schema.TEXT] = "shortest"
    mode: Annotated[str, schema.TEXT] = "RGB"


def names(name: str) -> bool:
    """Whether this is a CLIP's name: "ViT-B/32" (OpenAI), "ViT-B-32", "ViT-H-14-378-quickgelu" (open_clip)."""
    return re.fullmatch(r"ViT-[A-Za-z]+[-/]\d+.*", name) is not None


def from_directory(
    directory: Path, name: str, *, allow_pickle: bool = False, weights_key: str | None = None
) -> Checkpoint:
    """Read a folder with open_clip_config.json.

    Raises:
        CheckpointError: for settings out of their domain, a tower that is not supported, or tensors that do not fit.
    """
    where = f"{name}/{CONFIG}"
    settings = files.read_json(directory / CONFIG)
    model, preprocess = settings.get("model_cfg") or {}, settings.get("preprocess_cfg") or {}
    for key, value in (("model_cfg", model), ("preprocess_cfg", preprocess)):
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{where}: {key} must be an object, got {schema.shown(value)}")
    vision = model.get("vision_cfg") or {}
    if not isinstance(vision, Mapping):
        raise CheckpointError(f"{where}: model_cfg.vision_cfg must be an object, got {schema.shown(vision)}")
    paths = files.find_weights(directory, allow_pickle=allow_pickle, names=WEIGHTS)
    state = files.read_weights(paths, allow_pickle=allow_pickle, weights_key=weights_key)
    quick_gelu = bool(model.get("quick_gelu", False))
    return from_state(state, name, quick_gelu=quick_gelu, vision=vision, preprocess=preprocess, where=where)


def from_state(
    state: Mapping[str, Tensor],
    name: str,
    *,
    quick_gelu: bool,
    vision: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    where: str = "",
) -> Checkpoint:
    """Translate a whole CLIP's state dict.

    Args:
        quick_gelu: the activation. vision, preprocess: `vision_cfg` and `preprocess_cfg`; OpenAI's without.
        where: of these settings, for messages.

    Raises:
        CheckpointError: for what the forward does not have, or tensors that do not fit.
    """
    where = where or name
    facts = read_settings(_Vision, vision or {}, where, "vision_cfg.")
    require(not facts.timm_model_name, f"a tower of timm's ({facts.timm_model_name})", where)
    state = state_dicts.strip_prefix(state, [MARKER], name)
    require(MARKER in state, "a state dict without visual.conv1.weight (no Vision Transformer)", name)
    require("visual.layer1.0.conv1.weight" not in state, "a ResNet as vision tower", name)
    require(not facts.attentional_pool and "visual.attn_pool.query" not in state, "attentional pooling (CoCa)", where)
    require(not facts.final_ln_after_pool, "final_ln_after_pool", where)
    require(facts.pos_embed_type == "learnable", f"pos_embed_type={facts.pos_embed_type!r}", where)
    pools = {"tok": "cls", "avg": "avg"}
    kind = "avg" if facts.global_average_pool else facts.pool_type
    require(kind in pools, f"pool_type={kind!r}", where)
    config = _config(state, name, quick_gelu, pools[kind], facts)
    source = Source(state, name)
    source.dense("patch_embed", "visual.conv1.", bias=False)
    source.tokens(config, ["visual.class_embedding"], "visual.positional_embedding", covered=1)
    if config.pre_norm:
        source.norm("norm_pre", "visual.ln_pre.")
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}.", f"visual.transformer.resblocks.{i}."
        source.norm(f"{ours}norm1", f"{theirs}ln_1.")
        source.dense(f"{ours}qkv", f"{theirs}attn.in_proj_")
        source.dense(f"{ours}proj", f"{theirs}attn.out_proj.")
        source.norm(f"{ours}norm2", f"{theirs}ln_2.")
        source.dense(f"{ours}fc1", f"{theirs}mlp.c_fc.")
        source.dense(f"{ours}fc2", f"{theirs}mlp.c_proj.")
        if config.layer_scale:
            source.copy(f"{ours}layer_scale1", f"{theirs}ls_1.gamma")
            source.copy(f"{ours}layer_scale2", f"{theirs}ls_2.gamma")
    source.norm("norm", "visual.ln_post.")
    if config.projection_dim:
        source.transposed("projection.weight", "visual.proj")
    weights = source.finish(config, TEXT)
    return Checkpoint(config, weights, _read_preprocess(preprocess or {}, config, where))


def _config(state: Mapping[str, Tensor], name: str, quick_gelu: bool, pool: str, facts: _Vision) -> ViTConfig:
    """The architecture that the shapes say."""
    patches = state[MARKER]
    require(patches.ndim == 4, f"visual.conv1.weight {list(patches.shape)}", name)
    width, channels, height, side = patches.shape
    position = state.get("visual.positional_embedding")
    require(position is not None and position.ndim == 2, "a state dict without visual.positional_embedding", name)
    assert position is not None
    grid = math.isqrt(max(len(position) - 1, 0))
    require(grid > 0 and grid * grid + 1 == len(position), f"a grid of {len(position) - 1} patches", name)
    blocks = {m[1] for key in state if (m := re.match(r"visual\.transformer\.resblocks\.(\d+)\.", key))}
    hidden = state.get("visual.transformer.resblocks.0.mlp.c_fc.weight")
    require(hidden is not None, "a state dict without visual.transformer.resblocks.0.mlp.c_fc.weight", name)
    assert hidden is not None
    projection = state.get("visual.proj")
    return ViTConfig(
        image_size=(grid * height, grid * side),
        patch_size=(height, side),
        width=width,
        depth=len(blocks),
        heads=max(width // facts.head_width, 1),
        mlp_dim=len(hidden),
        in_channels=channels,
        activation="quick_gelu" if quick_gelu else "gelu",
        norm_eps=1e-5,
        pre_norm=not facts.no_ln_pre,
        layer_scale="visual.transformer.resblocks.0.ls_1.gamma" in state,
        pool=pool,
        projection_dim=projection.shape[1] if projection is not None and projection.ndim == 2 else 0,
        dynamic_size=False,  # neither library takes another size than the model was made for
        name=name,
    )


def _read_preprocess(settings: Mapping[str, Any], config: ViTConfig, where: str) -> Preprocess | None:
    facts = read_settings(_Preprocess, settings, where, "preprocess_cfg.")
    size = config.image_size

    def make() -> Preprocess:
        if facts.resize_mode not in ("shortest", "squash"):
            raise ValueError(f"resize_mode={facts.resize_mode!r} is not supported")
        return Preprocess(
            size=size,
            resize=size if facts.resize_mode == "squash" else min(size),
            interpolation=facts.interpolation,
            center_crop=facts.resize_mode == "shortest",
            mean=tuple(float(v) for v in facts.mean),
            std=tuple(float(v) for v in facts.std),
            rounding="even",
        )

    return attempt(make, config, where)
