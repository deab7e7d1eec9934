"""Checkpoints of other libraries, translated to (ViTConfig, canonical weights).

One file per family: `timm`, `torchvision`, `open_clip`, and `hf_vit`, `hf_dinov2`, `hf_clip` for transformers; `named`
for bare files with an architecture by name, `saved` for what an engine has saved.
What a family cannot say in a ViTConfig it refuses, by name; what a file holds beyond or short of
its architecture is an error that lists every tensor. None of the libraries is imported unless a
model of theirs is loaded, and transformers not even then.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitfast.images.preprocess import Preprocess
from vitfast.models.checkpoints import (
    files,
    folders,
    hf,
    live,
    named,
    open_clip,
    open_clip_live,
    saved,
    timm,
    torchvision,
)
from vitfast.models.checkpoints.preprocess import changed
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "known", "load", "loadable"]

SUPPORTED = (
    f"timm {', '.join(timm.SUPPORTED)}; transformers {', '.join(hf.supported())}; torchvision VisionTransformer; "
    f"open_clip {', '.join(open_clip_live.SUPPORTED)}"
)
_FAMILIES: tuple[Any, ...] = (timm, hf, torchvision, open_clip_live)
"""What reads live modules."""


def load(
    source: str | os.PathLike[str] | nn.Module,
    *,
    allow_pickle: bool = False,
    revision: str | None = None,
    weights_key: str | None = None,
    model: str | None = None,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Load a model of a supported family.

    Args:
        source: one of
            - a live module of timm, transformers, torchvision or open_clip (its evaluation-mode behaviour counts), also
              inside the wrappers of torch.compile, DataParallel, DistributedDataParallel and averaging;
            - a directory with config.json and model.safetensors (or shards with their index), as
              transformers' `save_pretrained` and timm's `save_for_hf` write it;
            - a directory that `Engine.save` or open_clip wrote; a Trainer's, whose last checkpoint is taken; one of
              sentence-transformers;
            - a weight file beside its config.json, or with `model`;
            - a Hugging Face hub id, "org/name", with or without "hf_hub:";
            - the name of a timm model, "vit_tiny_patch16_224", whose weights timm keeps on the hub.
            The timm forms need timm installed: their config.json names an architecture, it does not describe it.
        allow_pickle: also accept .bin, .pth, .pt, .ckpt and .pth.tar files, read with
            `torch.load(weights_only=True)`; of TorchScript archives (OpenAI's CLIP) the tensors alone are read.
        revision: branch, tag or commit of a hub id.
        weights_key: which of a training checkpoint's state dicts, "state_dict" or "model.ema"; by default the one
            that timm's own loader takes: state_dict_ema, model_ema, state_dict, model, then DINO's teacher. Or what
            all names of one of several models in a file begin with.
        model: the architecture of a file that has no config.json, or that is not to be asked: a name of timm
            ("vit_base_patch16_224"), torchvision ("vit_b_16"), the dinov2 repository ("dinov2_vits14") or CLIP
            ("ViT-B/32" for OpenAI's weights, "ViT-B-32" for open_clip's).
        preprocess: how images are prepared, in place of what the source says: all of it, or a mapping with some of
            size, crop, mean, std, interpolation, draft (see `vitfast.models.checkpoints.preprocess.changed`).

    Raises:
        CheckpointError: (a ValueError) naming the source and every reason.

    Warns:
        UserWarning: which weights are taken where a file has several; which prefix came off their names; why the
            preprocessing is unknown.
    """
    found = _load(source, allow_pickle=allow_pickle, revision=revision, weights_key=weights_key, model=model)
    if preprocess is None:
        return found
    return replace(found, preprocess=changed(found.preprocess, preprocess, found.config))


def _load(
    source: str | os.PathLike[str] | nn.Module,
    *,
    allow_pickle: bool,
    revision: str | None,
    weights_key: str | None,
    model: str | None,
) -> Checkpoint:
    if isinstance(source, nn.Module):
        _for_files(revision, weights_key, type(source).__name__, model)
        return _from_module(source)
    name = os.fspath(source)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"allow_pickle": allow_pickle, "weights_key": weights_key, "model": model}
    if path.is_dir():
        _for_files(revision, None, name)
        return _from_directory(path if model else folders.model_folder(path), **options)
    if path.is_file():
        _for_files(revision, None, name)
        if path.name.endswith((".safetensors", *files.PICKLES)):
            return _from_files(path.parent, [path], **options)
        raise CheckpointError(f"{name}: unknown weight file, expected .safetensors or {', '.join(files.PICKLES)}")
    hub_id = name
    for scheme in ("hf_hub:", "hf-hub:"):
        hub_id = hub_id.removeprefix(scheme)
    if "/" not in hub_id and path.suffix != ".safetensors":
        hub_id = timm.hub_id(hub_id)
    if not files.HUB_ID.fullmatch(hub_id):
        raise CheckpointError(
            f"{name!r} is no file or directory, no Hugging Face hub id (org/name) and no timm model name"
        )
    check = functools.partial(_check_settings, hub_id)
    directory = files.download(hub_id, revision=revision, allow_pickle=allow_pickle, check=check)
    return _from_directory(directory, name=hub_id, **options)


