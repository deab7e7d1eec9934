"""A server under load: what it can sustain, how long requests wait at each rate, and what it does with too many.

The server runs in a process of its own, or is somebody else's (see `vitfast.benchmarks.servers`). Every answer is
compared with what the engine itself makes of that picture, in this process. Engine and server take turns on the
machine, round by round.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitfast.benchmarks import load
from vitfast.benchmarks.load import OVERLOADED, Sample, Target
from vitfast.benchmarks.servers import Api, Served
from vitfast.images.preprocess import resize_and_crop

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

STEPS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)
"""Offered load, as shares of what the server answers in a closed loop."""
SUSTAINED = 0.99
"""Share of the requests that must be answered at a rate that is called sustained."""
KNEE = 10
"""The knee is the highest sustained rate whose p99 is at most so many times the median of an idle server."""
TOLERANCE = 1e-3
"""An answer is right if no number is further from the engine's own than this share of the largest: sums of fp32 depend
on the batch's size. Different pictures are much further apart, which is checked."""


def expected(engine: Engine, contents: Sequence[bytes]) -> Tensor:
    """The engine's own embeddings [N, E] of pictures.

    Raises:
        ValueError: if two are so alike that a mixed-up answer would not be noticed.
    """
    from PIL import Image

    rows = [engine([Image.open(io.BytesIO(content))]).embedding.float().cpu() for content in contents]
    matrix = torch.cat(rows)
    between = (matrix[:, None] - matrix[None]).abs().amax(-1) + torch.eye(len(matrix)) * 1e9
    if between.min() < 10 * TOLERANCE * matrix.abs().max():
        raise ValueError("two of the pictures have nearly one embedding: a wrong answer would not be noticed")
    return matrix


def judge(api: Api, samples: Sequence[Sample], want: Tensor) -> tuple[int, str]:
    """How many answers were wrong, and what was wrong with the first."""
    wrong, why = 0, ""
    want = torch.nn.functional.normalize(want, dim=-1) if api.unit else want
    bound = TOLERANCE * want.abs().max()
    for sample in samples:
        if sample.status != 200:
            continue
        try:
            error = (api.embedding(sample.answer) - want[sample.payload]).abs().max()
            said = "" if error <= bound else f"off by {error:.2g} of {want.abs().max():.2g}"
        except (ValueError, KeyError, RuntimeError, IndexError, TypeError) as problem:
            said = f"not an embedding: {type(problem).__name__}"
        wrong += bool(said)
        why = why or said
    return wrong, why


def row(case: str, served: Served, samples: Sequence[Sample], want: Tensor, seconds: float) -> dict[str, Any]:
    """What is said of a run: times are of the requests that were answered with 200."""
    answered = sorted(sample.seconds * 1e3 for sample in samples if sample.status == 200)
    refused = sum(sample.status in OVERLOADED for sample in samples)
    wrong, why = judge(served.api, samples, want)
    failed = len(samples) - len(answered) - refused
    made: dict[str, Any] = {"case": case, "provider": served.name, "correct": False, "model": served.model}
    made |= {"sent": len(samples), "answered": len(answered), "refused": refused, "failed": failed, "wrong": wrong}
    if wrong or failed or not answered:
        odd = next((s for s in samples if s.status not in (200, *OVERLOADED)), None)
        made["error"] = f"incorrect: {wrong} wrong answers ({why})" if wrong else f"failed: {failed} of {len(samples)}"
        made["error"] += f"; status {odd.status}: {odd.answer[:200].decode('latin-1')}" if odd else ""
        return made
    cuts = statistics.quantiles(answered, n=100, method="inclusive") if len(answered) > 1 else answered * 99
    spread = (cuts[79] - cuts[19]) / cuts[49]
    made |= {"correct": True, "median_ms": cuts[49], "p20_ms": cuts[19], "p80_ms": cuts[79], "p99_ms": cuts[98]}
    # Latency is spread by nature, not by noise.
    made |= {"spread": spread, "noisy": False, "rounds": 1, "images_per_s": len(answered) / seconds}
    return made


