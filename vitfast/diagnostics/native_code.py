"""What nvcc makes of the CUDA `linear` for Hopper (csrc/cuda/linear.cuh), and how busy its products are. Needs no GPU.

The kernel chooses its epilogue when it runs. Here it is compiled once for each of EPILOGUES, with what is known of such
a call fixed, so that the code is what the call runs. Its blocks stay and copy ahead, and one of its two warpgroups may
multiply while the other is in its epilogue: `schedule` is the model of that, for an epilogue as long as this code says.
As in `throughput`, latencies within the epilogue are taken to be hidden, and shared memory has one port.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfast.diagnostics import machine_code, sass, throughput
from vitfast.diagnostics.chips import LAUNCH_US
from vitfast.diagnostics.code_times import SUSTAINED_CLOCK
from vitfast.diagnostics.compiled import run_tool
from vitfast.diagnostics.schedule import Schedule, tensor_busy

if TYPE_CHECKING:
    from rich.table import Table

ARCH = "sm_90"
CLUSTER, ROWS, COLUMNS, DEPTH, STAGES = 2, 128, 256, 64, 3
"""Blocks that share weights, a block's tile and a step of it, and stages: those of csrc/cuda/linear.h for wide y."""
INNER = (768, 1024, 3072, 4096)
"""K of the products of ViT-B and ViT-L."""

_NONE, _GELU = "c.activation = LinearActivation::none;", "c.activation = LinearActivation::gelu;"
_FIRST, _INNER = "c.residual = nullptr; c.y_stats = nullptr;", "c.row_stats = nullptr; c.weight_sum = nullptr;"
_NORM = f"__builtin_assume(c.row_stats != nullptr); {_FIRST}"
EPILOGUES = {
    "bias": _NONE + _FIRST + _INNER,
    "norm": _NONE + _NORM,
    "norm_gelu": _GELU + _NORM,
    "residual_stats": _NONE + _INNER + "__builtin_assume(c.residual != nullptr && c.y_stats != nullptr);",
}
"""Name -> what is known of the call `c`, all of which have a bias. Those of a ViT: qkv, fc1, proj and fc2."""

_SOURCE = """
#include "cuda/linear.cuh"
#define INSTANCE(name, ...) \\
  extern "C" __global__ void VITFAST_CLUSTER(kLinearCluster) __launch_bounds__(kLinearThreads, 1) \\
      name(const __grid_constant__ vitfast::LinearParams p) {{ \\
    using namespace vitfast; \\
    LinearCall c = p.call; \\
    c.x_scale = c.weight_scale = nullptr, c.y_scale = nullptr, c.layer_scale = nullptr; \\
    c.n = c.n / {columns} * {columns}; \\
    __builtin_assume(c.bias != nullptr); \\
    __VA_ARGS__ \\
    linear_block<bf16, bf16, {columns}>(p, c); \\
  }}
using vitfast::kLinearCluster;
using vitfast::kLinearThreads;
"""


def inspect_linear() -> list[dict[str, Any]]:
    """Compile the kernel for each of EPILOGUES, bf16 and tiles of 256 columns, and read the result.

    Returns:
        Rows like those of `compiled.inspect`: kernel, config, arch, registers, spill_bytes, ptxas_warnings,
        product_loops, rest, epilogue_instructions_per_element, and tensor_busy at K = 768; also epilogue_clocks, those
        of a warpgroup alone between the products of two tiles; epilogue_shared_clocks, those of shared memory's port
        for a tile's; and tensor_busy_at: by each K of INNER.

    Raises:
        RuntimeError: without nvcc, or csrc/ (a checkout has it), or if it does not compile.
    """
    instances = "".join(f"INSTANCE(linear_{name}, {known})\n" for name, known in EPILOGUES.items())
    report, code = compile_kernels(_SOURCE.format(columns=COLUMNS) + instances)
    rows = []
    for name in EPILOGUES:
        listing, notes = sass.parse(code[f"linear_{name}"]), report[f"linear_{name}"]
        exposed = _exposed(listing)
        one = throughput.phase(exposed, 4, throughput.RATES[ARCH])
        barriers = throughput.BARRIER_CLOCKS * sum(i.base == "BAR" for i in exposed)
        clocks = one.pipes[one.busiest] + barriers + throughput.PRODUCT_TAIL_CLOCKS
        shared = 2 * one.pipes["shared memory"]
        busy = {k: round(busy_at(clocks, shared, k), 4) for k in INNER}
        rows.append(
            {
                "kernel": "linear, native",
                "config": f"{CLUSTER}x{ROWS}x{COLUMNS}x{DEPTH}_{name}",
                "arch": ARCH,
                **notes_of(notes),
                "product_loops": [machine_code.describe_part(listing.of(loop)) for loop in listing.product_loops],
                "rest": machine_code.describe_part(exposed),
                "epilogue_instructions_per_element": round(len(exposed) * 8 * throughput.WARP / (ROWS * COLUMNS), 2),
                "epilogue_clocks": round(clocks),
                "epilogue_shared_clocks": round(shared),
                "tensor_busy": busy[throughput.TYPICAL["K"]],
                "tensor_busy_at": busy,
            }
        )
    return rows


