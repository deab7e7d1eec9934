"""What a calibration of a quantised model found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

TARGET = 0.998
"""Mean cosine of a quantised model's embeddings to bf16's that a calibration asks for: what CLIP ViT-B/16 has of
photos in fp8 and int8 with every product quantised."""


@dataclass(frozen=True)
class Calibration:
    """What `vitfast.load(..., calibration=images)` found; `print` it.

    Attributes:
        precision: "fp8" or "int8". images: how many. target: mean cosine asked for.
        alone: product -> mean cosine of the embeddings to bf16's with this product alone quantised, worst first.
        skip_quantize: the products left in bf16, those that were asked for first, then by `alone`; what
            `vitfast.load(..., skip_quantize=)` takes.
        before, after: mean cosine with everything quantised but what was asked for, and with all of `skip_quantize` in
            bf16.
    """

    precision: str
    images: int
    target: float
    alone: Mapping[str, float]
    skip_quantize: tuple[str, ...]
    before: float
    after: float

    @property
    def kept(self) -> tuple[str, ...]:
        """The name that `skip_quantize` had in 0.1.0."""
        warnings.warn("Calibration.kept is now Calibration.skip_quantize", DeprecationWarning, stacklevel=2)
        return self.skip_quantize

    def __str__(self) -> str:
        skipped = self.skip_quantize
        rows = [f"{name:<20} {cosine:.6f}{'  in bf16' * (name in skipped)}" for name, cosine in self.alone.items()]
        return "\n".join([
            f"cosine to bf16 on {self.images} images, each product alone in {self.precision}:",
            *rows,
            f"all in {self.precision}: {self.before:.6f}; {len(skipped)} left in bf16: {self.after:.6f}, "
            f"asked for {self.target}",
        ])  # fmt: skip