def measured(
    case: str, served: Served, loop: Callable[[], Any], want: Tensor, seconds: float
) -> tuple[dict[str, Any], list[Sample]]:
    """A row of one run of a loop, with the batches that the server made meanwhile, and its memory."""
    before = served.metrics()
    started = time.perf_counter()
    samples = asyncio.run(loop())
    made = row(case, served, samples, want, max(seconds, time.perf_counter() - started))
    after = served.metrics()

    def difference(name: str) -> float:
        return sum(value - before.get(key, 0) for key, value in after.items() if re.match(name, key))

    if batches := difference(r"vitfast_batch_size_count"):
        made["mean_batch"] = difference(r"vitfast_batch_size_sum") / batches
        for stage in ("decode", "queue", "model"):
            of = rf'vitfast_stage_seconds_{{}}{{{{.*stage="{stage}"}}}}'
            made[f"{stage}_ms"] = 1e3 * difference(of.format("sum")) / difference(of.format("count"))
    if (memory := served.memory()) is not None:
        made["memory_bytes"] = memory
    return made, samples


def engine_rates(engine: Engine, contents: Sequence[bytes], batch: int, seconds: float) -> tuple[float, float]:
    """The engine alone in this process: images a second in batches, and ms of one image decoded and run by itself."""
    import numpy as np
    from PIL import Image

    assert engine.preprocess is not None
    tensor, preprocess = torch.zeros(batch, *engine.preprocess.size, 3, dtype=torch.uint8), engine.preprocess
    done, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < seconds / 2 or not done:
        engine(tensor, preprocessed=True).embedding.cpu()
        done += batch
    rate, end = done / took, time.perf_counter() + seconds / 2
    times: list[float] = []
    while time.perf_counter() < end or len(times) < 3:
        content, started = contents[len(times) % len(contents)], time.perf_counter()
        pixels = resize_and_crop(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), preprocess)
        engine(torch.from_numpy(pixels[None]), preprocessed=True).embedding.cpu()
        times.append(1e3 * (time.perf_counter() - started))
    return rate, statistics.median(times)


