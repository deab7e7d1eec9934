"""Checkpoint files: where the weights and settings of a directory, a file or a hub id are."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfast.models import schema
from vitfast.models.checkpoints import state_dicts, torchscript
from vitfast.models.checkpoints.source import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pth.tar", ".pt.tar")
NAMES = ("model.safetensors", "pytorch_model.bin")
"""What weights are called in a folder, safe and pickled."""
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
)
_SETTINGS = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json"),
    *TOKENIZER,
)
_SAFE = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors")
_PICKLED = (
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: if it cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def find_weights(directory: Path, *, allow_pickle: bool = False, names: tuple[str, str] = NAMES) -> list[Path]:
    """The weight files of a directory: model.safetensors, the shards of an index, or a lone file.

    Args:
        names: of the safe and of the pickled file, if not those of NAMES.

    Raises:
        CheckpointError: if there are none, shards are absent, or only pickles and they are not allowed.
    """
    kinds: list[tuple[str, tuple[str, ...]]] = [(names[0], (".safetensors",))]
    if allow_pickle:
        kinds.append((names[1], PICKLES))
    for name, _ in kinds:
        if (directory / name).is_file():
            return [directory / name]
        if (directory / f"{name}.index.json").is_file():
            return _shards(directory / f"{name}.index.json")
    for name, suffixes in kinds:
        lone = sorted(path for path in directory.iterdir() if path.name.endswith(suffixes))
        if len(lone) == 1:
            return lone
        if lone:
            raise CheckpointError(
                f"{directory} has no {name} but several other weight files: {', '.join(p.name for p in lone)}; "
                "give the path of one"
            )
    pickles = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLES))
    if pickles:
        raise CheckpointError(
            f"{directory} has no .safetensors file, only pickles ({', '.join(pickles)}); "
            "convert them, or pass allow_pickle=True (--allow-pickle) to read them with torch.load(weights_only=True)"
        )
    hint = (
        "" if allow_pickle else " (a hub model that has only pickled weights needs allow_pickle=True, --allow-pickle)"
    )
    raise CheckpointError(f"{directory} has no weights: expected {kinds[-1][0]} or {kinds[-1][0]}.index.json{hint}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        shown = schema.shown(weight_map)
        raise CheckpointError(f"{index}: weight_map must be an object, tensor name -> file name, got {shown}")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names files outside its directory: {', '.join(outside)}")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(absent)}")
    return [index.parent / name for name in names]


def read_weights(
    paths: Sequence[Path], *, allow_pickle: bool = False, weights_key: str | None = None
) -> dict[str, Tensor]:
    """All tensors of some weight files, on the CPU, as stored.

    Raises:
        CheckpointError: for a damaged file, a pickle that is not allowed or holds more than tensors,
            a tensor that two files hold, or a `weights_key` that a file does not have.

    Warns:
        UserWarning: which of a training checkpoint's state dicts is taken, where it has several.
    """
    state: dict[str, Tensor] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            part = state_dicts.named(_read_safetensors(path), weights_key, str(path))
        else:
            part = state_dicts.choose(_read_pickle(path, allow_pickle), weights_key, str(path))
        twice = sorted(state.keys() & part.keys())
        if twice:
            raise CheckpointError(f"{path} repeats tensors of another shard: {', '.join(twice)}")
        state.update(part)
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path, allow_pickle: bool) -> Any:
    if not path.name.endswith(PICKLES):
        raise CheckpointError(f"{path}: unknown weight file, expected .safetensors or one of {', '.join(PICKLES)}")
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle; convert it to .safetensors, or pass allow_pickle=True (--allow-pickle) to read it "
            "with torch.load(weights_only=True)"
        )
    if torchscript.is_archive(path):
        try:
            return torchscript.read(path)
        except Exception as error:  # whatever a damaged archive makes its readers raise
            raise CheckpointError(f"{path} cannot be read as a TorchScript archive: {error}") from error
    try:
        # Trainers (timm, DeiT, MAE) put their arguments beside the weights: a bag of attributes, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler and the archive reader raise
        raise CheckpointError(f"{path} cannot be read with torch.load(weights_only=True): {error}") from error


def download(
    hub_id: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    check: Callable[[Path], None] = lambda directory: None,
) -> Path:
    """The local directory of a Hugging Face hub model: settings and safetensors, nothing else.

    Pickled weights are fetched only if allowed and the model has no others.

    Args:
        check: is given the directory with the settings alone, and may raise before any weights are fetched.

    Raises:
        CheckpointError: if the package is absent, or the hub cannot be reached or refuses.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(f"loading {hub_id!r} needs the package huggingface_hub") from error

    def fetch(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # the client's own, the HTTP library's and the file system's errors
            at = f" at revision {revision!r}" if revision else ""
            raise CheckpointError(
                f"cannot get {hub_id!r}{at} from the Hugging Face hub: {type(error).__name__}: {error}"
            ) from error

    check(fetch(*_SETTINGS))
    directory = fetch(*_SETTINGS, *_SAFE)
    if allow_pickle and not any(path.suffix == ".safetensors" for path in directory.iterdir()):
        directory = fetch(*_SETTINGS, *_PICKLED)
    return directory


def cached(hub_id: str, name: str) -> Path | None:
    """A file of a hub model if it is in the local cache, or in the directory that `hub_id` names."""
    if os.path.isdir(hub_id):
        path = Path(hub_id, name)
        return path if path.is_file() else None
    if not HUB_ID.fullmatch(hub_id):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None  # without the package there is no cache to look in
    file = try_to_load_from_cache(hub_id, name)
    return Path(file) if isinstance(file, str) else None
