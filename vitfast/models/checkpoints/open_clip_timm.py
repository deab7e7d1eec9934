"""open_clip's models whose image tower is timm's: timm builds the tower, and open_clip's projection comes after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from vitfast.images.preprocess import Preprocess
from vitfast.models import libraries, schema
from vitfast.models.checkpoints import open_clip_towers, timm
from vitfast.models.checkpoints.source import Checkpoint, CheckpointError, read_settings, require
from vitfast.models.config import Flag, ViTConfig

TRUNK, HEAD = "visual.trunk.", "visual.head."


@dataclass(frozen=True)
class _Settings:
    """What is read of `vision_cfg`."""

    timm_model_name: Annotated[str, schema.TEXT] = ""
    timm_pool: Annotated[str, schema.TEXT] = "avg"
    timm_proj: Annotated[str, schema.one_of("linear", "mlp", "none", "")] = ""
    timm_proj_bias: Flag = False
    timm_model_kwargs: Annotated[Any, schema.OBJECT] = None


def from_state(
    vision: Mapping[str, Any],
    state: Mapping[str, Tensor],
    text: open_clip_towers.Text | None,
    name: str,
    where: str,
    preprocess: Callable[[ViTConfig], Preprocess | None],
) -> Checkpoint:
    """Translate a whole model's state dict.

    Args:
        vision: `vision_cfg`. where: of these settings, for messages. preprocess: of the architecture.

    Raises:
        CheckpointError: if timm cannot build the tower or fill it, or it is no Vision Transformer of its known ones.
    """
    # In a file null is "no projection of open_clip's", and an absent key is its default.
    given = {"timm_proj": "linear"} if "timm_proj" not in vision else {}
    facts = read_settings(_Settings, {**given, **vision}, where, "vision_cfg.")
    trunk = _trunk(facts, state, where)
    made = with_head(timm.from_module(trunk, where), state, where)
    made = replace(made, config=replace(made.config, name=name), preprocess=preprocess(made.config), labels=None)
    return replace(made, text=open_clip_towers.text(state, text, name) if text else None)


def with_head(made: Checkpoint, state: Mapping[str, Tensor], where: str) -> Checkpoint:
    """A tower of timm's with what open_clip makes of it: timm's classifier or a product of its own as projection.

    Raises:
        CheckpointError: for another head.
    """
    heads = {key.removeprefix(HEAD) for key in state if key.startswith(HEAD)}
    require(heads <= {"proj.weight", "proj.bias"}, f"a head of {', '.join(sorted(heads))} after timm's tower", where)
    weights, config = dict(made.weights), made.config
    if config.num_classes:
        require(not heads, "a classifier of timm's and a projection", where)
        for kind in ("weight", "bias"):
            if f"head.{kind}" in weights:
                weights[f"projection.{kind}"] = weights.pop(f"head.{kind}")
        config = replace(config, num_classes=0, projection_dim=config.num_classes)
    for key in heads:
        weights[f"projection.{key.removeprefix('proj.')}"] = state[HEAD + key]
    if heads:
        config = replace(config, projection_dim=len(state[f"{HEAD}proj.weight"]))
    shapes = config.weight_shapes()
    for key in ("projection.weight", "projection.bias"):
        if key in weights and tuple(weights[key].shape) != shapes[key][0]:
            raise CheckpointError(f"{where}: {key} {list(weights[key].shape)}, expected {list(shapes[key][0])}")
    return replace(made, config=config, weights=weights)


def _trunk(facts: _Settings, state: Mapping[str, Tensor], where: str) -> Any:
    """timm's module, made as open_clip makes it, and filled."""
    try:
        library = libraries.import_library("timm")
    except ImportError as error:
        raise CheckpointError(f"loading {where}, whose image tower is timm's, needs timm: {error}") from error
    own = {key.removeprefix(TRUNK): tensor for key, tensor in state.items() if key.startswith(TRUNK)}
    options = dict(facts.timm_model_kwargs or {})
    if facts.timm_proj in ("linear", "mlp"):
        options |= {"num_classes": 0} | ({"global_pool": facts.timm_pool} if facts.timm_pool else {})
    else:
        classes = 0 if facts.timm_proj == "none" else next((len(own[h]) for h in _HEADS if h in own), 0)
        options |= {"num_classes": classes, "global_pool": facts.timm_pool}
    said = f"{where} says timm_model_name={facts.timm_model_name!r}"
    try:
        with torch.device("meta"):
            wanted = sum(p.numel() for p in library.create_model(facts.timm_model_name, **options).parameters())
        if wanted > 2 * sum(tensor.numel() for tensor in own.values()):
            raise ValueError(f"a model of {wanted:,} weights, and the files hold far fewer")
        module = library.create_model(facts.timm_model_name, **options).eval()
        module.load_state_dict(own)
    except Exception as error:  # timm asserts, and raises RuntimeError, TypeError and what its readers raise
        raise CheckpointError(f"timm cannot build the image tower ({said}): {type(error).__name__}: {error}") from error
    if not timm.matches(module):
        reason = timm.REFUSED.get(type(module).__name__)
        told = reason or "not a Vision Transformer that is known"
        raise CheckpointError(f"{said}: {type(module).__name__} as image tower is not supported: {told}")
    return module


_HEADS = ("head.weight", "head.fc.weight")
