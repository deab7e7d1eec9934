"""`vitfast bench all`: the benchmarks worth having of a GPU, the most telling first, within a budget of time.

Every step is made of processes of their own: one that crashes the GPU's context, or hangs, takes no other with it. It
is known by name then (`benchmarks/watch.py`), and a new process goes on without it. What is measured stands in the
campaign's file within a second, and a second call goes on where the first one stopped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vitfast.benchmarks import child
from vitfast.benchmarks.campaign_file import CampaignFile
from vitfast.benchmarks.device import Device
from vitfast.benchmarks.environment import ROOT, environment
from vitfast.benchmarks.result_file import write
from vitfast.benchmarks.steps import BUDGET_S, SMOKE, STEPS, Step
from vitfast.benchmarks.watch import CONTEXT_LOST
from vitfast.engine.plan_cache import digest
from vitfast.ops import registry

STOPPING_S = 5.0
"""Kept for a step to finish its case and measure the roofs again after its own budget."""
LEAST_S = 15.0
"""A step is not begun with less time than this: a process needs most of it to import torch and to see the GPU."""
MOST_RESTARTS = 8
"""After so many culprits a step gives up."""
PARALLEL = 8
"""Processes at a time where they need not have the GPU to themselves."""
TESTS = ("-m", "pytest", "-m", "device", "--continue-on-collection-errors", "-p", "helpers.report")
WITH_PLUGINS = {"xdist": ("-n", "8"), "pytest_timeout": ("--timeout", "60", "--timeout-method", "thread")}
"""A test that hangs, or kills the GPU's context, ends its worker, and xdist begins another; where these plugins are."""


