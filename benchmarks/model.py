"""Whole models: the engine against other people's, in one interleaved run.

Weights are random (speed does not depend on them), images are random normal numbers of the model's size, already
on the device. Every provider's output is compared with that of timm's fp32 forward first; one that is wrong gets no
time. Those that multiply in 8 bits are judged by the cosine alone, and marked.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.benchmarks import site_times, timing
from vitfast.benchmarks.device import Device, Program
from vitfast.benchmarks.kernels import REFERENCE, add_ratios, check, quiet, reason
from vitfast.benchmarks.model_providers import BASELINE, EIGHT_BIT, PROVIDERS, Classifier
from vitfast.benchmarks.watch import SLOW_LIMIT_S, ContextLost, Watch
from vitfast.diagnostics.predict import predict
from vitfast.models import libraries
from vitfast.models.config import NAMED
from vitfast.ops.accuracy import PEER_TOLERANCE

SETTLE_MS = 250.0
"""On a CPU a shorter forward runs once more before it is timed: threads of the engine before it spin for some
milliseconds after its call, each on a core that this one's then wait for."""

LATENCY_BATCH = 8
"""Up to this batch size a call is timed until its result is there (latency); above, calls follow each other."""

EIGHT_BIT_COSINE = 0.98
"""Least mean cosine of an 8-bit provider's logits to fp32, which allows about twice the error of our own fp8: on the
same random models, emulated on a CPU, .9950 to .9964 (Ti), .9949 to .9959 (S), .9926 to .9949 (B); int8 above .999.
Those were taken when what attention gives had a scale for each row, not yet one for each head."""


