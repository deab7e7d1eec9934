"""Models loaded anew under load, and several processes behind one port."""

import asyncio
import json
import logging
import multiprocessing
import os
import re
import shlex
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
import torch
import typer
from helpers.engines import SMALL, engine
from helpers.photos import FakeEngine
from helpers.scripts import ROOT
from helpers.serving import client, embedding, files, png, running

from vitfast.cli.app import app
from vitfast.serving import workers
from vitfast.serving.limits import Limits
from vitfast.serving.model import served_names
from vitfast.serving.settings import Settings

PICTURES = [png(seed) for seed in range(4)]
OLD = [embedding(content) for content in PICTURES]


class NewEngine(FakeEngine):
    """The fake after it was trained a little more."""

    def __call__(self, images, *, preprocessed):
        output = super().__call__(images, preprocessed=preprocessed)
        output.embedding += 1000
        return output


class BrokenEngine(FakeEngine):
    """Cannot run."""

    def __call__(self, images, *, preprocessed):
        raise RuntimeError("no memory")


def test_a_reload_loses_no_request():
    loaded = []

    def load(name):
        loaded.append(name)
        time.sleep(0.1)
        return NewEngine()

    async def scenario(url, service):
        answers = []
        done = False

        async def work(session, number):
            while not done:
                which = number % len(PICTURES)
                response = await session.post("/embeddings", files=files(PICTURES[which]))
                assert response.status_code == 200, response.text
                answers.append((which, response.json()["data"][0]["embedding"]))
                number += 1

        async with httpx.AsyncClient(base_url=url, timeout=60) as session:
            tasks = [asyncio.ensure_future(work(session, number)) for number in range(8)]
            while not answers:
                await asyncio.sleep(0.01)
            before = len(answers)
            # Twice at once is once.
            loop = service.loop
            both = [asyncio.wrap_future(asyncio.run_coroutine_threadsafe(service.reload(), loop)) for _ in range(2)]
            await asyncio.gather(*both)
            after = len(answers)
            while len(answers) < after + 10:
                await asyncio.sleep(0.01)
            done = True
            await asyncio.gather(*tasks)
        return before, answers

    with running({"fake": FakeEngine()}, load=load) as (url, service):
        old = service.models["fake"]
        before, answers = asyncio.run(scenario(url, service))
        assert loaded == ["fake"]
        assert service.models["fake"] is not old
        assert not old.batcher._thread.is_alive()
        assert 'vitfast_reloads_total{model="fake",result="done"} 1.0' in service.metrics.text()[0].decode()
    kinds = []
    for which, row in answers:
        offset = np.float32(row) - OLD[which]
        assert (offset == offset[0]).all()
        kinds.append(int(offset[0]))
    assert set(kinds) == {0, 1000}
    assert kinds[before - 1] == 0
    assert kinds[-1] == 1000


@pytest.mark.parametrize("broken", ["load", "run"])
def test_a_reload_that_fails_changes_nothing(broken, caplog):
    def load(name):
        if broken == "load":
            raise ValueError("a damaged file")
        return BrokenEngine()

    threads = set(threading.enumerate())
    with client({"fake": FakeEngine()}, load=load) as server, caplog.at_level(logging.ERROR, "vitfast.serving"):
        old = server.service.models["fake"]
        server.portal.call(server.service.reload)
        assert server.service.models["fake"] is old
        assert "cannot be loaded anew" in caplog.text
        response = server.post("/embeddings", files=files(PICTURES[0])).json()
        assert np.array_equal(np.float32(response["data"][0]["embedding"]), OLD[0])
        text = server.get("/metrics").text
        assert 'vitfast_reloads_total{model="fake",result="failed"} 1.0' in text
        assert 'vitfast_queue_inputs{kind="image",model="fake"} 0.0' in text
    assert set(threading.enumerate()) <= threads


