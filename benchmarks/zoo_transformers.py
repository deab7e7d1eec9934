"""transformers' classes for the zoo: how each is built small, and what of its output is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.models import checkpoints, libraries
from vitfast.models.checkpoints import live

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-3, "projection_dim": 24,
}  # fmt: skip
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
_LLM = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 32, "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_RELATIVE = {"use_relative_position_bias": True}
_CLIP, _SIGLIP, _PIXTRAL = "clip_vision_model", "siglip_vision_model", {"head_dim": 16, "hidden_act": "silu"}
_WITH_LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    **dict.fromkeys(("Llava", "LlavaNext", "LlavaNextVideo", "VipLlava"), (_CLIP, "llama", {})),
    "LlavaOnevision": (_SIGLIP, "qwen2", {}),
    "PaliGemma": (_SIGLIP, "gemma", {}),
    "Gemma3": (_SIGLIP, "gemma3_text", {}),
    "InternVL": ("internvl_vision", "qwen2", {}),
    **dict.fromkeys(("AyaVision", "Cohere2Vision"), (_SIGLIP, "cohere2", {})),
    "DeepseekVL": (_SIGLIP, "llama", {}),
    "Mistral3": ("pixtral", "mistral", _PIXTRAL),
    "LightOnOcr": ("pixtral", "qwen3", _PIXTRAL),
    "Idefics3": ("idefics3_vision", "llama", {}),
    "SmolVLM": ("smolvlm_vision", "llama", {}),
    "Aria": ("idefics3_vision", "aria_text", {}),
    "Janus": ("janus_vision_model", "llama", {"mlp_ratio": 2.0, "hidden_act": "gelu", "projection_dim": 32}),
}
"""Beginning of classes of a vision tower and a language model -> types of both, and more settings of the tower."""

_PLAIN = """
    ViTModel ViTForImageClassification ViTForMaskedImageModeling DeiTModel DeiTForImageClassification
    DeiTForImageClassificationWithTeacher DeiTForMaskedImageModeling ViTMSNModel ViTMSNForImageClassification
    IJepaModel IJepaForImageClassification DPTModel DPTForDepthEstimation DPTForSemanticSegmentation DINOv3ViTModel
    DINOv3ViTBackbone InternVLVisionModel CLIPVisionModel CLIPVisionModelWithProjection MetaClip2VisionModel
    MetaClip2VisionModelWithProjection ChineseCLIPVisionModel AltCLIPVisionModel CLIPSegVisionModel GitVisionModel
    SiglipVisionModel Idefics3VisionTransformer SmolVLMVisionTransformer BlipVisionModel Blip2VisionModel
    InstructBlipVisionModel InstructBlipVideoVisionModel OwlViTVisionModel Owlv2VisionModel Aimv2VisionModel
    FlavaImageModel

    XCLIPVisionModel XCLIPModel YolosModel YolosForObjectDetection VitPoseBackbone VitPoseForPoseEstimation VitDetModel
    VitDetBackbone VideoMAEModel VideoMAEForVideoClassification VivitModel
    VivitForVideoClassification TimesformerModel VJEPA2Model MLCDVisionModel Phi4MultimodalVisionModel SamVisionModel
    SamModel SamHQVisionModel SamHQModel Sam2VisionModel Sam3VisionModel GotOcr2Model HieraModel HieraBackbone
    HieraForImageClassification Qwen2VLModel Qwen2_5_VLModel Qwen3VLVisionModel Qwen3VLModel Glm4vVisionModel Glm4vModel
    MllamaVisionModel Llama4VisionModel BeitBackbone GroupViTModel GroupViTVisionModel Pix2StructVisionModel
    AlignVisionModel AlignModel EomtForUniversalSegmentation LwDetrModel MgpstrModel Idefics2Model Kosmos2Model
    RadioModel PixioModel PixioBackbone Sapiens2Model Ovis2Model VideoLlavaModel OwlViTModel OwlViTForObjectDetection
    Owlv2Model Owlv2ForObjectDetection