@torch.no_grad()
def compare(
    name: str,
    batch: int,
    device: Device,
    dtype: torch.dtype,
    *,
    providers: Sequence[str],
    rounds: int = 15,
    seconds: float = math.inf,
    sites: bool = False,
    died: Mapping[tuple[str, str], dict[str, Any]] | None = None,
    watch: Watch | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """One row per provider.

    Args:
        name: of a timm model. providers: names in PROVIDERS; timm eager runs in any case.
        seconds: for everything. Providers that are not ready when most of it is spent are left out and say so.
        sites: also where the time of our engines' forwards goes, measured after the rounds, in as many (CPU only).
        died: (case, provider) -> the row of one that is not to run again. watch: told what is about to run.
        on_rows: gets the row of every provider as soon as it is ready, with times of its own and `provisional`.

    Returns:
        Rows with what every result row has, and images_per_s, max_error (against timm in fp32, by the largest
        logit; of a model without a classifier its embedding), cosine (of an image's logits to those, the mean),
        build_s (making the provider), first_call_ms (compiling on demand included) and peak_memory_bytes (what it
        added: weights, activations, graph pools; on a CPU the process's resident memory); of our engines plan and
        plan_s (see `model_providers.Classifier`), and with `sites` the rows of `site_times.measure`.

    Raises:
        ContextLost: if the device cannot go on; its `row` names what that is due to.
    """
    torch.compiler.reset()
    start, watch, case = time.perf_counter(), watch or Watch(), case_name(name, batch, dtype)
    timm = libraries.import_library("timm")
    watch.begin(case, REFERENCE, "making the model and the right answer", SLOW_LIMIT_S)
    torch.manual_seed(0)
    oracle = timm.create_model(name, pretrained=False).eval().to(device.torch_device)
    images = torch.randn(batch, 3, *oracle.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    images = images.to(device.torch_device)
    given, expected = images.to(dtype), oracle(images).double()
    short = str(dtype).removeprefix("torch.")
    rows: dict[str, dict[str, Any]] = {provider: {} for provider in (*providers, BASELINE)}
    programs: dict[str, Program] = {}
    engines: dict[str, Classifier] = {}
    bound = PEER_TOLERANCE
    # The baseline first: it says how far apart right answers in this dtype may be.
    for provider in dict.fromkeys((BASELINE, *providers)):
        row: dict[str, Any] = {"case": case, "provider": provider, "correct": False, "model": name, "batch": batch}
        row |= {"dtype": EIGHT_BIT.get(provider, short), **_work(name, batch)}
        row |= {"eight_bit": True} if provider in EIGHT_BIT else {}
        rows[provider] = row
        if (case, provider) in (died or {}):
            rows[provider] = dict((died or {})[case, provider])
            continue
        if provider != BASELINE and time.perf_counter() > start + 0.7 * seconds:
            row["error"] = "no time left to prepare it"
            continue
        watch.begin(case, provider, "preparing", SLOW_LIMIT_S)
        try:
            with quiet():
                run, made = _prepare(provider, oracle, given, device)
                row |= made | _accuracy(run(given), expected)
                if provider == BASELINE:
                    bound = max(2 * row["max_error"], PEER_TOLERANCE)
                if why := _why_wrong(row, bound):
                    row["error"] = f"incorrect: {why}"
                else:
                    call = functools.partial(_until_done, device, run, given) if batch <= LATENCY_BATCH else None
                    program = device.prepare([call or functools.partial(run, given)], capture=False)
                    times, telemetry = timing.time_interleaved({provider: program}, device, timing.FEWEST_ROUNDS)
                    programs[provider] = program
                    if isinstance(run, Classifier):
                        engines[provider] = run
                    row |= _timed(row, times[provider], telemetry, program) | {"provisional": True}
        except Exception as error:  # whatever a library raises is the reason in its cell
            row |= {"correct": False, "error": reason(error)}
            programs.pop(provider, None)
            check(device, row)
        on_rows([row])
    failed: dict[str, Exception] = {}
    try:
        times, telemetry = timing.time_interleaved(
            programs, device, rounds, seconds=start + seconds - time.perf_counter(), failed=failed,
            settle_ms=SETTLE_MS if device.torch_device.type == "cpu" else 0.0,
            before=lambda provider: watch.begin(case, provider, "being timed"),
        )  # fmt: skip
    except ContextLost as error:
        provider = list(failed)[-1]
        why = f"{reason(failed[provider])}; {error}"
        error.row = _untimed(rows[provider]) | {"correct": False, "died": True, "error": why}
        raise
    for provider, program in programs.items():
        row = rows[provider] = _untimed(rows[provider])
        if provider in failed:
            row |= {"correct": False, "error": reason(failed[provider])}
            continue
        row |= _accuracy(program.output(), expected)  # what was timed was right as well
        if why := _why_wrong(row, bound):
            row |= {"correct": False, "error": f"incorrect: {why}"}
        else:
            row |= _timed(row, times[provider], telemetry, program)
            if sites and provider in engines:
                watch.begin(case, provider, "being timed by site")
                row["sites"] = site_times.measure(engines[provider].engine, given, rounds)
    made_rows = list(rows.values())
    add_ratios(made_rows, BASELINE)
    del programs, engines, oracle
    device.release()
    watch.end()
    return made_rows


def settled(case: str, finished: Container[str], died: Container[tuple[str, str]]) -> bool:
    """Whether a run that goes on has nothing left to do in a case: it is finished, or its model itself does harm."""
    return case in finished or (case, REFERENCE) in died


def case_name(name: str, batch: int, dtype: torch.dtype) -> str:
    """What the rows of one comparison have as their case."""
    return f"{name} batch {batch} {str(dtype).removeprefix('torch.')}"


def _timed(row: dict[str, Any], times: Sequence[float], telemetry: Sequence[Any], program: Program) -> dict[str, Any]:
    """What a right row says about its times."""
    said: dict[str, Any] = {"correct": True, **timing.summary(times), **timing.clocks(telemetry)}
    said["timed_by"] = "synchronised" if row["batch"] <= LATENCY_BATCH else program.how
    said["images_per_s"] = 1e3 * row["batch"] / said["median_ms"]
    if "flops" in row:
        said["tflops"] = row["flops"] / said["median_ms"] / 1e9
    return said


TIMES = {"median_ms", "p20_ms", "p80_ms", "rounds", "spread", "noisy", "images_per_s", "tflops", "provisional"}


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the times it had alone."""
    return {name: value for name, value in row.items() if name not in TIMES}


def _prepare(
    provider: str, oracle: torch.nn.Module, given: Tensor, device: Device
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """A provider that has run once, and what that took."""
    before, start = device.allocated(), time.perf_counter()
    run = PROVIDERS[provider](oracle, given)
    device.synchronize()
    built = time.perf_counter()
    peak = device.peak_memory(functools.partial(run, given))
    made: dict[str, Any] = {"build_s": built - start, "first_call_ms": (time.perf_counter() - built) * 1e3}
    made |= run.facts() if isinstance(run, Classifier) else {}
    return run, made | ({} if peak is None or before is None else {"peak_memory_bytes": peak - before})


def _accuracy(logits: Tensor, expected: Tensor) -> dict[str, float]:
    """max_error, the largest by the largest right logit, and cosine, the mean over images."""
    got = logits.to(expected)
    error = (got - expected).abs().max() / expected.abs().max()
    cosine = torch.cosine_similarity(got, expected, dim=-1).mean()
    return {"max_error": error.item(), "cosine": cosine.item()}


def _why_wrong(measured: Mapping[str, Any], bound: float) -> str:
    """What is wrong with logits, or nothing. NaN exceeds every bound."""
    if measured.get("eight_bit"):
        cosine = measured["cosine"]
        return "" if cosine >= EIGHT_BIT_COSINE else f"cosine {cosine:.4f} is below {EIGHT_BIT_COSINE}"
    return "" if measured["max_error"] <= bound else f"error {measured['max_error']:.1e} exceeds {bound:.1e}"


def _until_done(device: Device, run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    logits = run(images)
    device.synchronize()
    return logits


def _work(name: str, batch: int) -> dict[str, Any]:
    """FLOPs of the forward, where the architecture is known without the library."""
    if name not in NAMED:
        return {}
    return {"flops": round(predict(NAMED[name], batch=batch, chip="h100")["gflop_per_image"] * batch * 1e9)}
