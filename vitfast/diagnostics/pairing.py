"""Which output of a model stands beside which of an engine: an engine's are `tokens`, `embedding` and `logits`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

NAMES = {
    "logits": ("logits",),
    "embedding": ("image_embeds", "pooler_output"),
    "tokens": ("last_hidden_state",),
}
"""Name of an engine's output -> what transformers calls it, the first that a model has."""


class Side(Protocol):
    """One of the callables that are compared."""

    name: str
    is_engine: bool
    module: Any


def is_engine(call: Any) -> bool:
    """Whether this is what `vitfast.load` gives."""
    from vitfast.engine.engine import Engine

    return isinstance(call, Engine)


def common(sides: Sequence[tuple[Side, dict[str, Any]]]) -> tuple[list[dict[str, Any]], str]:
    """Of an engine and a model, what both have by the model's names, and a note of what is left out.

    Args:
        sides: before, after and possibly an oracle, each with its flattened outputs. Two engines, two models, and
            those that have nothing in common are given back as they are.
    """
    reference = next(((side, outputs) for side, outputs in sides[:2] if not side.is_engine), None)
    everything = [outputs for _, outputs in sides]
    if reference is None or not any(side.is_engine for side, _ in sides[:2]):
        return everything, ""
    model, theirs = reference
    pairs = [
        pair(outputs, theirs, model.module) if side.is_engine else {name: name for name in outputs}
        for side, outputs in sides
    ]
    both = [name for name in pairs[0].values() if name in pairs[1].values()]
    if not both:
        return everything, ""
    kept = [
        {name: outputs[own] for own, name in names.items() if name in both}
        for names, outputs in zip(pairs, everything, strict=True)
    ]
    rest = [
        f"{own} of {side.name}"
        for names, (side, outputs) in zip(pairs[:2], sides[:2], strict=True)
        for own in outputs
        if names.get(own) not in both
    ]
    return kept, f"compared is what both have, which leaves out {', '.join(rest)}" if rest else ""


def pair(engine: Mapping[str, Any], other: Mapping[str, Any], module: nn.Module | None) -> dict[str, str]:
    """Name of an engine's output -> name of the same thing in the other's outputs, for what both have.

    Args:
        engine, other: flattened outputs. module: what gave the other's, if it is a module.

    A lone tensor is the tokens if it has three axes, else the logits where the engine has such, else the embedding.
    """
    if set(other) == {"output"}:
        axes = other["output"].ndim if isinstance(other["output"], Tensor) else 0
        name = "tokens" if axes == 3 else "logits" if "logits" in engine else "embedding"
        return {name: "output"} if name in engine else {}
    pairs = {}
    for name, theirs in NAMES.items():
        same = next((known for known in (name, *theirs) if known in other), None)
        if name in engine and same is not None and _alike(same, module):
            pairs[name] = same
    return pairs


def _alike(name: str, module: Any) -> bool:
    """Whether this output means what the engine's does, which two of transformers' do not always."""
    if name == "pooler_output":  # of ViT and DeiT: a product and tanh more than the embedding
        return not hasattr(getattr(module, "pooler", None), "dense")
    # CLIP's norm comes after pooling there, and before it in the engine.
    vision = getattr(module, "vision_model", module)
    return name != "last_hidden_state" or not hasattr(vision, "pre_layrnorm")
