"""What a GPU would be given, launched on one that is not there: Triton's real JIT, configs and compiler."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import standin

from vitfast.benchmarks import cases
from vitfast.benchmarks.environment import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")


def rehearsed(*arguments):
    """What `helpers.rehearsal` says."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, "-W", "ignore", "-m", "helpers.rehearsal", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_launch_that_fails_is_a_row_and_the_others_arrive():
    ops = [word for op in ("layer_norm", "row_stats", "add_layer_norm") for word in ("--op", op)]
    found = rehearsed(*ops, "--fault", "_row_stats_kernel")
    rows = {row["op"]: row for row in found["rows"]}
    assert {op: row["correct"] for op, row in rows.items()} == {
        "layer_norm": True, "row_stats": False, "add_layer_norm": True,
    }  # fmt: skip
    assert rows["row_stats"]["error"].startswith("OutOfResources: out of resource: shared memory")
    assert list(found["launches"].values()) == [["_layer_norm_kernel"], [], ["_layer_norm_kernel"]]
    assert len(found["specialisations"]["_layer_norm_kernel"]) == 2  # with a residual and without


@pytest.mark.full
def test_a_kernel_too_large_for_the_chip_is_refused_by_the_real_jit():
    found = rehearsed("--op", "attention", "--shared", "1024")
    assert found["rows"] and all("OutOfResources" in row["error"] for row in found["rows"])


@pytest.mark.full
def test_every_case_of_the_campaign_is_launched(capsys):
    """kernels-base, block and backward too; how many specialisations there are and how long they compile is printed."""
    found = rehearsed()
    failed = {row["case"]: row["error"] for row in found["rows"] if not row["correct"] and not row.get("absent")}
    assert not failed
    assert {row["op"] for row in found["rows"]} | {"attention_backward"} >= cases.OPS.keys() - {"attention_block"}
    launches = found["launches"]
    assert all(launches[row["case"]] for row in found["rows"] if row["correct"])
    block = next(names for case, names in launches.items() if case.startswith("block "))
    assert len(block) in (5, 6), block  # five launches, and the first statistics
    assert {"_attention_kernel", "_attention_dq_kernel", "_attention_dkdv_kernel"} <= {*launches["attention_backward"]}
    with capsys.disabled():
        for name, seconds in sorted(found["specialisations"].items()):
            print(f"\n{name}: {len(seconds)} specialisations, {sum(seconds):.1f} s to compile", end="")


def test_the_stand_in_takes_itself_back():
    before = torch.cuda.is_available(), torch.Generator
    with standin.installed():
        assert torch.cuda.is_available() and torch.empty(3, device="cuda").is_cuda
    assert (torch.cuda.is_available(), torch.Generator) == before
    assert not torch.empty(3).is_cuda