class Campaign:
    """One call of `vitfast bench all`.

    Args:
        folder: gets the files, at most six: campaign.json, campaign.log, page.html, tests.json, plan.json and the
            tuning table of the GPU.
        command: what `vitfast` is run by; python: what the tests are run by.
        extension: what was done about the C++ extension, to be kept with the rest.
    """

    def __init__(
        self,
        device: Device,
        folder: Path,
        budget_s: float,
        *,
        steps: Sequence[Step] = STEPS,
        say: Callable[[str], None],
        command: Sequence[str] = (sys.executable, "-m", "vitfast"),
        python: Sequence[str] = (sys.executable,),
        extension: str = "",
    ) -> None:
        self._device, self._folder, self._say = device, folder, say
        self._steps, self._command, self._python = steps, tuple(command), tuple(python)
        self._end = time.monotonic() + budget_s
        self._share = max(1.0, budget_s / BUDGET_S)
        self._stop, self._lock = threading.Event(), threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        entry = {"slug": device.slug, **environment(device)}
        self._boot = _boot()
        call = {"date": entry["date"], "budget_s": budget_s, "boot": self._boot, "extension": extension}
        self.file = CampaignFile(folder / "campaign.json", entry, call)
        self._withheld: list[str] = []

    def run(self) -> tuple[list[str], list[str]]:
        """Run steps in order until the budget is spent.

        Returns:
            What failed or was wrong; and what there was no time for, one line each.
        """
        unfinished = []
        log_file = (self._folder / "campaign.log").open("ab")
        with tempfile.TemporaryDirectory(prefix="vitfast-bench-") as work, log_file as log:
            self._work, self._log = Path(work), log
            self._environment = {"VITFAST_CACHE": os.environ.get("VITFAST_CACHE", str(self._work / "cache"))}
            self._restore_plans()
            for step in self._steps:
                if not self._due(step):
                    continue
                left = min(step.limit_s * self._share, self._end - time.monotonic())
                if left < LEAST_S:
                    unfinished.append(f"{step.name}: no time")
                    continue
                self._step(step, left)
                entry = self.file.step(step.name)
                if entry["state"] == "cut":
                    unfinished.append(f"{step.name}: {entry.get('why', 'its time was up')}; what it has is kept")
            self._keep()
        return self._failures(), unfinished

    def _restore_plans(self) -> None:
        """Give the steps the plans of an earlier call, which are then not measured again."""
        path = self._folder / "plan.json"
        for plan in json.loads(path.read_text()) if path.is_file() else ():
            kept = Path(self._environment["VITFAST_CACHE"]) / "plans" / f"{digest(plan['key'])}.json"
            if not kept.is_file():
                write(kept, json.dumps(plan))

    def _due(self, step: Step) -> bool:
        entry = self.file.step(step.name)
        again = step.each_machine and entry.get("boot") != self._boot
        return again or entry["state"] != "done"

    def _step(self, step: Step, limit_s: float) -> None:
        entry, start, before = self.file.step(step.name), time.monotonic(), self.file.step(step.name)["seconds"]
        if step.each_machine and entry.get("boot") != self._boot:
            entry.pop("answer", None)
        entry |= {"state": "running", "boot": self._boot}
        entry.pop("why", None)
        self.file.write()
        self._say(f"{step.name}: at most {limit_s:.0f} s")
        end = start + limit_s
        try:
            {"bench": self._bench, "jobs": self._jobs, "doctor": self._doctor, "tests": self._tests}[step.kind](
                step, entry, end
            )
        finally:  # a signal, too: the files are kept
            entry["seconds"] = before + time.monotonic() - start
            if entry["state"] == "running":
                entry["state"] = "cut"
            self._keep()
        self._say(f"{step.name}: {entry['state']} after {time.monotonic() - start:.0f} s")

    # --- one command of `vitfast bench` on the GPU, begun again after whatever kills it ---

    def _bench(self, step: Step, entry: dict[str, Any], end: float) -> None:
        (arguments,) = step.arguments
        path = self._work / f"{step.name}.json"
        if entry.get("result"):  # of an earlier call
            write(path, json.dumps(entry["result"]))
        changes = functools.partial(self._take, path, entry)
        for _ in range(MOST_RESTARTS):
            left = end - time.monotonic()
            if left < LEAST_S:
                entry |= {"state": "cut", "why": "its time was up after a restart"}
                return
            own = ("--budget", f"{max(1.0, left - 2 * STOPPING_S):.0f}s")
            done = self._child(("bench", *arguments, *own, *self._own(path)), left, path, changes)
            changes()
            if done.code in (0, 1):
                result = entry.get("result") or {"not_run": []}
                entry |= {"state": "cut" if result["not_run"] else "done", "exit_code": done.code}
                if result["not_run"]:
                    entry["why"] = f"no time for {len(result['not_run'])} cases"
                return
            if done.why == "time":
                entry |= {"state": "cut", "why": "its time was up"}
                return
            if done.code != CONTEXT_LOST and not self._blame(done, path, entry):
                entry |= {"state": "failed", "exit_code": done.code, "why": done.what()}
                return
        entry |= {"state": "failed", "why": f"gave up after {MOST_RESTARTS} culprits"}

    def _own(self, path: Path) -> tuple[str, ...]:
        """What every command is told besides its own arguments."""
        device = ("--device", str(self._device.torch_device))
        return (*device, "--resume", "--json", str(path), *(p for name in self._withheld for p in ("--without", name)))

    def _child(
        self, arguments: Sequence[str], limit_s: float, path: Path, on_tick: Callable[[], None] = lambda: None
    ) -> child.End:
        command = [*self._command, *arguments]
        if arguments[0].startswith("compute-sanitizer"):
            command = [*arguments[0].split(), *self._command, *arguments[1:]]
        self._write_log(f"\n$ {' '.join(arguments)}   (at most {limit_s:.0f} s)\n")
        watch = path.with_suffix(".now")
        watch.unlink(missing_ok=True)
        return child.run(
            command, self._log, limit_s, watch=watch, environment=self._environment, on_tick=on_tick, stop=self._stop
        )

    def _write_log(self, text: str) -> None:
        self._log.write(text.encode())
        self._log.flush()

    def _take(self, path: Path, entry: dict[str, Any]) -> None:
        """Take a result file into the campaign's, if it changed."""
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        with self._lock:
            if content != entry.get("result"):
                entry["result"] = content
                entry["culprits"] = _culprits(content["rows"])
                self.file.write()

    def _blame(self, done: child.End, path: Path, entry: dict[str, Any]) -> bool:
        """Put the row of what a process died of into its result file, so that the next does without it."""
        if done.during is None or not path.is_file():
            return False
        content = json.loads(path.read_text())
        during = done.during
        row = {"case": during.case, "provider": during.provider, "correct": False, "died": True, "error": done.what()}
        key = (during.case, during.provider)
        rows = [other for other in content["rows"] if (other["case"], other["provider"]) != key]
        write(path, json.dumps(content | {"rows": [*rows, row]}))
        self._take(path, entry)
        return True

    # --- many small commands side by side ---

    def _jobs(self, step: Step, entry: dict[str, Any], end: float) -> None:
        done: dict[str, Any] = dict(entry.get("answer", {}).get("jobs", {}))
        entry["answer"] = {"jobs": done}
        todo = [job for job in step.arguments if " ".join(job) not in done]
        with ThreadPoolExecutor(PARALLEL) as pool:
            try:
                list(pool.map(functools.partial(self._job, step, entry, end), todo))
            except BaseException:
                self._stop.set()  # the other threads end their processes
                raise
        missing = len(step.arguments) - len(done)
        entry["state"] = "cut" if missing else "done"
        if missing:
            entry["why"] = f"no time for {missing} of {len(step.arguments)}"
        entry["culprits"] = [culprit for job in done.values() for culprit in job["culprits"]]
        if step.name == "smoke":
            self._withhold(done)

    def _job(self, step: Step, entry: dict[str, Any], end: float, job: tuple[str, ...]) -> None:
        name = " ".join(job)
        path = self._work / step.name / f"{re.sub(r'[^a-z0-9]+', '-', name)}.json"
        tool = job[:1] if job[0].startswith("compute-sanitizer") else ()
        start = time.monotonic()
        ends = []
        for _ in range(MOST_RESTARTS):
            if (left := end - time.monotonic()) < 1 or self._stop.is_set():
                return
            done = self._child((*tool, "bench", *job[len(tool) :], *self._own(path)), left, path)
            if done.why == "time":
                return
            ends.append(done)
            if done.code in (0, 1) or (done.code != CONTEXT_LOST and not self._blame_job(done, path)):
                break
        rows = _rows(path)
        culprits = _culprits(rows)
        if ends and ends[-1].code not in (0, 1):
            culprits.append({"case": name, "provider": "", "error": ends[-1].what()})
        with self._lock:
            entry["answer"]["jobs"][name] = {
                "seconds": time.monotonic() - start, "rows": rows, "culprits": culprits, "exit_code": ends[-1].code,
            }  # fmt: skip
            self.file.write()

    def _blame_job(self, done: child.End, path: Path) -> bool:
        return self._blame(done, path, {})

    def _withhold(self, jobs: dict[str, Any]) -> None:
        """Backends that took a process with them in the smoke step do not run in the steps after it."""
        for job in SMOKE:
            found = jobs.get(" ".join(job))
            if found and job[2] in registry.OPS and any(row.get("died") for row in found["rows"]):
                self._withheld.append(f"{job[2]}/{job[4]}")

    # --- the others ---

    def _doctor(self, step: Step, entry: dict[str, Any], end: float) -> None:
        path = self._work / "doctor.json"
        with path.open("wb") as out:
            done = child.run(
                [*self._command, "doctor", "--json"], out, end - time.monotonic(), environment=self._environment
            )
        text = path.read_text()
        with contextlib.suppress(ValueError):  # then the text alone is kept
            entry["answer"] = json.loads(text[text.index("{") :])
        if "answer" not in entry:
            entry["answer"] = {"text": text}
        entry |= {"state": "cut" if done.why else "done" if done.code == 0 else "failed", "exit_code": done.code}

    def _tests(self, step: Step, entry: dict[str, Any], end: float) -> None:
        report = self._work / "tests.json"
        plugins = [word for name, words in WITH_PLUGINS.items() if importlib.util.find_spec(name) for word in words]
        arguments = [*self._python, *TESTS, *plugins, "--report", str(report), *_device_tests()]
        self._write_log(f"\n$ {' '.join(arguments)}\n")
        paths = (str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")]))
        own = {**self._environment, "PYTHONPATH": os.pathsep.join(paths)}  # -p comes before pytest's own pythonpath
        taken = functools.partial(self._take_report, report, entry)
        done = child.run(arguments, self._log, end - time.monotonic(), environment=own, on_tick=taken)
        ran = done.code in (0, 1) and report.is_file()  # without pytest the code is 1, too
        entry |= {"state": "done" if ran else "cut" if done.why else "failed", "exit_code": done.code}

    def _take_report(self, report: Path, entry: dict[str, Any]) -> None:
        """Keep the report of the tests so far, if it changed."""
        if report.is_file() and (content := json.loads(report.read_text())) != entry.get("answer"):
            entry["answer"] = content
            self.file.keep("tests.json", json.dumps(content, indent=1) + "\n")

    def _keep(self) -> None:
        """Write the campaign's file and page, and take what the steps left elsewhere."""
        plans = sorted(Path(self._environment["VITFAST_CACHE"]).glob("plans/*.json"))
        found = [json.loads(path.read_text()) for path in plans]
        table = ROOT / "kernels" / "configs" / f"{self._device.slug}.json"
        with self._lock:
            if found:
                self.file.keep("plan.json", json.dumps(found, indent=1) + "\n")
            if table.is_file():
                self.file.keep(table.name, table.read_text())
            self.file.write()
            self.file.write_page()

    def _failures(self) -> list[str]:
        failed = []
        for name, entry in self.file.content["steps"].items():
            failed += [f"{name}: {c['case']}: {c['provider']}: {c['error']}" for c in entry["culprits"]]
            if entry["state"] == "failed" or entry.get("exit_code"):
                why = entry.get("why") or f"exit code {entry.get('exit_code')}"
                failed.append(f"{name}: {why}")
        return failed


def _device_tests() -> list[str]:
    """The files that have tests for a GPU: to collect all others would take a good part of the time."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "mark.device" in path.read_text()]


def _culprits(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What took a process with it, or gave something wrong though it is ours."""
    return [
        {name: row[name] for name in ("case", "provider", "error")}
        for row in rows
        if row.get("died") or (row["provider"].startswith("vitfast") and str(row.get("error")).startswith("incorrect"))
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _boot() -> str:
    """What tells one start of a machine from another."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""
