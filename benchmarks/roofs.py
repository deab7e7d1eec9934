"""What this very device reaches, measured in the run that quotes it: a large product and a large copy.

A data sheet's peak is no roof: clocks, power and the numbers multiplied decide. Random normal numbers, never zeros.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vitfast.benchmarks import timing
from vitfast.benchmarks.device import Device
from vitfast.benchmarks.result_file import Results

FP8 = torch.float8_e4m3fn
SIDES = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}


@torch.no_grad()
def measure(device: Device, dtypes: Sequence[torch.dtype], rounds: int = 7) -> dict[str, Any]:
    """TFLOP/s of a square product in each dtype, on a GPU in all there are, and GB/s of a copy (both directions count).

    Returns:
        tflops: by dtype; side: of the square; copy_gb_per_s; copy_bytes; refused: dtype -> why it has no product; and
        clock and power meanwhile, of a CPU the rates of its instructions (see `Device.telemetry`).
    """
    kind, where = device.torch_device.type, device.torch_device
    side = SIDES[kind]
    programs: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for kind_of in (torch.float32, torch.float16, torch.bfloat16, FP8, torch.int8) if kind == "cuda" else dtypes:
        name = str(kind_of).removeprefix("torch.")
        try:
            programs[name] = device.prepare([_square_gemm(side, where, kind_of)])
        except Exception as error:  # whatever the library raises
            refused[name] = (str(error).splitlines() or [type(error).__name__])[0]
            device.check()
    source = torch.randn(COPY_BYTES[kind] // 4, device=where, generator=_generator(where))
    target = torch.empty_like(source)
    programs["copy"] = device.prepare([functools.partial(target.copy_, source)])
    times, telemetry = timing.time_interleaved(programs, device, rounds)
    median = {name: timing.summary(values)["median_ms"] for name, values in times.items()}
    copy = median.pop("copy")
    return {
        "tflops": {name: 2 * side**3 / ms / 1e9 for name, ms in median.items()},
        "side": side,
        "copy_gb_per_s": 2 * COPY_BYTES[kind] / copy / 1e6,
        "copy_bytes": COPY_BYTES[kind],
        "refused": refused,
        **timing.clocks(telemetry),
    }


def _generator(device: torch.device) -> torch.Generator:
    """One of its own: a capture that fails may leave torch's default generator of a GPU unusable."""
    return torch.Generator(device).manual_seed(0)


def _square_gemm(side: int, device: torch.device, dtype: torch.dtype) -> Any:
    generator = _generator(device)
    a, b = (torch.randn(side, side, device=device, generator=generator) for _ in range(2))
    if dtype == torch.int8:
        return functools.partial(torch._int_mm, a.mul(32).to(dtype), b.mul(32).to(dtype).t())
    if dtype != FP8:
        return functools.partial(torch.mm, a.to(dtype), b.to(dtype))
    one = torch.ones((), device=device)
    return functools.partial(
        torch._scaled_mm, a.to(FP8), b.to(FP8).t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
    )


def better(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements, before and after a run, with both kept: how far they differ shows drift."""
    best = first | {"tflops": dict(first["tflops"])}
    for name, value in second["tflops"].items():
        best["tflops"][name] = max(value, best["tflops"].get(name, 0.0))
    best["copy_gb_per_s"] = max(first["copy_gb_per_s"], second["copy_gb_per_s"])
    if "instruction_tflops" in first:
        pairs = first["instruction_tflops"], second["instruction_tflops"]
        best["instruction_tflops"] = {name: max(one[name] for one in pairs) for name in pairs[0]}
    return best | {"before": first, "after": second}


def drift(roofs: dict[str, Any]) -> float | None:
    """Largest relative difference of a roof before and after the run; None if it was not measured twice."""
    if "before" not in roofs:
        return None
    pairs = [(roofs["before"]["copy_gb_per_s"], roofs["after"]["copy_gb_per_s"])]
    pairs += [(value, roofs["after"]["tflops"][name]) for name, value in roofs["before"]["tflops"].items()]
    return max(abs(a - b) / max(a, b) for a, b in pairs)


@contextlib.contextmanager
def around(file: Results, device: Device, dtypes: Sequence[torch.dtype], *, wanted: bool = True) -> Iterator[None]:
    """Measure the roofs before and after what is done inside, and put the higher ones into a result file."""
    if not wanted:
        yield
        return
    before = file.content["roofs"] or measure(device, dtypes)  # a run that goes on has those of its beginning
    file.add(roofs=before)
    yield
    file.add(roofs=better(before, measure(device, dtypes)))
