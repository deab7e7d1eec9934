"""Kernels one by one: every contestant of a case is checked, then all right ones are timed in turn."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast import testing
from vitfast.benchmarks import timing
from vitfast.benchmarks.cases import OPS, Call, Case, gate_size, nbytes
from vitfast.benchmarks.device import Device
from vitfast.benchmarks.peers import BASELINE, Absent, Peer, Thunk, peers_of
from vitfast.benchmarks.shapes import awkward_dims, model_dims
from vitfast.config import NAMED

FULL_BATCHES = (1, 8, 64, 256, 512)


def grid(
    name: str, ops: Sequence[str], models: Sequence[str], batches: Sequence[int], device: torch.device, dtype: Any
) -> list[Case]:
    """The cases of a run, telling ones first, none twice.

    Args:
        name: "quick": the models and batches given. "full": all models, FULL_BATCHES and the awkward shapes too.
        ops: names in OPS to keep; empty for all.
    """
    if name == "full":
        models, batches = [*models, *NAMED], [*batches, *FULL_BATCHES]
    found: dict[tuple[str, str], Case] = {}
    pairs = [pair for batch in batches for model in models for pair in model_dims(NAMED[model], batch)]
    if name == "full":
        pairs += awkward_dims(batches[0])
    for op, dims in pairs:
        case = Case(op, dims, device, dtype)
        if not ops or op in ops:
            found.setdefault((op, case.name), case)
    return list(found.values())


def run(
    cases: Sequence[Case],
    device: Device,
    *,
    rounds: int = 20,
    seconds: float = math.inf,
    slow: bool = False,
    extra: Mapping[str, Peer] | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[str]:
    """Benchmark cases in order; `on_rows` gets the rows of each as soon as they are there.

    Args:
        rounds: of all contestants in turn. seconds: for everything; cases that are left then are not run.
        slow: also peers that take long to compile. extra: further peers by name.

    Returns:
        Names of the cases that there was no time for.
    """
    start = time.perf_counter()
    for index, case in enumerate(cases):
        if time.perf_counter() - start > seconds:
            return [left.name for left in cases[index:]]
        on_rows(run_case(case, device, peers_of(case, slow=slow, extra=extra), rounds))
    return []


@torch.no_grad()
def run_case(case: Case, device: Device, peers: Mapping[str, Peer], rounds: int) -> list[dict[str, Any]]:
    """One row per contestant. Only those whose output is right have times."""
    from vitfast.kernels._parts.launch import launched_configs

    torch.compiler.reset()  # or a shape too many would silently run uncompiled
    call = case.inputs()
    gate = Gate(case, call)
    moved = nbytes(call.args, call.kwargs) + gate.output_bytes
    # The call that the gate knows the answer to comes last: its output is looked at again after the timing.
    copies = [*(case.inputs(seed) for seed in range(1, timing.copies_needed(moved, device.cache_bytes))), call]
    rows, programs = [], {}
    for peer in peers.values():
        row: dict[str, Any] = {
            "case": case.name, "op": case.op, "peer": peer.name,
            "dtype": str(case.operand_dtype).removeprefix("torch."),
            "dims": dict(case.dims), "flops": case.flops, "bytes": moved, "correct": False, "checked": gate.checked,
        }  # fmt: skip
        rows.append(row)
        try:
            with quiet(), launched_configs() as configs:
                row |= gate.judge(peer.build(call), peer)
                if configs:
                    row["configs"] = configs
                if row["correct"]:
                    programs[peer.name] = timing.program(device, [peer.build(copy) for copy in copies])
        except Exception as error:  # whatever a library raises is the reason in its cell
            row |= {"correct": False, "error": reason(error)}
    times, telemetry = timing.time_interleaved(programs, device, rounds)
    cold = moved * len(copies) >= 2 * device.cache_bytes
    for row in rows:
        if row["peer"] in programs:
            program = programs[row["peer"]]
            row |= gate.judge(program.output, peers[row["peer"]], when="after the timing")
        if row["correct"]:
            row |= timing.summary(times[row["peer"]]) | timing.clocks(telemetry)
            row |= {"timed_by": program.how, "cold": cold} | ({"note": program.note} if program.note else {})
            row["tflops"] = case.flops / row["median_ms"] / 1e9
            row["gb_per_s"] = moved / row["median_ms"] / 1e6
    add_ratios(rows, BASELINE)
    del copies, programs, call, gate
    device.release()
    return rows


class Gate:
    """The right answer to one call, in part where all of it would take too long, and the rule to judge by."""

    def __init__(self, case: Case, call: Call) -> None:
        size, checked = case.size, gate_size(case)
        parts, self.checked = [slice(0, size)], "all"
        if checked < size:
            parts = spread(size, checked)
            self.checked = f"{checked} of {size}, in {len(parts)} parts"
        reference = OPS[case.op].reference
        self._answers = []
        for part in parts:
            given = call.part(part)
            oracle = reference(*given.args, **given.kwargs, upcast=True)
            self._answers.append((_tuple(oracle), _tuple(reference(*given.args, **given.kwargs))))
        self._parts, self._size, self._tolerances = parts, size, testing.tolerances_for(call.args)
        self.output_bytes = sum(nbytes(baseline) for _, baseline in self._answers) * size // checked

    def judge(self, run: Thunk, peer: Peer, when: str = "") -> dict[str, Any]:
        """correct, max_error (by the largest right value) and, if wrong, error."""
        actual, problems, worst = _tuple(run()), [], 0.0
        judge: Callable[..., list[str]] = testing.why_not_close_in_8_bits
        if not peer.eight_bit:
            judge = functools.partial(testing.why_not_close, tolerances=self._tolerances)
        if len(actual) != len(self._answers[0][0]):
            problems.append(f"{len(actual)} outputs, not {len(self._answers[0][0])}")
        for i, got in enumerate(actual if not problems else ()):
            shape = (self._size, *self._answers[0][0][i].shape[1:])
            if not isinstance(got, Tensor) or tuple(got.shape) != shape:
                problems.append(f"{tuple(got.shape) if isinstance(got, Tensor) else type(got)}, expected {shape}")
            elif not got.double().isfinite().all():  # fp8 has no isfinite
                problems.append("nan or inf in the output")
            else:
                for part, (oracles, baselines) in zip(self._parts, self._answers, strict=True):
                    problems += judge(got[part], oracles[i], baselines[i])
                    right = oracles[i].double()
                    error = (got[part].double() - right).abs().max() / right.abs().max()
                    worst = max(worst, error.item())
        row: dict[str, Any] = {"correct": not problems, "max_error": worst}
        if peer.eight_bit:
            row["eight_bit"] = True
        if problems:
            row["error"] = f"incorrect{when and f' {when}'}: {problems[0]}"
        return row


def spread(size: int, count: int, most: int = 8) -> list[slice]:
    """`count` of `size` rows as up to `most` slices of even lengths and gaps, the first and the last row among them."""
    pieces = min(most, count)
    parts: list[slice] = []
    for i in range(pieces):
        start = i * count // pieces + round(i * (size - count) / (pieces - 1))
        parts.append(slice(start, start + (i + 1) * count // pieces - i * count // pieces))
    return parts


def _tuple(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, (list, tuple)) else (output,)


def add_ratios(rows: Sequence[dict[str, Any]], baseline: str) -> None:
    """`ratio`: times as fast as the baseline, by medians; None without either."""
    by_peer = {row["peer"]: row.get("median_ms") for row in rows}
    for row in rows:
        mine, its = row.get("median_ms"), by_peer.get(baseline)
        row["ratio"] = its / mine if mine and its else None


def reason(error: Exception) -> str:
    """The first line of an error, for a cell."""
    if isinstance(error, Absent):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries' warnings are for their users; refusals arrive as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
