"""Several processes behind one port: each has the models and its own batches, and one that dies is replaced.

They share the listening socket, so that what a dead one had not accepted yet another one takes. A worker accepts when
it has warmed up, not before.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from types import FrameType

from vitfast.pipeline.stages import usable_cores
from vitfast.serving.metrics import FOLDER
from vitfast.serving.server import listening, log_to, make_server, say_listening
from vitfast.serving.settings import Settings

log = logging.getLogger("vitfast.serving")

_TICK = 0.2
"""Seconds between two looks at signals and restarts that are due."""
_LONGEST_PAUSE = 30.0
_WELL = 10.0
"""Seconds that a worker must have lived for its end to count as the first."""


@dataclass
class _Worker:
    """A process, and the end of a pipe that says when it is ready: "", or why it never will be."""

    index: int
    process: SpawnProcess
    pipe: connection.Connection
    started: float
    ready: bool = False


def run(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve from several processes until a signal ends them.

    SIGTERM and SIGINT have each answer what it has taken; the second kills them. SIGHUP has each load its models anew.

    Raises:
        RuntimeError: if a worker cannot start; the message says why. OSError: if the port cannot be had.
    """
    with listening(host, port) as listener, _counting_together():
        listener.listen(1024)  # here, too: who comes while no worker is ready waits
        say_listening(host, listener)
        _Supervisor(settings, listener, workers).run()


@contextlib.contextmanager
def _counting_together() -> Iterator[None]:
    """A folder in which the processes keep their metrics."""
    with tempfile.TemporaryDirectory(prefix="vitfast-metrics-") as folder:
        before = os.environ.get(FOLDER)
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]
            if before is not None:
                os.environ[FOLDER] = before


class _Supervisor:
    """Starts workers, and others in the place of those that end."""

    def __init__(self, settings: Settings, listener: socket.socket, count: int) -> None:
        self._settings, self._listener, self._count = settings, listener, count
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._due: dict[int, float] = {}  # worker number -> when it is to be started again
        self._pauses: dict[int, float] = {}
        self._signals: list[int] = []
        self._ever_ready = False

    def run(self) -> None:
        """Until a signal."""
        handled = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        before = {number: signal.signal(number, self._note) for number in handled}
        try:
            for index in range(self._count):
                self._start(index)
            while not {signal.SIGTERM, signal.SIGINT} & set(self._signals):
                self._look()
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _start(self, index: int) -> None:
        receiving, sending = self._context.Pipe(duplex=False)
        arguments = (self._settings, index, self._count, self._listener, sending)
        process = self._context.Process(target=work, args=arguments, name=f"vitfast-worker-{index}")
        process.start()
        sending.close()
        self._workers.append(_Worker(index, process, receiving, time.monotonic()))
        log.info("worker %d is process %d", index, process.pid)

    def _look(self) -> None:
        """Wait a moment for something to happen, and see to it."""
        waiting = [worker.pipe for worker in self._workers if not worker.ready]
        connection.wait([*waiting, *(worker.process.sentinel for worker in self._workers)], _TICK)
        if signal.SIGHUP in self._signals:
            self._signals = [number for number in self._signals if number != signal.SIGHUP]
            for worker in self._workers:
                self._send(worker, signal.SIGHUP)
        for worker in list(self._workers):
            self._hear(worker)
            if not worker.process.is_alive():
                self._ended(worker)
        for index, due in list(self._due.items()):
            if time.monotonic() >= due:
                del self._due[index]
                self._start(index)

    def _hear(self, worker: _Worker) -> None:
        if worker.ready or not worker.pipe.poll():
            return
        try:
            problem = worker.pipe.recv()
        except EOFError:  # it died before it could say anything
            return
        if problem and not self._ever_ready:
            raise RuntimeError(problem)
        if not problem:
            worker.ready = self._ever_ready = True
            log.info("worker %d is ready", worker.index)

    def _ended(self, worker: _Worker) -> None:
        from prometheus_client import multiprocess

        self._workers.remove(worker)
        worker.pipe.close()
        log.error("worker %d ended with code %s", worker.index, worker.process.exitcode)
        multiprocess.mark_process_dead(worker.process.pid)
        if not self._ever_ready:
            raise RuntimeError(f"a worker ended with code {worker.process.exitcode} before it was ready")
        well = worker.ready and time.monotonic() - worker.started > _WELL
        pause = 0.0 if well else self._pauses.get(worker.index, 0.0)
        self._due[worker.index] = time.monotonic() + pause
        self._pauses[worker.index] = min(_LONGEST_PAUSE, max(1.0, 2 * pause))

    def _send(self, worker: _Worker, number: int) -> None:
        assert worker.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(worker.process.pid, number)

    def _stop(self) -> None:
        """Have all end in order, and kill those that do not, or all when a second signal comes."""
        self._signals = self._signals[:1]
        for worker in self._workers:
            self._send(worker, signal.SIGTERM)
        end = time.monotonic() + self._settings.limits.drain_timeout + 10
        while alive := [worker for worker in self._workers if worker.process.is_alive()]:
            if time.monotonic() > end or len(self._signals) > 1:
                for worker in alive:
                    worker.process.kill()
            connection.wait([worker.process.sentinel for worker in alive], _TICK)
        for worker in self._workers:
            worker.process.join()


def work(settings: Settings, index: int, count: int, listener: socket.socket, ready: connection.Connection) -> None:
    """The life of a worker."""
    import torch
    from PIL import Image

    signal.signal(signal.SIGHUP, lambda *_: None)  # until there is something to reload
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all; the parent says when
    log_to(sys.stderr)
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    threads = settings.decode_threads or max(1, usable_cores() // count)
    Image.MAX_IMAGE_PIXELS = settings.limits.max_pixels  # which some of Pillow's decoders look at
    try:
        service = replace(settings, decode_threads=threads).on_device(index).service()
        service.warm_up()
        if service.failed is not None:
            raise service.failed
    except Exception as error:  # whatever loading and running a model raises is told to who started this
        log.exception("worker %d cannot start", index)
        ready.send(f"a worker cannot start: {type(error).__name__}: {error}")
        sys.exit(1)
    ready.send("")
    make_server(service, "", 0, worker=True).run(sockets=[listener])


def _follow_parent() -> None:
    """End when the parent has ended without a word."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