def _check_settings(name: str, directory: Path) -> None:
    """Refuse a model by its config.json, before its weights are fetched, where that alone says enough."""
    settings = directory / "config.json"
    if not settings.is_file():
        if (directory / open_clip.CONFIG).is_file():
            return
        raise CheckpointError(f"{name} has no config.json, which would say what the architecture is")
    config = files.read_json(settings)
    if "model_type" in config:
        hf.check(config, f"{name}/config.json")
    elif "architecture" in config:
        timm.check(directory, name)


def _for_files(revision: str | None, weights_key: str | None, name: str, model: str | None = None) -> None:
    if revision is not None:
        raise CheckpointError(f"revision={revision!r} applies to hub ids only, and {name} is not one")
    if weights_key is not None:
        raise CheckpointError(f"weights_key={weights_key!r} applies to files only, and {name} is a live module")
    if model is not None:
        raise CheckpointError(f"model={model!r} is the architecture of a file, and {name} is a live module")


def known() -> list[dict[str, str]]:
    """The classes of other libraries that are known: library, class, and why it is refused, "" if it is not."""
    listed: tuple[tuple[str, Sequence[str], Mapping[str, str]], ...] = (
        ("timm", timm.SUPPORTED, timm.REFUSED),
        ("transformers", hf.supported(), hf.REFUSED),
        ("torchvision", ("VisionTransformer",), {}),
        ("open_clip", open_clip_live.SUPPORTED, open_clip_live.REFUSED),
    )
    return [
        {"library": library, "class": name, "refused": reason}
        for library, supported, refused in listed
        for name, reason in {**dict.fromkeys(supported, ""), **refused}.items()
    ]


def loadable(module: nn.Module) -> bool:
    """Whether a live module is of a class that `load` takes, as far as the class says it."""
    return any(family.matches(module) for family in _FAMILIES)


def _from_module(module: nn.Module) -> Checkpoint:
    module = live.unwrap(module)
    for family in _FAMILIES:
        if family.matches(module):
            return _snapshot(family.from_module(module), module)
    kind = type(module)
    reason = next((why for family in (timm, hf, open_clip_live) if (why := family.REFUSED.get(kind.__name__))), "")
    inside = live.loadable_parts(module, loadable)
    if len(inside) == 1 and kind.__module__.startswith("transformers.models."):
        part = module.get_submodule(inside[0])
        warnings.warn(
            f"{kind.__name__}: the model taken is its part {inside[0]} ({type(part).__name__}); what is made of its "
            "output is left out",
            stacklevel=3,
        )
        return _from_module(part)
    hint = f". Its part {' or '.join(inside)} can be loaded by itself" if inside and not reason else ""
    if not reason and kind.__module__.startswith(("timm.", "transformers.", "torchvision.", "open_clip.")):
        reason = "what its parts are called and how they are joined is not described here"
    raise CheckpointError(
        f"{kind.__module__}.{kind.__name__} is not supported{f': {reason}' if reason else ''}{hint}. "
        f"Supported: {SUPPORTED}"
    )


def _snapshot(checkpoint: Checkpoint, module: nn.Module) -> Checkpoint:
    """A checkpoint in memory of its own, on the CPU: what becomes of the module later changes nothing in it."""
    shared = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    weights = {
        name: tensor.to("cpu", copy=tensor.untyped_storage().data_ptr() in shared)
        for name, tensor in checkpoint.weights.items()
    }
    return replace(checkpoint, weights=weights)


def _from_directory(
    directory: Path, *, allow_pickle: bool, weights_key: str | None, model: str | None, name: str | None = None
) -> Checkpoint:
    name = name or str(directory)
    described = model is None
    if described and (directory / saved.DESCRIPTION).is_file():
        _for_files(None, weights_key, f"{name}, which has one set of weights,")
        return saved.read(directory, name)
    if described and not (directory / "config.json").is_file() and (directory / open_clip.CONFIG).is_file():
        return open_clip.from_directory(directory, name, allow_pickle=allow_pickle, weights_key=weights_key)
    weights = files.find_weights(directory, allow_pickle=allow_pickle)
    return _from_files(directory, weights, allow_pickle=allow_pickle, weights_key=weights_key, model=model, name=name)


def _from_files(
    directory: Path,
    weights: list[Path],
    *,
    allow_pickle: bool,
    weights_key: str | None,
    model: str | None,
    name: str | None = None,
) -> Checkpoint:
    name = name or str(directory)
    settings = directory / "config.json"
    reading: dict[str, Any] = {"allow_pickle": allow_pickle, "weights_key": weights_key}
    if model is not None:
        return named.checkpoint(model, files.read_weights(weights, **reading), str(weights[0]))
    if not settings.is_file():
        state = files.read_weights(weights, **reading)
        raise CheckpointError(
            f"{weights[0]} says nothing of its architecture. It needs a config.json beside it, one with 'model_type' "
            f"as transformers writes it or with 'architecture' as timm does; or {named.hint(state)}"
        )
    config = files.read_json(settings)
    if "model_type" in config:
        return hf.from_state(config, files.read_weights(weights, **reading), name, f"{name}/config.json", directory)
    if "architecture" in config:
        return timm.from_module(timm.build(directory, weights, name=name, **reading), f"{name}/config.json")
    raise CheckpointError(f"{settings} has neither 'model_type' (transformers) nor 'architecture' (timm)")
