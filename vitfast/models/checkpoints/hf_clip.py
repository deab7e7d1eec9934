"""transformers CLIP, the vision tower.

`tokens` are all tokens after `post_layernorm`, which transformers applies to the CLS token only (its
`last_hidden_state` is before that norm). `embedding` is the projected image embedding, not scaled
to unit length (`image_embeds`); of CLIPVisionModel, which has no projection, it is the normalised
CLS token (`pooler_output`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source
from vitfast.models.config import ViTConfig

ARCHITECTURES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
BY_MODEL_TYPE = {
    "clip": lambda state: "CLIPModel",
    "clip_vision_model": lambda state: (
        "CLIPVisionModelWithProjection" if "visual_projection.weight" in state else "CLIPVisionModel"
    ),
}
IGNORABLE = (r"text_model\..*", r"text_projection\.weight", r"logit_scale", r".*embeddings\.position_ids")

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
_NAMES = common.BlockNames(
    block="encoder.layers.{}.",
    norm1="layer_norm1.",
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    proj="self_attn.out_proj.",
    norm2="layer_norm2.",
    fc1=("mlp.fc1.",),
    fc2="mlp.fc2.",
)


def matches(architecture: str) -> bool:
    """Whether this family has the class."""
    return architecture in ARCHITECTURES


def translate(
    config: Mapping[str, Any], state: Mapping[str, Tensor], architecture: str, name: str
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Config dict and state dict, of files or of a module, to ours.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    tower = dict(config)
    if "vision_config" in config or "vision_config_dict" in config:  # a whole CLIP, of which we take one tower
        tower = (config.get("vision_config") or {}) | (config.get("vision_config_dict") or {})
    facts = _DEFAULTS | {key: value for key, value in tower.items() if value is not None}
    projection = facts["projection_dim"]
    if architecture == "CLIPModel":
        projection = config.get("projection_dim") or _DEFAULTS["projection_dim"]
    elif architecture == "CLIPVisionModel":
        projection = 0
    ours = ViTConfig(
        image_size=common.pair(facts["image_size"]),
        patch_size=common.pair(facts["patch_size"]),
        width=facts["hidden_size"],
        depth=facts["num_hidden_layers"],
        heads=facts["num_attention_heads"],
        mlp_dim=facts["intermediate_size"],
        in_channels=facts["num_channels"],
        activation=common.activation(facts["hidden_act"], name),
        norm_eps=facts["layer_norm_eps"],
        pre_norm=True,
        projection_dim=projection,
        dynamic_size=True,
        position_antialias=False,
        name=name,
    )
    prefixes = ("", "vision_model.") if architecture == "CLIPVisionModel" else ("vision_model.", "")
    prefix = common.find_prefix(state, prefixes, "embeddings.patch_embedding.weight")
    source = Source(state, name)
    source.dense("patch_embed", f"{prefix}embeddings.patch_embedding.", bias=False)
    token, position = f"{prefix}embeddings.class_embedding", f"{prefix}embeddings.position_embedding.weight"
    source.tokens(ours, [token], position, covered=1)
    source.norm("norm_pre", f"{prefix}pre_layrnorm.")
    _NAMES.read(source, ours, prefix)
    source.norm("norm", f"{prefix}post_layernorm.")
    if projection:
        source.copy("projection.weight", "visual_projection.weight")
    return ours, source.finish(ours, IGNORABLE)