def run(
    servers: Sequence[Served],
    engine: Engine,
    contents: Sequence[bytes],
    *,
    batch: int,
    connections: int = 200,
    seconds: float = 10.0,
    rounds: int = 3,
    steps: Sequence[float] = STEPS,
    overload: float = 4.0,
    overload_seconds: float = 60.0,
    max_queue_wait: float = 2.0,
    on_rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Measure servers of one model, the first of which is ours.

    In every round the engine and the servers take turns: one request at a time (idle), then as many as fill two batches
    (saturated). Then come the rates, as shares of what the first server answered when saturated, and a flood.

    Args:
        engine: the same model in this process. batch: images of the largest batch that our server makes.
        connections: for the rates and the flood. seconds: of each measurement.
        steps: the rates. overload: the flood's rate, in the same unit; none if 0. overload_seconds: how long it lasts.
        max_queue_wait: what our server was told, in seconds; the flood's p99 is compared with it.

    Returns:
        Rows (see `row`). Idle ones have `added_ms`, the time beyond that of the engine alone; saturated ones
        `engine_ratio`, their rate by the engine's in batches; those of a rate `offered_per_s`; the first server's row
        at the knee has `knee`; the flood's has `bound_ms`, which p99 must not exceed, and `memory_growth`, from the
        second quarter to the last.
    """
    want = expected(engine, contents)
    made: list[dict[str, Any]] = []

    def take(rows: Sequence[dict[str, Any]]) -> None:
        made.extend(rows)
        on_rows(list(rows))

    targets = {served.name: served.target(contents) for served in servers}
    turns: dict[tuple[str, str], list[tuple[dict[str, Any], float]]] = {}
    for _ in range(rounds):
        rate, alone_ms = engine_rates(engine, contents, batch, seconds)
        for served in servers:
            for case, wide, against in (("idle", 1, alone_ms), ("saturated", 2 * batch, rate)):
                loop = functools.partial(load.closed_loop, targets[served.name], wide, seconds)
                one, _ = measured(case, served, loop, want, seconds)
                turns.setdefault((case, served.name), []).append((one, against))
    take([_of_rounds(case, of_rounds) for (case, _), of_rounds in turns.items()])
    first = next(row for row in made if row["case"] == "saturated")
    if not first["correct"]:
        return made
    sustained: list[dict[str, Any]] = []
    for step in sorted(steps):
        rate = step * first["images_per_s"]
        for served in servers:
            loop = functools.partial(load.open_loop, targets[served.name], connections, seconds, rate)
            one, _ = measured(f"at {rate:.3g}/s", served, loop, want, seconds)
            one |= {"offered_per_s": rate, "connections": connections}
            if served is servers[0] and one["correct"] and one["answered"] >= SUSTAINED * one["sent"]:
                sustained.append(one)
            take([one])
    idle = next(row for row in made if row["case"] == "idle")
    knees = [row for row in sustained if idle["correct"] and row["p99_ms"] <= KNEE * idle["median_ms"]]
    if knees:
        knees[-1]["knee"] = True
    on_rows(knees[-1:])
    if overload:
        rate = overload * (knees[-1] if knees else first)["images_per_s"]
        for served in servers:
            take([_flood(served, targets[served.name], want, connections, overload_seconds, rate, max_queue_wait)])
    return made


def _of_rounds(case: str, of_rounds: Sequence[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """One row of several rounds, each with what the engine itself did in it: medians."""
    rows = [one for one, _ in of_rounds]
    bad = next((one for one in rows if not one["correct"]), None)
    if bad is not None:
        return bad
    made = dict(rows[-1])
    for name, value in made.items():
        if name.endswith(("_ms", "_per_s")) or name in ("spread", "mean_batch"):
            made[name] = statistics.median(one.get(name, value) for one in rows)
        elif name in ("sent", "answered", "refused"):
            made[name] = sum(one[name] for one in rows)
    made["rounds"] = len(rows)
    if case == "idle":
        made["added_ms"] = statistics.median(one["median_ms"] - alone for one, alone in of_rounds)
        made["engine_ms"] = statistics.median(alone for _, alone in of_rounds)
    else:
        ratios = sorted(one["images_per_s"] / rate for one, rate in of_rounds)
        made |= {"engine_ratio": statistics.median(ratios), "engine_ratios": ratios}
        made["engine_per_s"] = statistics.median(rate for _, rate in of_rounds)
    return made


def _flood(
    served: Served, target: Target, want: Tensor, connections: int, seconds: float, rate: float, max_queue_wait: float
) -> dict[str, Any]:
    """More requests than there can be answers to."""
    memory: list[int] = []

    async def watched() -> list[Sample]:
        async def watch() -> None:
            while True:
                memory.append(served.memory() or 0)
                await asyncio.sleep(seconds / 64)

        watching = asyncio.ensure_future(watch())
        try:
            samples = await load.open_loop(target, connections, seconds, rate)
        finally:
            watching.cancel()
        # What waits in the client for a free connection is not the server's doing.
        return [dataclasses.replace(sample, seconds=sample.since_sent) for sample in samples]

    made, _ = measured(f"flooded at {rate:.3g}/s", served, watched, want, seconds)
    made |= {"offered_per_s": rate, "connections": connections}
    if memory and memory[0] and made["correct"]:
        quarter = len(memory) // 4
        made["memory_growth"] = max(memory[3 * quarter :]) - max(memory[quarter : 2 * quarter + 1])
        service = made.get("decode_ms", 0.0) + made.get("model_ms", 0.0)
        made["bound_ms"] = 2e3 * max_queue_wait + service
    return made
