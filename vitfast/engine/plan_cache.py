"""Measured plans on disk: JSON in the user's cache folder, keyed by everything that could change the choice."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitfast.models.config import ViTConfig
from vitfast.ops import registry
from vitfast.version import __version__


def plan_key(config: ViTConfig, device: torch.device, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """All that could change which backend is fastest. Plans are exchanged between machines that agree in it."""
    key = {
        "torch": torch.__version__,
        "vitfast": __version__,
        "dtype": str(dtype),
        "batch": batch,
        "config": repr(config),
    }
    if device.type == "cuda":
        import triton

        gpu = torch.cuda.get_device_name(device)
        return key | {
            "device": gpu,
            "extension": _native_ops("cuda"),
            "table": _table(gpu),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    threads, extension = torch.get_num_threads(), _native_ops("cpu")
    name = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return key | {"device": name, "threads": threads, "extension": extension, "simd": _simd()}


def _native_ops(device: str) -> list[str]:
    """The ops that the C++ extension has for a kind of device."""
    entries = (registry.backend(op, "native") for op in registry.OPS)
    return [entry.op for entry in entries if not entry.missing and device in entry.devices]


def _table(gpu: str) -> str:
    """A digest of the tuning table of a GPU, from which our kernels take their configs; "" where there is none."""
    path = registry.tuning_table(gpu)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def _simd() -> str:
    """The instructions that the C++ extension's ops use here; "" without it."""
    try:
        return importlib.import_module("vitfast._C").build_info()["simd"]
    except ImportError:
        return ""


_CPU_NUMBERS = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """This machine's CPU, by its numbers too: in a virtual machine quite different ones may have one name, on Arm none.

    Args:
        info: where Linux describes it.
    """
    text = info.read_text() if info.is_file() else ""
    found = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in ("model name", *_CPU_NUMBERS)}
    name = found.pop("model name")
    known = name[1] if name else platform.processor() or platform.machine()
    return ", ".join([known, *(f"{key} {match[1]}" for key, match in found.items() if match)])


def digest(key: Mapping[str, Any]) -> str:
    """A short name for a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """Where vitfast keeps what it can make again: $VITFAST_CACHE, else vitfast in the user's cache folder."""
    if folder := os.environ.get("VITFAST_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitfast"


def plans_dir() -> Path:
    """Where plans are kept."""
    return cache_dir() / "plans"


def plan_path(key: Mapping[str, Any]) -> Path | None:
    """The file of the plan for a key; None, with a warning, where the user has no home to keep it in."""
    try:
        return plans_dir() / f"{digest(key)}.json"
    except RuntimeError as error:
        warnings.warn(f"plans are not kept: {error}; VITFAST_CACHE can name a folder for them", stacklevel=2)
        return None


def warn_of(key: Mapping[str, Any], reason: str) -> None:
    """Say that the plan for a key cannot be used, and why."""
    warnings.warn(f"the plan {plan_path(key)} is measured again: {reason}", stacklevel=2)


def load_plan(key: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Choices and measurements that `save_plan` saved; None if there are none or, with a warning, if of no use.

    Of no use is a file that cannot be read or is damaged, in which something else stands for a name or a number, which
    names a backend that there is not, or which was made for another key.
    """
    path = plan_path(key)
    if path is None:
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        warn_of(key, f"it cannot be read ({type(error).__name__}: {error})")
        return None
    if reason := _fault(plan):
        warn_of(key, reason)
        return None
    made_for = plan["key"]
    if differing := sorted(name for name in {*key, *made_for} if key.get(name) != made_for.get(name)):
        told = "; ".join(f"{name} {made_for.get(name)!r}, here {key.get(name)!r}" for name in differing)
        warn_of(key, f"it was made for {told}")
        return None
    return plan["choices"], plan["measured"]


def adopt(plan: Any) -> None:
    """Keep a plan that came with a model, as `record` gives it, where there is none for its key.

    A plan made for another machine or version is kept under a key that is not asked for here. A damaged one is left
    out: it costs a measurement.
    """
    if plan is None or _fault(plan):
        return
    path = plan_path(plan["key"])
    if path is not None and not path.exists():
        save_plan(plan["key"], plan["choices"], plan["measured"])


def _fault(plan: Any) -> str:
    """What is wrong with a plan's form; "" if nothing is."""
    if not isinstance(plan, dict) or not all(
        isinstance(plan.get(part), dict) for part in ("key", "choices", "measured")
    ):
        return "it is no object with the objects key, choices and measured"
    for site, name in plan["choices"].items():
        if name not in registry.BACKENDS:
            return f"it names the backend {name!r} for {site}; the backends are {', '.join(registry.BACKENDS)}"
    for site, record in plan["measured"].items():
        times, reasons = (record.get(part) if isinstance(record, dict) else None for part in ("ms", "refused"))
        if not isinstance(times, dict) or not isinstance(reasons, dict):
            return f"what it measured of {site} is {record!r}, no object with the objects ms and refused"
        if not all(isinstance(ms, int | float) for ms in times.values()):
            return f"it has the times {times!r} for {site}, which are no numbers"
        if not all(isinstance(reason, str) for reason in reasons.values()):
            return f"it has the reasons {reasons!r} for {site}, which are no text"
    return ""


def save_plan(key: Mapping[str, Any], choices: Mapping[str, str], measured: Mapping[str, Any]) -> None:
    """Write choices, what they were made for and their measurements as JSON, atomically; warn where that cannot be."""
    path = plan_path(key)
    if path is None:
        return
    content = json.dumps({"key": key, "choices": choices, "measured": measured}, indent=1)
    part: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp", encoding="utf-8") as file:
            part = file.name
            file.write(content)
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        warnings.warn(
            f"the plan cannot be kept in {path} ({error}), so the next load measures again; VITFAST_CACHE can name "
            "another folder",
            stacklevel=2,
        )
