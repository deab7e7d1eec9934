"""What the compiler makes of every kernel, without a GPU: no spills, fits the chip, uses its tensor cores."""

import io
import json
import os
import re

import pytest
from helpers.inspected import TENSOR_CORES, inspected
from helpers.scripts import ROOT, compiling, compiling_code

from vitfast.diagnostics import compiled
from vitfast.kernels._compile.case import SHARED_MEMORY_LIMIT

KERNEL_FILES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem[0] != "_")


# Up to a minute each with a cold cache: in the full suite. By default there is every case of the others.
SLOW = {("sm_100", file) for file in KERNEL_FILES}
SLOW |= {(arch, file) for arch in ("sm_80", "sm_90") for file in ("attention_backward", "attention_block")}
SLOW |= {(arch, file) for arch in ("sm_80", "sm_90") for file in ("attention", "quantized_linear", "quantize", "mlp")}
SLOW |= {(arch, file) for arch in ("sm_80", "sm_90") for file in ("linear", "attention_short", "patch_embed")}
SLOW |= {("sm_80", "layer_norm"), ("sm_80", "resample"), ("sm_90", "resample")}


OLDEST = os.environ.get("VITFAST_OLDEST_TRITON", "")
"""A folder with the oldest Triton that vitfast takes (`make test-oldest-triton`): its kernels must be as good."""


@pytest.mark.full
@pytest.mark.skipif(not OLDEST, reason="VITFAST_OLDEST_TRITON names no folder with an older Triton")
@pytest.mark.parametrize("kernel", KERNEL_FILES)
def test_kernels_compile_well_with_the_oldest_triton(kernel):
    version = compiling("-c", "import triton; print(triton.__version__)", PYTHONPATH=OLDEST).strip()
    assert f'"triton>={version.rpartition(".")[0]}; ' in (ROOT / "pyproject.toml").read_text()
    options = ("--arch", "sm_90", "--kernel", kernel, "--json")
    rows = json.loads(compiling("-m", "vitfast", "inspect", *options, PYTHONPATH=OLDEST))
    assert {row["file"] for row in rows} == {kernel}
    assert [f"{row['kernel']}/{row['config']}: {problem}" for row in rows for problem in problems(row)] == []


# One process per chip and file: the work spreads over the workers of pytest-xdist, and a new file
# in kernels/ is inspected without being named here.
@pytest.mark.parametrize(
    ("arch", "kernel"),
    [
        pytest.param(arch, kernel, marks=pytest.mark.full if (arch, kernel) in SLOW else ())
        for arch in ("sm_90", "sm_80", "sm_100")
        for kernel in KERNEL_FILES
    ],
)
def test_kernels_compile_well(arch, kernel):
    rows = inspected(arch, kernel)
    assert {(row["arch"], row["file"]) for row in rows} == {(arch, kernel)}
    wrong = [f"{row['kernel']}/{row['config']}: {problem}" for row in rows for problem in problems(row)]
    assert wrong == []
    if kernel in PRODUCTS:
        assert any(has_half_operands(row) for row in rows)


@pytest.mark.full
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.full), "sm_90"])
def test_slow_kernels_compile_well(arch):
    """One case of each kernel, at head dim 64, before the full suite comes to all of them."""
    files = sorted(file for chip, file in SLOW if chip == arch)
    rows = json.loads(compiling_code(f"""
        import importlib, json
        from vitfast.diagnostics.compiled import inspect_case

        cases = {{}}
        for file in {files}:
            for case in importlib.import_module(f"vitfast.kernels._compile.{{file}}").compile_cases():
                heads = case.constexprs.get("HEAD_DIM", 64) == 64
                if heads and {arch[3:]} in case.archs and "bf16" in str(case.signature):
                    cases.setdefault((file, case.kernel), case)
        print(json.dumps([{{"file": file, **inspect_case(case, "{arch}")}} for (file, _), case in cases.items()]))
    """))  # fmt: skip
    assert {row["file"] for row in rows} == set(files)
    assert len({row["kernel"] for row in rows if row["file"] == "attention_backward"}) >= 2
    assert [problem for row in rows for problem in problems(row)] == []


