"""The libraries whose models vitfast takes, imported on demand: timm, torchvision, transformers."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

_SHIM: list[Any] = []


def import_library(name: str) -> Any:
    """Import a library that vitfast is compared with: timm, torchvision or transformers.

    torchvision's compiled ops cannot load beside a CPU-only torch build, and its import then fails
    for want of two schemas it never runs here; they are declared first where that is the case.

    Raises:
        ImportError: if the library is not installed.
    """
    if name in ("timm", "torchvision") and not _SHIM and not hasattr(torch.ops.torchvision, "nms"):
        spec = importlib.util.find_spec("torchvision")
        if spec is None:
            raise ImportError(f"{name} needs torchvision, which is not installed")
        try:
            torch.ops.load_library(str(next(Path(str(spec.origin)).parent.glob("_C*.so"))))
        except (OSError, StopIteration):
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _SHIM.append(library)  # a Library undefines its schemas when it is collected
    return importlib.import_module(name)
