"""vitfast.pipeline.devices: several processes give the rows of one, and one that dies loses and doubles nothing."""

import json
import os
import pickle
import signal
import tarfile
import time

import numpy as np
import pyarrow.compute as pc
import pytest
from helpers.engines import engine
from helpers.folder_runs import Runs
from helpers.photos import FakeEngine, make_photos, save
from typer.testing import CliRunner

import vitfast
from vitfast.cli.app import app
from vitfast.images.files import collect
from vitfast.pipeline import devices, manifest
from vitfast.pipeline.devices import (
    DeviceError,
    DeviceProcesses,
    Done,
    Failed,
    Job,
    Ready,
    device_names,
    is_share,
)
from vitfast.pipeline.embed import OK, Result, embed_images
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet, write_rows
from vitfast.pipeline.sources import find_sources

STAND_IN = """
import os, pickle, sys, time
from multiprocessing.connection import Connection
class Job(pickle.Unpickler):
    def find_class(self, module, name):
        return type(name, (), {})
_, _, number, _ = Job(sys.stdin.buffer).load()
pipe = Connection(int(sys.argv[2]), readable=False)
"""
"""How a process begins that then does what a test says, without the seconds that it takes to import torch."""


def sends(*messages):
    """Code that sends these."""
    return "".join(f"pipe.send_bytes({pickle.dumps(message)!r})\n" for message in messages)


def ready(weights="w"):
    return Ready(4, Identity(weights, {}, "float32"))


@pytest.fixture
def stand_in(monkeypatch):
    """A function that takes what processes do from their job on."""
    return lambda code: monkeypatch.setattr(devices, "_BEGIN", STAND_IN + code)


def job(out, **changes):
    return Job(**{"sources": ["s"], "model": "m", "out": str(out), **changes})


def test_names():
    assert device_names("0,1") == ["cuda:0", "cuda:1"]
    assert device_names("cpu, cpu") == ["cpu", "cpu"]
    for wrong in ("", "0,", "0,0", "0,cuda:0"):
        with pytest.raises(ValueError, match="expected devices like 0,1 or cpu,cpu, each GPU once; got "):
            device_names(wrong)


def test_shares():
    """Each key falls to one process, and about as many to each; what no text can hold included."""
    keys = [f"/photos/{number}.jpg" for number in range(3000)] + ["\udcff", "\ud800", ""]
    counts = [sum(is_share(key, number, 3) for key in keys) for number in range(3)]
    assert sum(counts) == len(keys) and min(counts) > 900
    assert all(sum(is_share(key, number, 3) for number in range(3)) == 1 for key in keys)


def test_rows_are_those_of_one_process(tmp_path):
    """Files and an archive through two processes; pictures that are bad and some that were done before included."""
    photos, shard, out = make_photos(tmp_path / "photos"), tmp_path / "more.tar", tmp_path / "out"
    with tarfile.open(shard, "w") as archive:
        for seed in range(5):
            archive.add(save(tmp_path / "inside" / f"{seed}.png", 100 + seed), f"{seed}.png")
        archive.add(photos / "b00.jpg", "bad.jpg")
    engine().save(tmp_path / "model")
    one = vitfast.load(tmp_path / "model", device="cpu")

    def run(folder, sources, **options):
        folder = EmbeddingFolder(folder, tmp_path / "model")
        return write_parquet(embed_images(one, folder.todo(find_sources(sources))), folder, one, **options)

    run(out, [photos / "p0.png", photos / "p1.png"])
    run(tmp_path / "one", [photos, shard])
    command = ["embed", photos, shard, "-m", tmp_path / "model", "-o", out, "--devices", "cpu,cpu", "--json"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    answer = json.loads(result.stdout)
    assert result.exit_code == 1  # some pictures are bad
    assert (answer["done"], len(answer["failed"]), answer["skipped"], answer["lost"]) == (13, 4, 2, None)
    expected, got = (read_embeddings(folder).sort_by("path") for folder in (tmp_path / "one", out))
    same = [name for name in expected.column_names if name != "embedding"]
    assert got.select(same).equals(expected.select(same))
    ours, theirs = (np.stack(table["embedding"].drop_null().to_numpy()) for table in (got, expected))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)  # batches are other ones
    assert manifest.differences(out) == []
    assert sorted(path.name for path in out.iterdir() if path.name[0] == ".") == []


