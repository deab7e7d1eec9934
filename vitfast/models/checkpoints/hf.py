"""transformers models: from a live module or from files, both as (config dict, state dict).

transformers itself is never imported: a config is read as the JSON it is stored as, with the
defaults of the configuration classes filled in where old files leave them out. Weight names differ
between files and (in recent versions) modules in memory; both are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitfast.images.preprocess import Preprocess
from vitfast.models import schema
from vitfast.models.checkpoints import (
    files,
    hf_aimv2,
    hf_beit,
    hf_clip,
    hf_common,
    hf_dinov2,
    hf_dinov3,
    hf_live,
    hf_pixtral,
    hf_siglip,
    hf_text,
    hf_vit,
    live,
    preprocess,
    state_dicts,
)
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError, read_settings
from vitfast.models.config import ViTConfig

FAMILIES: tuple[Any, ...] = (
    *(hf_vit, hf_dinov2, hf_clip),
    *(hf_dinov3.FAMILY, hf_beit.FAMILY, hf_beit.INTERNVL, hf_siglip.SIGLIP, hf_siglip.SIGLIP2, hf_siglip.TOWERS),
    *(hf_aimv2.FAMILY, hf_pixtral.FAMILY),
)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

_VIDEO = "patches of several frames, or attention between frames"
_PATCHES = "patches and their grids as input (image_grid_thw), and attention over images packed together"
_STAGES = "pooling between stages (a hierarchical model)"
_WINDOWS = "what its parts are called (windows and a neck, which timm's samvit models have and run with)"
_MAPS = "feature maps as output; load the files as the model without Backbone"
_DECODER = "a decoder or head beside the encoder; pass the encoder"
REFUSED = {
    "ViTForMaskedImageModeling": "a decoder; pass its encoder, model.vit",
    "DeiTForMaskedImageModeling": "a decoder; pass its encoder, model.deit",
    "ViTMAEForPreTraining": "a decoder; pass its encoder, model.vit",
    **dict.fromkeys(("BeitBackbone", "VitDetBackbone", "HieraBackbone"), _MAPS),
    **dict.fromkeys(
        (
            *("BeitForMaskedImageModeling", "BeitForSemanticSegmentation", "Data2VecVisionForSemanticSegmentation"),
            *("DPTForDepthEstimation", "DPTForSemanticSegmentation", "DepthAnythingForDepthEstimation"),
            *("YolosForObjectDetection", "VitPoseForPoseEstimation", "CLIPSegForImageSegmentation"),
            *("EomtForUniversalSegmentation", "EomtDinov3ForUniversalSegmentation"),
        ),
        _DECODER,
    ),
    "YolosModel": "detection tokens after the patches, and position embeddings in every block",
    "VitPoseBackbone": "patches that overlap (a patch convolution with padding)",
    "MLCDVisionModel": "rotary embedding of the class token",
    **dict.fromkeys(("XCLIPVisionModel", "XCLIPModel"), "message tokens between frames"),
    **dict.fromkeys(
        (
            *("VideoMAEModel", "VideoMAEForVideoClassification", "VivitModel", "VivitForVideoClassification"),
            *("TimesformerModel", "VJEPA2Model", "VideoLlavaModel"),
        ),
        _VIDEO,
    ),
    **dict.fromkeys(("HieraModel", "HieraForImageClassification", "Sam2VisionModel", "Sam3VisionModel"), _STAGES),
    **dict.fromkeys(("SamVisionModel", "SamHQVisionModel", "SamModel", "SamHQModel", "VitDetModel"), _WINDOWS),
    "GotOcr2Model": "windows, and convolutions between the tower and the language model",
    **dict.fromkeys(
        (
            *("Qwen2VLVisionModel", "Qwen2_5_VLVisionModel", "Qwen3VLVisionModel", "Qwen3VLMoeVisionModel"),
            *("Qwen3_5VisionModel", "Qwen3_5MoeVisionModel", "Glm4vVisionModel", "Glm4vMoeVisionModel"),
            *("PaddleOCRVisionModel", "VideoLlama3VisionModel", "Qwen2VLModel", "Qwen2_5_VLModel", "Qwen3VLModel"),
            "Glm4vModel",
        ),
        _PATCHES,
    ),
    **dict.fromkeys(
        ("MllamaVisionModel", "Llama4VisionModel"), "tiles of images, with embeddings of their aspect ratio"
    ),
    "Phi4MultimodalVisionModel": "positions and pooling that follow patch_attention_mask",
    **dict.fromkeys(("AlignVisionModel", "AlignModel"), "an EfficientNet"),
    "GroupViTModel": "grouping of tokens between stages",
    "LwDetrModel": "windows in the layout of the tokens, and maps of several blocks",
    "MgpstrModel": "tokens of characters, each with an attention of its own, after the blocks",
    **dict.fromkeys(("PixioModel", "PixioBackbone"), "several class tokens, whose mean is what it gives"),
    "RadioModel": "position embeddings that follow the size of the image, and a conditioner of the pixels",
    "Sapiens2Model": "grouped key and value heads beside full ones, in the same model",
    **dict.fromkeys(
        ("OwlViTModel", "Owlv2Model", "OwlViTForObjectDetection", "Owlv2ForObjectDetection"),
        "a tower that is no class of its own; OwlViTVisionModel and Owlv2VisionModel read the same files",
    ),
    **dict.fromkeys(("Idefics2Model", "Kosmos2Model", "Ovis2Model"), "a tower with names of its own"),
    "GroupViTVisionModel": "grouping of tokens between stages",
    "Pix2StructVisionModel": "patches with their row and column as input",
}
"""transformers classes that are near enough to be tried, with what the forward lacks for them."""


def supported() -> tuple[str, ...]:
    """Class names that can be loaded."""
    return tuple(name for family in FAMILIES for name in family.ARCHITECTURES)


def matches(module: nn.Module) -> bool:
    """Whether this is exactly one of the supported classes; a subclass may do anything."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in supported()


