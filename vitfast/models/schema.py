"""Domains of settings: dataclass fields say in their annotations what they may be, and all are checked at once.

    @dataclass(frozen=True)
    class Settings:
        hidden_size: Annotated[int, whole(1, 65_536)] = 768

    problems(Settings, {"hidden_size": -1})  # ["hidden_size must be a whole number from 1 to 65,536, got -1"]

Bounds are far above every model there is: they are for files that are damaged or hostile, so that nothing is built
whose size such a file has made up.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


class Domain(NamedTuple):
    """Which values a setting may have: in words, and as a test of any object whatever."""

    words: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Domain:
    """Whole numbers; True and 3.0 are none."""
    return Domain(f"a whole number from {low:,} to {high:,}", lambda value: _is_whole(value, low, high))


def number(low: float, high: float) -> Domain:
    """Finite numbers."""
    return Domain(f"a number from {low:g} to {high:g}", lambda value: _is_number(value, low, high))


def sides(low: int, high: int) -> Domain:
    """(height, width)."""
    return Domain(
        f"(height, width), two whole numbers from {low:,} to {high:,}",
        lambda value: isinstance(value, tuple) and _is_pair(value, low, high),
    )


def side_or_sides(low: int, high: int) -> Domain:
    """One number for both sides, or (height, width)."""
    return Domain(
        f"a whole number from {low:,} to {high:,}, or two: [height, width]",
        lambda value: _is_whole(value, low, high) or _is_pair(value, low, high),
    )


def one_of(*names: str) -> Domain:
    """Words."""
    return Domain(f"one of {', '.join(map(repr, names))}", lambda value: isinstance(value, str) and value in names)


FLAG = Domain("true or false", lambda value: isinstance(value, bool))
TEXT = Domain("a text", lambda value: isinstance(value, str))
TEXTS = Domain("a list of texts", lambda v: isinstance(v, (list, tuple)) and all(isinstance(item, str) for item in v))
WHOLES = Domain(
    "whole numbers from 0 to 65,536",
    lambda v: isinstance(v, tuple) and all(_is_whole(item, 0, 65_536) for item in v),
)
OBJECT = Domain("an object", lambda value: isinstance(value, Mapping))


def _is_whole(value: Any, low: int, high: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and low <= int(value) <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    # Compared before anything else is done with it: whole numbers may be too large for a float, and nan is in no range.
    return not isinstance(value, bool) and isinstance(value, Real) and bool(low <= value <= high)  # type: ignore[operator]


def _is_pair(value: Any, low: int, high: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_whole(side, low, high) for side in value)


def problems(kind: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is wrong with settings, one line each: the field, what it must be, and the value.

    Args:
        kind: a dataclass; its fields without a domain, and names that it has no field for, are not looked at.
        values: field -> value.
        prefix: stands before the fields' names.
    """
    return [
        f"{prefix}{name} must be {domain.words}, got {shown(values[name])}"
        for name, domain in _domains(kind).items()
        if name in values and not domain.holds(values[name])
    ]


def shown(value: Any) -> str:
    """A value in a message, shortened where it is long."""
    try:
        return _SHORT.repr(value)
    except Exception as error:  # an object that cannot even be shown must not hide what is wrong with it
        return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxdict = 30


@functools.cache
def _domains(kind: type) -> dict[str, Domain]:
    hints = get_type_hints(kind, include_extras=True)
    extras = {name: get_args(hint)[1:] for name, hint in hints.items() if get_origin(hint) is Annotated}
    return {name: extra for name, metadata in extras.items() for extra in metadata if isinstance(extra, Domain)}