def test_a_process_that_dies(stand_in, tmp_path):
    """The other goes on, what the dead one sent is kept, a message that it did not finish is none."""
    rows = [[Result(f"/{number}-{i}", OK) for i in range(4)] for number in range(2)]
    stand_in(
        sends(ready()) + f"if number == 0:\n    {sends(rows[0][:3])}"
        "    os.write(pipe.fileno(), (1000).to_bytes(4, 'big') + b'torn')\n"
        "    os.kill(os.getpid(), 9)\n" + sends(rows[1], Done(7, ["c"], {"l": "why"}, {}, 0.5, 1.0))
    )
    with EmbeddingFolder(tmp_path / "out", "m") as folder, DeviceProcesses(["cpu", "cpu"], job(folder.path)) as two:
        with pytest.raises(DeviceError, match=r"^process 0 \(cpu\) was killed by SIGKILL; the same command goes on"):
            write_rows(two.results(), folder, two.dimension, two.identity)
        assert (two.skipped, two.changed, two.left_out) == (7, ["c"], {"l": "why"})
    paths = read_embeddings(tmp_path / "out")["path"].to_pylist()
    assert sorted(paths) == ["/0-0", "/0-1", "/0-2", "/1-0", "/1-1", "/1-2", "/1-3"]


def test_a_process_that_fails_later(stand_in, tmp_path):
    stand_in(sends(ready(), Failed("MemoryError: none left", False)))
    with DeviceProcesses(["cpu"], job(tmp_path)) as one, pytest.raises(DeviceError, match="failed: MemoryError: none"):
        list(one.results())


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (sends(Failed("no such model", True)), ValueError, "^no such model$"),
        (sends(Failed("OSError: x", False)), RuntimeError, "^OSError: x$"),
        ("sys.exit(3)", RuntimeError, r"process 0 \(cpu\) ended with exit code 3"),
        (
            f"if number == 0:\n    {sends(ready('w0'))}else:\n    {sends(ready('w1'))}time.sleep(100)",
            ValueError,
            r"process 1 \(cpu\) does not make the embeddings of the first: weights 'w1', not 'w0'",
        ),
    ],
    ids=["usage", "failure", "death", "another model"],
)
def test_a_process_that_cannot_begin(code, error, message, stand_in, tmp_path):
    stand_in(code)
    with pytest.raises(error, match=message):
        DeviceProcesses(["cpu", "cpu"], job(tmp_path))


def test_no_process_is_left(stand_in, tmp_path):
    stand_in(sends(ready()) + "time.sleep(100)")
    with DeviceProcesses(["cpu", "cpu"], job(tmp_path)) as two:
        processes = two._processes
        assert [process.poll() for process in processes] == [None, None]
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_options_that_do_not_go_together(tmp_path):
    for more in (["--device", "cpu"], ["--profile", "p.html"]):
        result = CliRunner().invoke(app, ["embed", "x", "-m", "m", "-o", "o", "--devices", "cpu,cpu", *more])
        assert result.exit_code == 2 and "--devices goes without --device and --profile" in result.stderr


