"""Whether vitfast's attention means what a layer of transformers computes today; where it does not, the layer is left.

What counts is the implementation that runs now: "sdpa" and FlashAttention are transformers' own and are known; an
eager function is code of the model's file, may read anything of its module (sinks, say), and is compared on numbers.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitfast.integrations.recognise import source
from vitfast.integrations.transformers_attention import IMPLEMENTED, NAME

_KNOWN = ("sdpa", "flex_attention")
_TOLERANCE = 1e-3
"""Largest difference, relative to the largest value, that rounding in an eager function may make."""


def why_not(layer: Any, setting: str | None) -> str:
    """Why a layer on the attention interface cannot be switched from `setting`; "" if it can."""
    calls = _calls(type(layer).forward)
    if not (runs_eager(setting) or setting in _KNOWN or "flash" in str(setting)):
        return f"it runs attn_implementation={setting!r}, which vitfast does not know"
    for argument, value in _arguments(layer, calls).items():
        if argument not in IMPLEMENTED and value is not None and value is not False:
            shown = f"{argument}={value}" if isinstance(value, bool | int | float | str) else argument
            return f"its attention takes {shown}, which {NAME!r} does not implement"
    return _compare(layer, calls) if runs_eager(setting) else ""


def runs_eager(setting: str | None) -> bool:
    """Whether this is the eager function of the model's file; transformers takes None for it."""
    return setting in ("eager", None)


@dataclass(frozen=True)
class _Calls:
    """How a forward calls its attention function: the keywords, and the name of the eager function in its file."""

    keywords: tuple[tuple[str, ast.expr], ...]
    eager: str


@functools.cache
def _calls(forward: Any) -> _Calls:
    tree = ast.parse(textwrap.dedent(source(forward)))
    names, eager = set(), ""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        functions = [n.id for n in ast.walk(node.value) if isinstance(n, ast.Name) and "eager" in n.id]
        if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value) or functions:
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
            eager = next(iter(functions), eager)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    keywords = [(k.arg, k.value) for call in calls if call.func.id in names for k in call.keywords]  # type: ignore[attr-defined]
    return _Calls(tuple((name, value) for name, value in keywords if name is not None), eager)


def _arguments(layer: Any, calls: _Calls) -> dict[str, Any]:
    """Argument -> its value, or the text of an expression whose value only a call would tell."""
    return {name: _value(layer, expression) for name, expression in calls.keywords}


def _value(layer: Any, expression: ast.expr) -> Any:
    if isinstance(expression, ast.Constant):
        return expression.value
    parts = ast.unparse(expression).split(".")
    if parts[0] == "self" and all(part.isidentifier() for part in parts):
        return functools.reduce(lambda holder, name: getattr(holder, name, None), parts[1:], layer)
    return ast.unparse(expression)


def _compare(layer: Any, calls: _Calls) -> str:
    """Run the layer's eager function and plain attention on small numbers, without a mask and with one."""
    eager = inspect.unwrap(type(layer).forward).__globals__.get(calls.eager)
    if eager is None:
        return "its eager attention function was not found in its forward, so that it cannot be compared"
    device = next((tensor.device for tensor in layer.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return ""
    scale = _arguments(layer, calls).get("scaling")
    scale = scale if isinstance(scale, int | float) else None
    compared, errors = 0, []
    for q, k, v, mask in _examples(layer, device):
        try:
            with torch.no_grad():
                theirs, _ = eager(layer, q, k, v, mask, dropout=0.0, scaling=scale or q.shape[-1] ** -0.5)
        except Exception as error:  # it is another library's code; what it raises is reported
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        ours = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
        if theirs.shape != ours.shape or not (theirs - ours).abs().max() <= _TOLERANCE * ours.abs().max():
            at = "with a mask" if mask is not None else "without a mask"
            return f"its eager attention function computes something else than attention {at}"
        compared += 1
    return "" if compared else f"its eager attention function could not be compared: {errors[0]}"


def _examples(layer: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """q [1, H, 5, D], k and v [1, Hk, 5, D], large enough for a softcap to show, and a mask [1, 1, 5, 5] or None."""
    heads = _number(layer, ("num_heads", "num_attention_heads", "n_heads"), 4)
    head_dim = _number(layer, ("head_dim", "attention_head_size", "head_size"), 8)
    key_heads = max(heads // _number(layer, ("num_key_value_groups",), 1), 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(1, h, 5, head_dim, generator=generator) for h in (heads, key_heads, key_heads))
    mask = torch.randn(1, 1, 5, 5, generator=generator)
    q, k, v, mask = (x.to(device) for x in (q, k, v, mask))
    yield q, k, v, None
    yield q, k, v, mask


def _number(layer: nn.Module, names: tuple[str, ...], default: int) -> int:
    """The first of these attributes of a layer, or of its config, that is a positive number."""
    for holder in (layer, getattr(layer, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int | float) and value >= 1:
                return int(value)
    return default
