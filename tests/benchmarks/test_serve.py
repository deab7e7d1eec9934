"""Load on a server: what is measured, and that a wrong answer is found."""

import asyncio
import json
import os
import random
import socket
import threading
import time

import pytest
import torch
from helpers.benching import bench
from helpers.engines import SMALL, engine
from helpers.serving import running

from vitfast import testing
from vitfast.benchmarks import load, page, result_file, serve, servers
from vitfast.benchmarks.device import CpuDevice
from vitfast.serving.limits import Limits

PICTURES = servers.pictures(8, 40, 60)
SERVED = {"name": "vitfast", "model": "small", "api": servers.APIS["vitfast"]}


@pytest.fixture(scope="module")
def small():
    return engine(SMALL)


def test_run(small, tmp_path):
    file = result_file.Results("serve", CpuDevice(), {}, tmp_path / "out.json")
    with running({"small": small}, Limits(max_queue_wait=0.05), max_batch=4) as (url, _):
        made = [servers.Served(url=url, pid=os.getpid(), **SERVED)]
        made.append(servers.Served("openai", url, "small", servers.APIS["openai"]))
        serve.run(
            made, small, PICTURES, batch=4, connections=20, seconds=0.2, rounds=2, steps=(0.3, 0.6), overload=8,
            overload_seconds=0.5, max_queue_wait=0.05, on_rows=file.add,
        )  # fmt: skip
    rows = result_file.read(file.path)["rows"]
    cases = [row["case"].split(" at ")[0].split("at ")[0] for row in rows]
    assert cases == [*["idle", "saturated"] * 2, *[""] * 4, *["flooded"] * 2]
    for row in rows:
        if not row["sent"]:  # a machine so slow that at its rate none was due in this time
            continue
        assert row["correct"], row
        assert row["answered"] + row["refused"] == row["sent"]
        assert row["median_ms"] <= row["p99_ms"]
    ours = {row["case"].split(" at ")[0]: row for row in rows if row["provider"] == "vitfast"}
    idle, saturated, flooded = ours["idle"], ours["saturated"], ours["flooded"]
    assert idle["mean_batch"] == 1
    assert idle["added_ms"] == pytest.approx(idle["median_ms"] - idle["engine_ms"], rel=0.5)
    assert saturated["mean_batch"] > 1.5
    assert 0 < saturated["engine_ratio"] < 2
    assert flooded["bound_ms"] > 100
    assert "memory_growth" in flooded
    assert len(result_file.table(file.content)) == 1
    html = page.page([file.content])
    assert 'class="latency"' in html
    assert "ms beyond the engine alone" in html


def test_wrong_answers_are_found(small):
    config, other = SMALL, testing.random_weights(SMALL, seed=1)
    import vitfast
    from vitfast.engine.engine import Engine

    wrong = Engine(vitfast.Checkpoint(config, other, small.preprocess), device=testing.device())
    with running({"small": wrong}) as (url, _):
        (idle, saturated) = serve.run(
            [servers.Served(url=url, **SERVED)], small, PICTURES, batch=4, seconds=0.1, rounds=1
        )
    for row in (idle, saturated):
        assert not row["correct"]
        assert row["error"].startswith(f"incorrect: {row['answered']} wrong answers (off by")


def test_pictures_that_cannot_be_told_apart(small):
    with pytest.raises(ValueError, match="nearly one embedding"):
        serve.expected(small, [PICTURES[0], PICTURES[1], PICTURES[0]])


def test_an_answer_that_is_none():
    api = servers.APIS["openai"]
    want = torch.ones(1, 2)
    answers = (b"{}", b"nothing", b'{"data": [{"embedding": [1, 1, 1]}]}', b'{"data": [{"embedding": [1, 1.0001]}]}')
    samples = [load.Sample(0, 1.0, 1.0, 200, answer) for answer in answers]
    assert serve.judge(api, samples, want) == (3, "not an embedding: KeyError")


