"""What the transformers families share: settings, activations, and the names of a block's parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitfast.models.checkpoints.source import CheckpointError, Source
from vitfast.models.config import ViTConfig

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: str, where: str) -> str:
    """Our name of a transformers activation.

    Raises:
        CheckpointError: if the forward does not have it.
    """
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"{where}: hidden_act={name!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def num_labels(config: Mapping[str, Any]) -> int:
    """Classes of a classifier: as many as there are labels, and 2 (the library's default) if none are listed."""
    labels = config.get("id2label")
    return len(labels) if labels is not None else int(config.get("num_labels", 2))


def find_prefix(state: Mapping[str, Tensor], prefixes: Sequence[str], marker: str) -> str:
    """What stands before the encoder's names; the first candidate if none of them leads to `marker`."""
    return next((prefix for prefix in prefixes if prefix + marker in state), prefixes[0])


@dataclass(frozen=True)
class BlockNames:
    """Source names of one block's parts, without "weight" and "bias"; `block` has a place for the index."""

    block: str
    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: tuple[str, ...]
    fc2: str
    layer_scales: tuple[str, str] | None = None

    def read(self, source: Source, config: ViTConfig, prefix: str, *, qkv_bias: bool = True) -> None:
        """Take every block from `source`."""
        for i in range(config.depth):
            ours, theirs = f"blocks.{i}.", prefix + self.block.format(i)
            source.norm(f"{ours}norm1", theirs + self.norm1)
            source.dense(f"{ours}qkv", *(theirs + name for name in self.qkv), bias=qkv_bias)
            source.dense(f"{ours}proj", theirs + self.proj)
            source.norm(f"{ours}norm2", theirs + self.norm2)
            source.dense(f"{ours}fc1", *(theirs + name for name in self.fc1))
            source.dense(f"{ours}fc2", theirs + self.fc2)
            if self.layer_scales:
                source.copy(f"{ours}layer_scale1", theirs + self.layer_scales[0])
                source.copy(f"{ours}layer_scale2", theirs + self.layer_scales[1])

    def present(self, state: Mapping[str, Tensor], prefix: str) -> int:
        """How many of the first block's dense weights `state` holds under these names."""
        theirs = prefix + self.block.format(0)
        return sum(f"{theirs}{name}weight" in state for name in (*self.qkv, self.proj, *self.fc1, self.fc2))


def layout(state: Mapping[str, Tensor], prefix: str, *candidates: BlockNames) -> BlockNames:
    """The naming that fits a state dict best."""
    return max(candidates, key=lambda names: names.present(state, prefix))


FILE_ATTENTION = ("attention.attention.query.", "attention.attention.key.", "attention.attention.value.")
MEMORY_ATTENTION = ("attention.q_proj.", "attention.k_proj.", "attention.v_proj.")