def from_module(module: Any) -> Checkpoint:
    """Translate a live module, of any dtype and device.

    The preprocessing is found where the module was loaded from: a directory, or a hub id whose
    processor settings are in the local cache. It is None otherwise.

    Raises:
        CheckpointError: naming the feature that cannot be represented, the part that is not what the module's class
            makes of its config, or the tensors that do not fit.
    """
    kind = type(module).__name__
    family = next(family for family in FAMILIES if family.matches(kind))
    no_say = tuple(name for name in hf_live.NO_SAY if name not in getattr(family, "says", ()))
    hf_live.check(module, no_say)
    config = module.config.to_dict() | {"architectures": [kind]}
    state = {name: t for name, t in module.state_dict().items() if name.partition(".")[0] not in no_say}
    for head in hf_live.HEADS:
        if hasattr(module, head):  # which may have been replaced without a word to the config
            linear, inner = live.linear_head(getattr(module, head), f"{kind}.{head}")
            classes = 0 if linear is None else linear.out_features
            state = {name.replace(f"{head}.{inner}", f"{head}.", 1): tensor for name, tensor in state.items()}
            config |= {"num_labels": classes}
            if len(config.get("id2label") or {}) != classes:
                config |= {"id2label": None}
    origin = str(getattr(module.config, "_name_or_path", "") or "")
    cached = next((path for name in PROCESSOR_FILES if (path := files.cached(origin, name))), None)
    return from_state(config, state, origin or kind, f"the config of {origin or kind}", cached and cached.parent)


