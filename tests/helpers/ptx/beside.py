"""What a compile case executed, beside what `vitfast inspect` reads in its machine code.

`python -m helpers.ptx.beside ARCH FILE CASE` prints it for all cases whose config's name starts with CASE: what a warp
executes for a tile, by pipe, and the bytes that a tile moves. Executed is PTX, read is machine code. Products and
shared memory's instructions are the same in both; of addresses, moves, divisions and exponentials the assembler makes
others. Boxes of TMA are copied by one warp, where the machine code reads as if each did.
"""

import math
import re
import sys

from helpers.ptx import cases
from helpers.ptx.device import Launch
from helpers.ptx.program import TOTALS

from vitfast import testing
from vitfast.diagnostics import compiled, throughput

PIPES = {
    "tensor": r"mma\.|wgmma\.mma_async",
    "copy": r"cp\.async\.bulk\.tensor",
    "barrier": r"bar\.|barrier\.|mbarrier\.|fence\.|wgmma\.|cp\.async\.(commit|wait|bulk)|elect\.",
    "global": r"(ld|st)\.global|cp\.async\.c[ag]",
    "shared": r"(ld|st)\.shared|(ld|st)matrix|shfl\.",
    "mufu": r"(ex2|lg2|tanh|sin|cos|rcp|rsqrt|sqrt|div)\..*f32|cvt\.r[nzmp]i?\.([su]\d+\.f32|f32\.[fsu]\d+)$|popc\.",
    "fma": r"(add|sub|mul|fma)\.(rn\.)?(ftz\.)?(f32|f16|bf16)",
    "imad": r"(mul|mad|div|rem)\.",
    "control": r"(bra|ret|exit)$",
    "none": r"mov\.|(un)?pack\.|cvta\.|ld\.param|cvt\.[us]\d+\.[us]\d+$",
    "alu": r"add|sub|min|max|neg|abs|and|or|xor|not|sh[lrf]|selp|setp|bfe|prmt|clz|cvt\.",
}
"""Pipe, as in `vitfast.diagnostics.sass`, -> how names of its PTX begin; the first that fits. "none": registers."""


def pipe_of(name: str) -> str:
    """Raises:
    ValueError: for a name that no pipe has.
    """
    for pipe, pattern in PIPES.items():
        if re.match(pattern, name):
            return pipe
    raise ValueError(f"no pipe is known for the instruction {name}")


def executed(case, launch: Launch) -> dict[str, float]:
    """By pipe, the instructions of a warp for a tile."""
    counted = dict.fromkeys(PIPES, 0)
    for name, count in launch.counts.items():
        if name not in TOTALS:
            counted[pipe_of(name)] += count
    warps = tiles_of(case, launch) * case.num_warps
    return {pipe: count / warps for pipe, count in counted.items()}


def tiles_of(case, launch: Launch) -> int:
    """Of the problem of `cases`: two by two where a program goes over many, two heads, else one for each program."""
    if case.kernel in ("linear", "quantized_linear"):
        return 4 * case.constexprs.get("SPLIT_K", 1)
    if case.kernel == "attention_short":
        return 2
    return math.prod(launch.grid)


def read(case, arch: int) -> dict[str, int] | None:
    """The same as the machine code has it; None where `throughput` does not know how often its loops run."""
    sizes = {name: value for name, value in case.constexprs.items() if isinstance(value, int)}
    tokens = int(found[1]) if (found := re.search(r"N=(\d+)", case.config)) else cases.TOKENS
    k = 3 * sizes["PATCH_H"] ** 2 if case.kernel == "patch_embed" else cases.INNER
    steps = throughput.steps_of(case.kernel, sizes, k=k, tokens=tokens)
    row = compiled.inspect_case(case, f"sm_{arch}")
    if not steps or len(steps) != len(row["product_loops"]):
        return None
    parts = [(row["rest"], 1), *zip(row["product_loops"], steps, strict=True)]
    return {pipe: sum(part["pipes"].get(pipe, 0) * n for part, n in parts) for pipe in PIPES if pipe != "none"}


def lines(case, arch: int) -> list[str]:
    """A case run, and both as text."""
    with testing.poisoned_allocations():
        device = cases.run(case, arch)
    launch = next(launch for launch in device.launches if launch.kernel == case.fn.__name__)
    done, code, tiles = executed(case, launch), read(case, arch) or {}, tiles_of(case, launch)
    made = [
        f"{case.kernel}/{case.config}, sm_{arch}, {tiles} tiles",
        f"{'a warp, a tile':24}{'executed':>12}{'read':>12}",
    ]
    made += [f"{pipe:24}{done[pipe]:12.1f}{code.get(pipe, '-'):>12}" for pipe in PIPES]
    made += ["", "of all warps"]
    made += [f"{name.replace('_', ' '):24}{launch.counts[name] / tiles:12.0f}" for name in TOTALS[:-1]]
    return [*made, f"{'waits implied, in all':24}{launch.counts['implied_waits']:12d}", ""]


if __name__ == "__main__":
    for found in cases.cases_of(sys.argv[2], int(sys.argv[1])):
        if found.config.startswith(sys.argv[3]):
            print(*lines(found, int(sys.argv[1])), sep="\n")
