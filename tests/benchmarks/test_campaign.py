"""The campaign: steps in processes of their own, culprits by name, files that are whole whenever it is cut."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vitfast.benchmarks import campaign, campaign_file, child
from vitfast.benchmarks.campaign import Campaign
from vitfast.benchmarks.device import CpuDevice
from vitfast.benchmarks.steps import Step
from vitfast.engine import plan_cache

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
if "slow" in arguments and "SLOW" in os.environ:
    faults["two/torch eager"] = "waits"
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


def test_a_second_call_goes_on_where_the_budget_of_the_first_ended(started, monkeypatch):
    """In the middle of a step, and of jobs side by side; nothing that is finished is done twice."""
    jobs = Step("jobs", "jobs", (("smoke", "quick"), ("smoke", "slow")), each_machine=True)
    steps = [measuring("quick"), jobs, measuring("slow", "slow"), measuring("last")]
    monkeypatch.setenv("SLOW", "1")
    first = started(*steps)
    run = child.run

    def cut(command, *args, watch, on_tick, stop, **options):
        """What is slow is over once all else is done, whatever that takes here; and with its last step the budget."""
        over = threading.Event()

        def tick():
            on_tick()
            path, others = watch.with_suffix(".json"), first.file.step("jobs").get("answer", {}).get("jobs", {})
            finished = json.loads(path.read_text())["finished"] if path.is_file() else []
            if "slow" in command and "smoke quick" in others and finished == ["one"]:
                over.set()
                first._end = time.monotonic() if "kernels" in command else first._end

        return run(command, *args, watch=watch, on_tick=tick, stop=over, **options)

    monkeypatch.setattr(child, "run", cut)
    assert first.run() == (
        [],
        [
            "jobs: no time for 1 of 2; what it has is kept", "slow: its time was up; what it has is kept",
            "last: no time",
        ],
    )  # fmt: skip
    monkeypatch.setattr(child, "run", run)
    was = first.file.content["steps"]
    assert was["slow"]["result"]["finished"] == ["one"]
    monkeypatch.delenv("SLOW")
    second = started(*steps)
    assert second.run() == ([], [])
    rows = rows_of(second, "slow")
    assert len(rows) == 9 and len({row["pid"] for row in rows.values()}) == 2  # the first case is the first call's
    assert rows_of(second, "quick") == rows_of(first, "quick")
    now = second.file.content["steps"]
    assert now["jobs"]["answer"]["jobs"]["smoke quick"] == was["jobs"]["answer"]["jobs"]["smoke quick"]
    assert len(now["jobs"]["answer"]["jobs"]["smoke slow"]["rows"]) == 9
    assert len(second.file.content["calls"]) == 2 and now["last"]["state"] == "done"


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
import functools, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from vitfast.benchmarks import campaign
from vitfast.benchmarks.device import CpuDevice
from vitfast.benchmarks.steps import Step
from vitfast.cli.signals import stopping
campaign.LEAST_S, campaign.STOPPING_S = 0.5, 0.1
steps = [Step(f"s{{i}}", "bench", (("kernels", "two/vitfast native=dies"),), 60.0) for i in range(200)]
say = functools.partial(print, flush=True)
with stopping():
    campaign.Campaign(CpuDevice(), Path({out!r}), 900, steps=steps, say=say, command=(sys.executable, {script!r})).run()
"""


@pytest.mark.full
def test_files_are_valid_whenever_it_is_cut(started, tmp_path):
    """At 20 random moments of the first seconds in which steps run: there are more of these than all calls finish."""
    started()  # writes the stand-in
    out, seeds = tmp_path / "out", random.Random(3)
    program = CUT.format(
        root=str(campaign.ROOT), tests=str(campaign.ROOT / "tests"), out=str(out), script=str(tmp_path / "vitfast.py")
    )
    seen = 0
    for call in range(1, 21):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout.readline().startswith("s"), "a step has begun"
        time.sleep(4 * seeds.random())
        process.send_signal(seeds.choice([signal.SIGKILL, signal.SIGTERM]))
        process.communicate()
        assert process.returncode, "it was cut before its end"
        assert {path.name for path in out.iterdir()} <= {"campaign.json", "campaign.log", "page.html"}
        content = campaign_file.read(out / "campaign.json")
        assert len(content["calls"]) == 1 + call  # `started` began one
        done = sum(len(step.get("result", {}).get("rows", ())) for step in content["steps"].values())
        assert done >= seen, "each call goes on with what the one before had kept"
        seen = done
    assert seen


def test_a_cut_in_mid_write_leaves_whole_files_only(started, tmp_path, monkeypatch):
    """What is not whole yet stands outside the folder, and is gone with the next call."""
    started(measuring("kernels")).run()
    out, replace = tmp_path / "out", os.replace
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def cut(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        started(measuring("kernels"), measuring("after"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (part,) = tmp_path.glob(".out*")
    monkeypatch.setattr(os, "replace", replace)
    assert started(measuring("kernels"), measuring("after")).run() == ([], [])
    assert not part.exists() and {path.name for path in out.iterdir()} == before.keys()


def test_a_folder_that_is_a_disk_of_its_own_is_written_from_within(started, tmp_path, monkeypatch):
    """As a mounted one is, beside which nothing can be moved into it."""
    replace = os.replace

    def elsewhere(source, target):
        if Path(source).parent == tmp_path and Path(target).parent == tmp_path / "out":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", elsewhere)
    assert started(measuring("kernels")).run() == ([], [])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["campaign.json", "campaign.log", "page.html"] and not list(tmp_path.glob(".out*"))


def test_plans_of_one_call_are_those_of_the_next(started, tmp_path, monkeypatch):
    """They come home beside the rest, and are not measured again, wherever the cache is."""
    monkeypatch.delenv("VITFAST_CACHE")
    key, other = {"device": "a GPU", "batch": 64}, {"device": "a GPU", "batch": 1}
    plan = {"key": key, "choices": {"qkv": "torch"}, "measured": {}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text(json.dumps([plan]))
    made = started(measuring("kernels"))
    seen = []

    def step(*args):
        folder = Path(made._environment["VITFAST_CACHE"]) / "plans"
        seen.extend(json.loads(path.read_text()) for path in folder.iterdir())
        (folder / f"{plan_cache.digest(other)}.json").write_text(json.dumps(plan | {"key": other}))
        made.file.step("kernels")["state"] = "done"

    monkeypatch.setattr(made, "_bench", step)
    made.run()
    assert seen == [plan]
    kept = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert sorted(one["key"]["batch"] for one in kept) == [1, 64]


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
