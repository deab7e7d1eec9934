"""Folders that are not a model's own but have one inside: a Trainer's, sentence-transformers', a PEFT adapter's."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from vitfast.models import schema
from vitfast.models.checkpoints import files
from vitfast.models.checkpoints.source import CheckpointError

DESCRIPTIONS = ("vitfast_config.json", "config.json", "open_clip_config.json")
"""Files that say what the weights beside them are."""


def model_folder(directory: Path) -> Path:
    """The folder of the model that a folder stands for: itself, or one inside it.

    Raises:
        CheckpointError: for a PEFT adapter, with what to do; for modules.json of a kind that holds no model.

    Warns:
        UserWarning: which folder is taken, and what of it is left out.
    """
    if (directory / "adapter_config.json").is_file():
        raise _adapter(directory)
    if (directory / "modules.json").is_file():
        return _sentence_transformers(directory)
    if any((directory / name).is_file() for name in DESCRIPTIONS):
        return directory
    steps = {int(m[1]): path for path in directory.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    steps = {step: path for step, path in steps.items() if (path / "config.json").is_file()}
    if not steps:
        return directory
    last = steps[max(steps)]
    best = _best(last)
    said = f"; the best is {best}, by its trainer_state.json" if best and best != last.name else ""
    warnings.warn(f"{directory} is a Trainer's folder: the model taken is its last, {last.name}{said}", stacklevel=2)
    return last


def _best(checkpoint: Path) -> str:
    state = checkpoint / "trainer_state.json"
    named = files.read_json(state).get("best_model_checkpoint") if state.is_file() else None
    return Path(named).name if isinstance(named, str) else ""


def _adapter(directory: Path) -> CheckpointError:
    settings = files.read_json(directory / "adapter_config.json")
    kind, base = (schema.shown(settings.get(name)) for name in ("peft_type", "base_model_name_or_path"))
    return CheckpointError(
        f"{directory} is a PEFT adapter ({kind}) of {base}, not a model: merge the two and load the result, "
        f"PeftModel.from_pretrained(base, {str(directory)!r}).merge_and_unload().save_pretrained(folder)"
    )


def _sentence_transformers(directory: Path) -> Path:
    path = directory / "modules.json"
    try:
        modules: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(modules, list) or not modules or not all(isinstance(m, dict) for m in modules):
        raise CheckpointError(f"{path} must be a list of modules, got {schema.shown(modules)}")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    inner = modules[0].get("path") or ""
    if kinds[0] not in ("Transformer", "CLIPModel") or not isinstance(inner, str) or Path(inner).is_absolute():
        raise CheckpointError(f"{path}: its first module is {schema.shown(modules[0])}, which holds no model")
    if ".." in Path(inner).parts:
        raise CheckpointError(f"{path} names a folder outside its own: {schema.shown(inner)}")
    rest = f", without what follows it there ({', '.join(kinds[1:])})" if kinds[1:] else ""
    warnings.warn(f"{directory} is of sentence-transformers: the model taken is {inner or '.'}/{rest}", stacklevel=2)
    return directory / inner
