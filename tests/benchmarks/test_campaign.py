"""The campaign: steps in processes of their own, culprits by name, files that are whole whenever it is cut."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.benching import bench

from vitfast.benchmarks import campaign, campaign_file, carried, child, watch
from vitfast.benchmarks.campaign import STEPS, Campaign, Step
from vitfast.benchmarks.device import CpuDevice
from vitfast.ops import registry

# A stand-in for `python -m vitfast`: three providers of a few cases, of which some do as the arguments say.
VITFAST = """
import json, os, sys, time
sys.path.insert(0, {root!r})
arguments = sys.argv[1:]
if arguments[0] == "doctor":
    print(json.dumps({{"devices": []}}))
    sys.exit(0)
option = lambda name: arguments[arguments.index(name) + 1]
faults = dict(f.split("=") for f in arguments if "=" in f)  # "case/provider=what it does"
from vitfast.benchmarks.watch import CONTEXT_LOST, Watch  # without torch, which takes seconds to import
from pathlib import Path
def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)
path = Path(option("--json"))
content = json.loads(path.read_text()) if path.is_file() else {{
    "schema": 3, "kind": "kernels", "rows": [], "not_run": [], "finished": [], "roofs": {{}}, "method": {{}},
    "environment": {{"cpu": "c", "threads": 1, "commit": None, "torch": "2", "date": "2026-01-01T00:00:00+00:00"}}}}
write(path, json.dumps(content))
died = {{(r["case"], r["provider"]) for r in content["rows"] if r.get("died")}}
now = Watch(path.with_suffix(".now"))
for case in ("one", "two", "three"):
    if case in content["finished"]:
        continue
    rows = []
    for provider in ("torch eager", "vitfast triton", "vitfast native"):
        if (case, provider) in died:
            continue
        now.begin(case, provider, "being timed", 1.0)
        time.sleep(0.01)
        row = {{"case": case, "op": "linear", "provider": provider, "correct": True, "median_ms": 1.0, "p20_ms": 1.0,
               "p80_ms": 1.0, "spread": 0.0, "noisy": False, "ratio": 1.0, "tflops": 1.0, "gb_per_s": 1.0,
               "pid": os.getpid()}}
        fault = faults.get(f"{{case}}/{{provider}}")
        if fault == "hangs":
            time.sleep(60)
        if fault == "waits":
            now.end()
            time.sleep(60)
        if fault == "dies":
            os.kill(os.getpid(), 11)
        if fault == "loses":
            content["rows"].append(row | {{"correct": False, "died": True, "error": "the GPU's context is dead"}})
            write(path, json.dumps(content))
            sys.exit(CONTEXT_LOST)
        if fault == "fails":
            row = {{"case": case, "provider": provider, "correct": False, "error": "RuntimeError: no"}}
        if fault == "wrong":
            row = {{"case": case, "provider": provider, "correct": False, "error": "incorrect: max error 1 exceeds 0"}}
        rows.append(row)
    content["rows"] += rows
    content["finished"].append(case)
    write(path, json.dumps(content))
