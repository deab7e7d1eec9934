"""What an engine returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """What an engine returns for B images of N tokens.

    Attributes:
        tokens: [B, N, C] after the final norm: CLS (and distillation token), registers, patches. None where
            `Engine.stream` was not asked for them.
        embedding: [B, E], what the family's own users take: the projected image embedding for
            CLIP, the normalised CLS token for ViT and DINOv2, the pooled vector where a model pools.
        logits: [B, classes], or None if the model has no classifier.
        neck: [B, M, E] of what a model's neck makes of the patches (SAM's convolutions, the mergers of vision towers of
            language models), rows of its grid after one another; None where a model has none, where tokens are None,
            and for images of different sizes.
        layers: of each block that was asked for, [B, N, C], or [B, C, rows, columns] of the patches alone.
        attention_maps: of each block that was asked for, [B, H, N, N] fp32, a row a query.
        image_tokens: of images of different sizes, [N, C] of each; tokens is None then.
    """

    tokens: Tensor | None
    embedding: Tensor
    logits: Tensor | None
    layers: tuple[Tensor, ...] | None = None
    attention_maps: tuple[Tensor, ...] | None = None
    image_tokens: tuple[Tensor, ...] | None = None
    neck: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [t for t in (self.tokens, self.embedding, self.logits, self.neck) if t is not None]

    def __getitem__(self, images: slice) -> Output:
        """The outputs of some of the images, as views."""
        tokens, logits, neck = (None if t is None else t[images] for t in (self.tokens, self.logits, self.neck))
        return Output(tokens, self.embedding[images], logits, neck=neck)

    def clone(self) -> Output:
        """A copy, in memory of the same kind."""
        tokens, logits, neck = (None if t is None else t.clone() for t in (self.tokens, self.logits, self.neck))
        return Output(tokens, self.embedding.clone(), logits, neck=neck)

    def copy_(self, source: Output) -> None:
        """Copy the values of a source that has at least these tensors; on a GPU, without waiting for it."""
        for name in ("tokens", "embedding", "logits", "neck"):
            if (tensor := getattr(self, name)) is not None:
                tensor.copy_(getattr(source, name), non_blocking=True)
