"""How a class of another library is recognised: by path, and by what its method takes and reads."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vitfast.integrations import torch_sdpa
from vitfast.integrations.recognise import source
from vitfast.integrations.swap import Match, Method


@dataclass(frozen=True)
class Known:
    """A class, as far as its attention goes.

    Attributes:
        forward: takes the place of the class's own method; the module is its first argument.
        takes: the arguments of the method that it replaces, without self.
        reads: the attributes of self which that method reads.
        experimental: the flag `fused_attn`, which the method reads, is off unless the user has turned it on.
            (With timm's other classes it is the other way round, and off says that attention is to be spelt out.)
        method: the method's name.
    """

    forward: Callable[..., Any]
    takes: str
    reads: str
    experimental: bool = False
    method: str = "forward"


def find_known(module: Any, classes: Mapping[str, Known]) -> Match:
    """What to do with a module of one of these classes, exactly; None if it is of none, nor of a subclass.

    Where the installed class is not the one that is known, or a subclass, its own forward is kept and its
    calls of torch's attention are redirected, if it makes any; else it is left, and the answer says why.
    """
    kind: Any = type(module)
    known = classes.get(path(kind))
    if known is None:
        base = next((base for base in kind.__mro__ if path(base) in classes), None)
        why = base and f"{kind.__name__} is a subclass of {path(base)} that vitfast does not know"
        return base and (torch_sdpa.find(module) or why)
    if difference := _difference(kind, known):
        why = f"this version of {path(kind)} differs from the one vitfast knows: {difference}"
        return torch_sdpa.find(module) or why
    if "fused_attn" in known.reads.split() and not known.experimental and not module.fused_attn:
        return torch_sdpa.UNFUSED
    return known.forward if known.method == "forward" else Method(known.method, known.forward)


def path(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def _difference(kind: Any, known: Known) -> str:
    """In what the class's method is not the one that `known` stands for; "" if it is."""
    method = getattr(kind, known.method, None)
    if method is None:
        return f"it has no {known.method}"
    takes = list(inspect.signature(method).parameters)[1:]
    if takes != known.takes.split():
        return f"its {known.method} takes ({', '.join(takes)})"
    reads = set(re.findall(r"self\.(\w+)", source(method)))
    more, less = reads - set(known.reads.split()), set(known.reads.split()) - reads
    parts = [f"it {verb} {', '.join(sorted(names))}" for verb, names in (("reads", more), ("lacks", less)) if names]
    return " and ".join(parts)


def dropping(module: Any, dropout: Any) -> bool:
    """Whether attention weights are being dropped: then the module's own forward runs, random numbers and all."""
    return module.training and getattr(dropout, "p", dropout) > 0
