"""vitfast: Vision Transformer inference on fused kernels."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitfast.attention import attention_backend, explain, scaled_dot_product_attention
    from vitfast.checkpoints import Checkpoint, CheckpointError
    from vitfast.config import ViTConfig
    from vitfast.engine import Engine, load
    from vitfast.flash_attention import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from vitfast.images import ImageError, Preprocess
    from vitfast.integrations import Swap, replace_attention
    from vitfast.ops import BackendError
    from vitfast.output import Output
    from vitfast.verify import verify, verify_swap

__version__ = "0.1.0"

_PUBLIC = {
    "BackendError": "vitfast.ops",
    "Checkpoint": "vitfast.checkpoints",
    "CheckpointError": "vitfast.checkpoints",
    "Engine": "vitfast.engine",
    "ImageError": "vitfast.images",
    "Output": "vitfast.output",
    "Preprocess": "vitfast.images",
    "Swap": "vitfast.integrations",
    "ViTConfig": "vitfast.config",
    "attention_backend": "vitfast.attention",
    "explain": "vitfast.attention",
    "flash_attn_func": "vitfast.flash_attention",
    "flash_attn_kvpacked_func": "vitfast.flash_attention",
    "flash_attn_qkvpacked_func": "vitfast.flash_attention",
    "flash_attn_varlen_func": "vitfast.flash_attention",
    "flash_attn_varlen_qkvpacked_func": "vitfast.flash_attention",
    "load": "vitfast.engine",
    "replace_attention": "vitfast.integrations",
    "scaled_dot_product_attention": "vitfast.attention",
    "verify": "vitfast.verify",
    "verify_swap": "vitfast.verify",
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


class _Package(types.ModuleType):
    """This package, in which `vitfast.verify` stays the function when the submodule of that name is imported.

    Python sets a submodule as an attribute of its package once it has run; a public name goes first.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PUBLIC and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
