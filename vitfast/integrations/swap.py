"""`Swap`, the handle of everything that was replaced, and how attention is recognised in a model."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Method:
    """A method other than forward to replace, where other methods than forward lead to attention too."""

    name: str
    function: Callable[..., Any]


Found = Callable[..., Any] | Method | str | bool | None
"""What a finder says of a module: the forward to put in place of its own, taking the module first;
True where a setting has switched it already; why it is left alone; or None where it is not the finder's."""

Finder = Callable[[nn.Module, nn.Module | None], Found]
"""Called with a module and the module that holds it (None for the model itself)."""

_PRODUCT = re.compile(r" @ |matmul|bmm\(|einsum")
_NAMED = re.compile(r"attention|attn", re.IGNORECASE)


class Swap:
    """What was replaced in a model, and the way back; also a context manager that goes it.

    A swap replaces a method on instances, mostly `forward`, or a setting; parameters, buffers, hooks and the state
    dict are never touched. A deep copy or a pickle of a swapped model is itself swapped, and this
    handle does not reach it. Swap before torch.compile, not after.
    """

    def __init__(self) -> None:
        self.replaced: list[str] = []
        """Names of the modules whose attention now goes through vitfast."""
        self.left: dict[str, str] = {}
        """Names of the modules that attend and were left as they are -> why."""
        self._undo: list[Callable[[], str]] = []

    def replace(self, name: str, module: nn.Module, function: Callable[..., Any], method: str = "forward") -> None:
        """Put `function(module, ...)` in place of `module.forward`, or another method, on this instance only."""
        # A partial, not a bound method: it can be copied and pickled together with its module.
        bound = functools.partial(function, module)
        module.__dict__[method] = bound
        self.on_restore(functools.partial(_remove, name, module, bound, method))
        self.replaced.append(name)

    def on_restore(self, undo: Callable[[], str]) -> None:
        """Register a step back; it returns what went wrong, or ""."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Put everything back as it was; a second call does nothing.

        Raises:
            RuntimeError: naming the modules that somebody else has changed since; those stay as they
                are, all others are restored.
        """
        problems = []
        while self._undo:
            problems.append(self._undo.pop()())
        if problems := [problem for problem in problems if problem]:
            raise RuntimeError("not restored: " + "; ".join(problems))

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "in place" if self._undo else "restored"
        return f"Swap({len(self.replaced)} replaced, {len(self.left)} left, {state})"


def _remove(name: str, module: nn.Module, bound: Callable[..., Any], method: str) -> str:
    if module.__dict__.get(method) is not bound:
        return f"{name or 'the model'} ({type(module).__name__}) has another {method} by now"
    del module.__dict__[method]
    return ""


def swap_forwards(model: nn.Module, finders: Iterable[Finder], swap: Swap) -> None:
    """Ask the finders about each module, in order; replace what they can, note what is left."""
    finders = tuple(finders)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]] if name else None
        found = next((found for finder in finders if (found := finder(module, parent)) is not None), None)
        method = found if isinstance(found, Method) else Method("forward", found) if callable(found) else None
        if method is not None and method.name in module.__dict__:
            found, method = f"its {method.name} has been replaced already", None
        if method is not None:
            swap.replace(name, module, method.function, method.name)
        elif isinstance(found, str):
            swap.left[name] = found
        elif found:
            swap.replaced.append(name)


def unknown_attention(module: nn.Module, parent: nn.Module | None) -> Found:
    """The last finder: modules that look like attention and that nobody has claimed."""
    del parent
    if attends(type(module)):
        return f"vitfast has no exact replacement for {type(module).__module__}.{type(module).__qualname__}"
    return None


def attends(kind: type) -> bool:
    """Whether instances of this class compute softmax attention themselves, judged by their source:
    a call of SDPA, or a softmax beside a matrix product, in the forward or, if the class is named so, anywhere."""
    if kind.__module__.partition(".")[0] == "torch":
        return False  # torch's own are known by name
    text = source(kind.__dict__.get("forward") or getattr(kind, "forward", None))
    if _NAMED.search(kind.__name__):
        text += "".join(source(base) for base in kind.__mro__ if base not in (nn.Module, object))
    return "scaled_dot_product_attention" in text or ("softmax" in text.lower() and bool(_PRODUCT.search(text)))


def source(item: Any) -> str:
    """Source text of a class or function, "" where there is none (built in, or made at run time)."""
    return _source(item)


@functools.cache
def _source(item: Any) -> str:
    try:
        return inspect.getsource(item)
    except (OSError, TypeError):
        return ""
