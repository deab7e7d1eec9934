"""What a campaign is made of: watches, child processes, its list of steps, reports of tests, a carried extension."""

import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.benching import bench

from vitfast.benchmarks import campaign, carried, child, page, watch
from vitfast.benchmarks.steps import BUDGET_S, STEPS
from vitfast.engine import planner
from vitfast.ops import registry


def test_a_watch_says_what_runs_and_from_when(tmp_path):
    path = tmp_path / "r.now"
    assert watch.now(path) is None
    kept = watch.Watch(path)
    kept.begin("a case" * 50, "a provider", "being timed", 3.0)
    kept.begin("case", "provider", "preparing", 3.0)
    during = watch.now(path)
    assert (during.case, during.provider, during.doing, during.limit_s) == ("case", "provider", "preparing", 3.0)
    assert 0 <= time.monotonic() - during.since < 60
    kept.end()
    assert watch.now(path) is None
    watch.Watch().begin("case", "provider", "preparing")  # without a file it keeps nothing


def test_a_process_is_ended_with_what_watches_over_it(tmp_path):
    stop = threading.Event()
    program = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    path = tmp_path / "log"

    def look():
        if path.read_text().endswith("\n"):
            stop.set()

    with path.open("wb") as log:
        done = child.run([sys.executable, "-c", program], log, 30.0, stop=stop, on_tick=look)
    assert (done.code, done.why) == (None, "time") and done.seconds < 20
    started = Path(f"/proc/{path.read_text().strip()}/stat")  # ends with it
    deadline = time.monotonic() + 20  # on a busy machine it takes a moment to die
    with contextlib.suppress(OSError):  # there is no such process any more
        while started.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_steps_are_commands():
    """Every one parses: its device is refused by the command itself, not by the parser."""
    commands = [arguments for step in STEPS for arguments in step.arguments]
    assert len(commands) > 30
    for arguments in commands:
        done = bench(*arguments, "--device", "cuda:99", "--resume", "--json", "unwritten.json")
        assert done.exit_code == 2 and "cuda:99" in done.output and "Usage" not in done.output, done.output


def test_steps_fit_nine_minutes_in_their_order():
    names = [step.name for step in STEPS]
    assert names[:9] == [
        "doctor", "warm-up", "smoke", "kernels-base", "model-base", "configs", "sweep", "model-tuned", "tests",
    ]  # fmt: skip
    assert sum(step.limit_s for step in STEPS[:8]) <= BUDGET_S
    assert not any("max-autotune" in word for step in STEPS for arguments in step.arguments for word in arguments)


def test_all_takes_steps_that_there_are():
    done = bench("all", "--step", "tests", "--step", "kernel-base")
    assert done.exit_code == 2 and "--step must be one of doctor, warm-up" in done.output, done.output
    assert "'kernel-base'" in done.output


def test_all_wants_a_gpu():
    if not torch.cuda.is_available():
        done = bench("all", "--budget", "1m")
        assert done.exit_code == 2 and "no CUDA device" in done.output


def test_a_withheld_backend_runs_nowhere(monkeypatch):
    monkeypatch.setitem(registry.withheld, ("linear", "torch"), "it does harm")
    spec = registry.Spec("linear", "cpu", torch.float32)
    assert registry.backend("linear", "torch").why_not(spec) == ["it does harm"]
    assert "torch" not in [entry.name for entry in registry.candidates(spec)[0]]
    with pytest.raises(registry.BackendError, match="it does harm"):
        registry.choose(spec, "torch")
    done = bench("kernels", "--without", "linear/cuda", "--device", "cpu")
    assert done.exit_code == 2 and re.search("--without takes an op and a backend", done.output)


REPORTED = """
import os, time
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2

@pytest.mark.skip(reason="no reason")
def test_is_skipped():
    pass

def test_waits():
    time.sleep(60)
"""


def test_a_report_of_tests_is_there_though_they_are_cut(tmp_path):
    (tmp_path / "test_reported.py").write_text(REPORTED)
    report = tmp_path / "tests.json"
    paths = os.pathsep.join(map(str, (campaign.ROOT, campaign.ROOT / "tests")))
    command = [sys.executable, "-m", "pytest", "-p", "helpers.report", "--report", str(report), "-c", os.devnull]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", str(tmp_path)], env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (report.is_file() and len(json.loads(report.read_text())["skipped"]) == 1):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    content = json.loads(report.read_text())
    assert (content["passed"], content["done"]) == (1, False)
    assert content["failed"][0]["name"].endswith("test_fails") and "1 == 2" in content["failed"][0]["message"]


def test_a_carried_extension_is_used_only_where_it_fits(tmp_path):
    folder, package = tmp_path / "carried", tmp_path / "vitfast"
    (folder / "vitfast").mkdir(parents=True)
    package.mkdir()
    assert "there is none to use" in carried.use(folder, package)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (folder / "vitfast" / f"_C{suffix}").write_bytes(b"machine code")
    fits = {"torch": torch.__version__, "suffix": suffix, "cuda": "90a", "cuda_ops": ["linear"]}
    for name, other in (("torch", "2.11.0+cu999"), ("suffix", ".cpython-399.so")):
        (folder / "package.json").write_text(json.dumps(fits | {name: other}))
        said = carried.use(folder, package)
        assert said.startswith("no C++ extension") and other in said and not list(package.iterdir())
    (folder / "package.json").write_text(json.dumps(fits))
    assert "with CUDA kernels for 90a: linear" in carried.use(folder, package)
    assert (package / f"_C{suffix}").read_bytes() == b"machine code"
    (folder / "vitfast" / f"_C{suffix}").write_bytes(b"other code")
    assert "is there already" in carried.use(folder, package)
    assert (package / f"_C{suffix}").read_bytes() == b"machine code"


def test_the_page_says_what_plans_cost():
    row = {"case": "ViT batch 1", "provider": "vitfast", "correct": False, "error": "it was cut"}
    row |= {"plan": {"qkv": "triton", "attention": "torch"}, "plan_s": 12.34}
    environment = {"cpu": "c", "threads": 1, "commit": None, "torch": "2", "date": "2026-01-01"}
    result = {"kind": "model", "environment": environment, "rows": [row], "roofs": {}, "method": {}, "not_run": []}
    step = {"state": "done", "seconds": 1.0, "culprits": [], "result": result}
    shown = page.campaign_page({"steps": {"model-base": step, "doctor": {**step, "result": None}}})
    assert "12.3 s" in shown and "qkv: triton, attention: torch" in shown
    assert f"at most {planner.GPU_SECONDS:.0f} s" in shown
