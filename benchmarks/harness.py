"""What every benchmark shares: interleaved timing, the environment, result files, a table.

Method: all contestants run in one process, in interleaved rounds, so that a slow moment of the
machine hits all of them; medians with the 20th and 80th percentile are kept, and ratios of
medians quoted. On a GPU each call is timed by events, after writing a buffer larger than the L2
cache, on random data. Nothing is timed before its output has been checked.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def time_interleaved(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int, *, cold: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of every call in every round; each round runs all calls once, in turn.

    Args:
        cold: on a GPU, overwrite a 256 MB buffer before each call, so that it starts with nothing
            of its own in the L2 cache.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if cold and device.type == "cuda" else None
    for _ in range(rounds):
        for name, call in calls.items():
            if flush is not None:
                flush.zero_()
            times[name].append(_time_once(call, device))
    return times


def _time_once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"median_ms": statistics.median(times), "p20_ms": cuts[1], "p80_ms": cuts[7]}


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result comes from: commit, hardware, driver, clocks, versions."""
    import vitfast

    entry: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":!benchmarks/results")),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "vitfast": vitfast.__version__,
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        entry |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "nvml": _nvml(device),
        }
    return entry


def _git(*args: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout: the result says so by a null commit


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return match[1] if match else platform.processor()


def _nvml(device: torch.device) -> dict[str, Any]:
    """Driver, clocks, power and throttle reasons now, or why they cannot be read."""
    try:
        import pynvml
    except ImportError as error:
        return {"unavailable": str(error)}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    except pynvml.NVMLError as error:
        return {"unavailable": str(error)}


def device_slug(device: torch.device) -> str:
    """Folder name for a device's results: "cpu", or the GPU's name in lower case with dashes."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def save(name: str, device: torch.device, rows: list[dict[str, Any]], path: Path | None = None) -> Path:
    """Write rows with their environment as JSON; by default under benchmarks/results/<device>/."""
    entry = environment(device)
    if path is None:
        commit = (entry["commit"] or "nocommit")[:9]
        path = ROOT / "benchmarks" / "results" / device_slug(device) / f"{entry['date'][:10]}-{commit}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"schema": 1, "name": name, "environment": entry, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def print_table(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows for a person, numbers to three digits."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "peer", "error") else "right")
    for row in rows:
        values = (row.get(column) for column in columns)
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console(width=140).print(table)
