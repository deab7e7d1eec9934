"""What a GPU would be given, on one that is not there: Triton's real JIT, whole commands, planted faults."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import rehearsal

from vitfast.benchmarks import cases
from vitfast.benchmarks.campaign import Campaign
from vitfast.benchmarks.device import CpuDevice
from vitfast.benchmarks.environment import ROOT
from vitfast.benchmarks.steps import Step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")

PATHS = os.pathsep.join(map(str, (ROOT / "tests" / "standin", ROOT, ROOT / "tests")))


def launched(*arguments):
    """What `helpers.launched` says."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "helpers.launched", *arguments]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": PATHS}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Pretended(CpuDevice):
    """What the campaign's own process knows of the stand-in, which only the processes that it starts have."""

    slug, torch_device = "stand-in", torch.device("cuda", 0)

    def __init__(self):
        self.cache_bytes = 0


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    """Runs a campaign of given steps on the stand-in: (its file's steps, what failed, what is unfinished)."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", PATHS)

    def run(*steps, budget=900.0, **settings):
        monkeypatch.setenv("VITFAST_STANDIN", json.dumps({"limit_s": 300.0, **settings}))  # this machine may be busy
        made = Campaign(Pretended(), tmp_path / "out", budget, steps=steps, say=lambda text: None)
        failed, unfinished = made.run()
        return json.loads((tmp_path / "out" / "campaign.json").read_text())["steps"], failed, unfinished

    return run


CULPRIT = "_row_stats_kernel"
KERNELS = ("kernels", "-m", "vit_tiny_patch16_224", "--batch", "8", "--no-roofs")
NORMS = Step("norms", "bench", ((*KERNELS, "--op", "layer_norm", "--op", "row_stats"),), 600.0)


def rows_of(step):
    return {(row["case"].split()[0], row["provider"]): row for row in step["result"]["rows"]}


def test_a_launch_that_fails_is_a_row_and_the_others_arrive():
    ops = [word for op in ("layer_norm", "row_stats", "add_layer_norm") for word in ("--op", op)]
    found = launched(*ops, "--fault", f"{CULPRIT}=fails")
    rows = {row["op"]: row for row in found["rows"]}
    assert {op: row["correct"] for op, row in rows.items()} == {
        "layer_norm": True, "row_stats": False, "add_layer_norm": True,
    }  # fmt: skip
    assert rows["row_stats"]["error"].startswith("OutOfResources: out of resource: shared memory")
    assert list(found["launches"].values()) == [["_layer_norm_kernel"], [], ["_layer_norm_kernel"]]
    assert len(found["specialisations"]["_layer_norm_kernel"]) == 2  # with a residual and without


@pytest.mark.full
def test_a_kernel_that_kills_the_context_is_named_and_every_other_row_arrives(campaign):
    """By real commands, with Triton's JIT: the first process dies of it, the second does all else."""
    steps, failed, unfinished = campaign(NORMS, faults={CULPRIT: "dies"})
    rows = rows_of(steps["norms"])
    (culprit,) = [key for key, row in rows.items() if row.get("died")]
    assert culprit == ("row_stats", "vitfast triton")
    assert "context is dead" in rows[culprit]["error"]
    for op in ("layer_norm", "row_stats"):
        assert rows[op, "torch eager"]["correct"]
    assert rows["layer_norm", "vitfast triton"]["correct"] and rows["layer_norm", "vitfast triton"]["configs"]
    assert (steps["norms"]["state"], unfinished) == ("done", []) and len(failed) == 1 and "row_stats" in failed[0]


@pytest.mark.full
@pytest.mark.parametrize("does", ["fails", "hangs", "no memory", "no capture", "NVML"])
def test_whatever_one_kernel_does_every_other_row_arrives(does, campaign, tmp_path):
    plain, *_ = campaign(NORMS)
    right = {key for key, row in rows_of(plain["norms"]).items() if row["correct"]}
    (tmp_path / "out").rename(tmp_path / "plain")
    settings = {"refused": ["nvmlDeviceGetPowerUsage"]} if does == "NVML" else {"faults": {CULPRIT: does}}
    settings["limit_s"] = 60.0 if does == "hangs" else 300.0
    steps, failed, unfinished = campaign(NORMS, **settings)
    rows, culprit = rows_of(steps["norms"]), ("row_stats", "vitfast triton")
    assert rows.keys() == rows_of(plain["norms"]).keys() and culprit in right
    harmless = does in ("no capture", "NVML")
    assert {key for key, row in rows.items() if row["correct"]} == right - (set() if harmless else {culprit})
    assert (steps["norms"]["state"], unfinished) == ("done", [])
    said = rows[culprit].get("error", "")
    if does == "hangs":
        assert said == "hung: not done after 60 s while preparing" and rows[culprit]["died"]
        assert len(failed) == 1 and "row_stats" in failed[0]
    else:
        assert failed == []
    if does == "fails":
        assert said.startswith("OutOfResources")
    elif does == "no memory":
        assert said.startswith("OutOfMemoryError")
    elif does == "no capture":
        assert rows[culprit]["timed_by"] == "stream" and "not captured" in rows[culprit]["note"]
        assert rows["layer_norm", "vitfast triton"]["timed_by"] == "graph"
    elif does == "NVML":
        for key in right:
            assert rows[key]["sm_clock_mhz"] == 1755 and "power_w" not in rows[key]
            assert "not supported" in rows[key]["nvml_refused"]["power_w"]


