"""transformers SigLIP and SigLIP 2, and towers of its and CLIP's make inside larger models.

`embedding` is `pooler_output`: what attention pooling gives, or the normalised CLS token (of BLIP's towers normalised
twice, as they do); of towers that pool nothing the mean of the patch tokens (Janus's pooler_output is its first
patch's). The classifiers read the mean of all tokens. SigLIP 2 is given whole images here, not patches; images of any
size on the patch grid are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

from torch import Tensor

from vitfast.models import schema
from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import Eps, Flag, Hidden, ViTConfig


@dataclass(frozen=True)
class Settings(common.Settings):
    """config.json of a tower."""

    hidden_act: Annotated[str, schema.TEXT] = "gelu_pytorch_tanh"
    layer_norm_eps: Eps = 1e-6
    intermediate_size: Hidden = 3072
    vision_use_head: Flag = True


@dataclass(frozen=True)
class NaFlexSettings(Settings):
    """config.json of SigLIP 2."""

    num_patches: Annotated[int, schema.whole(1, 65_536)] = 256

    def common(self, where: str) -> dict[str, Any]:
        """The fields of ViTConfig that all transformers families have."""
        side = math.isqrt(self.num_patches)
        require(side * side == self.num_patches, f"num_patches={self.num_patches}, no square,", where)
        height, width = common.pair(self.patch_size)
        return replace(self, image_size=(side * height, side * width))._plain(where)

    def _plain(self, where: str) -> dict[str, Any]:
        return Settings.common(self, where)


@dataclass(frozen=True)
class TowerSettings(Settings):
    """config.json of other towers."""

    mlp_ratio: Annotated[float, schema.number(0, 64)] = 0
    """0: intermediate_size says it."""
    attention_bias: Flag = True
    qkv_bias: Flag = True
    use_qk_norm: Flag = False


_JANUS = replace(common.CLIP_NAMES, proj="self_attn.projection_layer.")
_BLIP = replace(common.CLIP_NAMES, qkv=("self_attn.qkv.",), proj="self_attn.projection.")


def _make(facts: Settings, architecture: str, classes: int) -> dict[str, Any]:
    classifier = architecture.endswith("ForImageClassification")
    del classes
    fields: dict[str, Any] = {
        "mlp_dim": facts.intermediate_size,
        "prefix_tokens": 0,
        "class_token": False,
        "position_antialias": architecture.startswith("Siglip2"),
        "pool": "avg_all" if classifier else "none",
    }
    if architecture.startswith("Siglip2"):
        fields["position_interpolation"] = "bilinear"
    if facts.vision_use_head and not classifier:
        fields |= {
            "pool": "map",
            "pool_heads": facts.num_attention_heads,
            "pool_mlp_dim": facts.intermediate_size,
            "pool_activation": common.activation(facts.hidden_act, architecture),
        }
    return fields


def _weights(source: Source, config: ViTConfig, facts: Settings, prefix: str, architecture: str) -> None:
    del facts
    embedding = f"{prefix}embeddings.patch_embedding."
    if architecture.startswith("Siglip2"):
        height, width = config.patch_size
        shape = (config.width, height, width, config.in_channels)

        def as_kernel(weight: Tensor) -> Tensor:
            return weight.view(shape).permute(0, 3, 1, 2).contiguous()

        flat = (config.width, height * width * config.in_channels)
        kernel = (config.width, config.in_channels, height, width)
        source.derive("patch_embed.weight", kernel, as_kernel, {f"{embedding}weight": flat})
        source.copy("patch_embed.bias", f"{embedding}bias")
    else:
        source.dense("patch_embed", embedding)
    source.tokens(config, [], f"{prefix}embeddings.position_embedding.weight", covered=0)
    common.CLIP_NAMES.read(source, config, prefix)
    source.norm("norm", f"{prefix}post_layernorm.")
    if config.attention_pool:
        _read_head(source, config, f"{prefix}head.")


def _read_head(source: Source, config: ViTConfig, theirs: str) -> None:
    """The pooling head, whose query is the same for every image."""
    width = config.width
    whole = {f"{theirs}attention.in_proj_weight": (3 * width, width), f"{theirs}attention.in_proj_bias": (3 * width,)}

    def query(weight: Tensor, bias: Tensor, probe: Tensor) -> Tensor:
        return weight[:width] @ probe.flatten() + bias[:width]

    source.derive("pool.query", (width,), query, {**whole, f"{theirs}probe": (1, 1, width)})
    for kind, (name, shape) in zip(("weight", "bias"), whole.items(), strict=True):
        source.derive(f"pool.kv.{kind}", (2 * width, *shape[1:]), lambda t: t[width:], {name: shape})
    source.dense("pool.proj", f"{theirs}attention.out_proj.")
    source.norm("pool.norm", f"{theirs}layernorm.")
    source.dense("pool.fc1", f"{theirs}mlp.fc1.")
    source.dense("pool.fc2", f"{theirs}mlp.fc2.")


def _make_tower(facts: TowerSettings, architecture: str, classes: int) -> dict[str, Any]:
    del classes
    require(not facts.use_qk_norm, "a norm of q and k (use_qk_norm)", "config")
    fields: dict[str, Any] = {
        "mlp_dim": int(facts.hidden_size * facts.mlp_ratio) if facts.mlp_ratio else facts.intermediate_size,
        "position_antialias": False,
    }
    if _kind(architecture) == "owl":
        return fields | {"pre_norm": True}
    if _kind(architecture) == "blip":
        return fields | {"pool_norm": True}
    fields |= {"prefix_tokens": 0, "class_token": False, "pool": "none"}
    # Idefics3 and SmolVLM place the patches of other sizes in the native grid, and resample nothing.
    return fields | {"dynamic_size": _kind(architecture) == "janus"}


def _kind(architecture: str) -> str:
    starts = {"Owl": "owl", "Blip": "blip", "InstructBlip": "blip", "Janus": "janus"}
    return next((kind for start, kind in starts.items() if architecture.startswith(start)), "idefics")


def _weights_tower(source: Source, config: ViTConfig, facts: TowerSettings, prefix: str, architecture: str) -> None:
    kind = _kind(architecture)
    source.dense("patch_embed", f"{prefix}embeddings.patch_embedding.", bias=kind != "owl")
    tokens = [f"{prefix}embeddings.class_embedding"] if config.class_token else []
    position = f"{prefix}embeddings.position_embedding{'' if kind == 'blip' else '.weight'}"
    source.tokens(config, tokens, position, covered=len(tokens))
    if config.pre_norm:
        source.norm("norm_pre", f"{prefix}pre_layernorm.")
    names = {"blip": _BLIP, "janus": _JANUS}.get(kind, common.CLIP_NAMES)
    names.read(source, config, prefix, qkv_bias=facts.qkv_bias if kind == "blip" else facts.attention_bias)
    source.norm("norm", f"{prefix}post_layernorm.")
    if config.pool_norm:
        source.norm("pool_norm", f"{prefix}post_layernorm.")


def _classifier(name: str) -> Any:
    return lambda state: f"{name}ForImageClassification" if "classifier.weight" in state else f"{name}Model"


def _bases(architecture: str) -> tuple[str, ...]:
    return ("", "vision_model.") if architecture.endswith("VisionModel") else ("vision_model.", "")


_LEFT = (r".*embeddings\.position_ids", r"logit_(scale|bias)", r"text_model\..*", r"(vision_model\.)?head\..*")

SIGLIP = common.Family(
    architectures=("SiglipVisionModel", "SiglipModel", "SiglipForImageClassification"),
    bases=_bases,
    by_model_type={
        "siglip": _classifier("Siglip"),
        "siglip_vision_model": lambda state: "SiglipVisionModel",
    },
    marker="embeddings.patch_embedding.weight",
    settings=Settings,
    make=_make,
    weights=_weights,
    ignorable=_LEFT,
)
SIGLIP2 = replace(
    SIGLIP,
    architectures=("Siglip2VisionModel", "Siglip2Model", "Siglip2ForImageClassification"),
    by_model_type={"siglip2": _classifier("Siglip2"), "siglip2_vision_model": lambda state: "Siglip2VisionModel"},
    settings=NaFlexSettings,
)
_BLIP2 = {"hidden_size": 1408, "num_hidden_layers": 39, "num_attention_heads": 16, "intermediate_size": 6144,
          "hidden_act": "gelu", "patch_size": 14}  # fmt: skip
_OWL = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 768}
_IDEFICS = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
TOWERS = common.Family(
    architectures=(
        *("BlipVisionModel", "Blip2VisionModel", "InstructBlipVisionModel", "InstructBlipVideoVisionModel"),
        *("OwlViTVisionModel", "Owlv2VisionModel", "JanusVisionModel"),
        *("Idefics3VisionTransformer", "SmolVLMVisionTransformer"),
    ),
    bases=lambda architecture: ("", "vision_model."),
    by_model_type={
        "blip_vision_model": lambda state: "BlipVisionModel",
        "blip_2_vision_model": lambda state: "Blip2VisionModel",
        "instructblip_vision_model": lambda state: "InstructBlipVisionModel",
        "instructblipvideo_vision_model": lambda state: "InstructBlipVideoVisionModel",
        "owlvit_vision_model": lambda state: "OwlViTVisionModel",
        "owlv2_vision_model": lambda state: "Owlv2VisionModel",
        "janus_vision_model": lambda state: "JanusVisionModel",
        "idefics3_vision": lambda state: "Idefics3VisionTransformer",
        "smolvlm_vision": lambda state: "SmolVLMVisionTransformer",
    },
    marker="embeddings.patch_embedding.weight",
    settings=TowerSettings,
    make=_make_tower,
    weights=_weights_tower,
    ignorable=(r".*embeddings\.position_ids",),
    defaults={
        "BlipVisionModel": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "image_size": 384},
        **dict.fromkeys(("Blip2VisionModel", "InstructBlipVisionModel", "InstructBlipVideoVisionModel"), _BLIP2),
        "OwlViTVisionModel": {**_OWL, "patch_size": 32},
        "Owlv2VisionModel": {**_OWL, "patch_size": 16},
        "JanusVisionModel": {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_act": "gelu",
            "image_size": 384, "mlp_ratio": 4.0,
        },
        "Idefics3VisionTransformer": _IDEFICS,
        "SmolVLMVisionTransformer": _IDEFICS,
    },
)  # fmt: skip
