"""One measuring process, watched from outside: what it died of, or hangs in, is known by name."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vitfast.benchmarks.watch import Now, now

POLL_S = 0.2


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        code: its exit code, negative for a signal; None if it was ended from here.
        why: "hung" (one contestant took longer than it may), "time" (its own time was up), or "" if it ended by itself.
        during: what it was doing last, by its watch; None where it has none or did nothing in particular.
        seconds: how long it ran.
    """

    code: int | None
    why: str
    during: Now | None
    seconds: float

    def what(self) -> str:
        """In words, for the row of the culprit."""
        doing = f" while {self.during.doing}" if self.during else ""
        if self.why == "hung":
            assert self.during is not None
            return f"hung: not done after {self.during.limit_s:.0f} s{doing}"
        if self.code is not None and self.code < 0:
            return f"the process died of {signal.Signals(-self.code).name}{doing}"
        return f"the process ended with exit code {self.code}{doing}"


def run(
    command: Sequence[str],
    log: IO[bytes],
    limit_s: float,
    *,
    watch: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_tick: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
) -> End:
    """Run a command; end it when its time is up, when what it watches over takes too long, or when told to stop.

    Args:
        log: takes what it prints. watch: the file of its `Watch`. on_tick: called every POLL_S.
    """
    start = time.monotonic()
    with subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    ) as process:  # fmt: skip
        try:
            while True:
                try:
                    code = process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    code = None
                during, spent = now(watch) if watch else None, time.monotonic() - start
                on_tick()
                if code is not None:
                    return End(code, "", during, spent)
                hung = during is not None and time.monotonic() - during.since > during.limit_s
                if hung or spent > limit_s or (stop is not None and stop.is_set()):
                    _end(process)
                    on_tick()
                    return End(None, "hung" if hung else "time", during, spent)
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: workers of tests hold the GPU, too.

    They stay in the group of this process: whoever ends that from outside ends them all.
    """
    if process.poll() is None:
        for pid in reversed(_family(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone meanwhile
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found
