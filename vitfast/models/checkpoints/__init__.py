"""Checkpoints of other libraries, translated to (ViTConfig, canonical weights).

One file per family: `timm`, `torchvision`, and `hf_vit`, `hf_dinov2`, `hf_clip` for transformers.
What a family cannot say in a ViTConfig it refuses, by name; what a file holds beyond or short of
its architecture is an error that lists every tensor. None of the libraries is imported unless a
model of theirs is loaded, and transformers not even then.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vitfast.images.preprocess import Preprocess
from vitfast.models.checkpoints import files, hf, timm, torchvision
from vitfast.models.checkpoints.source import CheckpointError
from vitfast.models.config import ViTConfig

__all__ = ["Checkpoint", "CheckpointError", "load"]

SUPPORTED = (
    "timm VisionTransformer and VisionTransformerDistilled; "
    f"transformers {', '.join(hf.supported())}; torchvision VisionTransformer"
)


@dataclass(frozen=True)
class Checkpoint:
    """A translated model.

    Attributes:
        config: the architecture.
        weights: canonical name (see `vitfast.models.config`) -> tensor, in the dtype they are stored in. They may
            share memory with the model they come from.
        preprocess: how its images are prepared; None where the source does not say.
        labels: the classes' names, one per row of the head; None where the source does not say.
    """

    config: ViTConfig
    weights: Mapping[str, Tensor]
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None


def load(
    source: str | os.PathLike[str] | nn.Module, *, allow_pickle: bool = False, revision: str | None = None
) -> Checkpoint:
    """Load a model of a supported family.

    Args:
        source: one of
            - a live module of timm, transformers or torchvision (its evaluation-mode behaviour counts);
            - a directory with config.json and model.safetensors (or shards with their index), as
              transformers' `save_pretrained` and timm's `save_for_hf` write it;
            - a .safetensors file beside its config.json;
            - a Hugging Face hub id, "org/name", with or without "hf_hub:";
            - the name of a timm model, "vit_tiny_patch16_224", whose weights timm keeps on the hub.
            The timm forms need timm installed: their config.json names an architecture, it does not describe it.
        allow_pickle: also accept .bin, .pth and .pt files, read with `torch.load(weights_only=True)`.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: (a ValueError) naming the source and every reason.
    """
    if isinstance(source, nn.Module):
        _no_revision(revision, type(source).__name__)
        return _from_module(source)
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        _no_revision(revision, name)
        return _from_files(path, files.find_weights(path, allow_pickle=allow_pickle), allow_pickle)
    if path.is_file():
        _no_revision(revision, name)
        return _from_files(path.parent, [path], allow_pickle)
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
    return _from_files(directory, files.find_weights(directory, allow_pickle=allow_pickle), allow_pickle, hub_id)


def _check_settings(name: str, directory: Path) -> None:
    """Refuse a model by its config.json, before its weights are fetched, where that alone says enough."""
    settings = directory / "config.json"
    if not settings.is_file():
        raise CheckpointError(f"{name} has no config.json, which would say what the architecture is")
    config = files.read_json(settings)
    if "model_type" in config:
        hf.check(config, name)


def _no_revision(revision: str | None, name: str) -> None:
    if revision is not None:
        raise CheckpointError(f"revision={revision!r} applies to hub ids only, and {name} is not one")


def _from_module(module: nn.Module) -> Checkpoint:
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    for family in (timm, hf, torchvision):
        if family.matches(module):
            return Checkpoint(*family.from_module(module))
    kind = type(module)
    reason = timm.REFUSED.get(kind.__name__) or hf.REFUSED.get(kind.__name__)
    raise CheckpointError(
        f"{kind.__module__}.{kind.__name__} is not supported{f': {reason}' if reason else ''}. Supported: {SUPPORTED}"
    )


def _from_files(directory: Path, weights: list[Path], allow_pickle: bool, name: str | None = None) -> Checkpoint:
    name = name or str(directory)
    settings = directory / "config.json"
    if not settings.is_file():
        raise CheckpointError(
            f"{weights[0]} needs a config.json beside it, which says what the architecture is: one with "
            "'model_type' as transformers writes it, or with 'architecture' as timm does"
        )
    config = files.read_json(settings)
    if "model_type" in config:
        state = files.read_weights(weights, allow_pickle=allow_pickle)
        ours, tensors = hf.from_state(config, state, name)
        return Checkpoint(ours, tensors, hf.read_preprocess(directory, config, ours), hf.labels(config, ours))
    if "architecture" in config:
        module = timm.build(directory, weights, name=name, allow_pickle=allow_pickle)
        return _from_module(module)
    raise CheckpointError(f"{settings} has neither 'model_type' (transformers) nor 'architecture' (timm)")
