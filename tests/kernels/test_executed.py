"""What the compiler made of the kernels, executed instruction by instruction: `helpers.ptx` and tests/emulation/ptx.

Cases of kernels/_compile, compiled for sm_90 and sm_80, run through their launchers and meet the oracle under a GPU's
bounds. Mistakes put into their PTX are found.
"""

import functools
import json
import os
import re

import pytest
import torch
from helpers.emulated import needs_compiler
from helpers.ptx.faults import FAULTS
from helpers.scripts import ROOT, compiling

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
]

CORE = [
    (90, "linear", "tma_64x64x64_gelu"),
    (90, "layer_norm", "1024"),
    (90, "quantize", "1024_fp8e4nv_norm"),
    (90, "attention_short", "short D=32"),
    (90, "quantized_linear", "tma_64x128x128_i8_bias"),
    (80, "linear", "64x64x64_gelu"),
]
"""TMA, mbarriers and wgmma; reductions; 8-bit output; products out of registers; int8; cp.async and mma.sync."""
PATH = f"{ROOT}:{ROOT / 'tests'}"
OLDEST = os.environ.get("VITFAST_OLDEST_TRITON", "")
"""A folder with the oldest Triton that vitfast takes (`make test-oldest-triton`)."""


def executed(jobs, path=PATH):
    """What `python -m helpers.ptx` says of each job."""
    lines = compiling("-W", "ignore", "-m", "helpers.ptx", json.dumps(jobs), PYTHONPATH=path).splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def core():
    """The core cases and the faults, in one process: what was found wrong with each."""
    jobs = {case: {"arch": case[0], "file": case[1], "case": case[2]} for case in CORE}
    jobs |= {name: {"fault": name} for name in FAULTS}
    return dict(zip(jobs, executed(list(jobs.values())), strict=True))


@pytest.mark.parametrize("case", CORE, ids=lambda case: f"sm_{case[0]}-{case[1]}-{case[2]}")
def test_a_case_is_right(case, core):
    assert not core[case]["wrong"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, core):
    """Not only wrong numbers: the trap says what is amiss."""
    assert re.search(FAULTS[fault].says, core[fault]["wrong"]), core[fault]["wrong"] or "nothing was found"


BEFORE_THE_PROJECTION = "    tl.debug_barrier()\n\n    # The projection.\n"
"""The barrier of attention_block between attention's output and its readers.

With one head nothing else stands there. With several, the compiler's barriers within the next head's loop do, as
they do after every wait for copies: between q, k, v and attention, and between the reads of q and the output. At a
head dim of 32 each lane reads what it wrote itself.
"""


@pytest.mark.parametrize(
    ("arch", "case"),
    [(80, "width192_sm80 D=64"), pytest.param(90, "width192 D=64", marks=pytest.mark.full)],
    ids=("sm_80", "sm_90"),
)
def test_a_race_planted_in_a_kernel_is_found(arch, case):
    job = {"arch": arch, "file": "attention_block", "case": case, "problem": {"heads": 1}}
    right, race = executed([job, job | {"old": BEFORE_THE_PROJECTION, "new": ""}])
    assert not right["wrong"]
    assert re.search("race: warp .* reads global memory that warp .* wrote with no barrier between", race["wrong"])


def test_what_is_executed_is_counted(core):
    """The bytes that TMA brings are those of all boxes: 2 x 2 tiles, 9 steps along K, 64 x 64 of both operands."""
    counts = core[CORE[0]]["counts"]
    assert counts["tma_read_bytes"] == 4 * 9 * 2 * 64 * 64 * 2
    assert counts["tma_written_bytes"] == 73 * 80 * 2
    assert counts["wgmma.mma_async.sync.aligned.k16.f32.bf16.bf16"] == 4 * 9 * 4 * 4  # tiles, steps, in a step, warps


@functools.cache
def beside(arch, file, case):
    """What `python -m helpers.ptx.beside` prints of a case: the numbers of a line by what it is named."""
    text = compiling("-W", "ignore", "-m", "helpers.ptx.beside", str(arch), file, case, PYTHONPATH=PATH)
    found = (re.match(r"(\D+?) +(\d.*)$", line) for line in text.splitlines()[1:])
    return {match[1]: [float(x) for x in match[2].split() if x != "-"] for match in found if match}


@pytest.mark.parametrize(
    ("arch", "file", "case"),
    [
        (90, "linear", "tma_64x64x64_gelu"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (90, "attention_short", "short-walk D=64 N=197"),
                (80, "linear", "64x64x64_gelu"),
                (80, "attention_short", "short-walk D=64 N=197"),
            )
        ),
    ],
)
def test_what_is_executed_is_what_the_machine_code_was_read_to_do(arch, file, case):
    """Products, and loads and stores of shared memory, of a tile; the latter without a bank conflict."""
    counts = beside(arch, file, case)
    for pipe in ("tensor", "shared"):
        executed, read = counts[pipe]
        assert executed == read > 0, pipe
    assert counts["shared turns"] == counts["shared accesses"]