def busy_at(epilogue: float, epilogue_shared: float, k: int, *, weight_shared: int = CLUSTER) -> float:
    """The share of clocks in which tensor cores multiply, for products over k.

    Args:
        epilogue, epilogue_shared: clocks, as `inspect_linear` has them. weight_shared: blocks that share weights.
    """
    steps = -(-k // DEPTH)
    schedule = Schedule(ROWS // 2, COLUMNS, together=True, stages=STAGES, weight_shared=weight_shared)
    step = 2 * ROWS * COLUMNS * DEPTH / throughput.RATES[ARCH].product_flops
    read = 2 * DEPTH * (ROWS + 2 * COLUMNS)  # each warpgroup its rows of x and all of the weights
    written = 2 * DEPTH * (ROWS + COLUMNS)
    port = steps * (read + written) / throughput.RATES[ARCH].shared_bytes + epilogue_shared
    return min(tensor_busy(schedule, steps=steps, epilogue=epilogue), steps * step / port)


def microseconds(row: Mapping[str, Any], dims: Mapping[str, int], chip: Mapping[str, Any], memory_us: float) -> float:
    """Of one launch of the kernel in `row`, for a product of M, N and K in `dims`; `chip` as `predict` has it."""
    rounds = -(-_tiles(dims) // (chip["multiprocessors"] // CLUSTER))
    products = 2 * ROWS * COLUMNS * dims["K"] / throughput.RATES[ARCH].product_flops
    clocks = rounds * products / busy_at(row["epilogue_clocks"], row["epilogue_shared_clocks"], dims["K"])
    return max(clocks / (chip["clock_ghz"] * 1e3 * SUSTAINED_CLOCK), memory_us) + LAUNCH_US


def _tiles(dims: Mapping[str, int]) -> int:
    """Of clusters."""
    return -(-dims["M"] // (CLUSTER * ROWS)) * -(-dims["N"] // COLUMNS)


def add_native(prediction: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add to a prediction what it would be with this kernel for its 16-bit products that fill the chip.

    Launches get native_us; `by_native` is the sum, the other launches as `by_code` has them.
    """
    made = {row["config"].split("_", 1)[1]: row for row in rows}
    total = 0.0
    for row in prediction["launches"]:
        dims = row["dims"]
        if row["op"] == "linear" and _tiles(dims) * CLUSTER >= prediction["chip"]["multiprocessors"]:
            name = dims["epilogue"].replace(" ", "_")
            row["native_us"] = microseconds(made.get(name, made["norm"]), dims, prediction["chip"], row["memory_us"])
        total += row["count"] * (row.get("native_us") or row.get("code_us") or row["time_us"])
    prediction["by_native"] = {"time_us": total, "images_per_s": prediction["batch"] / total * 1e6}


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a rich table."""
    from rich import box
    from rich.table import Table

    title = "the CUDA linear by nvcc: predicted share of clocks in which tensor cores multiply"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("config", "regs", "spill", "warnings", "epilogue\nan element", *(f"K={k}" for k in INNER)):
        made.add_column(name, justify="left" if name == "config" else "right")
    for row in rows:
        made.add_row(
            row["config"], str(row["registers"]), str(row["spill_bytes"]), " ".join(row["ptxas_warnings"]),
            f"{row['epilogue_instructions_per_element']:.1f}", *(f"{row['tensor_busy_at'][k]:.1%}" for k in INNER),
        )  # fmt: skip
    return made


def _exposed(listing: sass.Listing) -> tuple[sass.Instruction, ...]:
    """What stands between the products of two tiles: neither their loop, nor what is done under the first step's."""
    loop = listing.product_loops[0]
    of_tile = listing.outside()
    first = next((i.address for i in of_tile if i.pipe == "tensor"), listing.instructions[loop.first].address)
    last = listing.instructions[loop.last].address
    return tuple(i for i in of_tile if not first <= i.address <= last)


def compile_kernels(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Compile CUDA source that includes files of csrc/ for sm_90a; by entry: ptxas' report, and the disassembly.

    Raises:
        RuntimeError: without nvcc, or csrc/, or if it does not compile.
    """
    sources = Path(__file__).resolve().parents[2] / "csrc"
    if not (sources / "cuda").is_dir():
        raise RuntimeError(f"CUDA kernels are compiled from a checkout: there is no {sources / 'cuda'}")
    if shutil.which("nvcc") is None:
        raise RuntimeError("CUDA kernels are compiled by nvcc, which is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(text)
        command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{sources}", "-Xptxas", "-v"]
        command += ["-cubin", "-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"nvcc failed ({result.returncode}): {result.stderr.strip()}")
        listed = run_tool("nvdisasm", "-c", "-ndf", str(cubin))
    report = re.split(r"Compiling entry function '(\w+)'", result.stderr)
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", listed, flags=re.MULTILINE)
    return dict(zip(report[1::2], report[2::2], strict=True)), dict(zip(parts[1::2], parts[2::2], strict=True))


def notes_of(report: str) -> dict[str, Any]:
    """What ptxas reports of a kernel, by the names that rows have: registers, spill_bytes and ptxas_warnings."""
    return {
        "registers": int(_found(r"Used (\d+) registers", report)),
        "spill_bytes": int(_found(r"(\d+) bytes stack frame", report)),
        "ptxas_warnings": sorted(set(re.findall(r"\(?(C\d{4})\)?", report))),
    }


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas' report has no {pattern!r}: {text!r}")
    return found[1]