def test_a_peer_may_scale_to_length_1():
    sample = load.Sample(0, 1.0, 1.0, 200, json.dumps({"data": [{"embedding": [0.6, 0.8]}]}).encode())
    want = torch.tensor([[3.0, 4.0]])
    assert serve.judge(servers.APIS["infinity"], [sample], want) == (0, "")
    assert serve.judge(servers.APIS["openai"], [sample], want)[0] == 1


@pytest.mark.parametrize(("api", "answer"), [
    ("infinity", {"data": [{"embedding": [1.0, 2.0]}]}),
    ("litserve", {"embedding": [1.0, 2.0]}),
])  # fmt: skip
def test_peers_are_asked_in_their_own_way(api, answer):
    made = servers.APIS[api]
    assert json.loads(made.request(b"x", "m"))
    assert made.embedding(json.dumps(answer).encode()).tolist() == [1, 2]


class Slow:
    """A server that answers one request after another, each after `seconds`; it breaks off those that say so."""

    def __init__(self, seconds):
        self.seconds, self.listener = seconds, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.lock = threading.Lock()
        self.threads = []
        self._start(self._accept)

    def _start(self, *call):
        self.threads.append(threading.Thread(target=call[0], args=call[1:], daemon=True))
        self.threads[-1].start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)  # which wakes who waits for a connection, as closing does not
        self.listener.close()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()

    def _accept(self):
        while True:
            try:
                opened, _ = self.listener.accept()
            except OSError:
                return
            self._start(self._answer, opened)

    def _answer(self, opened):
        with opened, opened.makefile("rb") as lines:
            while head := self._head(lines):
                body = lines.read(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
                if body == b"break":
                    return
                with self.lock:
                    time.sleep(self.seconds)
                if body == b"chunked":
                    opened.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
                else:
                    opened.sendall(b"HTTP/1.1 429 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
                    return

    def _head(self, lines):
        """The lines of one request up to the empty one; nothing when the client has gone."""
        head = b""
        while (line := lines.readline()) != b"\r\n":
            if not line:
                return b""
            head += line
        return head


@pytest.fixture
def slow():
    made = Slow(0.02)
    yield made
    made.close()


def test_an_open_loop_waits_for_nobody(slow):
    target = load.Target(slow.url, "/x", {}, [b"chunked"])
    samples = asyncio.run(load.open_loop(target, 4, 0.5, rate=200))
    rng, arrivals = random.Random(0), 0
    at = rng.expovariate(200)
    while at < 0.5:
        arrivals, at = arrivals + 1, at + rng.expovariate(200)
    assert len(samples) == arrivals
    assert {(sample.status, sample.answer) for sample in samples} == {(200, b"abc")}
    # 50 are answered a second: the last of them waited for all the others, and that counts.
    assert max(sample.seconds for sample in samples) > 0.02 * arrivals - 0.6
    assert max(sample.since_sent for sample in samples) < max(sample.seconds for sample in samples)


def test_a_closed_loop_pauses_when_it_is_refused_and_survives_lost_connections(slow):
    samples = asyncio.run(load.closed_loop(load.Target(slow.url, "/x", {}, [b"refuse", b"break"]), 4, 1.0))
    by = {status: [s for s in samples if s.status == status] for status in (0, 429)}
    assert len(by[0]) + len(by[429]) == len(samples)
    assert by[0][0].answer.startswith(b"IncompleteReadError")
    assert 1 < len(by[429]) <= 4 * 1.0 / load.PAUSE + 4


def test_arguments():
    for arguments, word in (
        (("--model", "vit_nothing"), "vit_tiny_patch16_224"),
        (("--peer", "x=http://h"), "API=URL"),
        (("--peer", "openai=ftp://h"), "API=URL"),
    ):
        result = bench("serve", *arguments)
        assert result.exit_code == 2
        assert word in result.output


@pytest.mark.full
def test_the_command(tmp_path):
    result = bench(
        "serve", "-m", "vit_tiny_patch16_224", "--device", "cpu", "--seconds", "1", "--rounds", "1",
        "--overload-seconds", "4", "--json", tmp_path / "out.json", "--html", tmp_path / "out.html",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.html").read_text().count("<svg") > 1
    assert all(row["correct"] for row in json.loads((tmp_path / "out.json").read_text())["rows"])
