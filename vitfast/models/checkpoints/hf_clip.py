"""transformers CLIP and its kin (MetaCLIP 2, Chinese CLIP, AltCLIP, CLIPSeg, GIT): the vision tower.

`tokens` are all tokens after `post_layernorm`, which transformers applies to the CLS token only (its
`last_hidden_state` is before that norm). `embedding` is the projected image embedding, not scaled
to unit length (`image_embeds`); of CLIPVisionModel, which has no projection, it is the normalised
CLS token (`pooler_output`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from torch import Tensor

from vitfast.models import schema
from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, read_settings
from vitfast.models.config import Eps, Hidden, ViTConfig

_TOWERS = (
    *("CLIPVisionModel", "MetaClip2VisionModel", "ChineseCLIPVisionModel", "AltCLIPVisionModel"),
    *("CLIPSegVisionModel", "GitVisionModel"),
)
_PROJECTED = (
    *("CLIPVisionModelWithProjection", "MetaClip2VisionModelWithProjection"),
    *("CLIPModel", "MetaClip2Model", "ChineseCLIPModel", "AltCLIPModel", "CLIPSegModel"),
)
_CLASSIFIERS = ("CLIPForImageClassification", "MetaClip2ForImageClassification")
ARCHITECTURES = (*_TOWERS, *_PROJECTED, *_CLASSIFIERS)
BY_MODEL_TYPE = {
    "metaclip_2": lambda state: "MetaClip2Model",
    "metaclip_2_vision_model": lambda state: (
        "MetaClip2VisionModelWithProjection" if "visual_projection.weight" in state else "MetaClip2VisionModel"
    ),
    "chinese_clip": lambda state: "ChineseCLIPModel",
    "chinese_clip_vision_model": lambda state: "ChineseCLIPVisionModel",
    "altclip": lambda state: "AltCLIPModel",
    "altclip_vision_model": lambda state: "AltCLIPVisionModel",
    "clipseg": lambda state: "CLIPSegModel",
    "clipseg_vision_model": lambda state: "CLIPSegVisionModel",
    "git_vision_model": lambda state: "GitVisionModel",
    "clip": lambda state: "CLIPModel",
    "clip_vision_model": lambda state: (
        "CLIPVisionModelWithProjection" if "visual_projection.weight" in state else "CLIPVisionModel"
    ),
}
MARKER = "embeddings.patch_embedding.weight"
IGNORABLE = (r"text_model\..*", r"text_projection\.weight", r"logit_scale", r".*embeddings\.position_ids")


@dataclass(frozen=True)
class Settings(common.Settings):
    """config.json of the tower."""

    hidden_act: Annotated[str, schema.TEXT] = "quick_gelu"
    layer_norm_eps: Eps = 1e-5
    patch_size: common.SideOrSides = 32
    intermediate_size: Hidden = 3072
    projection_dim: Annotated[int, schema.whole(1, 65_536)] = 512


@dataclass(frozen=True)
class _Whole:
    """config.json of a whole CLIP, of which we take one tower."""

    vision_config: Annotated[Mapping[str, Any] | None, schema.OBJECT] = None
    vision_config_dict: Annotated[Mapping[str, Any] | None, schema.OBJECT] = None
    projection_dim: Annotated[int, schema.whole(1, 65_536)] = 512


def matches(architecture: str) -> bool:
    """Whether this family has the class."""
    return architecture in ARCHITECTURES


def prefixes(architecture: str) -> tuple[str, str]:
    """What may stand before the encoder's names: in the class's own files, and in others that hold the encoder."""
    return ("", "vision_model.") if architecture in _TOWERS else ("vision_model.", "")


def read(config: Mapping[str, Any], architecture: str, where: str) -> Settings:
    """The tower's settings, out of a whole CLIP's if need be.

    Raises:
        CheckpointError: with each field that is out of its domain.
    """
    whole = read_settings(_Whole, config, where)
    tower: Mapping[str, Any] = config
    inside = whole.vision_config is not None or whole.vision_config_dict is not None
    if inside:
        tower = {**(whole.vision_config or {}), **(whole.vision_config_dict or {})}
    if architecture == "GitVisionModel":
        tower = {"patch_size": 16, **{name: value for name, value in tower.items() if value is not None}}
    facts = read_settings(Settings, tower, where, "vision_config." if inside else "")
    return replace(facts, projection_dim=whole.projection_dim) if architecture.endswith("Model") and inside else facts


def translate(
    facts: Settings, classes: int, state: Mapping[str, Tensor], architecture: str, name: str
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Settings and state dict, of files or of a module, to ours; `classes` is how many a classifier has.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    classifier = architecture in _CLASSIFIERS  # which reads the mean of the patch tokens, and no norm before that
    projection = facts.projection_dim if architecture in _PROJECTED else 0
    ours = ViTConfig(
        **facts.common(name),
        mlp_dim=facts.intermediate_size,
        pre_norm=True,
        projection_dim=projection,
        final_norm=not classifier,
        pool="avg" if classifier else "cls",
        num_classes=classes if classifier else 0,
        position_antialias=False,
        name=name,
    )
    prefix = common.find_prefix(state, prefixes(architecture), MARKER)
    source = Source(state, name)
    source.dense("patch_embed", f"{prefix}embeddings.patch_embedding.", bias=False)
    token, position = f"{prefix}embeddings.class_embedding", f"{prefix}embeddings.position_embedding.weight"
    source.tokens(ours, [token], position, covered=1)
    source.norm("norm_pre", f"{prefix}pre_layrnorm.")
    common.CLIP_NAMES.read(source, ours, prefix)
    if classifier:
        source.dense("head", "classifier.")
        return ours, source.finish(ours, (*IGNORABLE, r".*post_layernorm\.(weight|bias)"))
    source.norm("norm", f"{prefix}post_layernorm.")
    if projection:
        source.copy("projection.weight", "visual_projection.weight")
    return ours, source.finish(ours, IGNORABLE)
