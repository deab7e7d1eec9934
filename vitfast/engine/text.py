"""Texts to embeddings: a text tower's tokenizer, plan and weights, and the blocks of `vitfast.models.vit`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.engine import planner
from vitfast.engine.isolation import isolated
from vitfast.models import vit
from vitfast.models.text import TextTower
from vitfast.models.weights import prepare_weights
from vitfast.ops import attention

TEMPLATES = ("a photo of {}.",)
"""What a label is put into, if nothing else is said."""

_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""A tokenizer's vocabulary is in one of these."""


@dataclass(frozen=True)
class ZeroShot:
    """A classifier made of texts.

    Attributes:
        labels: the classes. weight: [classes, E] fp32, of unit length. scale, bias: logits are scale * cosine + bias.
    """

    labels: tuple[str, ...]
    weight: Tensor
    scale: float
    bias: float | None

    @property
    def problem_type(self) -> str:
        """As `vitfast.Checkpoint` says it: where there is a bias each label is by itself, as SigLIP is trained."""
        return "single_label_classification" if self.bias is None else "multi_label_classification"

    def __call__(self, embedding: Tensor) -> Tensor:
        """Logits [B, classes] fp32 of image embeddings [B, E]."""
        cosine = F.normalize(embedding.float(), dim=-1) @ self.weight.to(embedding.device).T
        return self.scale * cosine + (self.bias or 0.0)


class TextRunner:
    """A text tower on one device.

    Args:
        tower: as it was loaded. device, dtype: where and in what it computes. backend: as for `vitfast.load`.
    """

    @isolated
    def __init__(
        self, tower: TextTower, *, device: torch.device, dtype: torch.dtype, backend: str, deterministic: bool
    ) -> None:
        self.tower = tower
        plan = planner.build(tower.config, device=device, dtype=dtype, backend=backend, deterministic=deterministic)
        # Attention is chosen by itself: a plan measures it without the causal mask, which not every backend has.
        chosen = backend if backend in ("torch", "triton") else None
        attend: Any = functools.partial(attention, causal=tower.causal, backend=chosen)
        self.plan = replace(plan, attention=attend)
        table = nn.Embedding.from_pretrained(tower.embedding.detach().float())
        self.weights = prepare_weights(tower.config, tower.weights, self.plan, device=device, dtype=dtype, stem=table)
        parts = (tower.projection, tower.projection_bias, tower.class_token)
        self.projection, self.bias, self.class_token = (
            None if part is None else part.detach().to(device, dtype, copy=True) for part in parts
        )
        self.device, self.dtype = device, dtype
        self._tokenizer: Any = None

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token numbers [T, context] by the family's own tokenizer: cut at the context, padded to it.

        Raises:
            ValueError: if the model's folder has no tokenizer, or transformers is not there to read it.
        """
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self.tower)
        made = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.tower.context, return_tensors="pt"
        )
        return made["input_ids"]

    @isolated
    def __call__(self, ids: Tensor) -> Tensor:
        """Embeddings [T, E] of texts given as token numbers [T, L], not scaled.

        Raises:
            ValueError: for a wrong shape or dtype, a text longer than the context or a number out of the vocabulary.
        """
        tower, vocabulary = self.tower, len(self.tower.embedding)
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not 0 < ids.shape[1] <= tower.context:
            raise ValueError(
                f"token numbers must be int64 [T, L] with L from 1 to {tower.context}, "
                f"got {ids.dtype} {list(ids.shape)}"
            )
        if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
            raise ValueError(f"token numbers must be from 0 to {vocabulary - 1}, got {ids.min()} to {ids.max()}")
        ids = ids.to(self.device).long()
        if not len(ids):
            return torch.empty(0, tower.embedding_dim, dtype=self.dtype, device=self.device)
        x = self._embed(ids)
        place = {} if tower.pad is None else {"key_mask": F.pad(ids != tower.pad, (1, 0), value=True)}
        stats = vit.first_stats(self.plan, x)
        for i in range(tower.config.depth):
            x, stats = vit.run_block(tower.config, self.weights, i, x, stats, self.plan, place)
        x = vit.final_norm(tower.config, self.weights, x, self.plan)
        pooled = x[torch.arange(len(ids), device=x.device), tower.place(ids)]
        return pooled if self.projection is None else F.linear(pooled, self.projection, self.bias)

    def _embed(self, ids: Tensor) -> Tensor:
        """What the first block reads: tokens of the texts, and the class token after them where there is one."""
        native, table = self.weights.positions, self.weights.stem
        assert native.embedding is not None and table is not None
        x = table(ids)
        if self.class_token is not None:
            x = torch.cat([x, self.class_token.expand(len(ids), 1, -1)], dim=1)
        return x + native.embedding[: x.shape[1]]

    def zero_shot(
        self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES, embeddings: Tensor | None = None
    ) -> ZeroShot:
        """A classifier of labels: each the mean of its embeddings in the templates, all scaled to unit length.

        Args:
            embeddings: of those texts, where they are there already: [labels, templates, E], in this order.

        Raises:
            ValueError: if there are no labels, a template has no place for one, or `embeddings` have another shape.
        """
        if isinstance(labels, str) or not labels or not all(isinstance(label, str) and label for label in labels):
            raise ValueError(f"labels must be a list of texts, got {labels!r}")
        if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
            raise ValueError(f"templates must be a list of texts with {{}} in them, got {templates!r}")
        expected = [len(labels), len(templates), self.tower.embedding_dim]
        if embeddings is not None and list(embeddings.shape) != expected:
            raise ValueError(f"embeddings must be {expected}, got {list(embeddings.shape)}")
        rows = []
        for i, label in enumerate(labels):
            if embeddings is None:
                made = self(self.ids([template.replace("{}", label) for template in templates]))
            else:
                made = embeddings[i]
            rows.append(F.normalize(F.normalize(made.float(), dim=-1).mean(0), dim=-1))
        return ZeroShot(tuple(labels), torch.stack(rows), self.tower.scale, self.tower.bias)


def _tokenizer(tower: TextTower) -> Any:
    if tower.tokenizer is None:
        raise ValueError("this model came without a tokenizer's files: pass token numbers, int64 [T, L]")
    if not any((tower.tokenizer / name).is_file() for name in _FILES):  # transformers would make up an empty one
        raise ValueError(f"{tower.tokenizer} has no tokenizer that can be read: none of {', '.join(_FILES)}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"reading the tokenizer in {tower.tokenizer} needs transformers: {error}") from error
    try:
        return AutoTokenizer.from_pretrained(str(tower.tokenizer), local_files_only=True)
    except Exception as error:  # OSError, ValueError, ImportError of what a tokenizer needs, ...
        raise ValueError(f"{tower.tokenizer} has no tokenizer that can be read: {error}") from error
