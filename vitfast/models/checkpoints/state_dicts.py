"""Which of a training checkpoint's state dicts are the weights, and what a wrapper has put before their names.

A trainer saves more than a model: its optimiser, an average of the weights, a student beside a teacher. The choice is
that of the families' own loaders: timm's `load_state_dict` takes the average (EMA) before the raw weights, DINO's
evaluation the teacher. Where there is a choice, the one made is said; `weights_key` names another.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from vitfast.models import schema
from vitfast.models.checkpoints.source import CheckpointError

PREFERRED = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
"""Names of the weights in training checkpoints, the one that is taken first. timm's order, then DINO's."""

_COUNTERS = ("n_averaged",)
"""What torch's AveragedModel keeps beside the weights."""

_DEPTH = 4


def choose(content: Any, weights_key: str | None, where: str) -> dict[str, Tensor]:
    """The state dict in what `torch.load` gave.

    Args:
        weights_key: the path to it, "state_dict_ema" or "ema.model"; or what all names of one of several models
            begin with, "teacher.backbone".

    Raises:
        CheckpointError: if there is none, or several and none is a usual choice; it lists what there is.

    Warns:
        UserWarning: if there are several, which is taken.
    """
    states = dict(_state_dicts(content))
    if weights_key is not None:
        if weights_key in states:
            return states[weights_key]
        for parent in sorted(states, key=len, reverse=True):
            if not parent or weights_key.startswith(f"{parent}."):
                inner = weights_key.removeprefix(f"{parent}.") if parent else weights_key
                if part := _beginning(states[parent], inner):
                    return part
        raise CheckpointError(f"{where} has no weights called {weights_key!r}. {_listing(content, states)}")
    if len(states) == 1 or "" in states:
        return states[""] if "" in states else next(iter(states.values()))
    chosen = next((name for name in PREFERRED if name in states), None)
    if chosen is None:
        raise CheckpointError(f"{where}: which weights are meant is not clear. {_listing(content, states)}")
    others = ", ".join(repr(name) for name in states if name != chosen)
    warnings.warn(
        f"{where}: the weights taken are those under {chosen!r}, not {others}; weights_key names others", stacklevel=2
    )
    return states[chosen]


def named(state: dict[str, Tensor], weights_key: str | None, where: str) -> dict[str, Tensor]:
    """A file's tensors, or those whose names begin with `weights_key`, without it.

    Raises:
        CheckpointError: if no name begins so.
    """
    if weights_key is None:
        return state
    if part := _beginning(state, weights_key):
        return part
    raise CheckpointError(f"{where} has no weights called {weights_key!r}. {_listing(state, {'': state})}")


def strip_prefix(state: Mapping[str, Tensor], expected: Sequence[str], where: str) -> Mapping[str, Tensor]:
    """A state dict without what a wrapper has put before all names ("module.", "_orig_mod.", "model.", ...).

    Args:
        expected: names of one tensor that a state dict without such a prefix has, any of them.

    Raises:
        CheckpointError: if there are several models in it, by their prefixes.

    Warns:
        UserWarning: which prefix has come off.
    """
    if any(name in state for name in expected):
        return state
    # The longest expected name first: what stands before "vit.embeddings" is the prefix, not "model.vit." before it.
    for wanted in sorted(expected, key=len, reverse=True):
        leads = sorted(name.removesuffix(wanted) for name in state if name.endswith(f".{wanted}"))
        if not leads:
            continue
        if len(leads) > 1:
            listed = ", ".join(repr(lead.rstrip(".")) for lead in leads)
            raise CheckpointError(f"{where} holds several models, {listed}: weights_key names one")
        lead = leads[0]
        rest = [name for name in state if not name.startswith(lead) and name not in _COUNTERS]
        if rest:  # not a wrapper's: the family lists what does not fit
            return state
        warnings.warn(f"{where}: the prefix {lead!r} has been taken off the names of all weights", stacklevel=2)
        return {name.removeprefix(lead): tensor for name, tensor in state.items() if name.startswith(lead)}
    return state


def _beginning(state: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    lead = key.rstrip(".") + "."
    return {name.removeprefix(lead): tensor for name, tensor in state.items() if name.startswith(lead)}


def _state_dicts(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(path, state dict) of all that are in nested dicts; "" is the path of the whole."""
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    if content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        yield path, dict(content)
        return
    for key, value in content.items():
        # An optimiser's tables are keyed by number, and hold no names of weights.
        if isinstance(key, str) and key not in ("optimizer", "optimizer_states", "lr_scheduler", "scheduler"):
            yield from _state_dicts(value, f"{path}.{key}" if path else key, depth + 1)


def _listing(content: Any, states: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What is in a file, for a message."""
    if not isinstance(content, Mapping):
        return f"It holds a {type(content).__name__}, expected a dict of tensors"
    if states and "" not in states:
        return f"weights_key may be {', '.join(f'{name!r} ({len(state)} tensors)' for name, state in states.items())}"
    if "" in states:
        tops = sorted({name.partition(".")[0] for name in states[""]})
        return f"Its tensors' names begin with {schema.shown(tops)}"
    keys = ", ".join(f"{schema.shown(key)} ({type(value).__name__})" for key, value in list(content.items())[:20])
    return f"It holds no state dict of tensors, only {keys or 'nothing'}"
