"""`Swap`, the handle of everything that was replaced in a model, and the way back."""

from __future__ import annotations

import copyreg
import functools
import html
import itertools
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitfast.attention import sdpa
from vitfast.integrations.recognise import attends


@dataclass(frozen=True)
class Method:
    """A method other than forward to replace, where other methods than forward lead to attention too."""

    name: str
    function: Callable[..., Any]


Match = Callable[..., Any] | Method | str | bool | None
"""What a finder says of a module: the forward to put in place of its own, taking the module first;
True where a setting has switched it already; why it is left alone; or None where it is not the finder's."""

Finder = Callable[[nn.Module, nn.Module | None], Match]
"""Called with a module and the module that holds it (None for the model itself)."""

LINES = 30
"""A swap lists at most so many of the modules that it left."""


def original(module: nn.Module) -> Any:
    """The class that a module was of before a swap, with its own methods; its class if nothing was swapped."""
    return getattr(type(module), "_vitfast_original", type(module))


class Swap:
    """What was replaced in a model, and the way back; also a context manager that goes it.

    A swap gives instances a subclass of their class, of the same name, in which one method is another (mostly
    `forward`), or changes a setting; parameters, buffers, hooks and the state dict are never touched. A copy of a
    swapped module, shallow, deep, pickled or made by nn.DataParallel, is itself swapped and computes with its own
    weights; this handle does not reach it. `torch.jit.script` compiles the module's own method, with a warning.
    Swap before torch.compile, not after.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.replaced: list[str] = []
        """Names of the modules whose attention now goes through vitfast."""
        self.left: dict[str, str] = {}
        """Names of the modules that attend and were left as they are -> why."""
        self._model = model
        self._undo: list[Callable[[], str]] = []

    def replace(self, name: str, module: nn.Module, function: Callable[..., Any], method: str = "forward") -> None:
        """Make `module.method(...)` call `function(module, ...)`, on this instance only."""
        kind: Any = type(module)
        module.__class__ = swapped = _swapped(kind, method, function)  # bound by self, so that copies are bound, too
        self.on_restore(functools.partial(_remove, name, module, kind, swapped, method))
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

    @property
    def route(self) -> sdpa.Route:
        """Which implementation calls take where the model is now and in its dtype, as far as these decide it.

        A call's own arguments may still send it to torch: `vitfast.explain` says it of one call.
        """
        tensors = itertools.chain(*((m.parameters(), m.buffers()) for m in [self._model] if m is not None))
        first = next((t for part in tensors for t in part if t.is_floating_point()), torch.empty(0))
        return sdpa.usual_route(first.device, first.dtype)

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        counts = f"{len(self.replaced)} replaced, {len(self.left)} left"
        if self.replaced and not self._undo:
            return f"Swap({counts}, restored)"
        lines = [f"Swap({counts}, in place; {self._route()})"]
        lines += [f"  left {names}: {why}" for names, why in self._left()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{html.escape(why)}</td></tr>" for n, why in self._left())
        head = f"{len(self.replaced)} replaced, {len(self.left)} left; {self._route()}"
        table = f"<table><tr><th>left</th><th>why</th></tr>{rows}</table>" if rows else ""
        return f"<b>Swap</b>: {html.escape(head)}{table}"

    def _route(self) -> str:
        route = self.route
        why = f" ({'; '.join(route.reasons)})" if route.reasons else ""
        return f"calls run {'the Triton kernels' if route.backend == 'triton' else 'torch'}{why}"

    def _left(self) -> list[tuple[str, str]]:
        """(name, why), modules left for one reason together; the last line counts what is not shown."""
        counts = Counter(self.left.values())
        first = {why: name or "the model" for name, why in reversed(self.left.items())}
        rows = [(first[why] + (f" and {n - 1} more" if n > 1 else ""), why) for why, n in counts.items()]
        more = [("...", f"and {len(rows) - LINES} more reasons: see .left")] if len(rows) > LINES else []
        return rows[:LINES] + more


@functools.cache
def _swapped(kind: Any, method: str, function: Callable[..., Any]) -> Any:
    """A subclass of `kind` by its name, whose `method` is `function`."""
    own = getattr(kind, method)

    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    # torch.jit.script reads the source behind __wrapped__ and looks names up in the function's globals.
    scope = getattr(own, "__globals__", replaced.__globals__)
    replaced = types.FunctionType(replaced.__code__, scope, method, None, replaced.__closure__)

    def __prepare_scriptable__(self: nn.Module) -> nn.Module:
        warnings.warn(
            f"torch.jit.script compiles {kind.__name__}'s own {method}: attention there is torch's, not vitfast's",
            stacklevel=2,
        )
        prepare = getattr(kind, "__prepare_scriptable__", None)
        return self if prepare is None else prepare(self)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, args, *rest = kind.__reduce_ex__(self, protocol)
        if make is not copyreg.__newobj__ or args[0] is not swapped:  # type: ignore[attr-defined]
            return (make, args, *rest)
        return (_renew, (kind, method, function, *args[1:]), *rest)

    names = {
        method: functools.update_wrapper(replaced, own),
        "_vitfast_original": kind,
        "_vitfast_function": function,
        "__reduce_ex__": __reduce_ex__,
        "__prepare_scriptable__": __prepare_scriptable__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__annotations__": dict(getattr(kind, "__annotations__", {})),
    }
    swapped = type(kind)(kind.__name__, (kind,), names)
    return swapped


def _renew(kind: Any, method: str, function: Callable[..., Any], *args: Any) -> Any:
    """A new object of a swapped class, for copies and pickles."""
    swapped = _swapped(kind, method, function)
    return swapped.__new__(swapped, *args)


def _remove(name: str, module: nn.Module, kind: Any, swapped: Any, method: str) -> str:
    if type(module) is not swapped or method in module.__dict__:
        return f"{name or 'the model'} ({type(module).__name__}) has another {method} by now"
    module.__class__ = kind
    return ""


def swap_forwards(model: nn.Module, finders: Iterable[Finder], swap: Swap) -> None:
    """Ask the finders about each module, in order; replace what they can, note what is left."""
    finders = tuple(finders)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if name in swap.left:
            continue
        parent = modules[name.rpartition(".")[0]] if name else None
        matched = next((matched for finder in finders if (matched := finder(module, parent)) is not None), None)
        method = matched if isinstance(matched, Method) else Method("forward", matched) if callable(matched) else None
        if method is not None and (method.name in module.__dict__ or original(module) is not type(module)):
            matched, method = f"its {method.name} has been replaced already", None
        if method is not None:
            swap.replace(name, module, method.function, method.name)
        elif isinstance(matched, str):
            swap.left[name] = matched
        elif matched:
            swap.replaced.append(name)


def unknown_attention(module: nn.Module, parent: nn.Module | None) -> Match:
    """The last finder: modules that look like attention and that nobody has claimed."""
    del parent
    if attends(module):
        return f"vitfast has no exact replacement for {type(module).__module__}.{type(module).__qualname__}"
    return None
