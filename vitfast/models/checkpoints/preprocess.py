"""How a model's images are prepared, where its source says so.

The answer is None where the source says nothing, and None with a warning where it says something
that `Preprocess` cannot express: the model can still be run on tensors, and a guess would give
wrong embeddings without a sign.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from vitfast.images.preprocess import Preprocess
from vitfast.models.config import ViTConfig

_PROCESSORS = {
    "vit": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
}
"""The processor of a transformers model type, for old files that name none."""


def from_transformers(settings: Mapping[str, Any], model_type: str, config: ViTConfig, what: str) -> Preprocess | None:
    """From a preprocessor_config.json or processor_config.json.

    Warns:
        UserWarning: with the reason, if it cannot be expressed; None is returned then.
    """
    processor = _PROCESSORS.get(model_type)
    return _attempt(lambda: Preprocess.from_transformers(settings, config.image_size, processor), config, what)


def from_timm(settings: Mapping[str, Any], config: ViTConfig, what: str) -> Preprocess | None:
    """From timm's `pretrained_cfg`, but at the size the model was built for; None if it is empty.

    Warns:
        UserWarning: with the reason, if it cannot be expressed; None is returned then.
    """
    if not settings:
        return None
    sized = {**settings, "input_size": (config.in_channels, *config.image_size)}
    return _attempt(lambda: Preprocess.from_timm(sized), config, what)


def _attempt(make: Callable[[], Preprocess], config: ViTConfig, what: str) -> Preprocess | None:
    try:
        found = make()
        if len(found.mean) != config.in_channels:
            raise ValueError(f"mean {found.mean} for a model of {config.in_channels} input channel(s)")
    except ValueError as reason:
        warnings.warn(f"{what}: preprocessing unknown: {reason}", stacklevel=2)
        return None
    return found
