"""What `Engine.save` writes: vitfast_config.json, which describes the model in our own words, and model.safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from vitfast.images.preprocess import Preprocess
from vitfast.models import schema
from vitfast.models.checkpoints import files
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError, Source, read_settings
from vitfast.models.config import Flag, ViTConfig
from vitfast.models.text import TextTower
from vitfast.version import __version__

DESCRIPTION = "vitfast_config.json"
FORMAT = 1


def write(checkpoint: Checkpoint, directory: Path, plan: Mapping[str, Any] | None = None) -> None:
    """Save a checkpoint such that `read` gives it back; files of an earlier save are replaced.

    Args:
        plan: what was chosen to run it, and for which machine (see `vitfast.engine.plan_cache`).

    Raises:
        CheckpointError: if the package safetensors is absent, or the model has a stem, a neck or code of its own, which
            no file describes.
        OSError: if the folder cannot be written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise CheckpointError("saving a model needs the package safetensors: pip install safetensors") from error
    if checkpoint.stem is not None or checkpoint.neck is not None:
        part = checkpoint.config.stem or checkpoint.config.neck
        raise CheckpointError(f"a model with a part that runs as it is ({part}) cannot be saved")
    if checkpoint.own_blocks:
        raise CheckpointError(f"a model with code of its own in blocks {sorted(checkpoint.own_blocks)} cannot be saved")
    description = {
        "format": FORMAT,
        "vitfast": __version__,
        "config": asdict(checkpoint.config),
        "preprocess": asdict(checkpoint.preprocess) if checkpoint.preprocess else None,
        "labels": checkpoint.labels,
        "problem_type": checkpoint.problem_type,
        "plan": plan,
        "text": _text_description(checkpoint.text) if checkpoint.text else None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dict(checkpoint.weights)
    if tower := checkpoint.text:
        tensors |= {f"{_TEXT}{name}": tensor for name, tensor in tower.weights.items()}
        tensors |= {f"{_TEXT}{n}": t for n in _TEXT_TENSORS if (t := getattr(tower, n)) is not None}
        for path in tower.tokenizer.iterdir() if tower.tokenizer else ():
            if path.name in files.TOKENIZER and path.parent != directory:
                shutil.copyfile(path, directory / path.name)
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    new = {name: directory / f".{name}.tmp" for name in ("model.safetensors", DESCRIPTION)}
    save_file(weights, new["model.safetensors"], metadata={"format": "pt"})
    new[DESCRIPTION].write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    for name, path in new.items():
        os.replace(path, directory / name)


def read(directory: Path, name: str) -> Checkpoint:
    """Read what `write` wrote.

    Raises:
        CheckpointError: for a file of another format, settings out of their domain, or tensors that do not fit.
    """
    where = f"{name}/{DESCRIPTION}"
    found = files.read_json(directory / DESCRIPTION)
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: format must be {FORMAT}, got {schema.shown(found.get('format'))} "
            f"(written by vitfast {schema.shown(found.get('vitfast'))}, this is {__version__})"
        )
    config = _made(ViTConfig, found.get("config"), f"{where}: config")
    preprocess = found.get("preprocess")
    labels, problem_type = found.get("labels"), found.get("problem_type")
    if labels is not None and (not schema.TEXTS.holds(labels) or len(labels) != config.num_classes):
        raise CheckpointError(
            f"{where}: labels must be null or a text for each of {config.num_classes} classes, "
            f"got {schema.shown(labels)}"
        )
    if problem_type is not None and not isinstance(problem_type, str):
        raise CheckpointError(f"{where}: problem_type must be null or a text, got {schema.shown(problem_type)}")
    state = files.read_weights(files.find_weights(directory))
    image = {key: tensor for key, tensor in state.items() if not key.startswith(_TEXT)}
    return Checkpoint(
        config,
        _weights(image, config, name),
        None if preprocess is None else _made(Preprocess, preprocess, f"{where}: preprocess"),
        None if labels is None else tuple(labels),
        problem_type,
        text=_text(found["text"], state, name, where, directory) if found.get("text") else None,
    )


def _weights(state: Mapping[str, Tensor], config: ViTConfig, name: str) -> dict[str, Tensor]:
    source = Source(state, name)
    for canonical, (_, required) in config.weight_shapes().items():
        if required or canonical in source:
            source.copy(canonical, canonical)
    return source.finish(config)


_TEXT = "text."
_TEXT_TENSORS = ("embedding", "projection", "projection_bias", "class_token")
_TEXT_FACTS = ("causal", "pool", "eot", "scale", "bias", "pad")


def _text_description(tower: TextTower) -> dict[str, Any]:
    facts = {name: getattr(tower, name) for name in _TEXT_FACTS}
    return {"config": asdict(tower.config), "tokenizer": tower.tokenizer is not None, **facts}


def _text(found: Any, state: Mapping[str, Tensor], name: str, where: str, directory: Path) -> TextTower:
    facts = read_settings(_TextFacts, found, f"{where}: text", "text.")
    config = _made(ViTConfig, found.get("config"), f"{where}: text.config")
    own = {key.removeprefix(_TEXT): tensor for key, tensor in state.items() if key.startswith(_TEXT)}
    tensors: dict[str, Any] = {key: own.pop(key, None) for key in _TEXT_TENSORS}
    table, width = tensors["embedding"], config.width
    rows = {key: t.shape[-1] for key, t in tensors.items() if t is not None and key != "projection_bias"}
    if table is None or table.ndim != 2 or any(size != width for size in rows.values()):
        raise CheckpointError(f"{name}: text.embedding and its like must be of width {width}, got {rows}")
    given = {key: value for key, value in vars(facts).items() if key != "tokenizer"}
    tokenizer = directory if facts.tokenizer else None
    return TextTower(config, _weights(own, config, f"{name}, text"), **tensors, **given, tokenizer=tokenizer)


@dataclass(frozen=True)
class _TextFacts:
    """What a description says of a text tower beside its architecture."""

    causal: Flag = False
    pool: Annotated[str, schema.one_of("first", "last", "eot")] = "eot"
    eot: Annotated[int | None, schema.whole(0, 100_000_000)] = None
    scale: Annotated[float, schema.number(0, 1e9)] = 1.0
    bias: Annotated[float | None, schema.number(-1e9, 1e9)] = None
    pad: Annotated[int | None, schema.whole(0, 100_000_000)] = None
    tokenizer: Flag = False


def plan(directory: Path) -> Any:
    """The plan beside a saved model; None if there is none."""
    path = directory / DESCRIPTION
    return files.read_json(path).get("plan") if path.is_file() else None


def _made(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from its fields as JSON has them, with lists for tuples."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where} must be an object, got {schema.shown(values)}")
    if unknown := sorted(values.keys() - {field.name for field in fields(kind)}):
        raise CheckpointError(f"{where} has {', '.join(map(schema.shown, unknown))}, which this version does not know")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
