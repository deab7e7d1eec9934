"""Attention maps: what a block's queries see, computed by the reference beside the block's own attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.models.plan import AttentionOp
from vitfast.ops import reference


class Attention:
    """A plan's attention that keeps the maps of some blocks, counted by the calls of a forward.

    A map takes 4 B·H·N² bytes, and the reference about three times as much while it makes it.
    """

    def __init__(self, attention: AttentionOp, blocks: Sequence[int]) -> None:
        self._attention: Any = attention
        self._blocks, self._calls = blocks, 0
        self._made: dict[int, Tensor] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /, **options: Any) -> Any:
        """What the attention gives."""
        if self._calls in self._blocks:
            self._made[self._calls] = probabilities(q, k, **options)
        self._calls += 1
        return self._attention(q, k, v, **options)

    def maps(self) -> tuple[Tensor, ...]:
        """[B, H, N, N] fp32 of each block, in the order asked for."""
        return tuple(self._made[block] for block in self._blocks)


def probabilities(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """softmax(q kᵀ · scale + bias) of q, k [B, N, H, D], fp32 [B, H, Nq, Nk]: attention to the rows of an identity."""
    batch, keys, heads, _ = k.shape
    rows = torch.eye(keys, device=k.device)[None, :, None, :].expand(batch, keys, heads, keys)
    options = {name: o.float() if isinstance(o, Tensor) and o.is_floating_point() else o for name, o in options.items()}
    return reference.attention(q.float(), k.float(), rows, **options).transpose(1, 2)
