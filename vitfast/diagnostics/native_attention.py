"""What nvcc makes of the CUDA `attention` for Hopper (csrc/cuda/attention_hopper.cuh), beside Triton's. Needs no GPU.

One of its blocks holds a multiprocessor. Its two warpgroups take tiles of 64 queries in turn, each against all keys of
a head at once, while keys and values of heads to come are copied. Here a warpgroup is what a block is in `throughput`:
there are two on a multiprocessor, and a tile is one pass through the loop over tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitfast.diagnostics import machine_code, sass, throughput
from vitfast.diagnostics.native_code import ARCH, compile_kernels, notes_of

if TYPE_CHECKING:
    from rich.table import Table

QUERIES, WARPGROUPS, HEAD_DIM = 64, 2, 64
"""Queries of a tile, and warpgroups that take tiles, as csrc/cuda/attention_hopper.h has them; columns of a head."""
KEYS = {197: 200, 257: 264}
"""Tokens of a ViT -> keys that the kernel computes for them."""

_SOURCE = """
#include "cuda/attention_hopper.cuh"
using namespace vitfast;
"""
_INSTANCE = "template __global__ void vitfast::attention_hopper_kernel<bf16, {head_dim}, {keys}>({params});\n"
_PARAMS = "const __grid_constant__ AttentionHopperParams"


def inspect_attention() -> list[dict[str, Any]]:
    """Compile the kernel for the tokens of KEYS, bf16 and heads of HEAD_DIM, and read the result.

    Returns:
        Rows like those of `compiled.inspect`: kernel, config, arch, registers, spill_bytes, ptxas_warnings,
        product_loops, tensor_busy and tile_clocks; also tokens, instructions_per_score and exponentials_per_score, of
        scores that are wanted.

    Raises:
        RuntimeError: as `native_code.inspect_linear`.
    """
    instances = (_INSTANCE.format(head_dim=HEAD_DIM, keys=keys, params=_PARAMS) for keys in KEYS.values())
    report, code = compile_kernels(_SOURCE + "".join(instances))
    names = {keys: next(name for name in code if f"Li{HEAD_DIM}ELi{keys}E" in name) for keys in KEYS.values()}
    return [_row(tokens, keys, report[names[keys]], code[names[keys]]) for tokens, keys in KEYS.items()]


def _row(tokens: int, keys: int, notes: str, disassembly: str) -> dict[str, Any]:
    listing = sass.parse(disassembly)
    (loop,) = listing.product_loops
    tile = listing.of(loop)
    threads, tiles = 4 * throughput.WARP, -(-tokens // QUERIES)
    wanted = tokens * tokens / tiles  # scores of a tile, on average
    clocks = tile_clocks(tile)
    return {
        "kernel": "attention, native",
        "config": f"{QUERIES}x{keys}x{HEAD_DIM}",
        "arch": ARCH,
        **notes_of(notes),
        "tokens": tokens,
        "product_loops": [machine_code.describe_part(tile)],
        "instructions_per_score": round(len(tile) * threads / wanted, 2),
        "exponentials_per_score": round(sass.count_pipes(tile)["mufu"] * threads / wanted, 2),
        "tensor_busy": clocks["tensor_busy"],
        "tile_clocks": clocks,
    }


def tile_clocks(tile: Sequence[sass.Instruction]) -> dict[str, Any]:
    """Of a tile, at the rate of both warpgroups together; as `throughput.tile_clocks`, without what copies take."""
    one = throughput.phase(tile, 4, throughput.RATES[ARCH])
    pipes = {**one.pipes, "shared memory": one.pipes["shared memory"] + one.operands}
    barriers = throughput.BARRIER_CLOCKS * sum(i.base == "BAR" for i in tile)
    tails = throughput.PRODUCT_TAIL_CLOCKS * sass.products_waited_for(tile)
    needs = {"products": one.tensor, **pipes, "latency": (one.clocks + barriers + tails) / WARPGROUPS}
    bound = max(needs, key=lambda name: needs[name])
    return {
        "clocks": round(needs[bound]),
        "tensor_clocks": round(one.tensor),
        "tensor_busy": round(one.tensor / needs[bound], 4),
        "bound": bound,
        "pipes": {name: round(clocks) for name, clocks in sorted(pipes.items())},
    }


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a rich table."""
    from rich import box
    from rich.table import Table

    title = "the CUDA attention by nvcc: a tile of 64 queries"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    counted = ("instructions\na score", "exp\na score", "clocks", "bound")
    for name in ("tokens", "config", "regs", "spill", "warnings", *counted):
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            str(row["tokens"]), row["config"], str(row["registers"]), str(row["spill_bytes"]),
            " ".join(row["ptxas_warnings"]), f"{row['instructions_per_score']:.1f}",
            f"{row['exponentials_per_score']:.2f}", str(row["tile_clocks"]["clocks"]), row["tile_clocks"]["bound"],
        )  # fmt: skip
    return made
