"""Interleaved timing with cold caches, and what is said about the times.

All providers take turns in every round, each round in another order, so that a slow moment of the
machine or its warming up hits all of them. Each works through copies of its inputs that together are
twice the size of the last cache, so that a call finds none of its own operands there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitfast.benchmarks.device import CallList, Device, Program

NOISY = 0.05
"""A row whose p20 and p80 are further apart than this share of the median is flagged."""

MOST_COPIES = 64
FEWEST_ROUNDS = 3


def copies_needed(nbytes: int, cache_bytes: int) -> int:
    """How many copies of operands of `nbytes` make twice the cache; at most MOST_COPIES."""
    return min(MOST_COPIES, max(1, math.ceil(2 * cache_bytes / max(nbytes, 1))))


def program(device: Device, calls: CallList) -> Program:
    """A program of the calls in turn (one on each copy of the operands), as often as it takes to be long enough."""
    once = device.prepare(calls)
    repeats = math.ceil(device.shortest_ms / max(device.time(once), 1e-4))
    return once if repeats <= 1 else device.prepare([*calls] * repeats)


def time_interleaved(
    programs: Mapping[str, Program],
    device: Device,
    rounds: int,
    *,
    seconds: float = math.inf,
    settle_ms: float = 0.0,
    before: Callable[[str], None] = lambda name: None,
    failed: dict[str, Exception] | None = None,
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Milliseconds of one call of every program in every round, and the telemetry after each round.

    Args:
        seconds: stop early after so long, but not before FEWEST_ROUNDS rounds.
        settle_ms: a program that takes less runs once before it is timed, in every round.
        before: told the name of the program that is about to run.
        failed: takes the error of a program that fails, which then has no times; without it the error is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    order, telemetry, start = list(programs), [], time.perf_counter()
    for done in range(rounds if programs else 0):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in tuple(order):
            before(name)
            program, measured = programs[name], times[name]
            try:
                if (measured[-1] if measured else 0.0) * program.calls < settle_ms:
                    device.time(program)
                measured.append(device.time(program) / program.calls)
            except Exception as error:  # whatever a library raises
                if failed is None:
                    raise
                failed[name] = error
                order.remove(name)
                del times[name]
                device.check()
        if not order:
            break
        order.append(order.pop(0))
        telemetry.append(device.telemetry())
    return times, telemetry


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile in milliseconds, their distance by the median, and whether that is noise."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    spread = (cuts[7] - cuts[1]) / median
    return {
        "median_ms": median,
        "p20_ms": cuts[1],
        "p80_ms": cuts[7],
        "rounds": len(times),
        "spread": spread,
        "noisy": spread > NOISY,
    }


def clocks(telemetry: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median clock, power and rates over the rounds, the highest temperature, and all reasons for throttling.

    What no sample has is left out, and `nvml_refused` says why.
    """
    samples: dict[str, list[Any]] = {}
    for sample in telemetry:
        for name, value in sample.items():
            samples.setdefault(name, []).append(value)
    reduced: dict[str, Callable[[list[Any]], Any]] = {
        "sm_clock_mhz": statistics.median,
        "power_w": statistics.median,
        "temperature_c": max,
        "throttled_by": lambda lists: sorted({reason for reasons in lists for reason in reasons}),
        "nvml_refused": lambda refusals: {name: why for refused in refusals for name, why in refused.items()},
        "instruction_tflops": _medians,
    }
    return {name: reduce(samples[name]) for name, reduce in reduced.items() if name in samples}


def _medians(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
