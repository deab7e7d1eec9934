"""vitfast: Vision Transformer inference on fused kernels."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

from vitfast.version import __version__

if TYPE_CHECKING:
    from vitfast.attention.flash_attn import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from vitfast.attention.sdpa import attention_backend, explain, scaled_dot_product_attention
    from vitfast.diagnostics.verify import verify, verify_swap
    from vitfast.engine.engine import Engine
    from vitfast.engine.load import load
    from vitfast.images.decode import ImageError
    from vitfast.images.preprocess import Preprocess
    from vitfast.integrations import Swap, replace_attention
    from vitfast.integrations.accelerate import accelerate
    from vitfast.models.checkpoints import Checkpoint, CheckpointError
    from vitfast.models.config import ViTConfig
    from vitfast.models.output import Output
    from vitfast.ops import BackendError

_PUBLIC = {
    "BackendError": "vitfast.ops",
    "Checkpoint": "vitfast.models.checkpoints",
    "CheckpointError": "vitfast.models.checkpoints",
    "Engine": "vitfast.engine.engine",
    "ImageError": "vitfast.images.decode",
    "Output": "vitfast.models.output",
    "Preprocess": "vitfast.images.preprocess",
    "Swap": "vitfast.integrations",
    "ViTConfig": "vitfast.models.config",
    "accelerate": "vitfast.integrations.accelerate",
    "attention_backend": "vitfast.attention.sdpa",
    "explain": "vitfast.attention.sdpa",
    "flash_attn_func": "vitfast.attention.flash_attn",
    "flash_attn_kvpacked_func": "vitfast.attention.flash_attn",
    "flash_attn_qkvpacked_func": "vitfast.attention.flash_attn",
    "flash_attn_varlen_func": "vitfast.attention.flash_attn",
    "flash_attn_varlen_qkvpacked_func": "vitfast.attention.flash_attn",
    "load": "vitfast.engine.load",
    "replace_attention": "vitfast.integrations",
    "scaled_dot_product_attention": "vitfast.attention.sdpa",
    "verify": "vitfast.diagnostics.verify",
    "verify_swap": "vitfast.diagnostics.verify",
}

__all__ = [
    "BackendError",
    "Checkpoint",
    "CheckpointError",
    "Engine",
    "ImageError",
    "Output",
    "Preprocess",
    "Swap",
    "ViTConfig",
    "__version__",
    "accelerate",
    "attention_backend",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "load",
    "replace_attention",
    "scaled_dot_product_attention",
    "verify",
    "verify_swap",
]


def __getattr__(name: str) -> Any:
    """Import the public names on first use: `import vitfast` itself is instant and needs no torch."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vitfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


_MOVED = {
    "vitfast.checkpoints": "vitfast.models.checkpoints",
    "vitfast.embed": "vitfast.pipeline.embed",
    "vitfast.embedding_folder": "vitfast.pipeline.parquet",
    "vitfast.flash_attention": "vitfast.attention.flash_attn",
}
"""Modules of 0.1.0 that were documented, and where they are now. The old names go with the release after the next."""


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module of _MOVED from its new place, with a DeprecationWarning."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = _MOVED[spec.name]
        warnings.warn(f"{spec.name} has moved to {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """It has run where it is now: only give back the spec that the import system has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_MovedFinder())
