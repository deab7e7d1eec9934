"""What a calibration of a quantised model found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TARGET = 0.998
"""Mean cosine of a quantised model's embeddings to bf16's that a calibration asks for: what CLIP ViT-B/16 has of
photos in fp8 and int8 with nothing kept."""


@dataclass(frozen=True)
class Calibration:
    """What `vitfast.load(..., calibration=images)` found; `print` it.

    Attributes:
        precision: "fp8" or "int8". images: how many. target: mean cosine asked for.
        alone: product -> mean cosine of the embeddings to bf16's with this product alone quantised, worst first.
        kept: the products left in bf16, those of `keep=` first, then by `alone`.
        before, after: mean cosine with everything but `keep=` quantised, and with all of `kept` in bf16.
    """

    precision: str
    images: int
    target: float
    alone: Mapping[str, float]
    kept: tuple[str, ...]
    before: float
    after: float

    def __str__(self) -> str:
        rows = [f"{name:<20} {cosine:.6f}{'  kept' * (name in self.kept)}" for name, cosine in self.alone.items()]
        return "\n".join([
            f"cosine to bf16 on {self.images} images, each product alone in {self.precision}:",
            *rows,
            f"all in {self.precision}: {self.before:.6f}; {len(self.kept)} kept in bf16: {self.after:.6f}, "
            f"asked for {self.target}",
        ])  # fmt: skip
