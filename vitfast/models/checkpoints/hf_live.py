"""Live transformers modules: is each part what the module's class makes of its config?

The class is built once more from the module's own config, without memory, and the two are compared part by part:
classes, and the numbers, flags and words that the parts keep (a LayerNorm's eps, an attention's scale).
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from vitfast.models import schema
from vitfast.models.checkpoints import live
from vitfast.models.checkpoints.source import CheckpointError, require

HEADS = ("classifier", "cls_classifier", "distillation_classifier")
NO_SAY = ("pooler", "text_model", "text_projection")
"""Parts that the outputs do not depend on."""

_NO_MATTER = {"training", "p", "drop_prob", "attention_dropout", "dropout", "gradient_checkpointing", "inplace"}
_SIMPLE = (bool, int, float, str)


def check(module: Any, no_say: tuple[str, ...] = NO_SAY) -> None:
    """Refuse a module that is not what its class makes of its config.

    Args:
        no_say: parts that the outputs do not depend on.

    Raises:
        CheckpointError: naming the part, what it is and what it should be.
    """
    name = live.kind_of(module).__name__
    live.unchanged(module, name, no_say)
    _known_attention(module, name)
    try:
        with torch.device("meta"):
            built = live.kind_of(module)(copy.deepcopy(module.config))
    except Exception as error:  # whatever a config that has been changed by hand makes its class raise
        raise CheckpointError(
            f"{name}: its config no longer builds it, so that its parts cannot be checked: "
            f"{type(error).__name__}: {error}"
        ) from error
    _compare(built, module, name, "", (*no_say, *HEADS))


def _compare(built: nn.Module, have: nn.Module, name: str, path: str, skip: tuple[str, ...] = ()) -> None:
    where = f"{name}: {path}" if path else name
    if _idle(built) and _idle(have):
        return
    made, kind = live.full_name(type(built)), live.full_name(live.kind_of(have))
    require(type(built) is live.kind_of(have), f"{kind} in place of {made}", where)
    for key, value in vars(built).items():
        if key.startswith("_") or key in _NO_MATTER or not _simple(value):
            continue
        given = vars(have).get(key)
        told = f"{key}={schema.shown(given)} where its config makes {schema.shown(value)}"
        require(_simple(given) and _plain(given) == _plain(value), told, where)
    want, got = ({n: part for n, part in m._modules.items() if part is not None} for m in (built, have))
    for child in [*want, *(n for n in got if n not in want)]:
        if child in skip:
            continue
        there = f"{name}: {f'{path}.{child}'.lstrip('.')}"
        require(child in got, f"a missing {live.full_name(type(want[child]))}" if child in want else "", there)
        require(child in want, f"{live.full_name(type(got[child]))}, which {made} does not have,", there)
        _compare(want[child], got[child], name, f"{path}.{child}".lstrip("."))


def _idle(part: nn.Module) -> bool:
    kind = type(part)
    drop_path = kind.__module__.startswith("transformers.") and kind.__name__.endswith("DropPath")
    return live.does_nothing(part) or drop_path


def _simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, _SIMPLE) for item in value)
    return isinstance(value, _SIMPLE)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _known_attention(module: Any, name: str) -> None:
    """Refuse an attention function that somebody has registered under a name of their own."""
    chosen = getattr(module.config, "_attn_implementation", None) or "eager"
    modeling = sys.modules.get("transformers.modeling_utils")
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    if not isinstance(chosen, str) or functions is None or chosen not in functions or "/" in chosen:
        return  # eager, or a kernel of the hub, which is loaded for being exact
    function = functions[chosen]
    home = str(getattr(function, "__module__", ""))
    known = home.startswith(("transformers.", "vitfast."))
    require(known, f"the attention function {chosen!r} ({home}.{getattr(function, '__qualname__', function)})", name)