# Kernels whose 16-bit products must be done by the best tensor-core instruction of the chip. fp32
# products are exact (no TF32), which no tensor core can do. `linear_sum` only adds up.
PRODUCTS = ("linear", "attention", "attention_backward", "attention_block")


def has_half_operands(row):
    return bool({"bf16", "fp16"} & set(row["dtypes"]))


def expected_warnings(row):
    """C7517: sums in fp8 are moved to fp32 after every 128 columns, for which products must be waited for."""
    promoted = row["kernel"] == "quantized_linear" and "fp8e4nv" in row["dtypes"] and row["arch"] == "sm_90"
    return {"C7517"} if promoted else set()


def problems(row):
    """What is wrong with one row of the report, sentences."""
    if row["spill_bytes"]:
        yield f"{row['spill_bytes']} bytes spilled"
    if unexpected := set(row["ptxas_warnings"]) - expected_warnings(row):
        yield f"the assembler warns of {', '.join(sorted(unexpected))}"
    if row["accumulator_conversions"] and row["arch"] == "sm_90":
        yield f"{row['accumulator_conversions']} accumulators go through shared memory"
    if not row["fits"]:
        yield f"{row['shared_bytes']} bytes of shared memory, {row['registers']} registers do not fit"
    multiplies = row["file"] in PRODUCTS and row["kernel"] != "linear_sum"
    if multiplies and has_half_operands(row) and row["tensor_core"] != TENSOR_CORES[row["arch"]]:
        yield f"products by {row['tensor_core']}"
    if row["shared_limit"] != SHARED_MEMORY_LIMIT[int(row["arch"][3:])]:
        yield f"shared memory limit is said to be {row['shared_limit']}"
    if not 0 < row["occupancy"]["fraction"] <= 1:
        yield f"occupancy is said to be {row['occupancy']}"
    if not row["tile"] or not all(0 < share <= 1 for share in row["tile_efficiency"].values()):
        yield f"tile {row['tile']}, efficiency {row['tile_efficiency']}"


SEEDED = """
import json, sys
from pathlib import Path
import triton, triton.language as tl
from vitfast.diagnostics.compiled import inspect_case
from vitfast.kernels._compile.case import CompileCase

@triton.jit
def product(y, x, w, residual, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(x + rows[:, None] * K + (k + inner)[None, :])
        b = tl.load(w + columns[None, :] * K + (k + inner)[:, None])
        total = tl.dot(a, b, total)
    if residual is not None:
        total += tl.load(residual + rows[:, None] * N + columns[None, :])
    tl.store(y + rows[:, None] * N + columns[None, :], total.to(tl.bfloat16))

@triton.jit
def clumsy(y, x, w, K, TURNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(x + rows[:, None] * K + (k + inner)[None, :])
        total = tl.dot(a, tl.load(w + columns[None, :] * K + (k + inner)[:, None]), total)
        if not TURNED:
            total *= 0.5  # waits for the product
    if TURNED:
        total += tl.trans(total)  # goes through shared memory
    tl.store(y + rows[:, None] * N + columns[None, :], total.to(tl.bfloat16))

@triton.jit
def scale(y, a, b, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    if a is not None:
        value = tl.load(a + offsets) * 2
    else:
        value = tl.load(b + offsets)
    tl.store(y + offsets, value)

def case(config, m, n, stages, fn=product, **constexprs):
    constexprs = {"M": m, "N": n, "BLOCK_K": 64, "residual": None} | constexprs
    constexprs = {name: value for name, value in constexprs.items() if name in fn.arg_names}
    pointers = dict.fromkeys(("y", "x", "w"), "*bf16")
    return CompileCase("seeded", config, fn, pointers | {"K": "i32"}, constexprs, 4, stages,
                       aligned=("y", "x", "w", "K"), tile={"M": m, "N": n})

def swapped(present, absent):
    return CompileCase("seeded", present, scale, {"y": "*fp32", present: "*fp32"},
                       {absent: None, "SIZE": 512}, 4, 1, tile={"C": 512})

cases = [case("good", 64, 64, 3), case("spilling", 128, 256, 3), case("greedy", 64, 256, 8),
         case("waiting", 64, 64, 3, fn=clumsy, TURNED=False), case("turned", 64, 64, 3, fn=clumsy, TURNED=True),
         swapped("a", "b"), swapped("b", "a")]
rows = {}
for one in cases:
    print("case", one.config)
    rows[one.config] = inspect_case(one, "sm_90")
Path(sys.argv[1]).write_text(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """Reports on the kernels above, what ptxas said of each, and the cubins in Triton's cache."""
    folder = tmp_path_factory.mktemp("seeded")
    script, report, cache = folder / "seeded.py", folder / "rows.json", folder / "cache"
    script.write_text(SEEDED)
    log = compiling(
        "-c",
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])",
        script,
        report,
        TRITON_CACHE_DIR=str(cache),
        TRITON_DUMP_PTXAS_LOG="1",
    )
    logs = dict(part.split("\n", 1) for part in log.split("case ")[1:])
    return json.loads(report.read_text()), logs, list(cache.glob("*/*.cubin"))


