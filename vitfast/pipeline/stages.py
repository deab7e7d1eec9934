"""Where a run's time goes, and which stage binds it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from vitfast.pipeline.timeline import Timeline


@dataclass
class Stages:
    """Seconds that the loop over batches spent on each stage; threads that decode are beside it.

    Attributes:
        decode: waiting for pictures, none of them being ready. write: writing rows. total: all, the model's included.
        workers: decoding threads. fitting: the largest batch from which on memory was not short, 0 if it never was.
        timeline: how busy each stage was over time, where that was asked for.
    """

    decode: float = 0.0
    write: float = 0.0
    total: float = 0.0
    workers: int = 0
    fitting: int = 0
    timeline: Timeline | None = None
    _started: float | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def spent(self, stage: str) -> Iterator[None]:
        """Count the time of a block as that of a stage: "decode" or "write"."""
        started = time.perf_counter()
        self._started = started if self._started is None else self._started
        try:
            yield
        finally:
            now = time.perf_counter()
            setattr(self, stage, getattr(self, stage) + now - started)
            self.total = now - self._started
            if stage == "write" and self.timeline is not None:
                self.timeline.add(stage, started, now)

    def at_work(self, stage: str) -> contextlib.AbstractContextManager[None]:
        """Note a block in the timeline, if there is one, as time that a thread works on a stage."""
        return contextlib.nullcontext() if self.timeline is None else self.timeline.spent(stage)

    @property
    def model(self) -> float:
        """Seconds of the rest: preprocessing on the device, the forward, and on a GPU what is waited for."""
        return max(self.total - self.decode - self.write, 0.0)

    @property
    def bound(self) -> str:
        """The stage that takes most of the time: "decode", "model" or "write"."""
        times = {"model": self.model, "decode": self.decode, "write": self.write}
        return max(times, key=lambda stage: times[stage])

    def advice(self) -> str:
        """One line: which stage binds, how busy the model is, and what may help; "" if nothing was done."""
        if not self.total:
            return ""
        busy = f"model {self.model / self.total:.0%} busy"
        if self.fitting:
            busy += f", in batches of at most {self.fitting} for want of memory"
        cores = usable_cores()
        if self.bound == "model":
            return f"model-bound: {busy}"
        if self.bound == "write":
            return f"write-bound: {busy}; the output folder is slow"
        more = f"try --workers {cores}" if self.workers < cores else f"all {cores} cores decode already"
        return f"decode-bound: {busy}; {more}"


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
