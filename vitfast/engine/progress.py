"""What takes long the first time says so: one line of the "vitfast" logger after a second, then how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

FIRST, NEXT = 1.0, 2.0
"""Seconds of silence before the first line, and between that and the others."""

_logger = logging.getLogger("vitfast")


def said(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items one by one; what is done with them is reported if it lasts longer than FIRST.

    The lines are warnings of the logger "vitfast", which Python writes to stderr unless it is told otherwise:
    `logging.getLogger("vitfast").setLevel("ERROR")` ends them.

    Args:
        what: the first line, e.g. "measuring backends"; later lines count the items that are done.
    """
    begun = time.perf_counter()
    due, told = begun + FIRST, False
    for done, item in enumerate(items):
        if time.perf_counter() >= due:
            _logger.warning("vitfast: %s: %d of %d done", what, done, total)
            due, told = time.perf_counter() + NEXT, True
        yield item
    if told:
        _logger.warning("vitfast: %s: done in %.1f s", what, time.perf_counter() - begun)