"""
"""Classes that take SMALL, those that are equal before those that are refused."""


def _each(names: Sequence[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: dict(settings) for name in names}


TRANSFORMERS: dict[str, dict[str, Any]] = {
    **_each(_PLAIN.split(), {}),
    **_each(("ViTMAEModel", "ViTMAEForPreTraining"), {"mask_ratio": 0.0}),
    **_each(
        (
            *("Dinov2Model", "Dinov2Backbone", "Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
            *("Dinov2WithRegistersBackbone", "Tipsv2VisionModel", "Tipsv2VisionBackbone"),
        ),
        {"mlp_ratio": 2},
    ),
    "Dinov2ForImageClassification": {"mlp_ratio": 2, "use_swiglu_ffn": True},
    "BeitModel": _RELATIVE | {"use_absolute_position_embeddings": True},
    "BeitForImageClassification": {"use_shared_relative_position_bias": True},
    "BeitForMaskedImageModeling": _RELATIVE | {"use_absolute_position_embeddings": True},
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "Data2VecVisionModel": _RELATIVE | {"use_mean_pooling": False},
    "Data2VecVisionForImageClassification": {"use_relative_position_bias": True},
    "Data2VecVisionForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "PixtralVisionModel": _PIXTRAL,
    "JanusVisionModel": {"mlp_ratio": 2.0, "hidden_act": "gelu"},
    **_each(
        (
            *("CLIPModel", "CLIPForImageClassification", "MetaClip2Model", "MetaClip2ForImageClassification"),
            *("ChineseCLIPModel", "AltCLIPModel", "CLIPSegModel", "SiglipModel", "SiglipForImageClassification"),
            "Aimv2Model",
        ),
        {"vision_config": SMALL, "text_config": _TEXT},
    ),
    "CLIPSegForImageSegmentation": {"vision_config": SMALL, "text_config": _TEXT, "extract_layers": [0, 1]},
    "Siglip2VisionModel": {"num_patches": 9},
    **_each(
        ("Siglip2Model", "Siglip2ForImageClassification"),
        {"vision_config": SMALL | {"num_patches": 16}, "text_config": _TEXT},
    ),
    **_each(
        ("BlipModel", "BlipForConditionalGeneration", "BlipForQuestionAnswering"),
        {"vision_config": SMALL | {"hidden_act": "gelu"}, "text_config": _TEXT | {"encoder_hidden_size": 64}},
    ),
    **_each(
        ("Blip2Model", "Blip2ForConditionalGeneration", "InstructBlipModel", "InstructBlipForConditionalGeneration"),
        {
            "vision_config": SMALL | {"hidden_act": "gelu"},
            "qformer_config": _TEXT | {"encoder_hidden_size": 64},
            "text_config": _TEXT | {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32, "vocab_size": 300},
        },
    ),
    **_each(("GitModel", "GitForCausalLM"), {"vision_config": SMALL, **_TEXT}),
    **_each(
        ("TimmWrapperModel", "TimmWrapperForImageClassification"),
        {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 2, "img_size": 32, "patch_size": 8}},
    ),
    **{
        f"{name}{end}": {
            "vision_config": SMALL | {"model_type": vision} | more,
            "text_config": _LLM | {"model_type": text},
        }
        for name, (vision, text, more) in _WITH_LANGUAGE.items()
        for end in ("Model", "ForConditionalGeneration")
    },
}
"""Class of transformers -> what its config has beyond SMALL; a whole model's, what it has instead."""

_UNNORMED = ("CLIP", "MetaClip2", "AltCLIP", "ChineseCLIP", "Owl")
"""Beginnings of classes whose last_hidden_state is before the last norm."""
_TANH = ("ViT", "DeiT", "DPT", "IJepa", "Yolos", "Flava")
"""Beginnings of classes whose pooler_output passes a dense layer and tanh, which is no part of `embedding`."""


def build(name: str) -> nn.Module:
    """A class of transformers, small, with random weights; without any where the class alone says that it is refused.

    Raises:
        ValueError: if it cannot be built.
    """
    library = libraries.import_library("transformers")
    kind, changes = getattr(library, name), TRANSFORMERS[name]
    whole = "vision_config" in changes or "architecture" in changes
    settings = [changes] if whole else [SMALL | changes, {"num_hidden_layers": 2}, {}]
    reasons = []
    for given in settings:  # sizes may have other names or kinds in a config
        try:
            with torch.device("meta"):
                empty = kind(kind.config_class(**given))
        except Exception as error:  # whatever a config's or a class's own checks raise
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        known = checkpoints.loadable(empty) or len(live.loadable_parts(empty, checkpoints.loadable)) == 1
        return kind(kind.config_class(**given)) if known else empty
    raise ValueError(f"{name} cannot be built: {'; '.join(reasons)}")


def outputs(model: Any, images: Tensor) -> dict[str, Tensor]:
    """What a model gives for images; of one that is not known itself, what the one part gives that is."""
    name = type(model).__name__
    inside = [] if checkpoints.loadable(model) else live.loadable_parts(model, checkpoints.loadable)
    if inside:
        part = model.get_submodule(inside[0])
        if type(part).__module__.startswith("timm."):
            return {"tokens": part.forward_features(images), "output": part(images)}
        return outputs(part, images)
    given = _patches(images) if name.startswith("Siglip2") else {"pixel_values": images}
    if hasattr(model, "get_image_features"):
        made = model.get_image_features(**given)
        return {"embedding": made if isinstance(made, Tensor) else made.pooler_output}
    if name.startswith("ViTMAE"):  # random numbers by which patches are shuffled
        given["noise"] = torch.arange(model.config.image_size**2 // model.config.patch_size**2)[None].float()
    found = model(**given)
    if maps := getattr(found, "feature_maps", None):
        return {"patches": maps[-1].flatten(2).mT}
    made = {}
    for key, ours in (("logits", "output"), ("image_embeds", "embedding"), ("last_hidden_state", "tokens")):
        if isinstance(tensor := getattr(found, key, None), Tensor):
            made[ours] = tensor
    pooled = getattr(found, "pooler_output", None)
    if isinstance(pooled, Tensor) and "embedding" not in made and not name.startswith(_TANH):
        made["embedding"] = pooled
    if name.startswith(_UNNORMED):
        made.pop("tokens", None)
    if name.startswith("Janus"):  # whose pooler_output is the first patch's, normalised twice
        made.pop("embedding", None)
    return made


def _patches(images: Tensor) -> dict[str, Tensor]:
    """Images as SigLIP 2 takes them."""
    side = SMALL["patch_size"]
    grid = [size // side for size in images.shape[2:]]
    cut = images.unflatten(2, (-1, side)).unflatten(4, (-1, side)).permute(0, 2, 4, 3, 5, 1)
    rows = cut.reshape(len(images), grid[0] * grid[1], -1)
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([grid] * len(images))}