sys.exit(1 if "wrong" in faults.values() else 0)
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts a campaign of given steps with the stand-in for `vitfast`; gives it before it runs."""
    script = tmp_path / "vitfast.py"
    script.write_text(VITFAST.format(root=str(campaign.ROOT)))
    monkeypatch.setattr(campaign, "LEAST_S", 0.5)
    monkeypatch.setattr(campaign, "STOPPING_S", 0.1)

    def start(*steps, budget=60.0):
        return Campaign(
            CpuDevice(), tmp_path / "out", budget, steps=steps, say=lambda text: None,
            command=(sys.executable, str(script)),
        )  # fmt: skip

    return start


def measuring(name, *faults, limit_s=60.0):
    return Step(name, "bench", (("kernels", *faults),), limit_s)


def rows_of(made, step):
    return {(row["case"], row["provider"]): row for row in made.file.content["steps"][step]["result"]["rows"]}


def test_whatever_one_contestant_does_every_other_row_arrives(started, tmp_path):
    faults = {
        "one/vitfast triton": "loses", "two/vitfast native": "dies", "three/vitfast triton": "hangs",
        "three/torch eager": "fails",
    }  # fmt: skip
    made = started(measuring("kernels", *(f"{who}={what}" for who, what in faults.items())), measuring("after"))
    failed, unfinished = made.run()
    assert unfinished == []
    rows = rows_of(made, "kernels")
    assert len(rows) == 9
    for who in [(case, provider) for case in ("one", "two", "three") for provider in
                ("torch eager", "vitfast triton", "vitfast native")]:  # fmt: skip
        assert rows[who]["correct"] == ("/".join(who) not in faults), who
    assert "context is dead" in rows["one", "vitfast triton"]["error"]
    assert rows["two", "vitfast native"]["error"] == "the process died of SIGSEGV while being timed"
    assert rows["three", "vitfast triton"]["error"] == "hung: not done after 1 s while being timed"
    assert len([line for line in failed if line.startswith("kernels: ")]) == 3, failed  # culprits, each named
    steps = made.file.content["steps"]
    assert (steps["kernels"]["state"], steps["after"]["state"]) == ("done", "done")
    assert len({row["pid"] for row in rows.values() if row["correct"]}) > 1  # by several processes
    page = (tmp_path / "out" / "page.html").read_text()
    assert "SIGSEGV" in page and "hung: not done" in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["campaign.json", "campaign.log", "page.html"]


def test_a_wrong_result_fails_the_campaign_and_ends_nothing(started):
    made = started(measuring("kernels", "two/vitfast triton=wrong"), measuring("after"))
    failed, _ = made.run()
    assert failed[0] == "kernels: two: vitfast triton: incorrect: max error 1 exceeds 0"
    assert made.file.content["steps"]["after"]["state"] == "done"


def test_a_step_that_cannot_begin_says_so(started, tmp_path):
    made = started(measuring("kernels"))
    (tmp_path / "vitfast.py").write_text("raise SystemExit(7)")
    failed, _ = made.run()
    assert failed == ["kernels: the process ended with exit code 7"]


def test_a_second_call_goes_on_where_the_first_stopped(started):
    first = started(measuring("one-step"), measuring("slow", "two/torch eager=waits", limit_s=4.0))
    _, unfinished = first.run()
    assert unfinished == ["slow: its time was up; what it has is kept"]
    assert first.file.content["steps"]["slow"]["result"]["finished"] == ["one"]
    second = started(measuring("one-step"), measuring("slow"), measuring("last"))
    assert second.run() == ([], [])
    rows = rows_of(second, "slow")
    assert len(rows) == 9 and len({row["pid"] for row in rows.values()}) == 2  # the first case is the first call's
    assert rows_of(second, "one-step") == rows_of(first, "one-step")
    assert len(second.file.content["calls"]) == 2


def test_no_time_is_no_failure(started):
    made = started(measuring("kernels"), budget=0.1)
    assert made.run() == ([], ["kernels: no time"])


def test_jobs_run_side_by_side_and_withhold_what_died(started, monkeypatch):
    jobs = (
        ("smoke", "--op", "linear", "--backend", "triton", "one/vitfast triton=dies"),
        ("smoke", "--op", "mlp", "--backend", "native"),
    )
    monkeypatch.setattr(campaign, "SMOKE", jobs)
    made = started(Step("smoke", "jobs", jobs), measuring("after"))
    failed, _ = made.run()
    assert failed == ["smoke: one: vitfast triton: the process died of SIGSEGV while being timed"]
    assert made._withheld == ["linear/triton"]
    found = made.file.content["steps"]["smoke"]["answer"]["jobs"]
    assert [len(job["rows"]) for job in found.values()] == [9, 9]
    assert "--without linear/triton" in (made._folder / "campaign.log").read_text()


def test_another_gpu_or_other_sources_do_not_go_on(started, tmp_path):
    started(measuring("kernels"), budget=0.1).run()
    path = tmp_path / "out" / "campaign.json"
    content = json.loads(path.read_text())
    content["environment"]["sources"] = "0" * 16
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="begun with sources '0000000000000000'"):
        started(measuring("kernels"))


CUT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from vitfast.benchmarks import campaign
from vitfast.benchmarks.device import CpuDevice
campaign.LEAST_S, campaign.STOPPING_S = 0.5, 0.1
steps = [campaign.Step(f"s{{i}}", "bench", (("kernels", "two/vitfast native=dies"),), 60.0) for i in range(6)]
campaign.Campaign(CpuDevice(), {out!r}, 60, steps=steps, say=print, command=(sys.executable, {script!r})).run()
"""


@pytest.mark.full
def test_files_are_valid_whenever_it_is_cut(started, tmp_path):
    started()  # writes the stand-in
    out, seeds = tmp_path / "out", random.Random(3)
    program = CUT.format(
        root=str(campaign.ROOT), tests=str(campaign.ROOT / "tests"), out=str(out), script=str(tmp_path / "vitfast.py")
    ).replace("'" + str(out) + "'", f"__import__('pathlib').Path({str(out)!r})")
    seen = 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
        time.sleep(2.0 + 6 * seeds.random())
        process.send_signal(seeds.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait()
        if (out / "campaign.json").is_file():
            steps = campaign_file.read(out / "campaign.json")["steps"]
            done = sum(len(step.get("result", {}).get("rows", ())) for step in steps.values())
            assert done >= seen or all(step["state"] == "done" for step in steps.values())
            seen = done
    assert seen  # each call went on with what the one before had kept


# --- the pieces ---


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
    assert not started.is_file() or started.read_text().split()[2] == "Z"


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
    assert sum(step.limit_s for step in STEPS[:8]) <= campaign.BUDGET_S
    assert not any("max-autotune" in word for step in STEPS for arguments in step.arguments for word in arguments)


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


def test_results_are_unpacked_with_the_commit_of_the_same_sources(started, tmp_path, monkeypatch):
    made = started(measuring("kernels-base"))
    made.run()
    monkeypatch.setattr(campaign_file, "results_folder", lambda: tmp_path / "results")
    path = made.file.path
    content = json.loads(path.read_text())
    content["environment"]["commit"] = None
    path.write_text(json.dumps(content))
    monkeypatch.setattr(campaign_file, "commit_of", lambda: "a" * 40)
    (written,) = campaign_file.unpack(path)
    assert written.parent == tmp_path / "results" / "cpu" and written.name.endswith("-aaaaaaaaa-kernels-base.json")
    assert json.loads(written.read_text())["environment"]["commit"] == "a" * 40
    content["environment"]["sources"] = "something else"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="check out the commit"):
        list(campaign_file.unpack(path))
    assert os.environ.get("VITFAST_CACHE")  # of the tests, not of the campaign


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
