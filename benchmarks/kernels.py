"""Kernels one by one: every provider of a case is checked, then all right ones are timed in turn."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitfast.benchmarks import timing
from vitfast.benchmarks.cases import OPS, Call, Case, gate_size, nbytes
from vitfast.benchmarks.device import Device
from vitfast.benchmarks.providers import BASELINE, Absent, Provider, Thunk, providers_of
from vitfast.benchmarks.shapes import awkward_dims, model_dims
from vitfast.benchmarks.watch import LIMIT_S, SLOW_LIMIT_S, ContextLost, Watch
from vitfast.engine.dtypes import DTYPES, QUANTIZED, dtype_name
from vitfast.models.config import NAMED
from vitfast.ops import accuracy

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
    cases: dict[tuple[str, str], Case] = {}
    pairs = [pair for batch in batches for model in models for pair in model_dims(NAMED[model], batch)]
    if name == "full":
        pairs += awkward_dims(batches[0])
    for op, dims in pairs:
        case = Case(op, dims, device, dtype)
        if not ops or op in ops:
            cases.setdefault((op, case.name), case)
    return list(cases.values())


def grid_in(
    dtypes: Sequence[str], name: str, ops: Sequence[str], models: Sequence[str], batches: Sequence[int],
    device: torch.device,
) -> list[Case]:  # fmt: skip
    """`grid` in each of some dtypes, one after the other.

    Args:
        dtypes: as in DTYPES; or "fp8" or "int8": what multiplies or makes such operands, bf16 around them, which is
            then no part of the other dtypes' cases.

    Raises:
        ValueError: for a dtype that is neither.
    """
    dtypes = list(dict.fromkeys(map(dtype_name, dtypes)))
    apart = QUANTIZED.keys() & set(dtypes)
    cases = []
    for asked in dtypes:
        for case in grid(name, ops, models, batches, device, DTYPES.get(asked, torch.bfloat16)):
            precision = _precision(case)
            if precision == asked if asked in apart else not (precision and apart):
                cases.append(replace(case, of_several=len(dtypes) > 1))
    return cases


def _precision(case: Case) -> str:
    """The 8 bits that a case's operands or results are in, or ""."""
    words = {word for value in case.dims.values() if isinstance(value, str) for word in value.split()}
    return next((name for name in QUANTIZED if name in words), "")


