"""transformers models: from a live module or from files, both as (config dict, state dict).

transformers itself is never imported: a config is read as the JSON it is stored as, with the
defaults of the configuration classes filled in where old files leave them out. Weight names differ
between files and (in recent versions) modules in memory; both are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitfast.images.preprocess import Preprocess
from vitfast.models.checkpoints import files, hf_clip, hf_dinov2, hf_vit, preprocess
from vitfast.models.checkpoints.source import CheckpointError
from vitfast.models.config import ViTConfig

FAMILIES = (hf_vit, hf_dinov2, hf_clip)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

REFUSED = {
    "DINOv3ViTModel": "rotary position embedding (RoPE)",
    "SiglipVisionModel": "attention pooling (MAP head)",
    "SiglipModel": "attention pooling (MAP head)",
    "Siglip2VisionModel": "attention pooling (MAP head)",
    "Siglip2Model": "attention pooling (MAP head)",
    "BeitModel": "relative position bias",
    "BeitForImageClassification": "relative position bias",
    "ViTForMaskedImageModeling": "a decoder; pass its encoder, model.vit",
    "DeiTForMaskedImageModeling": "a decoder; pass its encoder, model.deit",
    "Dinov2Backbone": "feature maps as output; load the files as Dinov2Model",
    "Dinov2WithRegistersBackbone": "feature maps as output; load the files as Dinov2WithRegistersModel",
}
"""transformers classes that are near enough to be tried, with what the forward lacks for them."""


def supported() -> tuple[str, ...]:
    """Class names that can be loaded."""
    return tuple(name for family in FAMILIES for name in family.ARCHITECTURES)


def matches(module: nn.Module) -> bool:
    """Whether this is exactly one of the supported classes; a subclass may do anything."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in supported()


def from_module(module: Any) -> tuple[ViTConfig, dict[str, Tensor], Preprocess | None, tuple[str, ...] | None]:
    """Translate a live module, of any dtype and device.

    The preprocessing is found where the module was loaded from: a directory, or a hub id whose
    processor settings are in the local cache. It is None otherwise.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    config = module.config.to_dict() | {"architectures": [type(module).__name__]}
    origin = str(getattr(module.config, "_name_or_path", "") or "")
    ours, weights = from_state(config, module.state_dict(), origin or type(module).__name__)
    cached = next((path for name in PROCESSOR_FILES if (path := files.cached(origin, name))), None)
    found = read_preprocess(cached.parent, config, ours) if cached else None
    return ours, weights, found, labels(config, ours)


def from_state(
    config: Mapping[str, Any], state: Mapping[str, Tensor], name: str
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Translate the contents of config.json and of the weight files.

    Raises:
        CheckpointError: for an architecture that is not supported or not representable, or tensors
            that do not fit it.
    """
    architecture = _architecture(config, state)
    for family in FAMILIES:
        if family.matches(architecture):
            return family.translate(config, state, architecture, name)
    raise _refused(architecture, name)


def check(config: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError for an architecture that config.json names and that is not supported."""
    named = config.get("architectures")
    if named and not any(family.matches(str(named[0])) for family in FAMILIES):
        raise _refused(str(named[0]), name)


def _refused(architecture: str, name: str) -> CheckpointError:
    reason = REFUSED.get(architecture)
    return CheckpointError(
        f"{name}: transformers architecture {architecture!r} is not supported"
        f"{f': {reason}' if reason else ''}. Supported: {', '.join(supported())}"
    )


def _architecture(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """The class a checkpoint was saved from; where the file does not say, what its keys make it."""
    named = config.get("architectures")
    if named:
        return str(named[0])
    kind = str(config.get("model_type"))
    for family in FAMILIES:
        if kind in family.BY_MODEL_TYPE:
            return family.BY_MODEL_TYPE[kind](state)
    return kind


def labels(config: Mapping[str, Any], ours: ViTConfig) -> tuple[str, ...] | None:
    """The class names of config.json; None if it has none but the library's placeholders."""
    names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    if not ours.num_classes or set(names) != set(range(ours.num_classes)):
        return None
    listed = tuple(names[i] for i in range(ours.num_classes))
    return None if listed == tuple(f"LABEL_{i}" for i in range(ours.num_classes)) else listed


def read_preprocess(directory: Path, config: Mapping[str, Any], ours: ViTConfig) -> Preprocess | None:
    """The preprocessing that a directory's processor settings describe; None if it has none.

    Raises:
        CheckpointError: for a damaged file.
    """
    for name in PROCESSOR_FILES:
        path = directory / name
        if path.is_file():
            return preprocess.from_transformers(files.read_json(path), str(config.get("model_type")), ours, str(path))
    return None
