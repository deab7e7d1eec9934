"""A real server under load: right answers, refusals where there is too much, and an end that loses nothing."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from helpers.photos import FakeEngine
from helpers.scripts import ROOT
from helpers.serving import HeldEngine, client, embedding, files, png, running

from vitfast.benchmarks import servers
from vitfast.benchmarks.load import Target, open_loop
from vitfast.serving.limits import Limits
from vitfast.serving.server import listening

PICTURES = [png(seed) for seed in range(16)]
EXPECTED = [embedding(content) for content in PICTURES]


async def load(url, count, connections, pick):
    """Send `count` requests over so many connections; the status of each, and whether its answer was right."""
    results = []

    async def work(numbers, session):
        for number in numbers:
            wanted = pick(number)
            contents = [PICTURES[i] for i in wanted]
            response = await session.post("/embeddings", files=files(*contents))
            right = True
            if response.status_code == 200:
                rows = np.float32([row["embedding"] for row in response.json()["data"]])
                right = np.array_equal(rows, np.stack([EXPECTED[i] for i in wanted]))
            results.append((response.status_code, right, response.headers.get("retry-after")))

    limits = httpx.Limits(max_connections=connections)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as session:
        await asyncio.gather(*(work(range(i, count, connections), session) for i in range(connections)))
    return results


def test_every_answer_is_the_engines_own():
    engine = FakeEngine()
    with running({"fake": engine}, Limits(max_queue_wait=60)) as (url, service):
        pick = lambda number: [(number * 7 + i) % len(PICTURES) for i in range(1 + number % 3)]  # noqa: E731
        results = asyncio.run(load(url, 240, 24, pick))
        assert [status for status, _, _ in results] == [200] * 240
        assert all(right for _, right, _ in results)
        assert max(engine.batches[10:]) > 3  # of requests that came together, beyond the warm-up's batches
        assert service.budget.used == service.in_flight == service.models["fake"].batcher.waiting == 0


def test_overload_is_refused_and_the_rest_is_right():
    engine = HeldEngine()
    with running({"fake": engine}, Limits(max_queue_wait=0.2), max_batch=4) as (url, service):
        engine.seconds = 0.05  # 80 images a second at most
        for size in (1, 2, 4):
            for _ in range(30):
                service.models["fake"].batcher.times.note(size, engine.seconds)
        started = time.perf_counter()
        results = asyncio.run(load(url, 200, 50, lambda number: [number % len(PICTURES)]))
        seconds = time.perf_counter() - started
        statuses = [status for status, _, _ in results]
        assert set(statuses) == {200, 429}
        assert all(right for _, right, _ in results)
        assert all(int(after) >= 1 for status, _, after in results if status == 429)
        assert statuses.count(200) >= 8
        assert seconds < 30
        assert service.budget.used == 0


def resident() -> int:
    """Bytes of this process in memory."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


async def watch(lags: list[float]) -> None:
    """Note how late the server's own loop is: that a busy machine withholds the processor is not its doing."""
    while True:
        started = time.perf_counter()
        await asyncio.sleep(0.01)
        lags.append(time.perf_counter() - started - 0.01)


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.full)])
def test_four_times_as_much_as_there_can_be_answers_to(seconds):
    """200 connections: no wrong answer, nothing lost, the excess refused, and what is accepted waits within bounds."""
    engine, api = HeldEngine(classes=0), servers.APIS["vitfast"]
    with running({"fake": engine}, Limits(max_queue_wait=1.0), max_batch=4) as (url, service):
        engine.seconds = 0.2  # 20 images a second
        for size in (1, 2, 4):
            for _ in range(30):
                service.models["fake"].batcher.times.note(size, engine.seconds)
        payloads = [api.request(content, "fake") for content in PICTURES]
        target = Target(url, api.path, api.headers, payloads)
        asyncio.run(open_loop(target, 200, seconds / 3, 80))
        before, lags = resident(), [0.0]
        watching = asyncio.run_coroutine_threadsafe(watch(lags), service.loop)
        samples = asyncio.run(open_loop(target, 200, seconds, 80))
        watching.cancel()
        assert resident() - before < 16 << 20
        assert service.in_flight == service.budget.used == 0
    assert len(samples) > 50 * seconds
    assert {sample.status for sample in samples} == {200, 429}
    accepted = [sample for sample in samples if sample.status == 200]
    assert len(accepted) > 10 * seconds
    assert all(sample.answer == EXPECTED[sample.payload].tobytes() for sample in accepted)
    assert np.percentile([sample.since_sent for sample in accepted], 99) <= 2 * 1.0 + 0.2 + 3 * max(lags)


def test_the_queue_is_bounded_by_bytes():
    engine = HeldEngine()
    size = len(PICTURES[0])
    with running({"fake": engine}, Limits(max_queue_bytes=6 * size, max_queue_wait=60)) as (url, service):
        engine.gate = threading.Event()

        async def scenario():
            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                first = [asyncio.ensure_future(session.post("/embeddings", files=files(PICTURES[0]))) for _ in range(2)]
                while service.models["fake"].batcher.waiting + service.models["fake"].batcher._running < 2:
                    await asyncio.sleep(0.01)
                others = [await session.post("/embeddings", files=files(*PICTURES[:4])) for _ in range(2)]
                engine.gate.set()
                return [r.status_code for r in await asyncio.gather(*first)], [r.status_code for r in others]

        assert asyncio.run(scenario()) == ([200, 200], [429, 429])
        assert service.budget.used == 0


