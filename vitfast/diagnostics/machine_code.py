"""What the compiler's later stages made of a kernel: the assembler's warnings, accumulators moved, clocks of a tile."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitfast.diagnostics import sass, throughput

_CONVERSION = re.compile(
    r"(%\w+) = ttg\.convert_layout %\S+ : tensor<(\d+)x(\d+)xf32, (#[\w.]+).*-> tensor<\S+ (#[\w.]+)"
)
_PRODUCT = re.compile(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) .*-> tensor<(\d+)x(\d+)xf32")
_WARPGROUP_ROWS = re.compile(r"(#mma\d*) = #ttg\.nvidia_mma<\{versionMajor = 3,.*warpsPerCTA = \[(\d+), 1\]")
_WARNING = re.compile(r"\(?(C\d{4})\)?")
HEAD_DIM = 64
"""Of a row that names no head dim."""


def ptxas_warnings(ptx: str, ptxas: Path) -> list[str]:
    """The assembler's numbered warnings, such as C7515 (products made to wait for each other), once each.

    Args:
        ptx: of a kernel, as Triton has assembled it. ptxas: the assembler that Triton itself runs for it: an older one
            refuses the file.

    Raises:
        RuntimeError: if it does not assemble.
    """
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None, "PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={target[1]}", str(source), "-o", str(source.with_suffix(".cubin"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{ptxas} failed ({result.returncode}): {result.stderr.strip()}")
    return sorted(set(_WARNING.findall(result.stderr + result.stdout)))


def accumulator_conversions(ttgir: str) -> int:
    """How often a large part of the sums of products changes its layout: through shared memory, behind barriers.

    Two do not count: between layouts of wgmma whose warps divide rows alone, which differ in the width of an
    instruction and put each element in the same lane; and into nothing but a store, through which all outputs go.

    Args:
        ttgir: Triton's GPU dialect of the kernel. Parts of a quarter and more of the largest product count.
    """
    elements = max((int(m[1]) * int(m[2]) for m in _PRODUCT.finditer(ttgir)), default=0)
    rows = {m[1]: m[2] for m in _WARPGROUP_ROWS.finditer(ttgir)}

    def counts(m: re.Match[str]) -> bool:
        name, source, target = m[1], m[4], m[5]
        large = 4 * int(m[2]) * int(m[3]) >= elements > 0
        same = source == target or (source in rows and rows[source] == rows.get(target))
        scope = ttgir[m.end() :].split(f"{name} = ", 1)[0]  # names come again in other regions
        uses = [line for line in scope.splitlines() if re.search(rf"{name}\b", line)]
        stored = bool(uses) and all(re.search(rf"tt\.store %\w+, {name}\b", line) for line in uses)
        return large and not source.startswith("#blocked") and not same and not stored

    return sum(counts(m) for m in _CONVERSION.finditer(ttgir))


def describe(
    case: Any, arch: str, asm: Mapping[str, Any], listing: sass.Listing, *, warps: int, blocks: int, ptxas: Callable,
    k: int, tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """The part of a row of `vitfast inspect` that is read from the machine code.

    Returns:
        ptxas_warnings, accumulator_conversions; product_loops and rest: instructions by pipe, load and store widths,
        and waits for products of each; from `throughput.tile_clocks`, for a product over k and attention of `tokens`:
        tensor_busy, epilogue_instructions_per_element and tile_clocks, None where it has no answer.
    """
    sizes = {name: value for name, value in case.constexprs.items() if isinstance(value, int)}
    steps = throughput.steps_of(case.kernel, sizes, k=k, tokens=tokens)
    clocks = None
    if steps:
        head_dim = sizes.get("HEAD_DIM", HEAD_DIM)
        elements = throughput.output_elements(case.kernel, sizes, head_dim, tokens)
        clocks = throughput.tile_clocks(
            listing, steps, arch=arch, warps=warps, blocks=max(1, blocks), elements=elements,
            copied=_copied(case, listing),
        )  # fmt: skip
    return {
        "ptxas_warnings": ptxas_warnings(asm["ptx"], ptxas()),
        "accumulator_conversions": accumulator_conversions(asm["ttgir"]),
        "product_loops": [describe_part(listing.of(loop)) for loop in listing.product_loops],
        "rest": describe_part(listing.outside()),
        "epilogue_instructions_per_element": clocks and clocks.pop("epilogue_instructions_per_element"),
        "tensor_busy": clocks and clocks["tensor_busy"],
        "tile_clocks": clocks,
    }


def _copied(case: Any, listing: sass.Listing) -> int:
    """Bytes by TMA in a step, by `throughput.copied_bytes`."""
    if not any(i.base == "UTMALDG" for i in listing.instructions):
        return 0
    size = 1 if case.kernel == "quantized_linear" else 2
    return throughput.copied_bytes(case.kernel, case.constexprs, size)


def describe_part(instructions: tuple[sass.Instruction, ...]) -> dict[str, Any]:
    """How many instructions a part of the code has, by pipe, its load and store widths, and its waits for products."""
    return {
        "instructions": len(instructions),
        "pipes": dict(sorted(sass.count_pipes(instructions).items())),
        "widths": sass.load_widths(instructions),
        "product_waits": sass.products_waited_for(instructions),
    }