def from_state(
    config: Mapping[str, Any], state: Mapping[str, Tensor], name: str, where: str, directory: Path | None
) -> Checkpoint:
    """Translate the contents of config.json and of the weight files.

    Args:
        name: of the model. where: of the config, for messages. directory: what may hold processor settings.

    Raises:
        CheckpointError: for settings out of their domain, an architecture that is not supported or not
            representable, or tensors that do not fit it.
    """
    architecture = _architecture(config, state, where)
    family = next((family for family in FAMILIES if family.matches(architecture)), None)
    if family is None:
        inside = _tower_inside(config, state)
        if inside is None:
            raise _refused(architecture, where)
        kind = inside[0]["architectures"][0]
        warnings.warn(f"{name}: the model taken is the {kind} in a {architecture}", stacklevel=3)
        return from_state(*inside, name, where, directory)
    labels = read_settings(hf_common.Labels, config, where)
    facts = family.read(config, architecture, where)
    marked = [prefix + family.MARKER for prefix in family.prefixes(architecture)]
    state = state_dicts.strip_prefix(state, marked, name)
    try:
        ours, weights = family.translate(facts, labels.classes, state, architecture, name)
    except ValueError as error:  # the settings may be to blame as well as the tensors
        said = ", ".join(f"{key}={schema.shown(value)}" for key, value in vars(facts).items())
        listed = f"num_labels={labels.num_labels}" if labels.id2label is None else f"{labels.classes} names in id2label"
        raise CheckpointError(f"{error}\n({where} says {said}, {listed})") from error
    preprocess = read_preprocess(directory, config, ours, hf_common.pair(facts.image_size)) if directory else None
    text = hf_text.read(config, state, architecture, name, where, directory)
    return Checkpoint(ours, weights, preprocess, labels.names(ours.num_classes), labels.problem_type, text=text)


def check(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for an architecture that config.json names and that is not supported."""
    named = read_settings(hf_common.Origin, config, where).architectures
    inner = config.get("vision_config") or config.get("encoder")
    kind = inner.get("model_type") if isinstance(inner, Mapping) else None
    inside = isinstance(kind, str) and any(kind in family.BY_MODEL_TYPE for family in FAMILIES)
    if named and not inside and not any(family.matches(named[0]) for family in FAMILIES):
        raise _refused(named[0], where)


def _tower_inside(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Settings and weights of the vision tower in a model of another class; None if there is none that is known."""
    settings = next((config[key] for key in ("vision_config", "encoder") if schema.OBJECT.holds(config.get(key))), None)
    if settings is None:
        return None
    kind = settings.get("model_type")
    family = next((family for family in FAMILIES if isinstance(kind, str) and kind in family.BY_MODEL_TYPE), None)
    if family is None:
        return None
    leads = [key.removesuffix(family.MARKER) for key in state if key.endswith(family.MARKER)]
    if not leads:
        return None
    lead = min(leads, key=len)
    inner = {key.removeprefix(lead): tensor for key, tensor in state.items() if key.startswith(lead)}
    architecture = family.BY_MODEL_TYPE[kind](inner)
    return {**settings, "architectures": [architecture]}, inner


def _refused(architecture: str, where: str) -> CheckpointError:
    reason = REFUSED.get(architecture)
    return CheckpointError(
        f"{where}: transformers architecture {schema.shown(architecture)} is not supported"
        f"{f': {reason}' if reason else ''}. Supported: {', '.join(supported())}"
    )


def _architecture(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> str:
    """The class a checkpoint was saved from; where the file does not say, what its keys make it."""
    origin = read_settings(hf_common.Origin, config, where)
    if origin.architectures:
        return origin.architectures[0]
    for family in FAMILIES:
        if origin.model_type in family.BY_MODEL_TYPE:
            return family.BY_MODEL_TYPE[origin.model_type](state)
    return origin.model_type


def read_preprocess(
    directory: Path, config: Mapping[str, Any], ours: ViTConfig, size: tuple[int, int]
) -> Preprocess | None:
    """The preprocessing that a directory's processor settings describe, for a native size; None if it has none.

    Raises:
        CheckpointError: for a damaged file.
    """
    for name in PROCESSOR_FILES:
        path = directory / name
        if path.is_file():
            model_type = str(config.get("model_type"))
            return preprocess.from_transformers(files.read_json(path), model_type, ours, size, str(path))
    return None
