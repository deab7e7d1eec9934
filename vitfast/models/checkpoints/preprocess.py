"""How a model's images are prepared, where its source says so.

The answer is None where the source says nothing, and None with a warning where it says something
that `Preprocess` cannot express: the model can still be run on tensors, and a guess would give
wrong embeddings without a sign.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

from vitfast.images.preprocess import Preprocess
from vitfast.models import schema
from vitfast.models.checkpoints.source import CheckpointError, read_settings
from vitfast.models.config import Flag, ViTConfig

_PROCESSORS = {
    "vit": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
}
"""The processor of a transformers model type, for old files that name none."""


_PIXELS = schema.whole(1, 65_536)
_EDGES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")


def _is_size(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(name in _EDGES and (side is None or _PIXELS.holds(side)) for name, side in value.items())
    if isinstance(value, (list, tuple)):
        return len(value) == 2 and all(map(_PIXELS.holds, value))
    return _PIXELS.holds(value)


def _channels(low: float, high: float, *, one: bool) -> schema.Domain:
    """A list with a number for each channel, or, with `one`, a number for all of them."""
    each = schema.number(low, high)
    words = f"{each.words}, or a list of such, one a channel" if one else f"a list, for each channel {each.words}"

    def holds(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return len(value) > 0 and all(map(each.holds, value))
        return one and each.holds(value)

    return schema.Domain(words, holds)


_INPUT = schema.Domain(
    "[channels, height, width]",
    lambda v: isinstance(v, (list, tuple)) and len(v) == 3 and all(map(_PIXELS.holds, v)),
)
_Size: TypeAlias = Annotated[
    Any, schema.Domain(f"{_PIXELS.words}, two of them, or an object of {', '.join(_EDGES)}", _is_size)
]
_Means: TypeAlias = Annotated[Any, _channels(-1e6, 1e6, one=True)]
_Stds: TypeAlias = Annotated[Any, _channels(1e-6, 1e6, one=True)]


@dataclass(frozen=True)
class _Processor:
    """What is read of a transformers processor's settings; the processor's own defaults fill in the rest."""

    image_processor: Annotated[Any, schema.OBJECT] = None
    image_processor_type: Annotated[str, schema.TEXT] = ""
    feature_extractor_type: Annotated[str, schema.TEXT] = ""
    do_resize: Flag = True
    size: _Size = None
    resample: Annotated[int, schema.whole(0, 5)] = 0
    do_center_crop: Flag = True
    crop_size: _Size = None
    do_rescale: Flag = True
    rescale_factor: Annotated[float, schema.number(1e-9, 1e9)] = 1 / 255
    do_normalize: Flag = True
    image_mean: _Means = 0.0
    image_std: _Stds = 1.0


@dataclass(frozen=True)
class TimmSettings:
    """What is read of timm's `pretrained_cfg`."""

    input_size: Annotated[Any, _INPUT] = None
    interpolation: Annotated[str, schema.TEXT] = ""
    crop_pct: Annotated[float, schema.number(0.01, 10)] = 0.875
    crop_mode: Annotated[str, schema.TEXT] = ""
    mean: Annotated[Any, _channels(-1e6, 1e6, one=False)] = 0.0
    std: Annotated[Any, _channels(1e-6, 1e6, one=False)] = 1.0
    num_classes: Annotated[int, schema.whole(-1, 10_000_000)] = 0
    label_names: Annotated[Any, schema.TEXTS] = ()
    label_descriptions: Annotated[Any, schema.OBJECT] = None


def from_transformers(
    settings: Mapping[str, Any], model_type: str, config: ViTConfig, image_size: tuple[int, int], what: str
) -> Preprocess | None:
    """From a preprocessor_config.json or processor_config.json, for a model of this native size.

    Raises:
        CheckpointError: for settings that no processor would take; it names field, value and what is allowed.

    Warns:
        UserWarning: with the reason, if it cannot be expressed; None is returned then.
    """
    inner = settings.get("image_processor")
    facts = read_settings(_Processor, inner if isinstance(inner, Mapping) else settings, what)
    _same_channels(what, image_mean=facts.image_mean, image_std=facts.image_std)
    processor = _PROCESSORS.get(model_type)
    return attempt(lambda: Preprocess.from_transformers(settings, image_size, processor), config, what)


