"""Signals: what was done is kept, and the exit code says which signal it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.folder_runs import Runs
from helpers.grids import thinned
from helpers.photos import save

from vitfast.cli.signals import Stopped, exit_code, stopping
from vitfast.pipeline.embed import BATCH_SECONDS
from vitfast.pipeline.parquet import read_embeddings
from vitfast.pipeline.writing import PART_SECONDS

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture(scope="module")
def runs():
    with Runs() as runs:
        yield runs


@pytest.fixture
def photos(tmp_path):
    for i in range(20):
        save(tmp_path / "photos" / f"{i:02}.png", i)
    return tmp_path / "photos"


def embed(runs, photos, out, *options, **job):
    return runs.start(
        "embed", photos, "-m", "m", "-o", out, "-b", "4", "--json", *options, log=out.parent / "log", **job
    )


@pytest.mark.parametrize("name", CODES)
def test_a_signal_ends_a_run_with_what_it_has_done(name, runs, photos, tmp_path):
    out = tmp_path / "out"
    code = runs.wait(embed(runs, photos, out, fault=["result", 9, "before", name]))
    assert code == CODES[name]
    summary = json.loads((tmp_path / "log.out").read_text())
    assert summary["interrupted"]
    assert summary["done"] == 10 == read_embeddings(out).num_rows
    assert sorted(path.name[:5] for path in out.iterdir()) == ["_mani", "part-"]
    assert runs.wait(embed(runs, photos, out)) == 0
    assert read_embeddings(out).num_rows == 20


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("operation", "when"), [("fsync", "before"), ("replace", "before"), ("replace", "after")])
def test_a_signal_in_the_last_moment_costs_nothing(operation, when, name, runs, photos, tmp_path):
    out = tmp_path / "out"
    assert runs.wait(embed(runs, photos, out, fault=[operation, 0, when, name])) == CODES[name]
    assert read_embeddings(out).num_rows == 20


@pytest.mark.parametrize(
    ("number", "when"), thinned([*((n, "before") for n in range(5)), *((n, "after") for n in range(4))], unpack=True)
)
def test_a_signal_while_old_parts_are_taken_away(when, number, runs, photos, tmp_path):
    out = tmp_path / "out"
    assert runs.wait(embed(runs, photos, out, rows=8)) == 0
    assert len(list(out.glob("part-*"))) == 3
    code = runs.wait(embed(runs, photos, out, "--overwrite", fault=["unlink", number, when, "SIGTERM"], weights=1))
    assert code == 143
    assert read_embeddings(out).num_rows == 20


def test_a_kill_costs_what_came_since_the_last_part(runs, photos, tmp_path):
    out = tmp_path / "out"
    code = runs.wait(embed(runs, photos, out, fault=["result", 15, "before", "SIGKILL"], seconds=0.2, pause=0.1))
    assert code == -signal.SIGKILL
    assert 11 <= read_embeddings(out).num_rows <= 16
    assert PART_SECONDS <= 5
    assert PART_SECONDS + BATCH_SECONDS <= 10  # what came since, and the batch under way


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_signal_from_outside_and_its_repetition(runs, photos, tmp_path):
    """As `timeout` and a shell send it: to the process and again to its group."""
    out = tmp_path / "out"
    pid = embed(runs, photos, out, seconds=0.0, pause=0.05)
    wait_for(lambda: list(out.glob("part-*")))
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    assert runs.wait(pid) == 143
    assert read_embeddings(out).num_rows == json.loads((tmp_path / "log.out").read_text())["done"] < 20


def test_classify_prints_what_it_has_done(runs, photos, tmp_path):
    pid = runs.start("classify", photos, "-m", "m", "-b", "1", "--json", log=tmp_path / "log", slow=0.1)
    wait_for(lambda: (tmp_path / "log.err").exists() and "batch" in (tmp_path / "log.err").read_text())
    os.kill(pid, signal.SIGTERM)
    assert runs.wait(pid) == 143
    rows = json.loads((tmp_path / "log.out").read_text())
    assert len(rows) < 20
    assert f"interrupted after {len(rows)} of 20 images" in (tmp_path / "log.err").read_text()


@pytest.fixture
def not_ignored():
    """As in a terminal: what starts a process in the background has it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("not_ignored")
def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(getattr(signal, name)) for name in CODES]
    with stopping() as state:
        assert all(signal.getsignal(getattr(signal, name)) == state._handle for name in CODES)
        state.check()
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert exit_code(caught.value) == 129
        os.kill(os.getpid(), signal.SIGTERM)  # the second is ignored
        with pytest.raises(Stopped, match="SIGHUP"):
            state.check()
    assert [signal.getsignal(getattr(signal, name)) for name in CODES] == before
    assert exit_code(KeyboardInterrupt()) == 130


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGHUP)  # as under nohup
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.full
def test_the_third_signal_ends_at_once():
    code = (
        "import os, signal, time\nfrom vitfast.cli.signals import stopping\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with stopping():\n"
        "  try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "  except KeyboardInterrupt: pass\n"
        "  os.kill(os.getpid(), signal.SIGINT); time.sleep(0.01)\n"
        "  print('still there', flush=True); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert (done.returncode, done.stdout) == (143, "still there\n")
