"""`make gpu` as a GPU machine would run it, on a stand-in for the GPU: `python -m helpers.rehearsal --out FOLDER`.

The checkout is copied without .git and all that is built, Triton's cache is empty, and `make gpu` runs there as often
as --calls says, each time for --budget. Then the timeline is printed: every step, how long it took here, how many
specialisations were compiled in it, and the CPU seconds of that. On a machine with --cores cores the compiling of a
step takes about that by the processes that share it; the last column says whether that fits the step's limit.

Exit code 1: something does not fit, or took a process with it though nothing was planted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from vitfast.benchmarks import campaign, campaign_file, steps
from vitfast.benchmarks.environment import ROOT

BUILT = shutil.ignore_patterns(
    ".git",
    ".venv",
    "build",
    "dist",
    "site",
    "*.so",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "node_modules",
)
MOST_FILES = 6
START_S = 8.0
"""Of a job besides compiling: Python, torch and the GPU's context."""


def bare_checkout(folder):
    """A copy of the checkout in a folder, without .git and what was built."""
    shutil.copytree(ROOT, folder, symlinks=True, ignore=BUILT)
    return folder


def make_gpu(checkout, out, budget, *, standin, cache, arguments=""):
    """`make gpu` in a checkout, the stand-in in every Python; its process, ended or not.

    Args:
        standin: settings of `standin.start`. cache: Triton's. arguments: GPU_ARGS.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(checkout / "tests" / "standin"), "VITFAST_STANDIN": json.dumps(standin),
        "TRITON_CACHE_DIR": str(cache), "VITFAST_CACHE": str(cache / "vitfast"),
    }  # fmt: skip
    settings = {"PYTHON": sys.executable, "BUDGET": budget, "OUT": out, "GPU_ARGS": arguments}
    command = ["make", "-s", "gpu", *(f"{name}={value}" for name, value in settings.items())]
    return subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def timeline(content, log, cores):
    """(step, state, limit, seconds here, specialisations needed, compiled, CPU seconds, estimate) of every step.

    Args:
        content: of campaign.json. log: lines of the stand-in.
    """
    by_step = defaultdict(list)
    for entry in log:
        by_step[entry["step"]].append(entry)
    rows = []
    for step in steps.STEPS:
        if step.name not in content["steps"]:
            continue
        entry, found = content["steps"][step.name], by_step[step.name]
        compiled = [form for form in found if form["seconds"]]
        seconds = sum(form["seconds"] for form in compiled)
        jobs = defaultdict(float)
        for form in compiled:
            jobs[form["pid"]] += form["seconds"]
        side_by_side = min(campaign.PARALLEL, cores) if step.kind in ("jobs", "tests") else 1
        estimate = max(max(jobs.values(), default=0.0), seconds / side_by_side)
        if step.kind == "jobs":
            estimate += START_S * -(-len(step.arguments) // side_by_side)
        forms = len({form["form"] for form in found})
        rows.append(
            (step.name, entry["state"], step.limit_s, entry["seconds"], forms, len(compiled), seconds, estimate)
        )
    return rows


def show(rows, cores):
    """The timeline as lines of text."""
    yield f"{'step':18}{'state':>8}{'limit':>7}{'here':>7}{'forms':>7}{'compiled':>9}{'CPU s':>7}   on {cores} cores"
    for name, state, limit, here, forms, compiled, seconds, estimate in rows:
        fits = "fits" if estimate <= limit else "too long"
        told = f"{name:18}{state:>8}{limit:>6.0f}s{here:>6.0f}s{forms:>7}{compiled:>9}{seconds:>7.0f}"
        yield f"{told}{estimate:>6.0f} s {fits}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default="60m")
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--cores", type=int, default=16)
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    with tempfile.TemporaryDirectory(prefix="vitfast-rehearsal-") as folder:
        checkout, log = bare_checkout(Path(folder) / "vitfast"), Path(folder) / "compiled.jsonl"
        log.touch()
        for _ in range(arguments.calls):
            # Nothing hangs that was not planted, however busy this machine is.
            settings = {"log": str(log), "limit_s": 600.0}
            process = make_gpu(checkout, out, arguments.budget, standin=settings, cache=Path(folder) / "cache")
            for line in process.stdout:
                print(line.decode(), end="", flush=True)
            code = process.wait()
        print(f"exit code {code}")
        content = campaign_file.read(out / "campaign.json")
        rows = timeline(content, map(json.loads, log.read_text().splitlines()), arguments.cores)
    print(*show(rows, arguments.cores), sep="\n")
    files = sorted(path.name for path in out.iterdir())
    print(f"{len(files)} files: {', '.join(files)}")
    late = [name for name, _, limit, *_, estimate in rows if estimate > limit]
    culprits = [culprit for step in content["steps"].values() for culprit in step["culprits"]]
    print(*culprits, sep="\n")
    sys.exit(1 if late or culprits or len(files) > MOST_FILES else 0)


if __name__ == "__main__":
    main()