@pytest.mark.full
def test_a_budget_that_ends_in_mid_step_leaves_what_was_done(campaign):
    """And a second call does the rest."""
    step = Step("all", "bench", (KERNELS,), 60.0)
    steps, failed, unfinished = campaign(step, faults={"_attention_dkdv_kernel": "hangs"})  # however fast the rest is
    assert steps["all"]["state"] == "cut" and len(unfinished) == 1 and failed == []
    first = {key: row for key, row in rows_of(steps["all"]).items() if row["correct"]}
    finished = steps["all"]["result"]["finished"]
    steps, failed, unfinished = campaign(Step("all", "bench", (KERNELS,), 900.0))
    assert (steps["all"]["state"], failed, unfinished) == ("done", [], [])
    assert len(steps["all"]["result"]["finished"]) > len(finished) > 0
    again = rows_of(steps["all"])
    assert all(again[key]["correct"] for key in first)


@pytest.mark.full
def test_a_kernel_too_large_for_the_chip_is_refused_by_the_real_jit():
    found = launched("--op", "attention", "--shared", "1024")
    assert found["rows"] and all("OutOfResources" in row["error"] for row in found["rows"])


@pytest.mark.full
def test_every_case_of_the_campaign_is_launched():
    """kernels-base, block and backward too, with the configs that the real one would get."""
    found = launched()
    failed = {row["case"]: row["error"] for row in found["rows"] if not row["correct"] and not row.get("absent")}
    assert not failed
    assert {row["op"] for row in found["rows"]} == cases.OPS.keys() - {"attention_block"}
    launches = found["launches"]
    assert all(launches[row["case"]] for row in found["rows"] if row["correct"])
    block = next(names for case, names in launches.items() if case.startswith("block "))
    assert len(block) in (5, 6), block  # five launches, and the first statistics
    backward = next(names for case, names in launches.items() if case.startswith("attention_backward"))
    assert {"_attention_kernel", "_attention_dq_kernel", "_attention_dkdv_kernel"} <= {*backward}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_whole_command_from_a_bare_checkout(tmp_path):
    """`make gpu` without .git, with a kernel that kills the context and a budget that ends in mid-step; then once more.

    One step of each kind but those of `vitfast bench`, which take longest and are tried above; `make gpu-rehearsal` has
    them all.
    """
    checkout = rehearsal.bare_checkout(tmp_path / "vitfast")
    assert not (checkout / ".git").exists()
    settings = {"faults": {"_quantize_kernel": "dies"}, "limit_s": 600.0, "only": "vitfast bench smoke"}
    names = ("doctor", "smoke", "tests")

    def call(budget):
        process = rehearsal.make_gpu(
            checkout, tmp_path / "out", budget, standin=settings, cache=tmp_path / "cache",
            arguments=" ".join(f"--step {name}" for name in names),
        )  # fmt: skip
        said = process.communicate()[0].decode()
        content = json.loads((tmp_path / "out" / "campaign.json").read_text())
        assert {path.name for path in (tmp_path / "out").iterdir()} <= {
            "campaign.json", "campaign.log", "page.html", "tests.json",
        }  # fmt: skip
        assert content["environment"]["commit"] is None and content["environment"]["sources"]
        return process.returncode, said, content["steps"]

    _, said, first = call("50s")
    assert any(f"{name}: " in said and first[name]["state"] in ("cut", "") for name in names[1:]), said[-3000:]
    code, said, steps = call("90m")
    assert code == 2, said[-3000:]  # make's own, of a command that gave 1
    assert [steps[name]["state"] for name in names] == ["done"] * 3
    for name, job in first["smoke"].get("answer", {}).get("jobs", {}).items():
        assert steps["smoke"]["answer"]["jobs"][name] == job, "what the first call finished is not done again"
    culprits = {culprit["case"].split()[0] for step in steps.values() for culprit in step["culprits"]}
    assert culprits == {"quantize"}, culprits
    report = json.loads((tmp_path / "out" / "tests.json").read_text())
    assert report["done"] and report["passed"] > 0 and not report["errors"]
