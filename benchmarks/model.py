"""Whole models: the engine against other people's, in one interleaved run.

Weights are random (speed does not depend on them), images are random normal numbers of the model's size, already
on the device. Every provider's logits are compared with timm's fp32 forward first; one that is wrong gets no time.
Those that multiply in 8 bits are judged by the cosine alone, and marked.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.benchmarks import timing
from vitfast.benchmarks.device import Device
from vitfast.benchmarks.kernels import add_ratios, quiet, reason
from vitfast.benchmarks.model_providers import BASELINE, EIGHT_BIT, PROVIDERS
from vitfast.diagnostics.predict import predict
from vitfast.models import libraries
from vitfast.models.config import NAMED
from vitfast.ops.accuracy import PEER_TOLERANCE

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
) -> list[dict[str, Any]]:
    """One row per provider.

    Args:
        name: of a timm model. providers: names in PROVIDERS; timm eager runs in any case.
        seconds: for everything. Providers that are not ready when most of it is spent are left out and say so.

    Returns:
        Rows with what every result row has, and images_per_s, max_error (against timm in fp32, by the largest
        logit), cosine (of an image's logits to those, the mean), build_s (making the provider), first_call_ms
        (compiling on demand included) and peak_memory_bytes (what it added: weights, activations, graph pools; on a
        CPU the process's resident memory).
    """
    torch.compiler.reset()
    start = time.perf_counter()
    timm = libraries.import_library("timm")
    torch.manual_seed(0)
    oracle = timm.create_model(name, pretrained=False).eval().to(device.torch_device)
    images = torch.randn(batch, 3, *oracle.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    images = images.to(device.torch_device)
    given, expected = images.to(dtype), oracle(images).double()
    rows: list[dict[str, Any]] = []
    programs, accuracy = {}, {}
    short = str(dtype).removeprefix("torch.")
    for provider in dict.fromkeys((*providers, BASELINE)):
        row: dict[str, Any] = {"case": f"{name} batch {batch} {short}", "provider": provider, "correct": False}
        eight_bits = {"dtype": EIGHT_BIT[provider], "eight_bit": True} if provider in EIGHT_BIT else {}
        rows.append(row | {"model": name, "batch": batch, "dtype": short, **_work(name, batch), **eight_bits})
        if provider != BASELINE and time.perf_counter() > start + 0.7 * seconds:
            rows[-1]["error"] = "no time left to prepare it"
            continue
        try:
            with quiet():
                run, made = _prepare(provider, oracle, given, device)
                accuracy[provider] = _accuracy(run(given), expected)
                call = functools.partial(_until_done, device, run, given) if batch <= LATENCY_BATCH else None
                programs[provider] = device.prepare([call or functools.partial(run, given)], capture=False)
            rows[-1] |= made | accuracy[provider]
        except Exception as error:  # whatever a library raises is the reason in its cell
            rows[-1]["error"] = reason(error)
    bound = max(2 * accuracy.get(BASELINE, {}).get("max_error", 0.0), PEER_TOLERANCE)
    wrong = {provider: _why_wrong(measured, bound, provider in EIGHT_BIT) for provider, measured in accuracy.items()}
    right = {provider: program for provider, program in programs.items() if not wrong[provider]}
    times, telemetry = timing.time_interleaved(right, device, rounds, seconds=start + seconds - time.perf_counter())
    for provider, program in right.items():  # what was timed was right as well
        wrong[provider] = _why_wrong(_accuracy(program.output(), expected), bound, provider in EIGHT_BIT)
    for row in rows:
        provider = row["provider"]
        if provider in programs and not wrong[provider]:
            row |= {"correct": True, **timing.summary(times[provider]), **timing.clocks(telemetry)}
            row["timed_by"] = "synchronised" if batch <= LATENCY_BATCH else right[provider].how
            row["images_per_s"] = 1e3 * batch / row["median_ms"]
            if "flops" in row:
                row["tflops"] = row["flops"] / row["median_ms"] / 1e9
        elif provider in programs:
            row["error"] = f"incorrect: {wrong[provider]}"
    add_ratios(rows, BASELINE)
    del programs, right, oracle
    device.release()
    return rows


def _prepare(
    provider: str, oracle: torch.nn.Module, given: Tensor, device: Device
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """A provider that has run once, and what that took."""
    before, start = device.allocated(), time.perf_counter()
    run = PROVIDERS[provider](oracle, given)
    device.synchronize()
    built = time.perf_counter()
    peak = device.peak_memory(functools.partial(run, given))
    first_ms = (time.perf_counter() - built) * 1e3
    made = {"build_s": built - start, "first_call_ms": first_ms}
    return run, made | ({} if peak is None or before is None else {"peak_memory_bytes": peak - before})


def _accuracy(logits: Tensor, expected: Tensor) -> dict[str, float]:
    """max_error, the largest by the largest right logit, and cosine, the mean over images."""
    got = logits.to(expected)
    error = (got - expected).abs().max() / expected.abs().max()
    cosine = torch.cosine_similarity(got, expected, dim=-1).mean()
    return {"max_error": error.item(), "cosine": cosine.item()}


def _why_wrong(measured: dict[str, float], bound: float, eight_bit: bool) -> str:
    """What is wrong with logits, or nothing. NaN exceeds every bound."""
    if eight_bit:
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
