"""Compile every kernel for chips that need not be present, and report what the compiler made of it.

Registers, spills, shared memory, occupancy, tensor-core and copy instructions of every compile case
(`kernels/_compile/<name>.py`), read from the cubin with cuobjdump and nvdisasm, which come with
Triton. Triton's own cache makes the second run fast.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfast.diagnostics import machine_code, sass
from vitfast.diagnostics.throughput import TYPICAL

if TYPE_CHECKING:
    from rich.table import Table

    from vitfast.kernels._compile.case import CompileCase

DEFAULT_ARCHS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor of an architecture has: resident warps and blocks, shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    tensor_memory_columns: int = 0

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory one block may use."""
        return self.shared - RESERVED_SHARED


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(warps=64, blocks=32, shared=164 * 1024),
    "sm_86": Multiprocessor(warps=48, blocks=16, shared=100 * 1024),
    "sm_89": Multiprocessor(warps=48, blocks=24, shared=100 * 1024),
    "sm_90": Multiprocessor(warps=64, blocks=32, shared=228 * 1024),
    "sm_100": Multiprocessor(warps=64, blocks=32, shared=228 * 1024, tensor_memory_columns=512),
}
"""CUDA C++ Programming Guide, compute capabilities, table of technical specifications; tensor memory
from the PTX ISA, tcgen05. The allocation rules below are those of the occupancy calculator
(cuda_occupancy.h of CUDA 13.0)."""

RESERVED_SHARED = 1024  # bytes the driver takes from every block
SHARED_GRANULARITY = 128  # bytes
REGISTERS = 65_536  # 32-bit registers a multiprocessor has, and the most one block may have
REGISTER_GRANULARITY = 256  # registers, allocated a warp
SUB_PARTITIONS = 4  # of a multiprocessor, each with its own registers
WARP_SIZE = 32
POINTER = re.compile(r"(?:\*k?|tensordesc<)(\w+)")  # "*bf16", "tensordesc<bf16[128,64]>": the element type

BATCHES = (1, 8, 64, 256)
GEMM_TOKENS = 197  # ViT-*/16 at 224 pixels
GEMM_WIDTHS = (577, 768, 2304, 3072)  # an awkward one, then ViT-B: width, qkv, mlp
ATTENTION_TOKENS = (197, 257, 577)  # /16 at 224, /14 at 224, /16 at 384
TYPICAL_SHAPES = ("N=197", "M=1576 N=768", "M=1576 C=768")  # what `render` shows: 8 images of ViT-B/16


