"""Dynamic batching: inputs that come one by one, run together by a thread of their own.

A batch starts when it is full, when nothing more is on its way, or when its first input has waited long enough. So a
single request on an idle server waits for nobody, and under load batches fill while the one before is at work.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

log = logging.getLogger("vitfast.serving")
T = TypeVar("T")

_NEW = 0.2
"""The weight of a new measurement in what a batch is expected to take."""


class Failed(Exception):
    """The model failed on a batch; what went wrong is in the log."""


class Entry:
    """An input on its way: first being prepared, then waiting, then done."""

    __slots__ = ("arrived", "future", "given")

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        self.given: Any = None
        self.arrived = 0.0


class BatchTimes:
    """How long batches take, by size rounded up to a power of two."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def note(self, size: int, seconds: float) -> None:
        """A batch of `size` took so long."""
        bucket = _power_of_two(size)
        before = self._seconds.get(bucket, seconds)
        self._seconds[bucket] = before + _NEW * (seconds - before)

    def expected(self, size: int) -> float:
        """Seconds that a batch of `size` should take; what was never seen is taken for proportional to its size."""
        if not size or not self._seconds:
            return 0.0
        bucket = _power_of_two(size)
        known = min(list(self._seconds), key=lambda seen: (abs(seen - bucket), seen))
        return self._seconds[known] * max(1.0, bucket / known)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class Batcher:
    """A queue of inputs and the thread that runs them.

        entry = batcher.expect()
        batcher.put(entry, image)        # or batcher.fail(entry, error)
        made = entry.future.result()

    An entry whose future is cancelled leaves the queue at once.

    Args:
        run: inputs -> what is made of each, called by the thread alone.
        max_batch: inputs of a batch at most.
        max_wait: seconds that an input waits for others that are expected.
        observe: told of each batch: its size, the seconds that each input waited, the seconds it took.
        name: of the thread.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        *,
        max_batch: int,
        max_wait: float,
        observe: Callable[[int, list[float], float], None] = lambda size, waits, seconds: None,
        name: str = "vitfast-batches",
    ) -> None:
        self._run, self._max_batch, self._max_wait, self._observe = run, max_batch, max_wait, observe
        self.times = BatchTimes()
        self._queue: deque[Entry] = deque()
        self._coming = 0  # entries that are expected and not there
        self._running, self._started = 0, 0.0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def expect(self) -> Entry:
        """Announce an input; `put` or `fail` must follow.

        Raises:
            RuntimeError: after `close`.
        """
        entry = Entry()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._coming += 1
        entry.future.add_done_callback(lambda future: self._leave(entry) if future.cancelled() else None)
        return entry

    def put(self, entry: Entry, given: Any) -> None:
        """The input that was announced."""
        with self._changed:
            self._coming -= 1
            if not entry.future.cancelled():
                entry.given, entry.arrived = given, time.perf_counter()
                self._queue.append(entry)
            self._changed.notify()

    def fail(self, entry: Entry, error: Exception) -> None:
        """The input that was announced does not come."""
        with self._changed:
            self._coming -= 1
            self._changed.notify()
        if entry.future.set_running_or_notify_cancel():
            entry.future.set_exception(error)

    def _leave(self, entry: Entry) -> None:
        with self._changed, contextlib.suppress(ValueError):  # it is not there, or not any more
            self._queue.remove(entry)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Inputs in the queue."""
        return len(self._queue)

    def predicted_wait(self) -> float:
        """Seconds until the model would turn to an input that came now."""
        with self._changed:
            ahead, running, started = len(self._queue) + self._coming, self._running, self._started
        full, rest = divmod(ahead, self._max_batch)
        left = max(0.0, self.times.expected(running) - (time.perf_counter() - started)) if running else 0.0
        return left + full * self.times.expected(self._max_batch) + self.times.expected(rest)

    def close(self) -> None:
        """Run what has been announced, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _take(self) -> list[Entry]:
        """The next batch; empty when there will be none."""
        with self._changed:
            while True:
                if self._queue:
                    left = self._queue[0].arrived + self._max_wait - time.perf_counter()
                    if len(self._queue) >= self._max_batch or not self._coming or left <= 0:
                        break
                    self._changed.wait(left)
                elif self._closed and not self._coming:
                    return []
                else:
                    self._changed.wait()
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
            self._running, self._started = len(batch), time.perf_counter()
            return batch

    def _loop(self) -> None:
        while batch := self._take():
            alive = [entry for entry in batch if entry.future.set_running_or_notify_cancel()]
            if alive:
                self._compute(alive)
            with self._changed:
                self._running = 0
            del batch, alive  # their inputs would live on until the next one is full

    def _compute(self, batch: list[Entry]) -> None:
        started = time.perf_counter()
        try:
            made = self._run([entry.given for entry in batch])
        except BaseException as error:  # whatever a model raises ends these requests, and no others
            log.exception("the model failed on a batch of %d", len(batch))
            for entry in batch:
                entry.future.set_exception(Failed(type(error).__name__))
            return
        seconds = time.perf_counter() - started
        self.times.note(len(batch), seconds)
        self._observe(len(batch), [started - entry.arrived for entry in batch], seconds)
        for entry, result in zip(batch, made, strict=True):
            entry.future.set_result(result)


class Alone:
    """A thread that does what others give it, one after another; it does not keep the process from ending.

    OpenMP keeps a team of threads for each thread that computes. With more of them than cores they sleep between any
    two ops, to be woken for the next: so one thread does all that a model does, and loading is done by one that ends.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """What the function gives, or raises."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function(*args, **options))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(job)
        return future.result()

    def close(self) -> None:
        """Let the thread end after what it has been given."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # its inputs would live on until the next one comes
