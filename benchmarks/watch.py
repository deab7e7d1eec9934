"""What a measuring process does at this moment, in a small file, so that whoever started it can name what it died of.

A kernel that reads where it must not kills the GPU's context, and with it all that a process could still measure; one
that never ends holds it up. Both are known from outside only: `Watch` writes down what is about to run, `now` reads it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CONTEXT_LOST = 86
"""Exit code of a process that wrote its rows and ended because the GPU's context is dead."""

LAUNCH_LIMIT_S, LIMIT_S, SLOW_LIMIT_S = 20.0, 40.0, 240.0
"""How long it may take before it counts as hung: one launch at a small shape, its compiling included; one contestant
that prepares or runs; one that compiles a whole model."""

_WIDTH = 1024
"""Bytes of the file: every note has as many, so that one write replaces all of the one before."""


class ContextLost(RuntimeError):
    """The GPU's context is dead, so nothing more can run in this process; `row` is that of what killed it."""

    def __init__(self, message: str, row: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Now:
    """What runs since `since` (time.monotonic, which all processes of a machine share), and for how long it may."""

    case: str
    provider: str
    doing: str
    since: float
    limit_s: float


class Watch:
    """Keeps the file that says what runs; without a path it keeps nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def begin(self, case: str, provider: str, doing: str, limit_s: float = LIMIT_S) -> None:
        """Write down what is about to run."""
        if self._file is not None:
            note = asdict(Now(case, provider, doing, time.monotonic(), limit_s))
            os.pwrite(self._file, json.dumps(note).encode().ljust(_WIDTH), 0)

    def end(self) -> None:
        """Nothing in particular runs."""
        if self._file is not None:
            os.pwrite(self._file, b"null".ljust(_WIDTH), 0)


def now(path: Path) -> Now | None:
    """What runs by a file of `Watch`; None if nothing does, or the file is not there or half written."""
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return Now(**note) if note else None
