"""How many clocks a tile takes, by its machine code: what each pipe needs, what can overlap, how busy the products are.

A tile is a loop over products (`Listing.product_loops`) and the rest: addresses and first copies before it, the
epilogue after.
The model, for a multiprocessor that holds b blocks:

    one block    clocks of the loops, plus those of the rest, plus waiting for the first copies. In a loop products and
                 all else overlap, unless the loop waits for its own products (wait_group 0): then they add up.
    b blocks     the longest of: that over b; what any one pipe, or the issue slots, need for the whole tile.

tensor_busy is the share of these clocks in which tensor cores multiply. Latencies inside a phase are taken to be
hidden, so it is a bound from above; launches, waves, L2 and memory are not in it (see `vitfast.diagnostics.launches`).

Shared memory has one port of 128 bytes a clock for all: loads and stores, the operands of wgmma (which with both in
shared memory has its full rate from 64 columns on, where these are 128 bytes a clock: Luo et al. 2024), and what TMA
writes, of which this is an assumption.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitfast.diagnostics.sass import Instruction, Listing, count_pipes, tensor_instructions

WARP = 32
FILL_CLOCKS = 260 + 43
"""Until the first copied step has arrived: L2 and the wait on its mbarrier (FlashGPU-Sim, configuration SM90_H100)."""
BARRIER_CLOCKS = 30
"""Of a barrier of a block outside its loops, in which nobody works. An assumption, of the size that microbenchmarks of
earlier GPUs have (Wong et al. 2010, "Demystifying GPU Microarchitecture through Microbenchmarking")."""
PRODUCT_TAIL_CLOCKS = 65
"""From the last product of a tile to its sums (FlashGPU-Sim, SM90_H100)."""


@dataclass(frozen=True)
class Rates:
    """Clocks of a multiprocessor that one instruction of one warp takes on each pipe, if nothing else runs.

    `product_flops`: a clock, dense, of 16-bit operands by the newest tensor-core instruction; those of 8 bits do twice.
    `mma_share`: the part of it that mma.sync reaches.
    """

    pipes: Mapping[str, float]
    product_flops: int
    mma_share: float
    shared_bytes: int
    global_bytes: int
    issue: float
    source: str


_GUIDE = "CUDA C++ Programming Guide, arithmetic instruction throughput"
RATES = {
    "sm_80": Rates(
        {"fma": 0.5, "imad": 0.5, "alu": 0.5, "mufu": 2.0, "other": 0.5},
        product_flops=2048, mma_share=1.0, shared_bytes=128, global_bytes=64, issue=0.25, source=_GUIDE,
    ),
    "sm_90": Rates(
        {"fma": 0.25, "imad": 0.5, "alu": 0.5, "mufu": 2.0, "other": 0.5},
        product_flops=4096, mma_share=2 / 3, shared_bytes=128, global_bytes=64, issue=0.25,
        source=f"{_GUIDE}; wgmma m64nNk16 in N/2 clocks: Luo et al. 2024, arXiv 2402.13499; mma.m16n8k16 every "
        "6 clocks of a sub-partition: FlashGPU-Sim, SM90_H100",
    ),
}  # fmt: skip
"""By architecture. sm_86 and sm_89 have other ratios, and products of sm_100 do not tell their shape: no figures."""


@dataclass(frozen=True)
class Phase:
    """Clocks that the instructions of a part of the code need on each pipe, for all warps of a block, once.

    `operands`: of shared memory's, those in which products read theirs.
    """

    tensor: float
    operands: float
    pipes: Mapping[str, float]
    instructions: int
    waits_for_own_products: bool

    @property
    def busiest(self) -> str:
        """The pipe that needs the most clocks, products aside; issue slots count as one."""
        return max(self.pipes, key=lambda name: self.pipes[name])

    @property
    def clocks(self) -> float:
        """Of one pass of one block through it."""
        other, products = self.pipes[self.busiest], max(self.tensor, self.operands)
        return products + other if self.waits_for_own_products else max(products, other)


def phase(instructions: Sequence[Instruction], warps: int, rates: Rates) -> Phase:
    """What a block of this many warps needs for the instructions, each run once by every warp."""
    counts = count_pipes(instructions)
    pipes = {name: counts[name] * clocks * warps for name, clocks in rates.pipes.items()}
    pipes["fma"] += pipes.pop("imad")  # the heavy half of the same unit
    pipes["shared memory"] = _bytes_moved(instructions, "shared") * warps * WARP / rates.shared_bytes
    operands = _operand_bytes(instructions) * warps / 4 / rates.shared_bytes
    pipes["global memory"] = _bytes_moved(instructions, "global") * warps * WARP / rates.global_bytes
    pipes["issue"] = len(instructions) * rates.issue * warps
    waits = [i for i in instructions if i.name.startswith("WARPGROUP.DEPBAR")]
    asynchronous = any(i.base.endswith("GMMA") for i in instructions)
    own = (not asynchronous and counts["tensor"] > 0) or any("gsb0, 0x0" in i.operands for i in waits)
    return Phase(_product_clocks(instructions, warps, rates), operands, pipes, len(instructions), own)


def tile_clocks(
    listing: Listing, steps: Sequence[int], *, arch: str, warps: int, blocks: int, elements: int, copied: int = 0
) -> dict[str, Any] | None:
    """What a tile takes on a multiprocessor that holds `blocks` of these blocks.

    Args:
        steps: how often each of the product loops runs for a tile, in the order of the code.
        elements: of the tile's output. copied: bytes that TMA writes to shared memory in a step of the first loop.

    Returns:
        clocks: a tile, at the rate of all blocks together; tensor_clocks: of its products; tensor_busy: their ratio;
        bound: what takes the longest: "products", a pipe, "issue", or "latency" where one block's own order does;
        epilogue_instructions_per_element; pipes: clocks a tile by pipe. None for an architecture without rates, or
        if the code has another number of product loops than `steps`.
    """
    rates = RATES.get(arch)
    loops = listing.product_loops
    if rates is None or len(loops) != len(steps) or not loops:
        return None
    rest_code = listing.outside()
    rest = phase(rest_code, warps, rates)
    parts = [(phase(listing.of(loop), warps, rates), n) for loop, n in zip(loops, steps, strict=True)]
    pipes: dict[str, float] = defaultdict(float, rest.pipes)
    for part, n in parts:
        for name, clocks in part.pipes.items():
            pipes[name] += clocks * n
    pipes["shared memory"] += rest.operands + sum(part.operands * n for part, n in parts)
    pipes["shared memory"] += copied * steps[0] / rates.shared_bytes
    tensor = rest.tensor + sum(part.tensor * n for part, n in parts)
    barriers = sum(i.base == "BAR" for i in rest_code) * BARRIER_CLOCKS
    alone = rest.clocks + barriers + FILL_CLOCKS + PRODUCT_TAIL_CLOCKS + sum(part.clocks * n for part, n in parts)
    needs = {"products": tensor, **pipes, "latency": alone / blocks}
    bound = max(needs, key=lambda name: needs[name])
    return {
        "clocks": round(needs[bound]),
        "tensor_clocks": round(tensor),
        "tensor_busy": round(tensor / needs[bound], 4),
        "bound": bound,
        "epilogue_instructions_per_element": round(rest.instructions * warps * WARP / elements, 2),
        "pipes": {name: round(clocks) for name, clocks in sorted(pipes.items())},
    }


def _product_clocks(instructions: Iterable[Instruction], warps: int, rates: Rates) -> float:
    """Of all products that a block's warps, or its warpgroups, issue."""
    clocks = 0.0
    for name, m, n, k in tensor_instructions(instructions):
        whole_rate = name.endswith("GMMA") or rates.mma_share == 1
        bits = 8 if name[0] in "QI" else 16
        flops = rates.product_flops * (16 // bits) * (1 if whole_rate else rates.mma_share)
        issuers = warps / 4 if name.endswith("GMMA") else warps
        clocks += issuers * 2 * m * n * k / flops
    return clocks


def _operand_bytes(instructions: Iterable[Instruction]) -> int:
    """Bytes that a warpgroup's products read from shared memory: rows of 32 bytes of b, and of a if it is there."""
    total = 0
    for i in instructions:
        for name, m, n, _ in tensor_instructions([i]):
            if name.endswith("GMMA"):
                a_in_registers = len(re.findall(r"\bR\d+", i.operands.partition("gdesc")[0])) > 1
                total += 32 * (n + (0 if a_in_registers else m))
    return total


def _bytes_moved(instructions: Iterable[Instruction], pipe: str) -> int:
    """Bytes a thread moves by loads, stores and shuffles of one kind of memory."""
    moved = 0
    for i in instructions:
        if i.pipe != pipe:
            continue
        matrices = {"1": 1, "2": 2, "4": 4}
        if i.base in ("LDSM", "STSM"):  # 8 by 8 matrices of 16 bits, one word a thread each
            moved += 4 * next((matrices[m] for m in i.name.split(".") if m in matrices), 1)
        else:
            moved += i.width
    return moved


TYPICAL = {"K": 768, "N": 197}
"""What a row of `vitfast inspect` is said for: ViT-B's width, and the tokens of a /16 at 224 pixels."""


WALKED = {"attention": "BLOCK_N", "attention_dq": "BLOCK_N", "attention_dkdv": "BLOCK_M"}
"""Kernels whose tiles walk over all tokens: in tiles of this block, and then a narrower one."""


def steps_of(kernel: str, blocks: Mapping[str, int], *, k: int | None = None, tokens: int | None = None) -> list[int]:
    """How often each product loop of a kernel runs for a tile.

    Args:
        blocks: BLOCK_M, BLOCK_N, ... of its config.
        k: of a product. tokens: of attention, as many keys as queries, all of them seen.

    Returns:
        One number a loop, in the order of the code; none for a kernel whose loops are not known here.
    """
    if kernel in ("linear", "quantized_linear", "patch_embed") and k is not None:
        return [_covering(_covering(k, blocks["BLOCK_K"]), blocks.get("SPLIT_K", 1))]
    if kernel in WALKED and tokens is not None:
        whole, left = divmod(tokens, blocks[WALKED[kernel]])
        return [whole, _covering(left, blocks["BLOCK_TAIL"])]
    if kernel == "attention_short" and tokens is not None:
        return [_covering(tokens, blocks["BLOCK_M"])]
    return []


def copied_bytes(kernel: str, blocks: Mapping[str, Any], size: int) -> int:
    """What TMA writes to shared memory for a step of a product's loop, elements of `size` bytes; else 0."""
    if kernel not in ("linear", "quantized_linear"):
        return 0
    columns = blocks["BLOCK_N"] * (2 if blocks.get("ACTIVATION") == "swiglu" else 1)
    return (blocks["BLOCK_M"] + columns) * blocks["BLOCK_K"] * size


def output_elements(kernel: str, blocks: Mapping[str, int], head_dim: int, tokens: int) -> int:
    """Of a tile: what `epilogue_instructions_per_element` is counted for."""
    if kernel in ("attention", "attention_dq"):
        return blocks["BLOCK_M"] * head_dim
    if kernel == "attention_dkdv":
        return 2 * blocks["BLOCK_N"] * head_dim
    if kernel == "attention_short":
        return tokens * head_dim
    return blocks["BLOCK_M"] * blocks["BLOCK_N"]


def _covering(extent: int, block: int) -> int:
    return -(-extent // block)
