"""Names that are nearly right: what a message may suggest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """For the end of a message: the names near to a wrong one; "" if there are none."""
    near = difflib.get_close_matches(str(given), list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