@pytest.mark.full
def test_a_good_kernel_passes(seeded):
    rows, logs, _ = seeded
    row = rows["good"]
    assert (row["spill_bytes"], row["fits"], row["tensor_core"], row["copy"]) == (0, True, "wgmma", "cp.async")
    assert row["shared_bytes"] == 3 * (64 + 64) * 64 * 2  # stages * tiles of x and w * bytes
    assert f"Used {row['registers']} registers" in logs["good"]


def test_spills_are_those_that_ptxas_reports(seeded):
    rows, logs, _ = seeded
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", logs["spilling"])
    frame, stores, loads = map(int, found.groups())
    assert min(stores, loads) > 0
    assert rows["spilling"]["spill_bytes"] == frame > 0
    assert rows["spilling"]["instructions"]["STL"] > 0


def test_too_much_shared_memory_does_not_fit(seeded):
    row = seeded[0]["greedy"]
    assert row["shared_bytes"] > row["shared_limit"] == 232_448
    assert row["fits"] is False
    assert row["occupancy"] == {"blocks_per_sm": 0, "fraction": 0.0, "limited_by": "shared memory"}


def test_products_waited_for_and_sums_moved_are_noticed(seeded):
    rows, logs, _ = seeded
    found = {name: list(problems({**rows[name], "file": "seeded"})) for name in ("good", "waiting", "turned")}
    assert found == {
        "good": [],
        "waiting": ["the assembler warns of C7517"],
        "turned": ["1 accumulators go through shared memory"],
    }
    assert "C7517" in logs["waiting"]


def test_cases_that_swap_a_pointer_for_none_are_not_confused(seeded):
    """Triton's cache key has no names of constexprs: cases a and b could be taken for the same."""
    rows, _, cubins = seeded
    assert len(cubins) == len(rows)


def test_occupancy_by_nvidias_calculator():
    """Expected values: cudaOccMaxActiveBlocksPerMultiprocessor of CUDA 13.0's cuda_occupancy.h."""
    expected = {
        ("sm_80", 229, 65_536, 8): 1,
        ("sm_80", 64, 64, 4): 8,
        ("sm_86", 40, 0, 1): 16,
        ("sm_89", 128, 32_768, 4): 3,
        ("sm_90", 168, 61_440, 4): 3,
        ("sm_90", 32, 0, 2): 32,
        ("sm_90", 255, 1_000, 2): 4,
        ("sm_90", 255, 1_000, 16): 0,
        ("sm_90", 33, 1_000, 16): 3,  # 33 registers a thread are 1,056 a warp, of which 1,280 are taken
        ("sm_90", 40, 1_000, 16): 3,
        ("sm_90", 41, 1_000, 16): 2,
        ("sm_100", 65, 9_000, 8): 3,
    }
    found = {key: compiled.compute_occupancy(*key)["blocks_per_sm"] for key in expected}
    assert found == expected
    assert compiled.compute_occupancy("sm_100", 32, 0, 4, tensor_memory_columns=256)["blocks_per_sm"] == 2