def inspect(archs: Sequence[str] = DEFAULT_ARCHS, kernels: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compile every case of the named kernel files for every named chip; one row each.

    Args:
        archs: chips, "sm_90" and so on. A case made for sm_80 is also compiled for sm_86 and sm_89.
        kernels: names of files in kernels/ ("linear", "attention", ...); None for all.

    Returns:
        Rows that json.dumps accepts: file, and what `inspect_case` describes.

    Raises:
        ValueError: for an unknown chip or kernel; the message lists what is allowed.
        RuntimeError: if Triton is missing or interpreting, a tool is missing or a case does not compile.
    """
    for arch in archs:
        _multiprocessor(arch)
    modules = _kernel_modules(kernels)
    return [
        {"file": name, **inspect_case(case, arch)}
        for arch in archs
        for name, module in modules.items()
        for case in module.compile_cases()
        if {_number(arch), _number(arch) // 10 * 10} & set(case.archs)
    ]


def find_case(file: str, kernel: str, config: str, arch: str, **constexprs: Any) -> CompileCase | None:
    """The compile case of a kernel in kernels/<file>.py with this config name, the first if there are several.

    Args:
        constexprs: values it must have, e.g. HEAD_DIM=64, bias=None.

    Raises:
        ValueError, RuntimeError: as `inspect`.
    """
    _multiprocessor(arch)
    number = _number(arch)
    for case in _kernel_modules([file])[file].compile_cases():
        fits = {number, number // 10 * 10} & set(case.archs)
        same = all(key in case.constexprs and case.constexprs[key] == value for key, value in constexprs.items())
        if (case.kernel, case.config) == (kernel, config) and fits and same:
            return case
    return None


def inspect_case(case: CompileCase, arch: str, *, k: int = TYPICAL["K"], tokens: int = TYPICAL["N"]) -> dict[str, Any]:
    """Compile one case for one chip and read the result.

    Args:
        k, tokens: of the product, or of the attention, whose tiles `tile_clocks` is for.

    Returns:
        kernel, config, arch; dtypes: those of the tensors; num_warps: as launched, warp-specialised
        ones included; num_stages; tile; registers: a thread; spill_bytes: stack frame and local
        memory of a thread; shared_bytes, shared_limit: a block; tensor_memory_columns: a block;
        fits: whether a block can be resident at all; occupancy: as `compute_occupancy`;
        tensor_core: "tcgen05", "wgmma", "mma" or "none"; copy: how global memory is read, "tma",
        "cp.async" or "ld", the newest that occurs; instructions: how often each instruction for
        products, copies and spills stands in the code; tile_efficiency: see `tile_efficiency`; and what
        `machine_code.describe` reads from the code.

    Raises:
        ValueError: for an unknown chip, or a case that does not give every argument of the kernel.
        RuntimeError: as `inspect`.
    """
    chip = _multiprocessor(arch)
    compiled = _compile(case, _number(arch))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _resource_usage(run_tool("cuobjdump", "--dump-resource-usage", cubin.name))
        listing = sass.parse(run_tool("nvdisasm", "-c", "-ndf", cubin.name))
    instructions = Counter(i.base for i in listing.instructions)
    num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    occupancy = compute_occupancy(arch, usage["REG"], shared, num_warps, tensor_memory)
    return {
        "kernel": case.kernel,
        "config": case.config,
        "arch": arch,
        "dtypes": sorted({pointer[1] for kind in case.signature.values() if (pointer := POINTER.match(str(kind)))}),
        "num_warps": num_warps,
        "num_stages": case.num_stages,
        "tile": dict(case.tile),
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": shared,
        "shared_limit": chip.shared_limit,
        "tensor_memory_columns": tensor_memory,
        "fits": occupancy["blocks_per_sm"] > 0,
        "occupancy": occupancy,
        "tensor_core": _tensor_core(instructions),
        "copy": _copy(instructions),
        "instructions": {name: count for name, count in sorted(instructions.items()) if _is_telling(name)},
        "tile_efficiency": tile_efficiency(case.kernel, case.tile),
        **machine_code.describe(
            case,
            arch,
            compiled.asm,
            listing,
            warps=num_warps,
            blocks=occupancy["blocks_per_sm"],
            ptxas=lambda: _ptxas(_number(arch)),
            k=k,
            tokens=tokens,
        ),
    }


def compute_occupancy(
    arch: str, registers: int, shared_bytes: int, num_warps: int, tensor_memory_columns: int = 0
) -> dict[str, Any]:
    """Blocks a multiprocessor of this chip can hold at once, by NVIDIA's occupancy calculator.

    Args:
        registers: a thread. shared_bytes, num_warps, tensor_memory_columns: a block.

    Returns:
        blocks_per_sm; fraction: its warps / the chip's; limited_by: the scarcest resource.
    """
    chip = _multiprocessor(arch)
    registers_per_warp = _round_up(registers * WARP_SIZE, REGISTER_GRANULARITY)
    block_registers = registers_per_warp * _round_up(num_warps, SUB_PARTITIONS)
    warps_by_registers = REGISTERS // SUB_PARTITIONS // registers_per_warp * SUB_PARTITIONS
    limits = {
        "shared memory": chip.shared // _round_up(shared_bytes + RESERVED_SHARED, SHARED_GRANULARITY),
        "registers": warps_by_registers // num_warps if block_registers <= REGISTERS else 0,
        "warps": chip.warps // num_warps,
        "blocks": chip.blocks,
    }
    if tensor_memory_columns:
        limits["tensor memory"] = chip.tensor_memory_columns // tensor_memory_columns
    limited_by = min(limits, key=lambda name: limits[name])
    blocks = limits[limited_by]
    return {"blocks_per_sm": blocks, "fraction": round(blocks * num_warps / chip.warps, 4), "limited_by": limited_by}


def tile_efficiency(kernel: str, tile: Mapping[str, int]) -> dict[str, float]:
    """Share of the computed elements that is useful, by ViT shape, when `tile` covers the problem.

    Attention tiles are laid over N queries (axis M) and N keys (axis N), at three token counts.
    Others are laid over M = B * 197 rows and N columns (axis C in kernels along rows); the share of
    a shape is the product of its axes' shares. An axis that the tile lacks counts as 1. Rounded to
    four digits.
    """

    def share(size: int, axis: str) -> float:
        return size / _round_up(size, tile[axis]) if axis in tile else 1.0

    if not {"M", "N", "C"} & tile.keys():
        return {}
    if kernel.startswith("attention"):  # forward, dq and dkdv
        return {f"N={n}": round(share(n, "M") * share(n, "N"), 4) for n in ATTENTION_TOKENS}
    columns = "N" if "N" in tile else "C"
    return {
        f"M={batch * GEMM_TOKENS} {columns}={width}": round(share(batch * GEMM_TOKENS, "M") * share(width, columns), 4)
        for batch in BATCHES
        for width in GEMM_WIDTHS
    }


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a rich table, a section for each kernel and chip; spilling and misfitting ones red.

    blocks is how many a multiprocessor holds and what keeps it from more; useful is the tile
    efficiency at 8 images of ViT-B/16 (attention: 197 tokens).
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title="compiled kernels")
    table.title_justify = "left"
    table.add_column("config", min_width=20, overflow="fold")
    table.add_column("warps\nstages")
    for name in ("regs", "spill", "shared\nKiB of"):
        table.add_column(name, justify="right")
    for name in ("blocks,\nlimited by", "cores", "copy", "useful"):
        table.add_column(name)
    section = None
    for row in rows:
        if section != (row["kernel"], row["arch"]):
            section = (row["kernel"], row["arch"])
            table.add_section()
            table.add_row(Text(", ".join(section), style="bold"))
        efficiency, occupancy = row["tile_efficiency"], row["occupancy"]
        typical = next((efficiency[key] for key in TYPICAL_SHAPES if key in efficiency), None)
        table.add_row(
            Text(row["config"]),
            f"{row['num_warps']} x {row['num_stages']}",
            str(row["registers"]),
            str(row["spill_bytes"]),
            f"{row['shared_bytes'] / 1024:.0f}/{row['shared_limit'] // 1024}",
            f"{occupancy['blocks_per_sm']} {occupancy['limited_by'].removesuffix(' memory')}",
            row["tensor_core"],
            row["copy"],
            "" if typical is None else f"{typical:.0%}",
            style=None if row["fits"] and not row["spill_bytes"] else "red",
        )
    return table


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _multiprocessor(arch: str) -> Multiprocessor:
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"no chip named {arch!r}; the chips are {', '.join(MULTIPROCESSORS)}")
    return MULTIPROCESSORS[arch]


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _kernel_modules(names: Sequence[str] | None) -> dict[str, Any]:
    """The compile cases of the named files of kernels/ (None: all), after a check that they can be compiled."""
    try:
        import vitfast.kernels as package
        from vitfast.kernels._parts import launch
    except ImportError as error:
        raise RuntimeError(f"compiling kernels needs triton, which cannot be imported: {error}") from error
    if launch.interpreting():
        raise RuntimeError(
            "kernels cannot be compiled while TRITON_INTERPRET=1 is set: @triton.jit functions are then "
            "interpreter stubs; unset it and start a new process"
        )
    known = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_")
    names = known if names is None else names
    for name in names:
        if name not in known:
            raise ValueError(f"no kernel file named {name!r}; the files are {', '.join(known)}")
    return {name: importlib.import_module(f"vitfast.kernels._compile.{name}") for name in names}


def _compile(case: CompileCase, arch: int) -> Any:
    """The case compiled for one chip; the result has .asm and .metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.fn.arg_names
    constants = {name for name in case.constexprs if "." not in name}  # the others are entries of tuples
    if set(names) != {*case.signature, *constants} or set(case.signature) & constants:
        raise ValueError(
            f"compile case {case.kernel}/{case.config}: signature {list(case.signature)} and constexprs "
            f"{list(case.constexprs)} must together be the kernel's arguments {list(names)}, each once"
        )
    # Triton's cache key leaves the constexprs' names out and takes the signature's types, sorted by
    # name; with "constexpr" in their places, two cases that swap a pointer for None have two keys.
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attributes = {case.path(name): [["tt.divisibility", 16]] for name in case.aligned}
    constexprs = {case.path(name): value for name, value in case.constexprs.items()}
    source = ASTSource(case.fn, signature, constexprs, attributes)
    # Fusion of products and sums, said aloud: Triton's default is to change, and 3.9 warns of it.
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, WARP_SIZE), options=options)
    except Exception as error:
        raise RuntimeError(f"{case.kernel}/{case.config} does not compile for sm_{arch}: {error}") from error


