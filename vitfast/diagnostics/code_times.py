"""How long a launch takes by the machine code of its tiles, instead of by a flat share of the peak. A model as well.

The longest of three times, plus that of starting it:

    tiles    tiles * clocks of one (`throughput.tile_clocks`) / multiprocessors / wave efficiency, at a sustained clock
    L2       bytes that tiles copy of their operands / L2's rate: each tile reads its rows and columns for itself
    memory   as in `launches`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitfast.diagnostics.chips import LAUNCH_US
from vitfast.diagnostics.throughput import WALKED

SUSTAINED_CLOCK = 0.85
"""Share of the boost clock that an H100 keeps under dense products. An assumption: of the 989 TFLOP/s at its boost
clock, large products reach about 800, by tiles whose tensor cores are busy 95 % of the time."""

L2_BYTES_PER_CLOCK = {(8, 0): 3840, (9, 0): 5180}
"""By compute capability, read by all multiprocessors together. Measured by others (github.com/te42kyfo/gpu-benches at
commit 3088b33, gpu-l2-cache): an A100 gives 5.4 TB/s at 1.41 GHz; an H200, whose chip an H100 SXM has too, 10.25 TB/s
at 1.98 GHz of 6 to 8 MB, which are what the tiles of one round read, and 9.7 TB/s of 12 to 40 MB. An H100 PCIe with 114
multiprocessors gives 7.0 TB/s at 1.755 GHz; Luo et al. 2024 (arXiv 2402.13499) found 3942 bytes a clock on one. Later
chips are taken to have the last."""


def l2_bytes_per_clock(capability: Sequence[int]) -> int:
    """Of a chip of this compute capability, or of the newest one before it that has a figure."""
    return L2_BYTES_PER_CLOCK[max(known for known in L2_BYTES_PER_CLOCK if known <= tuple(capability))]


def problem_of(row: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the loops of a predicted launch's tiles depend on: `k` of a product, `tokens` of attention."""
    dims = row["dims"]
    if row["op"] in ("linear", "quantized_linear"):
        return {"k": dims["K"]}
    if row["op"] in WALKED:
        return {"tokens": dims["tokens"]}
    return {}


def time_by_code(
    row: Mapping[str, Any], blocks: Mapping[str, int], tile: Mapping[str, Any], chip: Mapping[str, Any]
) -> Any:
    """Microseconds of one launch and what binds it.

    Args:
        row: a launch of `predict`. blocks: BLOCK_M, BLOCK_N, ... of its kernel. tile: what `tile_clocks` says of it.
        chip: as `predict` has it.

    Returns:
        code_us, code_bound ("products", a pipe, "issue", "latency", "L2" or "memory") and tensor_busy: the share of
        that time, the start left out, in which tensor cores multiply.
    """
    dims = row["dims"]
    if row["op"] in WALKED:
        own = blocks["BLOCK_N" if row["op"] == "attention_dkdv" else "BLOCK_M"]
        tiles = _covering(dims["tokens"], own) * dims["batch"] * dims["heads"]
        copied = 0  # keys and values of a head are read by few tiles: memory's time covers it
    else:
        rows, columns = _covering(dims["M"], blocks["BLOCK_M"]), _covering(dims["N"], blocks["BLOCK_N"])
        tiles = rows * columns * blocks.get("SPLIT_K", 1)
        operands = blocks["BLOCK_M"] + blocks["BLOCK_N"] * (2 if "swiglu" in dims["epilogue"] else 1)
        size = 1 if row["op"] == "quantized_linear" else 2
        copied = rows * columns * operands * dims["K"] * size
    clock = chip["clock_ghz"] * 1e3 * SUSTAINED_CLOCK  # clocks a microsecond
    share = tiles / (chip["multiprocessors"] * row["wave_efficiency"] * clock)
    times = {
        tile["bound"]: share * tile["clocks"],
        "L2": copied / (l2_bytes_per_clock(chip["capability"]) * clock),
        "memory": row["memory_us"],
    }
    bound = max(times, key=lambda name: times[name])
    return {
        "code_us": times[bound] + LAUNCH_US,
        "code_bound": bound,
        "tensor_busy": round(share * tile["tensor_clocks"] / times[bound], 4),
    }


def add_whole(prediction: dict[str, Any]) -> None:
    """The forward's time by code: where a launch has none, as its memory and products by the flat model say."""
    rows = prediction["launches"]
    known = [row for row in rows if row.get("code_us")]
    total = sum(row["count"] * (row.get("code_us") or row["time_us"]) for row in rows)
    prediction["by_code"] = {
        "time_us": total,
        "images_per_s": prediction["batch"] / total * 1e6,
        "launches_by_code": len(known),
        "assumptions": {
            "sustained_clock": SUSTAINED_CLOCK,
            "l2_bytes_per_clock": l2_bytes_per_clock(prediction["chip"]["capability"]),
        },
    }


def _covering(extent: int, block: int) -> int:
    return -(-extent // block)
