"""Executes kernels in a process in which Triton is its compiler: `python -m helpers.ptx JOBS`.

JOBS is JSON, a list of objects. Of a compile case: "arch", "file" and "case", the start of its config's name; with
"all": true, all that start so; with "seed", other schedules; with "problem", other sizes, for kernels whose check takes
them; with "old" and "new", words of the kernel's source that are replaced first. Of a mistake in the PTX: "fault", a
name of `faults.FAULTS`. Of a whole forward: "forward", the halves that are fused, "fold_norm" and "arch"; with
"fenced": true, a fence.proxy.async is put after each wait for cp.async, which Triton 3.6 leaves out.

For each kernel, or forward, a line of JSON: its name; what was found wrong, "" for nothing; seconds; counts.
"""

import contextlib
import dataclasses
import importlib
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from helpers.mutants import mutant
from helpers.ptx import cases
from helpers.ptx.device import executing
from helpers.ptx.faults import FAULTS

from vitfast import testing

WAIT = re.compile(r"(cp\.async\.wait_group\s+\d+;)")


def main(jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        if "forward" in job:
            report("forward", forward, job)
            continue
        change = None
        if fault := FAULTS.get(job.get("fault", "")):
            job |= {"arch": fault.arch, "file": fault.file, "case": fault.case}
            change = lambda name, ptx, fault=fault: fault.change(ptx)  # noqa: E731
        found = [case for case in cases.cases_of(job["file"], job["arch"]) if case.config.startswith(job["case"])]
        assert found, f"there is no case {job}"
        for case in found if job.get("all") else found[:1]:
            report(f"{case.kernel}/{case.config}", compiled_case, job, case, change)


def report(name: str, run, *args) -> None:
    begun, wrong, counts = time.perf_counter(), "", {}
    try:
        with testing.poisoned_allocations():
            counts = run(*args)
    except Exception as error:  # whatever it dies of is its result
        wrong = f"{type(error).__name__}: {error}"
    print(json.dumps({"name": name, "wrong": wrong, "seconds": time.perf_counter() - begun, "counts": counts}))


def compiled_case(job: dict, case, change) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        if "old" in job:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            module = importlib.import_module(f"vitfast.kernels.{job['file']}")
            changed = mutant(module, job["old"], job["new"], Path(folder))
            stack.enter_context(mock.patch.object(cases, job["file"], changed))
            case = dataclasses.replace(case, fn=getattr(changed, case.fn.__name__))
        device = cases.run(case, job["arch"], job.get("seed", 0), change, **job.get("problem", {}))
    return next(launch.counts for launch in device.launches if launch.kernel == case.fn.__name__)


def forward(job: dict) -> dict[str, int]:
    """The forward of a ViT of two blocks against float64, and how often each kernel was launched."""
    with executing(job["arch"]) as device:
        if job.get("fenced"):
            device.change = lambda name, ptx: WAIT.sub(r"\1\n\tfence.proxy.async.shared::cta;", ptx)
        from helpers import engines, forwards  # which kernels run on CPU tensors is asked when vitfast.ops is imported

        images = testing.make(2, 3, *engines.SMALL.image_size)
        options = {"fold_norm": job["fold_norm"], "fused": job["forward"]}
        forwards.check(engines.SMALL, images, torch.bfloat16, "triton", **options)
        names = [launch.kernel for launch in device.launches]
    return {name: names.count(name) for name in dict.fromkeys(names)}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
