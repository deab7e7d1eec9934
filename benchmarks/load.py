"""Load for an HTTP server: requests over kept connections, at a rate of our own (open loop) or as fast as it answers.

In the open loop requests come as a Poisson process, whether or not the server keeps up, and a request's time runs from
when it was due: a slow server cannot slow down who asks (no coordinated omission). In the closed loop each connection
sends its next request when the last was answered, a little later if that was refused.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

OVERLOADED = (429, 503)
"""Statuses of a server that has too much to do."""
PAUSE = 0.1
"""Seconds after which a closed loop tries again."""


class Target(NamedTuple):
    """A server, and what to send it: `payloads` are whole bodies, all of the same headers."""

    url: str
    path: str
    headers: Mapping[str, str]
    payloads: Sequence[bytes]


@dataclass(slots=True)
class Sample:
    """A request that was sent: which payload, seconds since it was due and since it was sent, its status and answer.

    Status 0: the connection was lost, and `answer` says how.
    """

    payload: int
    seconds: float
    since_sent: float
    status: int
    answer: bytes


class Connection:
    """A connection that is kept, and made anew where the server closes it."""

    def __init__(self, target: Target) -> None:
        parts = urlsplit(target.url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        head = {"Host": parts.netloc, "Connection": "keep-alive", **target.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        start = f"POST {parts.path.rstrip('/')}{target.path} HTTP/1.1\r\n{lines}"
        self._requests = [f"{start}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in target.payloads]
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> None:
        """Connect; what `send` does on first need."""
        self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 20)

    async def send(self, payload: int) -> tuple[int, bytes]:
        """Status and body of the answer to a payload; status 0 and the reason where there is none."""
        try:
            if self._streams is not None and self._streams[0].at_eof():  # it was idle too long for the server
                await self.close()
            if self._streams is None:
                await self.open()
            assert self._streams is not None
            reader, writer = self._streams
            writer.write(self._requests[payload])
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status, headers = int(head[9:12]), head
            body = await _body(reader, headers)
            if "\r\nconnection: close" in headers:
                await self.close()
            return status, body
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            await self.close()
            return 0, repr(error).encode()

    async def close(self) -> None:
        """Close it; the next request opens another."""
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def _body(reader: asyncio.StreamReader, head: str) -> bytes:
    if "\r\ntransfer-encoding: chunked" in head:
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        return b"".join(parts)
    _, found, rest = head.partition("\r\ncontent-length:")
    if not found:
        raise ValueError("an answer without its length")
    return await reader.readexactly(int(rest.partition("\r\n")[0]))


async def closed_loop(target: Target, connections: int, seconds: float) -> list[Sample]:
    """Keep so many requests under way, for so long."""
    samples: list[Sample] = []
    end = time.perf_counter() + seconds
    numbers = _shuffled(len(target.payloads))

    async def work(connection: Connection) -> None:
        while (started := time.perf_counter()) < end:
            payload = next(numbers)
            status, answer = await connection.send(payload)
            taken = time.perf_counter() - started
            samples.append(Sample(payload, taken, taken, status, answer))
            if status in OVERLOADED:
                await asyncio.sleep(PAUSE)

    await _over(target, connections, lambda made: asyncio.gather(*map(work, made)))
    return samples


async def open_loop(target: Target, connections: int, seconds: float, rate: float, seed: int = 0) -> list[Sample]:
    """Send `rate` requests a second in the mean, for so long, over so many connections.

    A request that finds all of them busy waits for one, and its time runs.
    """
    samples: list[Sample] = []
    rng, numbers = random.Random(seed), _shuffled(len(target.payloads))

    async def arrivals(made: Sequence[Connection]) -> None:
        free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        for connection in made:
            free.put_nowait(connection)

        async def one(payload: int, due: float) -> None:
            connection = await free.get()
            sent = time.perf_counter()
            status, answer = await connection.send(payload)
            now = time.perf_counter()
            samples.append(Sample(payload, now - due, now - sent, status, answer))
            free.put_nowait(connection)

        start = due = time.perf_counter()
        tasks = []
        while (due := due + rng.expovariate(rate)) < start + seconds:
            if (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            tasks.append(asyncio.ensure_future(one(next(numbers), due)))
        await asyncio.gather(*tasks)

    await _over(target, connections, arrivals)
    return samples


async def _over(target: Target, connections: int, run: Callable[[list[Connection]], object]) -> None:
    """Have something run over open connections, which are closed afterwards."""
    made = [Connection(target) for _ in range(connections)]
    try:
        for connection in made:
            await connection.open()
        await run(made)  # type: ignore[misc]
    finally:
        for connection in made:
            await connection.close()


def _shuffled(count: int) -> Iterator[int]:
    """Numbers below `count`, each as often as the others, without end."""
    rng, numbers = random.Random(1), list(range(count))
    while True:
        rng.shuffle(numbers)
        yield from numbers
