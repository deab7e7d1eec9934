"""Measured plans on disk: JSON in the user's cache folder, keyed by everything that could change the choice."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
import warnings
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

        return key | {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    extension = [op for op in registry.OPS if not registry.backend(op, "native").missing]
    return key | {"device": _cpu_name(), "threads": torch.get_num_threads(), "extension": extension}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return f"{match[1] if match else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def digest(key: dict[str, Any]) -> str:
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


def load_plan(path: Path, key: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Choices and measurements that `save_plan` saved; None if there are none or, with a warning, for another key."""
    if not path.is_file():
        return None
    plan = json.loads(path.read_text())
    made_for = plan.get("key", {})
    if differing := sorted(name for name in {*key, *made_for} if key.get(name) != made_for.get(name)):
        told = "; ".join(f"{name} {made_for.get(name)!r}, here {key.get(name)!r}" for name in differing)
        warnings.warn(f"the plan {path} is measured again, it was made for {told}", stacklevel=2)
        return None
    return plan["choices"], plan["measured"]


def save_plan(path: Path, key: dict[str, Any], choices: dict[str, str], measured: dict[str, Any]) -> None:
    """Write choices, what they were made for and their measurements as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        json.dump({"key": key, "choices": choices, "measured": measured}, file, indent=1)
    os.replace(file.name, path)
