"""Where a result comes from: source, hardware, driver, versions and the settings that change speed."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from vitfast.benchmarks.device import Device
from vitfast.engine.plan_cache import cpu_name
from vitfast.version import __version__

ROOT = Path(__file__).resolve().parents[1]
"""The checkout; in an installed package, the package."""

PACKAGES = (
    "triton", "numpy", "timm", "transformers", "torchvision", "onnxruntime", "openvino", "flash-attn", "flash-attn-3",
    "xformers", "sageattention", "liger-kernel", "torchao", "tensorrt", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
"""Distributions whose version can explain a number."""

SOURCES = {".py", ".cpp", ".cu", ".cuh", ".h"}
"""Suffixes of what a result depends on."""

VARIABLES = re.compile(r"(CUDA_|NVIDIA_|OMP_|MKL_|KMP_|TORCH|TRITON_|PYTORCH_|VITFAST_)\w*")
PATHS = re.compile(r"\w*(PATH|DIR|HOME|CACHE)\w*")


def environment(device: Device) -> dict[str, Any]:
    """Everything about the machine and the software that a reader needs to repeat a result."""
    commit = commit_of()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "sources": sources_digest(),
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--", ":!benchmarks/results")),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "vitfast": __version__,
        "torch": torch.__version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "settings": {
            "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn": torch.backends.cudnn.version(),
        },
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if VARIABLES.fullmatch(name) and not PATHS.fullmatch(name)
        },
        **device.facts(),
    }


def commit_of() -> str | None:
    """The commit of the checkout; None where this is none."""
    return _git("rev-parse", "HEAD")


def sources_digest() -> str:
    """A short name for what the code is, which a copy of a checkout without .git has, too."""
    digest = hashlib.sha256()
    folders = [ROOT / name for name in ("vitfast", "kernels", "benchmarks", "csrc")]
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    """Git's answer about the checkout; None where this is none, which the result then says by a null commit."""
    if not (ROOT / "pyproject.toml").is_file():
        return None  # installed, perhaps below somebody else's repository
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
