"""vitfast: Vision Transformer inference on fused kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitfast.checkpoints import Checkpoint, CheckpointError
    from vitfast.config import ViTConfig
    from vitfast.engine import Engine, load
    from vitfast.images import ImageError, Preprocess
    from vitfast.model import Output
    from vitfast.ops import BackendError

__version__ = "0.1.0"

_PUBLIC = {
    "BackendError": "vitfast.ops",
    "Checkpoint": "vitfast.checkpoints",
    "CheckpointError": "vitfast.checkpoints",
    "Engine": "vitfast.engine",
    "ImageError": "vitfast.images",
    "Output": "vitfast.model",
    "Preprocess": "vitfast.images",
    "ViTConfig": "vitfast.config",
    "load": "vitfast.engine",
}

__all__ = [
    "BackendError",
    "Checkpoint",
    "CheckpointError",
    "Engine",
    "ImageError",
    "Output",
    "Preprocess",
    "ViTConfig",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import vitfast` itself is instant and needs no torch."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vitfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
