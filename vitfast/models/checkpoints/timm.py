"""timm's models: live modules, files and names. timm's files carry only an architecture's name, so timm builds the
module there; what it does is read from the module (timm_vit.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from vitfast.models import libraries, schema
from vitfast.models.checkpoints import files, live, state_dicts, timm_sam, timm_towers, timm_vit
from vitfast.models.checkpoints.preprocess import TimmSettings, from_timm
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError, read_settings
from vitfast.models.config import Channels, Classes, Depth, Heads, ViTConfig, Width
from vitfast.ops.names import did_you_mean

_FAMILIES: tuple[Any, ...] = (timm_vit, timm_towers, timm_sam)
SUPPORTED = tuple(name for family in _FAMILIES for name in family.SUPPORTED)
REFUSED = timm_vit.REFUSED
"""timm classes that are near enough to be tried, with what the forward lacks for them."""

_Count = Annotated[int, schema.whole(0, 65_536)]
_Rate = Annotated[float, schema.number(0, 1)]


@dataclass(frozen=True)
class _ModelArgs:
    """What config.json may say of a VisionTransformer's sizes; other arguments are for timm to judge."""

    img_size: Annotated[Any, schema.side_or_sides(1, 65_536)] = None
    patch_size: Annotated[Any, schema.side_or_sides(1, 65_536)] = None
    in_chans: Channels = 3
    num_classes: Classes = 0
    embed_dim: Width = 1
    depth: Depth = 1
    num_heads: Heads = 1
    mlp_ratio: Annotated[float, schema.number(0, 64)] = 4
    init_values: Annotated[float, schema.number(0, 1e6)] = 0
    reg_tokens: _Count = 0
    drop_rate: _Rate = 0
    pos_drop_rate: _Rate = 0
    patch_drop_rate: _Rate = 0
    proj_drop_rate: _Rate = 0
    attn_drop_rate: _Rate = 0
    drop_path_rate: _Rate = 0
    global_pool: Annotated[str, schema.TEXT] = ""


@dataclass(frozen=True)
class _Settings:
    """timm's config.json."""

    architecture: Annotated[str, schema.TEXT] = ""
    num_classes: Annotated[int, schema.whole(-1, 10_000_000)] = 0
    global_pool: Annotated[str, schema.TEXT] = ""
    label_names: Annotated[Any, schema.TEXTS] = ()
    label_descriptions: Annotated[Any, schema.OBJECT] = None
    pretrained_cfg: Annotated[Any, schema.OBJECT] = None
    model_args: Annotated[Any, schema.OBJECT] = None


def _settings(directory: Path, where: str) -> _Settings:
    """config.json, checked.

    Raises:
        CheckpointError: with each field that is out of its domain.
    """
    settings = read_settings(_Settings, content := files.read_json(directory / "config.json"), where)
    if (inside := settings.pretrained_cfg) is None:
        read_settings(TimmSettings, content, where)
    else:
        read_settings(TimmSettings, inside, where, "pretrained_cfg.")
    read_settings(_ModelArgs, settings.model_args or {}, where, "model_args.")
    return settings


def matches(module: nn.Module) -> bool:
    """Whether this is exactly one of the classes of timm's that are known; a subclass may do anything."""
    kind = type(module)
    return kind.__module__.startswith("timm.models.") and kind.__name__ in SUPPORTED


def _family(module: nn.Module) -> Any:
    """What reads a module of a class that is known."""
    return next(family for family in _FAMILIES if type(module).__name__ in family.SUPPORTED)


def from_module(module: Any, where: str | None = None) -> Checkpoint:
    """Translate a live module, of any dtype and device.

    Args:
        where: the file that its `pretrained_cfg` is from, for messages.

    Raises:
        CheckpointError: naming the feature that cannot be represented, the part that is not timm's own, or the
            tensors that do not fit.
    """
    settings = getattr(module, "pretrained_cfg", None) or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{type(module).__name__}: pretrained_cfg must be a dict, got {schema.shown(settings)}")
    named = (settings.get("architecture"), settings.get("tag"))
    name = ".".join(part for part in named if isinstance(part, str) and part) or type(module).__name__
    own = live.unchanged(module, name, blocks=module.blocks if type(module).__name__ in timm_vit.PLAIN else None)
    made = _family(module).translate(module, name)
    # A stem or patches of a size that leaves some pixels over take the images that timm's would.
    image_size = tuple(getattr(getattr(module, "patch_embed", None), "img_size", None) or made.config.image_size)
    found = from_timm(settings, made.config, image_size, where or f"pretrained_cfg of {name}")
    return replace(made, preprocess=found, labels=_labels(settings, made.config), own_blocks=own)


