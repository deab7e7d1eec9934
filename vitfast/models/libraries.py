"""The libraries whose models vitfast takes, imported on demand: timm, torchvision, transformers, open_clip."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_DECLARED: list[Any] = []


def import_library(name: str) -> Any:
    """Import a library whose models vitfast takes: timm, torchvision, transformers or open_clip.

    Raises:
        ImportError: if the library is not installed, or its import fails, whatever it raised; with the versions.
    """
    if name in ("timm", "torchvision", "open_clip"):
        if importlib.util.find_spec("torchvision") is None:
            raise ImportError(f"{name} needs torchvision, which is not installed")
        declare_torchvision_ops()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a library that does not fit its torch raises anything at all
        involved = dict.fromkeys((name, "torchvision", "torch"))
        versions = ", ".join(f"{library} {_version(library)}" for library in involved)
        raise ImportError(f"import {name} raises {type(error).__name__}: {error} ({versions})") from error


def declare_torchvision_ops() -> None:
    """Make torchvision importable where its compiled operators do not load: beside another build of torch than theirs.

    Its import then fails for want of two schemas that are never run here; they are declared. Where the operators load,
    nothing is changed.
    """
    if _DECLARED or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return
    try:
        torch.ops.load_library(str(next(Path(str(spec.origin)).parent.glob("_C*.so"))))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)  # a Library undefines its schemas when it is collected


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