def test_chips_agree_with_the_kernels_limits():
    limits = {int(name[3:]): chip.shared_limit for name, chip in compiled.MULTIPROCESSORS.items()}
    assert limits == SHARED_MEMORY_LIMIT


def test_tile_efficiency():
    gemm = compiled.tile_efficiency("linear", {"M": 128, "N": 256, "K": 64})
    assert gemm["M=197 N=768"] == round(197 / 256, 4)
    assert gemm["M=1576 N=577"] == round(1576 / 1664 * 577 / 768, 4)
    assert compiled.tile_efficiency("attention", {"M": 64, "N": 64})["N=257"] == round((257 / 320) ** 2, 4)
    assert compiled.tile_efficiency("layer_norm", {"M": 4, "C": 1024})["M=1576 C=768"] == 0.75
    assert compiled.tile_efficiency("pool", {"D": 64}) == {}


def test_refuses_the_interpreter():
    code = "from vitfast.diagnostics.compiled import inspect\ntry: inspect()\nexcept RuntimeError as e: print(e)"
    assert "TRITON_INTERPRET=1" in compiling_code(code, TRITON_INTERPRET="1")


def test_errors_say_what_is_wrong():
    code = """
        import dataclasses, json
        from triton import knobs
        from vitfast.diagnostics.compiled import inspect, inspect_case
        from vitfast.kernels._compile import layer_norm

        def message(function, *arguments):
            try:
                function(*arguments)
            except (ValueError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}"

        case = layer_norm.compile_cases()[0]
        messages = [
            message(inspect, ["sm_70"]),
            message(inspect, ["sm_90"], ["lin"]),
            message(inspect_case, dataclasses.replace(case, signature={}), "sm_90"),
            message(inspect_case, dataclasses.replace(case, signature=dict.fromkeys(case.signature, "i1")), "sm_90"),
        ]
        vars(type(knobs.nvidia))["cuobjdump"].default_path = "/nowhere/cuobjdump"
        messages.append(message(inspect_case, case, "sm_90"))
        print(json.dumps(messages))
    """
    arch, kernel, arguments, broken, tool = json.loads(compiling_code(code, TRITON_CUOBJDUMP_PATH="/nowhere/cuobjdump"))
    assert arch.startswith("ValueError: no chip named 'sm_70'; the chips are sm_80, ")
    assert kernel.startswith("ValueError: no kernel file named 'lin'; the files are ")
    assert all(name in kernel for name in KERNEL_FILES)
    assert arguments.startswith("ValueError: compile case layer_norm/")
    assert "must together be the kernel's arguments" in arguments
    assert re.match(r"RuntimeError: layer_norm/\S+ does not compile for sm_90: ", broken)
    assert tool.startswith("RuntimeError: cuobjdump is neither in Triton's package")


def test_render_shows_every_row():
    from rich.console import Console

    row = {
        "kernel": "linear",
        "config": "demo",
        "arch": "sm_90",
        "tile": {"M": 64, "N": 64},
        "num_warps": 4,
        "num_stages": 3,
        "registers": 123,
        "spill_bytes": 8,
        "shared_bytes": 65_536,
        "shared_limit": 232_448,
        "fits": True,
        "occupancy": {"blocks_per_sm": 3, "fraction": 0.1875, "limited_by": "shared memory"},
        "tensor_core": "wgmma",
        "copy": "tma",
        "tile_efficiency": {"M=1576 N=768": 0.985},
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(compiled.render([row, row | {"config": "other"}, row | {"arch": "sm_100"}]))
    text = console.export_text()
    assert [text.count(word) for word in ("linear, sm_90", "linear, sm_100", "demo", "other")] == [1, 1, 2, 1]
    words = text.split("demo")[1].split()
    assert words[:10] == ["4", "x", "3", "123", "8", "64/227", "3", "shared", "wgmma", "tma"]
    assert words[10] == "98%"