def test_clients_that_go_leave_the_queue():
    engine = HeldEngine()
    with running({"fake": engine}) as (url, service):
        engine.gate = threading.Event()
        batcher = service.models["fake"].batcher
        host, port = url.removeprefix("http://").split(":")
        body = httpx.Request("POST", url, files=files(PICTURES[0]))
        content = body.read()
        head = f"POST /embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: {body.headers['content-type']}\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        sockets = []
        for expected in ((1, 0), (1, 1), (1, 2)):  # running, waiting
            sockets.append(socket.create_connection((host, int(port))))
            sockets[-1].sendall(head.encode() + content)
            wait_until(lambda expected=expected: (batcher._running, batcher.waiting) == expected)
        sockets[1].close()
        wait_until(lambda: batcher.waiting == 1)
        engine.gate.set()
        assert sockets[2].recv(100).startswith(b"HTTP/1.1 200")
        for opened in sockets:
            opened.close()
        wait_until(lambda: service.budget.used == 0)
        assert engine.batches[-2:] == [1, 1]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_requests_without_an_answer_in_time():
    engine = HeldEngine()
    with client({"fake": engine}, Limits(request_timeout=0.1)) as server:
        engine.gate = threading.Event()
        response = server.post("/embeddings", files=files(PICTURES[0]))
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "timeout"
        assert response.headers["retry-after"] == "1"
        engine.gate.set()
        assert server.post("/embeddings", files=files(PICTURES[0])).status_code == 200


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /embeddings HT", b""),
        (
            b"POST /embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
            b"408",
        ),
    ],
)
def test_slow_senders_are_cut(sent, answer):
    with running({"fake": FakeEngine()}, Limits(header_timeout=0.2, body_timeout=0.2)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as opened:
            opened.sendall(sent)
            received = b""
            while part := opened.recv(1000):
                received += part
        assert received[9:12] == answer


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_are_sent_at_once(host):
    """No small packet waits for the one before it to be acknowledged, which takes a client 40 ms."""

    async def accepted(listener: socket.socket) -> int:
        option: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(reader, writer):
            option.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            writer.close()
            return await option

    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with listening(host, 0) as listener:
        assert asyncio.run(accepted(listener))


def test_connections_are_kept_longer_than_a_header_may_take():
    with running({"fake": FakeEngine()}, Limits(header_timeout=0.3, keep_alive=1.5)) as (url, _):
        address = url.removeprefix("http://")

        def closed(opened):
            """Seconds until the server closes it."""
            started = time.monotonic()
            assert opened.sock.recv(1) == b""
            return time.monotonic() - started

        with contextlib.closing(http.client.HTTPConnection(address, timeout=20)) as opened:
            for _ in range(2):
                opened.request("GET", "/health/live")
                sock = opened.sock
                assert opened.getresponse().read() and opened.sock is sock
                time.sleep(0.6)
            opened.sock.sendall(b"GET /hea")  # the clock of a header runs on a kept connection, too
            assert closed(opened) < 1.2
            opened.close()
            opened.request("GET", "/health/live")
            opened.getresponse().read()
            assert 1 < closed(opened) < 10


def test_a_body_that_drips_is_cut():
    head = b"POST /embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
    with running({"fake": FakeEngine()}, Limits(body_timeout=0.3)) as (url, service):
        host, port = url.removeprefix("http://").split(":")
        started = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=20) as opened:
            opened.sendall(head)
            opened.settimeout(0.02)
            received = b""
            while not received and time.monotonic() < started + 20:
                with contextlib.suppress(TimeoutError):
                    opened.sendall(b" ")
                    received = opened.recv(1000)
        assert received[9:12] == b"408"
        assert time.monotonic() - started < 10
        wait_until(lambda: service.in_flight == service.budget.used == 0)


SERVER = """
import sys, time
sys.path.insert(0, "tests")
from helpers.serving import HeldEngine
from vitfast.serving.server import log_to, run
from vitfast.serving.service import Service
engine = HeldEngine()
service = Service({"fake": engine}, max_batch=2, load=lambda name: engine)
engine.seconds = 0.03
log_to(sys.stderr)
run(service, "127.0.0.1", 0)
print(service.requests, "requests")
"""


def test_sigterm_loses_no_request():
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", SERVER],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first = json.loads(process.stderr.readline())
        url = first["message"].removeprefix("listening on ")

        async def scenario():
            sent, results = 0, []

            async def work(session):
                nonlocal sent
                while True:
                    sent += 1
                    try:
                        response = await session.post("/embeddings", files=files(PICTURES[sent % 16]))
                    except (httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                        return  # nobody listens any more, or an idle connection was closed: the log has none of these
                    results.append(response.status_code)
                    if response.status_code == 503:
                        return

            async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                while True:
                    with contextlib.suppress(httpx.ConnectError):
                        if (await session.get("/health/ready")).status_code == 200:
                            break
                    await asyncio.sleep(0.05)
                workers = [asyncio.ensure_future(work(session)) for _ in range(16)]
                process.send_signal(signal.SIGHUP)
                while results.count(200) < 20:
                    await asyncio.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                await asyncio.gather(*workers)
            return results

        results = asyncio.run(scenario())
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert set(results) <= {200, 503}
        assert results.count(200) > 20
        assert "requests" in out
        lines = [json.loads(line) for line in err.splitlines()]
        taken = [line["status"] for line in lines if line.get("endpoint") == "/embeddings"]
        assert sorted(taken) == sorted(results)  # whatever was taken has been answered, and the answer has arrived
        assert "Traceback" not in err
        assert "loading fake anew" in err
    finally:
        process.kill()
        process.wait()
