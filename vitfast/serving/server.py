"""The process: uvicorn with an end that loses no request, and a clock for senders of slow headers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from vitfast.serving.app import create_app
from vitfast.serving.service import Service

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("vitfast.serving")

_BACKLOG = 1024
_LINGER = 0.2
"""Seconds that connections stay open after the last answer: closing one while its client is still sending a request
that was refused would take the refusal away."""


def make_server(service: Service, host: str, port: int, *, worker: bool = False) -> uvicorn.Server:
    """A server of one process, to be run with `run()`.

    The first SIGTERM or SIGINT has it answer what it has taken, refuse what is new with 503, and then end; the second
    ends it at once. SIGHUP has it load its models anew. A service that cannot warm up ends it, too.

    Args:
        worker: it is one of several, whose parent says when: only its SIGTERM counts, and that once.

    Raises:
        ImportError: as `create_app`.
    """
    app = create_app(service)
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    limits = service.limits

    class Protocol(H11Protocol):
        """Closes a connection on which no whole header came in time."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._deadline is not None:
                self._deadline.cancel()

        def _watch(self) -> None:
            """Let the clock run while a header comes, and from its start: more bytes do not set it back."""
            at_work = self.cycle is not None and not self.cycle.response_complete
            if at_work and self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
            elif not at_work and self._deadline is None:
                self._deadline = self.loop.call_later(limits.header_timeout, self.transport.close)

    class Server(uvicorn.Server):
        """Drains before it ends."""

        _draining: asyncio.Task[None] | None = None
        _reloading: asyncio.Task[None] | None = None
        _hung_up = False

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            main = threading.current_thread() is threading.main_thread()
            before = signal.getsignal(signal.SIGHUP)
            with super().capture_signals():
                if main and before is not signal.SIG_IGN:
                    signal.signal(signal.SIGHUP, self._hang_up)
                try:
                    yield
                finally:
                    if main:
                        signal.signal(signal.SIGHUP, before or signal.SIG_DFL)

        def _hang_up(self, sig: int, frame: FrameType | None) -> None:
            self._hung_up = True

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if worker and (service.draining or sig != signal.SIGTERM):
                return
            if service.draining:
                super().handle_exit(sig, frame)
                return
            service.draining = True
            log.info("signal %d: finishing %d requests", sig, service.in_flight)

        async def on_tick(self, counter: int) -> bool:
            if service.failed is not None:
                return True
            if service.draining and self._draining is None:
                self._draining = asyncio.ensure_future(self._drain())
            if self._hung_up and service.ready and not service.draining:
                self._hung_up = False
                self._reloading = asyncio.ensure_future(service.reload())
            return await super().on_tick(counter)

        async def _drain(self) -> None:
            loop = asyncio.get_running_loop()
            end = loop.time() + limits.drain_timeout
            while service.in_flight and loop.time() < end:
                await asyncio.sleep(0.02)
            await asyncio.sleep(_LINGER)
            self.should_exit = True

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="on",
        backlog=_BACKLOG,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
        timeout_keep_alive=limits.keep_alive,  # type: ignore[arg-type]  # it goes to call_later
        timeout_graceful_shutdown=max(1, int(limits.drain_timeout)),
    )
    return Server(config)


class JsonLines(logging.Formatter):
    """Log records as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger and message; of a request its fields, of an error its traceback."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to(stream: TextIO, level: int = logging.INFO) -> None:
    """Send what this package and uvicorn log to a stream, as JSON lines."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name in ("vitfast.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "vitfast.serving" else max(level, logging.WARNING))
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each odd byte of a client


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to an address, made first so that a port in use is one clear error.

    Raises:
        OSError: if the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol: asyncio switches Nagle's algorithm off for sockets that say they are TCP's, and without that an
    # answer's body waits 40 ms for the client to acknowledge its header.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        yield listener


def say_listening(host: str, listener: socket.socket) -> None:
    """Log where a server is to be found."""
    shown = f"[{host}]" if ":" in host else host
    log.info("listening on http://%s:%d", shown, listener.getsockname()[1])


def run(service: Service, host: str, port: int) -> None:
    """Serve until a signal ends it.

    Raises:
        RuntimeError: if a model cannot be warmed up. OSError: if the port cannot be had.
    """
    with listening(host, port) as listener:
        server = make_server(service, host, port)
        say_listening(host, listener)
        server.run(sockets=[listener])
    if service.failed is not None:
        raise RuntimeError(f"a model cannot be warmed up: {service.failed}") from service.failed