def _ptxas(arch: int) -> Path:
    """The assembler that Triton runs for an architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return Path(get_ptxas(arch).path)


@functools.cache
def _tool(name: str) -> str:
    from triton import knobs

    try:
        return getattr(knobs.nvidia, name).path
    except RuntimeError as error:
        raise RuntimeError(
            f"{name} is neither in Triton's package (triton/backends/nvidia/bin) nor at TRITON_{name.upper()}_PATH"
        ) from error


def run_tool(name: str, *arguments: str) -> str:
    """What one of NVIDIA's binary tools prints.

    Raises:
        RuntimeError: if it is not there, or fails; with what it wrote.
    """
    result = subprocess.run([_tool(name), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed ({result.returncode}): {result.stderr.strip()}")
    return result.stdout


def _resource_usage(dump: str) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one kernel in a cubin."""
    lines = [line for line in dump.splitlines() if "REG:" in line]
    if len(lines) != 1:
        raise RuntimeError(f"expected the resource usage of one kernel from cuobjdump, got: {dump.strip()!r}")
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", lines[0])}


def _tensor_core(instructions: Mapping[str, int]) -> str:
    """The newest kind of tensor-core instruction among these."""
    for kind, pattern in (("tcgen05", r"UTC\w*MMA"), ("wgmma", r"[A-Z]GMMA"), ("mma", r"[A-Z]MMA")):
        if any(re.fullmatch(pattern, name) for name in instructions):
            return kind
    return "none"


def _copy(instructions: Mapping[str, int]) -> str:
    """The newest way of loading from global memory among these."""
    if any(name.startswith(("UTMALDG", "UBLKCP")) for name in instructions):
        return "tma"
    return "cp.async" if "LDGSTS" in instructions else "ld"


def _is_telling(name: str) -> bool:
    """Whether an instruction multiplies on tensor cores, copies from or to global memory, or spills."""
    return "MMA" in name or name.startswith(("UTMALDG", "UTMASTG", "UBLKCP", "LDG", "STG", "STL", "LDL"))
