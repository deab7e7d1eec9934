"""Grids of test cases of which the default suite runs a part."""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], step: int = 2, *, unpack: bool = False) -> list[Any]:
    """Cases for `parametrize`: every one in the full suite, by default the first and each `step`th after it.

    `unpack`: a case is a tuple of values for several names, and not one value.
    """
    return [
        pytest.param(*(case if unpack else (case,)), marks=() if i % step == 0 else pytest.mark.full)
        for i, case in enumerate(cases)
    ]