def pretend(settings, index, count, listener, ready):
    """A worker that answers its process's number to whoever connects; or cannot start."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if settings.models == {"bad": ""}:
        ready.send("a worker cannot start: no such model")
        os._exit(1)
    ready.send("")
    while True:
        opened, _ = listener.accept()
        opened.sendall(str(os.getpid()).encode())
        opened.close()


@pytest.fixture
def supervisor(monkeypatch):
    """Makes supervisors of forked workers that pretend, on a listener."""
    monkeypatch.setattr(workers, "work", pretend)
    monkeypatch.setattr(workers, "_TICK", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as listener, workers._counting_together():

        def make(models, count=2):
            made = workers._Supervisor(Settings(models), listener, count)
            made._context = multiprocessing.get_context("fork")
            return made

        yield make, listener.getsockname()


def ask(address):
    with socket.create_connection(address, 120) as opened:
        return int(opened.recv(100))


def test_a_worker_that_is_killed_is_replaced(supervisor):
    make, address = supervisor
    made, pids, lost = make({"m": ""}), [], []

    def ready():
        return [worker.process.pid for worker in list(made._workers) if worker.ready]

    def disturb():
        try:
            while len(ready()) < 2:
                time.sleep(0.01)
            first, second = ready()
            os.kill(first, signal.SIGKILL)
            end = time.monotonic() + 120
            while time.monotonic() < end and (first in ready() or len(ready()) < 2):
                try:
                    pids.append(ask(address))  # the other goes on meanwhile
                except (ConnectionError, ValueError) as error:  # no answer: the one that was killed had taken it
                    lost.append(error)
            pids.extend([first, second, *ready()])
        finally:
            made._signals.append(signal.SIGTERM)

    thread = threading.Thread(target=disturb)
    thread.start()
    made.run()
    thread.join()
    *asked, first, second, one, other = pids
    assert len(lost) <= 1, lost
    assert second in asked
    assert second in (one, other)
    assert first not in (one, other)
    assert not any(worker.process.is_alive() for worker in made._workers)
    assert [worker.process.exitcode for worker in made._workers] == [0, 0]


def test_a_server_whose_workers_cannot_start_says_why(supervisor):
    make, _ = supervisor
    with pytest.raises(RuntimeError, match="no such model"):
        make({"bad": ""}).run()


def test_workers_that_die_again_and_again_are_waited_for_longer(supervisor):
    make, _ = supervisor
    made = make({"m": ""}, 1)
    made._ever_ready = True
    pauses = []
    for _ in range(7):
        made._start(0)
        (worker,) = made._workers
        worker.process.kill()
        worker.process.join()
        made._ended(worker)
        pauses.append(round(made._due.pop(0) - time.monotonic()))
    assert pauses == [0, 1, 2, 4, 8, 16, 30]


def test_workers_are_dealt_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = [Settings({}, {"device": None}).on_device(index).options["device"] for index in range(3)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    for named in ("cpu", "cuda:1"):
        assert Settings({}, {"device": named}).on_device(0).options["device"] == named


def test_the_examples_commands_are_taken():
    unit = (ROOT / "examples" / "vitfast.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    container = (ROOT / "examples" / "Containerfile").read_text()
    (entry,), (command,) = (re.findall(rf"^{word} (\[.*)$", container, re.MULTILINE) for word in ("ENTRYPOINT", "CMD"))
    group = typer.main.get_command(app)
    for line in (shlex.split(start), [*json.loads(entry), *json.loads(command)]):
        assert Path(line[0]).name == "vitfast"
        context = group.commands["serve"].make_context("serve", line[2:])
        assert line[1] == "serve"
        assert served_names(context.params["models"])
    assert f"TimeoutStopSec={Limits().drain_timeout * 2:.0f}" in unit


@pytest.mark.full
def test_workers_under_load(tmp_path):
    """A real server of two processes: one is killed, the models are loaded anew, and it ends in order."""
    made = engine(SMALL)
    made.save(tmp_path / "model")
    want = [embedding(content, made) for content in PICTURES]
    command = [sys.executable, "-m", "vitfast", "serve", f"m={tmp_path / 'model'}", "--port", "0", "--workers", "2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stderr=log, stdout=subprocess.PIPE)

    def said(pattern, count=1):
        end = time.monotonic() + 120
        while len(found := re.findall(pattern, (tmp_path / "log").read_text())) < count:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.05)
        return found

    async def scenario():
        (url,) = said(r"listening on (http://[\d.:]+)")
        pids = [int(pid) for pid in said(r"worker \d is process (\d+)", 2)]
        said("is ready", 2)
        lost, statuses, done = 0, [], False

        async def work(number):
            nonlocal lost
            while not done:
                number += 1
                try:  # a connection for each, so that the kernel deals them out anew
                    async with httpx.AsyncClient(base_url=url, timeout=60) as session:
                        response = await session.post("/embeddings", files=files(PICTURES[number % 4]))
                except httpx.TransportError:
                    lost += 1
                    continue
                statuses.append(response.status_code)
                if response.status_code == 200:
                    row = np.float32(response.json()["data"][0]["embedding"])
                    assert np.allclose(row, want[number % 4], atol=1e-4)

        tasks = [asyncio.ensure_future(work(number)) for number in range(4)]
        await asyncio.sleep(1)
        os.kill(pids[0], signal.SIGKILL)
        await asyncio.to_thread(said, "is ready", 3)
        at_most, before = lost, len(statuses)
        process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(said, "m has been loaded anew", 2)
        await asyncio.sleep(0.5)
        assert lost == at_most  # by the kill, what the dead one was at work on, and nothing by the reload
        assert at_most <= 4
        assert len(statuses) > before
        async with httpx.AsyncClient(base_url=url) as session:
            text = (await session.get("/metrics")).text
        counted = float(re.search(r'requests_total\{endpoint="/embeddings",status="200"\} ([\d.]+)', text)[1])
        assert counted >= 0.9 * statuses.count(200)  # of all workers together, whichever was asked
        done = True
        await asyncio.gather(*tasks)
        assert set(statuses) == {200}
        process.send_signal(signal.SIGTERM)
        return pids

    try:
        asyncio.run(scenario())
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, (tmp_path / "log").read_text()
        assert b"2 workers have ended" in out
        assert "Traceback" not in (tmp_path / "log").read_text()
        for line in (tmp_path / "log").read_text().splitlines():
            json.loads(line)
    finally:
        process.kill()
        process.wait()
