"""The forward on images of different sizes in one pass: their tokens lie one after another, and none is padding.

Products and norms do not know of images, so they run on all tokens at once. Attention is one launch where the backend
takes sequences of different lengths (Triton, by `cu_queries`), else one for each size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.models import vit
from vitfast.models.config import ViTConfig
from vitfast.models.output import Output
from vitfast.models.plan import AttentionOp, Plan
from vitfast.models.positions import Positions
from vitfast.models.weights import Weights


@dataclass(frozen=True)
class Group:
    """Images of one size: [b, Cin, H, W] or uint8 [b, H, W, Cin], and the positions of that size."""

    images: Tensor
    positions: Positions


def lengths(shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Where each sequence begins, and the last ends: int32 [images + 1], of (images, tokens) for each size."""
    tokens = [n for images, n in shapes for _ in range(images)]
    ends = torch.tensor([0, *accumulate(tokens)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return ends.to(device, non_blocking=True)


def forward(
    config: ViTConfig, weights: Weights, groups: Sequence[Group], plan: Plan, ends: Tensor | None = None
) -> list[Output]:
    """Run the model on groups of images; an output for each group.

    Args:
        ends: what `lengths` gives for these groups, kept from an earlier call.

    Raises:
        ValueError: if the plan computes attention inside a fused block, or a block has code of its own.
    """
    if any(isinstance(block, nn.Module) for block in weights.blocks):
        raise ValueError("images of different sizes cannot be packed where blocks have code of their own")
    if plan.attention_block is not None:
        raise ValueError("images of different sizes cannot be packed where attention is part of a fused block")
    parts = [vit.embed(config, weights, group.positions, group.images, plan) for group in groups]
    shapes = [(len(part), part.shape[1]) for part in parts]
    x = torch.cat([part.flatten(0, 1) for part in parts])[None]
    if ends is None:
        ends = lengths(shapes, x.device)
    varlen = plan.backends.get("attention") == "triton"
    mixed = replace(plan, attention=_Attention(plan.attention, shapes, ends, varlen), attention_quantize=None)

    stats = vit.first_stats(mixed, x)
    for i in range(config.depth):
        places = [group.positions.of_block(config, i) for group in groups]
        x, stats = vit.run_block(config, weights, i, x, stats, mixed, {"places": places})
    x = vit.final_norm(config, weights, x, plan)[0]
    rows = x.split([images * tokens for images, tokens in shapes])
    return [
        vit.head(config, weights, part.view(*shape, x.shape[-1]), plan, group.positions.grid)
        for part, shape, group in zip(rows, shapes, groups, strict=True)
    ]


class _Attention:
    """Attention of packed q, k and v [1, T, H, D], each image by itself."""

    def __init__(self, attention: AttentionOp, shapes: list[tuple[int, int]], ends: Tensor, varlen: bool) -> None:
        self.attention, self.shapes, self.ends, self.varlen = attention, shapes, ends, varlen

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, /, *, places: Sequence[dict[str, Any]] = (), **heads: Any
    ) -> Tensor:
        """[1, T, H, D]; `places`: for each group, what attention is given of positions."""
        attention: Any = self.attention
        if self.varlen and not any(places):
            longest = max(tokens for _, tokens in self.shapes)
            packed = {"cu_queries": self.ends, "cu_keys": self.ends, "max_queries": longest, "max_keys": longest}
            return attention(q, k, v, **heads, **packed)
        sizes = [images * tokens for images, tokens in self.shapes]
        parts = zip(self.shapes, places, *(t[0].split(sizes) for t in (q, k, v)), strict=True)
        made = [attention(*(t.unflatten(0, shape) for t in qkv), **heads, **place) for shape, place, *qkv in parts]
        return torch.cat([part.flatten(0, 1) for part in made])[None]