def test_counts_of_a_tile():
    """64 x 64, 9 steps of 64 along K, 4 warps: a hyperbolic tangent for each of a thread's 32 elements, and no more."""
    counts = beside(90, "linear", "tma_64x64x64_gelu")
    assert counts["mufu"][0] == 32
    assert counts["operand bytes"] == [9 * 4 * (64 + 64) * 16 * 2]  # steps, products in each, rows of both, K, bytes
    assert counts["shared written bytes"] == [64 * 64 * 2]  # y, on its way to TMA


@pytest.mark.full
@pytest.mark.parametrize("file", sorted(path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")))
@pytest.mark.parametrize("arch", [90, 80])
def test_every_compile_case_is_right(arch, file):
    results = executed([{"arch": arch, "file": file, "case": "", "all": True}])
    assert results
    assert not [(result["name"], result["wrong"]) for result in results if result["wrong"]]


def proved(folder, arch, file, case, change=lambda ptx: ptx):
    """What SentryWard says of a block of a case: a second opinion, by proof instead of execution."""
    sentryward = pytest.importorskip("sentryward", reason="SentryWard, a static verifier of PTX, is not installed")
    arguments = (str(arch), file, case, folder)
    compiling("-W", "ignore", "-m", "helpers.ptx.sentryward", *arguments, PYTHONPATH=PATH)
    (folder / "kernel.ptx").write_text(change((folder / "kernel.ptx").read_text()))
    return sentryward.verify(folder / "kernel.ptx", input=folder / "input.json", timeout_seconds=300)


@pytest.mark.full
def test_a_proof_finds_no_race_in_attention_short(tmp_path):
    case = (80, "attention_short", "short D=32")
    assert proved(tmp_path, *case)["result"] == "race_free"
    found = proved(tmp_path, *case, lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx))
    assert found["result"] == "potential_race" and found["races"]


@pytest.mark.full
@pytest.mark.parametrize(("file", "case"), [("layer_norm", "1024"), ("quantize", "1024_fp8e4nv_norm")])
def test_a_proof_finds_but_stores_of_one_sum(tmp_path, file, case):
    """Lanes of a warp that hold the same sum store it to one word: the executor lets them, a proof knows no values."""
    found = proved(tmp_path, 90, file, case)
    assert found["result"] == "potential_race" and found["checks"]["synchronization"] == "passed"
    for race in found["races"]:
        assert race["region"]["address_space"] == "shared"
        assert race["first"]["mode"] == race["second"]["mode"] == "write"
        assert race["first"]["location"] == race["second"]["location"]
        assert race["first"]["actor"] // 32 == race["second"]["actor"] // 32


@pytest.mark.full
@pytest.mark.skipif(not OLDEST, reason="VITFAST_OLDEST_TRITON names no folder with an older Triton")
def test_the_core_is_right_with_the_oldest_triton():
    """And a whole forward, whose launches that Triton's JIT specialises.

    On sm_90 it lets wgmma read what cp.async brought with no fence between (Triton's pull request 10537, of the 3.7
    series, puts one there). With that fence put into the PTX the forward is right.
    """
    jobs = [{"arch": arch, "file": file, "case": case} for arch, file, case in CORE]
    forward = {"forward": ("attention_block", "mlp"), "fold_norm": True}
    jobs += [forward | {"arch": 80}, forward | {"arch": 90, "fenced": True}, forward | {"arch": 90}]
    *right, unfenced = executed(jobs, f"{OLDEST}:{PATH}")
    assert len(right) == len(jobs) - 1
    assert not [(result["name"], result["wrong"]) for result in right if result["wrong"]]
    assert "with no fence.proxy.async after it" in unfenced["wrong"]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 6))
def test_other_schedules_find_nothing_else(seed):
    jobs = [{"arch": arch, "file": file, "case": case, "seed": seed} for arch, file, case in CORE]
    assert not [result for result in executed(jobs) if result["wrong"]]


@pytest.mark.full
@pytest.mark.parametrize(
    ("fused", "fold_norm", "launches"), [((), False, 17), ((), True, 14), (("attention_block", "mlp"), True, 7)]
)
@pytest.mark.parametrize("arch", [90, 80])
def test_a_forward_of_two_blocks_is_right(arch, fused, fold_norm, launches):
    """Launchers, the JIT's specialisation and tensor descriptors as they are; every launch executed."""
    [result] = executed([{"forward": fused, "fold_norm": fold_norm, "arch": arch}])
    assert not result["wrong"]
    assert sum(result["counts"].values()) == launches
