"""How attention is told from other modules: by what their code, followed from `forward`, calls and computes."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

_NAMED = re.compile(r"attention|attn", re.IGNORECASE)
_FUSED = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "flex_attention",
    "memory_efficient_attention",
}
"""Functions that are attention. flash-attn's are known by the beginning of their names."""
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_DEPTH = 4
"""How many calls from `forward` on are followed, in methods of the class and in functions outside torch."""


def attends(module: nn.Module) -> bool:
    """Whether a module computes softmax attention itself, judged by its code; torch's own classes are known by name.

    Attention is a call of a fused function, or a softmax beside a matrix product: in one function that `forward` comes
    to or, if the class is named after attention, anywhere in those functions. Comments and docstrings do not count.
    """
    kind: Any = type(module)
    if _in_torch(kind.__module__):
        return False
    softmax = any(isinstance(child, nn.Softmax) for child in module.children())
    traits = [_Traits(softmax=softmax)] if softmax and _NAMED.search(kind.__name__) else []
    traits += _traits(kind)
    if any(item.fused or ((item.softmax or softmax) and item.product) for item in traits):
        return True
    whole = any(item.softmax for item in traits) and any(item.product for item in traits)
    return whole and bool(_NAMED.search(kind.__name__))


def source(item: Any) -> str:
    """Source text of a class or function, "" where there is none (built in, or made at run time)."""
    return _source(item)


@functools.cache
def _source(item: Any) -> str:
    try:
        return inspect.getsource(item)
    except (OSError, TypeError):
        return ""


class _Traits:
    """What one function does."""

    def __init__(self, *, fused: bool = False, softmax: bool = False, product: bool = False) -> None:
        self.fused, self.softmax, self.product = fused, softmax, product


@functools.cache
def _traits(kind: Any) -> list[_Traits]:
    return [_look(function) for function in _reached(kind)]


def _look(function: Any) -> _Traits:
    traits = _Traits()
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            traits.product = True
        elif isinstance(node, ast.Call):
            name = _last(node.func)
            traits.fused |= name in _FUSED or name.startswith("flash_attn")
            traits.softmax |= "softmax" in name.lower()
            traits.product |= name in _PRODUCTS
    return traits


def _reached(kind: type) -> Iterator[Any]:
    """`forward` and the functions to which it leads, as far as they can be told from the class and its file."""
    pending, seen = [(getattr(kind, "forward", None), 0)], set()
    while pending:
        function, depth = pending.pop()
        function = inspect.unwrap(function) if callable(function) else None
        if not inspect.isfunction(function) or function in seen or _in_torch(function.__module__):
            continue
        seen.add(function)
        yield function
        if depth < _DEPTH:
            calls = [node.func for node in ast.walk(_tree(function)) if isinstance(node, ast.Call)]
            pending += [(_resolve(called, function, kind), depth + 1) for called in calls]


def _resolve(called: ast.expr, function: Any, kind: type) -> Any:
    """The function that is called: a method of the class, or something global; None where that cannot be told."""
    if isinstance(called, ast.Name):
        return function.__globals__.get(called.id)
    if not isinstance(called, ast.Attribute):
        return None
    if isinstance(called.value, ast.Call) and _last(called.value.func) == "super":
        bases = iter(kind.__mro__)
        holder = next((base for base in bases if vars(base).get(function.__name__) is function), None)
        return next((vars(base)[called.attr] for base in bases if holder and called.attr in vars(base)), None)
    if not isinstance(called.value, ast.Name):
        return None
    if called.value.id in ("self", "cls"):
        return getattr(kind, called.attr, None)
    holder = function.__globals__.get(called.value.id)
    return getattr(holder, called.attr, None) if inspect.ismodule(holder) or inspect.isclass(holder) else None


def _last(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


@functools.cache
def _tree(function: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(source(function)))
    except SyntaxError:  # part of an expression, as the source of a lambda may be
        return ast.Module([], [])


def _in_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"