def run(
    cases: Sequence[Case],
    device: Device,
    *,
    rounds: int = 20,
    seconds: float = math.inf,
    slow: bool = False,
    extra: Mapping[str, Provider] | None = None,
    finished: Container[str] = (),
    died: Mapping[tuple[str, str], dict[str, Any]] | None = None,
    watch: Watch | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[str]:
    """Benchmark cases in order; `on_rows` gets the rows of each as soon as they are there.

    Args:
        rounds: of all providers in turn. seconds: for everything; cases that are left then are not run.
        slow: also providers that take long to compile. extra: further providers by name.
        finished: names of cases to leave alone. died: (case, provider) -> the row of one that is not to run again.
        watch: told what is about to run.

    Returns:
        Names of the cases that there was no time for.

    Raises:
        ContextLost: if the device cannot go on; its `row` names what that is due to.
    """
    start, lost = time.perf_counter(), died or {}
    cases = [case for case in cases if case.name not in finished and (case.name, REFERENCE) not in lost]
    for index, case in enumerate(cases):
        if time.perf_counter() - start > seconds:
            return [left.name for left in cases[index:]]
        able = providers_of(case, slow=slow, extra=extra)
        rows = [lost[case.name, name] for name in able if (case.name, name) in lost]
        able = {name: provider for name, provider in able.items() if (case.name, name) not in lost}
        on_rows([*run_case(case, device, able, rounds, watch or Watch()), *rows])
    return []


REFERENCE = "reference"
"""Stands for a provider where the case itself failed: its inputs, or the answer to compare with."""


@torch.no_grad()
def run_case(
    case: Case, device: Device, providers: Mapping[str, Provider], rounds: int, watch: Watch | None = None
) -> list[dict[str, Any]]:
    """One row per provider. Only those whose output is right have times.

    Raises:
        ContextLost: if the device cannot go on; its `row` names what that is due to.
    """
    from vitfast.kernels._parts.launch import launched_configs

    watch = watch or Watch()
    torch.compiler.reset()  # or a shape too many would silently run uncompiled
    about: dict[str, Any] = {
        "case": case.name, "op": case.op, "dtype": str(case.operand_dtype).removeprefix("torch."),
        "dims": dict(case.dims), "flops": case.flops, "correct": False,
    }  # fmt: skip
    watch.begin(case.name, REFERENCE, "making inputs and the right answer")
    try:
        call = case.inputs()
        gate = Gate(case, call)
        moved = nbytes(call.args, call.kwargs) + gate.output_bytes
        # The call that the gate knows the answer to comes last: its output is looked at again after the timing.
        copies = [*(case.inputs(seed) for seed in range(1, timing.copies_needed(moved, device.cache_bytes))), call]
    except Exception as error:  # for want of memory, say: the cases after this one may have enough
        row = about | {"provider": REFERENCE, "error": reason(error)}
        check(device, row)
        device.release()
        return [row]
    rows, programs = [], {}
    for provider in providers.values():
        row = about | {"provider": provider.name, "bytes": moved, "checked": gate.checked}
        rows.append(row)
        watch.begin(case.name, provider.name, "preparing", SLOW_LIMIT_S if provider.slow else LIMIT_S)
        try:
            with quiet():
                run = provider.build(call)
                with launched_configs() as configs:  # of one call: not of what planned it, nor of what is captured
                    row |= gate.judge(run, provider)
                if configs:
                    row["configs"] = configs
                if row["correct"]:
                    programs[provider.name] = timing.program(device, [provider.build(copy) for copy in copies])
        except Exception as error:  # whatever a library raises is the reason in its cell
            row |= {"correct": False, "error": reason(error)}
            programs.pop(provider.name, None)
            check(device, row)
    failed: dict[str, Exception] = {}
    by_provider = {row["provider"]: row for row in rows}
    try:
        times, telemetry = timing.time_interleaved(
            programs, device, rounds, failed=failed, before=lambda name: watch.begin(case.name, name, "being timed")
        )
    except ContextLost as error:
        name = list(failed)[-1]
        error.row = by_provider[name] | {"correct": False, "died": True, "error": f"{reason(failed[name])}; {error}"}
        raise
    watch.begin(case.name, REFERENCE, "comparing after the timing")
    cold = moved * len(copies) >= 2 * device.cache_bytes
    for row in rows:
        if row["provider"] in failed:
            row |= {"correct": False, "error": reason(failed[row["provider"]])}
        elif row["provider"] in programs:
            program = programs[row["provider"]]
            row |= gate.judge(program.output, providers[row["provider"]], when="after the timing")
        if row["correct"]:
            row |= timing.summary(times[row["provider"]]) | timing.clocks(telemetry)
            row |= {"timed_by": program.how, "cold": cold} | ({"note": program.note} if program.note else {})
            row["tflops"] = case.flops / row["median_ms"] / 1e9
            row["gb_per_s"] = moved / row["median_ms"] / 1e6
    add_ratios(rows, BASELINE)
    del copies, programs, call, gate
    device.release()
    watch.end()
    return rows


def check(device: Device, row: dict[str, Any]) -> None:
    """Whether the device still works after the error in a row; if not, that row is what its process died of."""
    try:
        device.check()
    except ContextLost as error:
        error.row = row | {"died": True, "error": f"{row['error']}; {error}"}
        raise


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
        self._parts, self._size = parts, size
        self._tolerances = accuracy.tolerances_for(call.args, call.kwargs.get("activation"))
        self.output_bytes = sum(nbytes(baseline) for _, baseline in self._answers) * size // checked

    def judge(self, run: Thunk, provider: Provider, when: str = "") -> dict[str, Any]:
        """correct, max_error (by the largest right value) and, if wrong, error."""
        actual, problems, worst = _tuple(run()), [], 0.0
        judge: Callable[..., list[str]] = accuracy.why_not_close_in_8_bits
        if not provider.eight_bit:
            judge = functools.partial(accuracy.why_not_close, tolerances=self._tolerances)
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
        if provider.eight_bit:
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
    by_provider = {row["provider"]: row.get("median_ms") for row in rows}
    for row in rows:
        mine, its = row.get("median_ms"), by_provider.get(baseline)
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