def from_timm(
    settings: Mapping[str, Any], config: ViTConfig, image_size: tuple[int, int], what: str
) -> Preprocess | None:
    """From timm's `pretrained_cfg`, but at the size the model was built for; None if it is empty.

    Raises:
        CheckpointError: for settings that timm could not use; it names field, value and what is allowed.

    Warns:
        UserWarning: with the reason, if it cannot be expressed; None is returned then.
    """
    if not settings:
        return None
    facts = read_settings(TimmSettings, settings, what)
    _same_channels(what, mean=facts.mean, std=facts.std)
    sized = {**settings, "input_size": (config.in_channels, *image_size)}
    return attempt(lambda: Preprocess.from_timm(sized), config, what)


CHANGES = ("size", "crop", "mean", "std", "interpolation", "draft")
"""What of a model's preprocessing can be given by name."""


def changed(found: Preprocess | None, given: Preprocess | Mapping[str, Any], config: ViTConfig) -> Preprocess:
    """A model's preprocessing with what the user says of it.

    Args:
        found: what its source says. given: all of it, or a mapping with some of CHANGES:
            size: what images are resized to, shortest side or (height, width);
            crop: the centre that is cut out, side or (height, width); by default nothing is cut from an exact size,
            and the model's own size from a shortest side;
            mean, std: one number a channel, or one for all; interpolation: "bicubic", "bilinear", ...;
            draft: whether large JPEG files are decoded at a part of their size.

    Raises:
        CheckpointError: for another name, a value that does not fit, or mean and std that nobody says.
    """
    try:
        made = given if isinstance(given, Preprocess) else _changed(found, given, config)
        if len(made.mean) != config.in_channels:
            raise ValueError(f"mean {made.mean} for a model of {config.in_channels} input channel(s)")
        if made.size != config.image_size and not config.dynamic_size:
            raise ValueError(f"images of {made.size}, and the model takes {config.image_size} only")
        config.grid(config.fit(made.size) if config.off_grid != "refuse" else made.size)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"preprocess: {error}") from error
    return made


def _changed(found: Preprocess | None, given: Mapping[str, Any], config: ViTConfig) -> Preprocess:
    if not isinstance(given, Mapping) or not given.keys() <= set(CHANGES):
        raise ValueError(f"expected a Preprocess or a mapping with {', '.join(CHANGES)}, got {schema.shown(given)}")
    changes = {name: value for name, value in given.items() if value is not None}
    for name in ("mean", "std"):
        if name in changes:
            values = changes[name]
            each = values if isinstance(values, (list, tuple)) else [values]
            many = each * config.in_channels if len(each) == 1 else each
            changes[name] = tuple(float(value) for value in many)
    size, crop = changes.pop("size", None), changes.pop("crop", None)
    if found is None:
        if missing := [name for name in ("mean", "std") if name not in changes]:
            raise ValueError(f"the model's source does not say how images are normalised: give {' and '.join(missing)}")
        found = Preprocess(size=config.image_size, resize=min(config.image_size))
    if isinstance(size, (list, tuple)):
        size = tuple(size)
        changes |= {"resize": size, "size": size, "center_crop": False, "cover": False}
    elif size is not None:
        changes |= {"resize": size, "size": config.image_size, "center_crop": True, "cover": False}
    if crop is not None:
        changes |= {"size": tuple(crop) if isinstance(crop, (list, tuple)) else (crop, crop), "center_crop": True}
    return replace(found, **changes)


def _same_channels(where: str, **values: Any) -> None:
    lengths = {len(value) for value in values.values() if isinstance(value, (list, tuple))}
    if len(lengths) > 1:
        given = ", ".join(f"{name}={schema.shown(value)}" for name, value in values.items())
        raise CheckpointError(f"{where}: {' and '.join(values)} must have as many numbers, got {given}")


def attempt(make: Callable[[], Preprocess], config: ViTConfig, what: str) -> Preprocess | None:
    """What `make` makes; None, with a warning that gives the reason, if it raises ValueError or does not fit."""
    try:
        preprocess = make()
        if len(preprocess.mean) != config.in_channels:
            raise ValueError(f"mean {preprocess.mean} for a model of {config.in_channels} input channel(s)")
    except ValueError as reason:
        warnings.warn(f"{what}: preprocessing unknown: {reason}", stacklevel=2)
        return None
    return preprocess
