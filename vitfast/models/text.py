"""Text towers of CLIP, SigLIP and CoCa: the same blocks as an image tower, under tokens of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfast.models.config import ViTConfig


@dataclass(frozen=True)
class TextTower:
    """A text tower as it is loaded.

    Attributes:
        config: its blocks. `image_size` is (context, 1): the "patches" are the tokens of a text of full length.
        weights: canonical weights of its blocks, position embedding and final norm (see `vitfast.models.config`).
        embedding: [V, C], a row a token. projection: [E, C] or None. projection_bias: [E] or None.
        causal: whether tokens see only those before them.
        pool: which token stands for the text: the "last" of full length, padding included (SigLIP); the "first"; or
            the first `eot`, the token that ends a text (CLIP); where `eot` is None the token of the highest number.
        scale, bias: logits are scale * cosine + bias. A bias is SigLIP's: each label is by itself then (sigmoid).
        tokenizer: the folder with the tokenizer's files, or None.
        class_token: [C], of a token after the text, which stands for it (CoCa); or None.
        pad: the number of padding, which hides the token after it (CoCa's mask is one late, and trained so); or None.
    """

    config: ViTConfig
    weights: Mapping[str, Tensor]
    embedding: Tensor
    projection: Tensor | None
    projection_bias: Tensor | None
    causal: bool
    pool: str
    eot: int | None
    scale: float
    bias: float | None
    tokenizer: Path | None = None
    class_token: Tensor | None = None
    pad: int | None = None

    @property
    def context(self) -> int:
        """Tokens of the longest text."""
        return self.config.image_size[0] - (self.class_token is not None)

    @property
    def embedding_dim(self) -> int:
        """Channels of the embedding."""
        return self.config.width if self.projection is None else len(self.projection)

    def place(self, ids: Tensor) -> Tensor:
        """The place [T] of the token that stands for each text [T, L]."""
        if self.class_token is not None:
            return torch.full((len(ids),), ids.shape[1], device=ids.device)
        if self.pool in ("first", "last"):
            return torch.full((len(ids),), ids.shape[1] - 1 if self.pool == "last" else 0, device=ids.device)
        return ids.argmax(dim=1) if self.eot is None else (ids == self.eot).int().argmax(dim=1)


def text_config(*, context: int, name: str, **fields: Any) -> ViTConfig:
    """The description of a text tower's blocks: tokens come from a table, not from patches."""
    return ViTConfig(
        image_size=(context, 1),
        patch_size=(1, 1),
        in_channels=1,
        prefix_tokens=0,
        class_token=False,
        stem="token embedding",
        pool="none",
        name=f"{name}, text" if name else "text",
        **fields,
    )