def _labels(settings: Mapping[str, Any], config: ViTConfig) -> tuple[str, ...] | None:
    """The class names in timm's settings, described where they have a description."""
    names = settings.get("label_names")
    if not isinstance(names, (list, tuple)) or len(names) != config.num_classes:
        return None
    described = settings.get("label_descriptions") or {}
    return tuple(str(described.get(name, name)) for name in names)


def build(
    directory: Path, weights: Sequence[Path], *, name: str, allow_pickle: bool, weights_key: str | None
) -> nn.Module:
    """Let timm build and fill the module that a directory's config.json names, as `create_model` does.

    Raises:
        CheckpointError: if timm is not installed, does not know the architecture, config.json asks for what no model
            has or is far larger than the weights, or the weights do not fit it.
    """
    where = f"{name}/config.json"
    settings = _settings(directory, where)
    timm = _timm(f"{name}, whose config.json names a timm architecture,")
    state = files.read_weights(weights, allow_pickle=allow_pickle, weights_key=weights_key)
    state = dict(state_dicts.strip_prefix(state, ["patch_embed.proj.weight"], name))
    _no_larger_than(timm, settings, sum(tensor.numel() for tensor in state.values()), where)
    # No classifier: timm would leave out a head of another size, and go on with a random one.
    overlay: dict[str, Any] = {"source": "", "state_dict": state, "custom_load": False, "classifier": None}
    try:
        return timm.create_model(f"local-dir:{directory}", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    except Exception as error:  # timm asserts, and raises RuntimeError, TypeError and what its readers raise
        raise CheckpointError(f"{_cannot(settings, name, where)}: {type(error).__name__}: {error}") from error


def _no_larger_than(timm: Any, settings: _Settings, elements: int, where: str) -> None:
    """Refuse a config whose model is far larger than the weights beside it, before any memory is taken for it."""
    wanted = sum(parameter.numel() for parameter in _empty(timm, settings, where).parameters())
    if wanted > 2 * elements:
        raise CheckpointError(
            f"{where} describes a model of {wanted:,} weights and the files hold {elements:,}: architecture="
            f"{settings.architecture!r}, model_args={schema.shown(settings.model_args)}"
        )


def _empty(timm: Any, settings: _Settings, where: str) -> Any:
    """The module that a config describes, without memory for its weights."""
    try:
        with torch.device("meta"):
            return timm.create_model(settings.architecture, pretrained=False, **(settings.model_args or {})).eval()
    except Exception as error:  # as in `build`
        raise CheckpointError(f"{_cannot(settings, where, where)}: {type(error).__name__}: {error}") from error


def check(directory: Path, name: str) -> None:
    """Refuse what a directory's config.json describes, as far as that can be told without the weights.

    Raises:
        CheckpointError: with the reason.
    """
    where = f"{name}/config.json"
    settings = _settings(directory, where)
    module = _empty(_timm(f"{name}, whose config.json names a timm architecture,"), settings, where)
    kind = type(module).__name__
    if not matches(module):
        raise CheckpointError(
            f"{where}: timm's {kind} is not supported{f': {REFUSED[kind]}' if kind in REFUSED else ''}"
        )
    with contextlib.suppress(NotImplementedError):  # of some models the values of a table decide, which are not there
        _family(module).config_of(module, settings.architecture)


def _cannot(settings: _Settings, name: str, where: str) -> str:
    return (
        f"timm cannot load {name} ({where} says architecture={schema.shown(settings.architecture)}, "
        f"model_args={schema.shown(settings.model_args)})"
    )


def hub_id(name: str) -> str:
    """The hub id under which timm keeps the default (or the tagged) weights of one of its models.

    Raises:
        CheckpointError: if timm is not installed, or has no such model or no such weights.
    """
    timm = _timm(f"{name!r}, which is no file, directory or hub id (org/name), as a timm model name")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models())
        raise CheckpointError(f"{name!r} is no file, directory or hub id (org/name), and timm has no such model{near}")
    try:
        settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise CheckpointError(f"timm has no weights called {name!r}: {error}") from error
    if not settings.hf_hub_id:
        raise CheckpointError(f"timm has no weights on the Hugging Face hub for {name!r}")
    return settings.hf_hub_id


def _timm(what: str) -> Any:
    try:
        return libraries.import_library("timm")
    except ImportError as error:
        raise CheckpointError(f"loading {what} needs timm, which cannot be imported: {error}") from error