def test_float16(tmp_path, monkeypatch):
    """Half as many bytes, kept apart from float32, and no vector that it cannot hold."""
    monkeypatch.setattr("vitfast.engine.load.load", lambda *_, **__: FakeEngine())
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    command = ["embed", str(photos), "-m", "m", "-o", str(out)]
    assert CliRunner().invoke(app, [*command, "--output-dtype", "float16"]).exit_code == 1
    whole = tmp_path / "whole"
    assert CliRunner().invoke(app, ["embed", str(photos), "-m", "m", "-o", str(whole)]).exit_code == 1
    half, single = read_embeddings(out), read_embeddings(whole)
    assert str(half["embedding"].type) == "fixed_size_list<element: halffloat>[4]"
    ours, theirs = (np.stack(table["embedding"].drop_null().to_numpy()) for table in (half, single))
    assert ours.dtype == np.float16 and np.array_equal(ours, theirs.astype(np.float16))
    save(photos / "later.png", 50)
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "output_dtype 'float16', not 'float32'" in refused.stderr
    found = CliRunner().invoke(app, ["similar", str(photos / "p3.png"), str(out), "--json"])
    assert found.exit_code == 0 and len(json.loads(found.stdout)["matches"]) == 9

    class Large(FakeEngine):
        def __call__(self, *arguments, **options):
            output = super().__call__(*arguments, **options)
            output.embedding[1] = 70000
            return output

    folder, large = EmbeddingFolder(tmp_path / "large", "m"), Large()
    paths = [path for path in collect([photos]) if path.name in ("p0.png", "p1.png")]
    summary = write_parquet(embed_images(large, paths), folder, large, output_dtype="float16")
    assert list(summary.failed.values()) == ["the embedding does not fit float16: it has 7e+04, allowed is 65504"]
    assert summary.done == 1 and read_embeddings(tmp_path / "large")["embedding"].null_count == 1
    with pytest.raises(ValueError, match="output_dtype must be one of float32, float16, got 'int8'"):
        write_parquet([], folder, large, output_dtype="int8")


def many_photos(folder, count):
    for number in range(count):
        save(folder / f"{number:05d}.png", number)
    return folder


def check_whole(out, model, photos, count):
    """Each photograph has the row that one process gives it."""
    table = read_embeddings(out).sort_by("path")
    assert table["path"].to_pylist() == [str(path) for path in collect([photos])] and len(table) == count
    assert pc.all(pc.equal(table["status"], "ok")).as_py()
    one = vitfast.load(model, device="cpu")
    expected = np.stack([result.embedding for result in embed_images(one, collect([photos]))])
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, rtol=0, atol=2e-5)
    assert manifest.differences(out) == []


@pytest.mark.full
def test_a_real_process_that_is_killed(tmp_path):
    photos, out, count = many_photos(tmp_path / "photos", 2000), tmp_path / "out", 2000
    engine().save(tmp_path / "model")
    work = Job([str(photos)], str(tmp_path / "model"), str(out))
    with EmbeddingFolder(out, work.model) as folder, DeviceProcesses(["cpu", "cpu"], work) as two:
        seen = []

        def kill(result):
            seen.append(result.path)
            if len(seen) == 5:
                two._processes[0].kill()

        with pytest.raises(DeviceError, match=r"process 0 \(cpu\) was killed by SIGKILL"):
            write_rows(two.results(), folder, two.dimension, two.identity, on_result=kill)
    assert len(read_embeddings(out)) == len(seen) < count
    with EmbeddingFolder(out, work.model) as folder, DeviceProcesses(["cpu", "cpu"], work) as two:
        summary = write_rows(two.results(), folder, two.dimension, two.identity)
        assert two.skipped == len(seen)
    assert summary.done == count - len(seen)
    check_whole(out, tmp_path / "model", photos, count)


@pytest.mark.full
def test_the_caller_killed(tmp_path):
    """Its processes end by themselves, and the next run goes on."""
    photos, out, count = many_photos(tmp_path / "photos", 2000), tmp_path / "out", 2000
    engine().save(tmp_path / "model")
    with Runs() as runs:

        def start():
            command = ("embed", photos, "-m", tmp_path / "model", "-o", out, "--devices", "cpu,cpu")
            return runs.start(*command, log=tmp_path / "log", real=True, rows=100, seconds=0.1)

        pid = start()
        deadline = time.monotonic() + 120
        while not any(out.glob("part-*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert runs.wait(pid) == -signal.SIGKILL
        assert 0 < len(read_embeddings(out)) < count
        assert runs.wait(start()) == 0, (tmp_path / "log.err").read_text()
    check_whole(out, tmp_path / "model", photos, count)
