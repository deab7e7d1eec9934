"""What attention may do to q and k before it multiplies them: `QKNorm`, then `Rope`. Both in fp32, rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021): x * cos + rotate_half(x) * sin, (a, b) being rotated to (-b, a).

    Attributes:
        cos, sin: [rows, D]; [H, rows, D] where each head has its own; or [B, H, rows, D]. fp32 or q's dtype, alike in
            strides. The last `rows` tokens are rotated; those before, such as a class token and registers, are not.
        interleaved: a and b are channels 2d and 2d + 1, as in timm's default and RoFormer, and not d and d + D / 2, as
            in DINOv3 and transformers' `rotate_half`.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


@dataclass(frozen=True)
class QKNorm:
    """LayerNorm, or RMSNorm if `rms`, of each head of q and of k.

    Attributes:
        q_weight, k_weight, q_bias, k_bias: [D], fp32 or q's dtype.
        eps: added to the variance, or mean square.
    """

    q_weight: Tensor
    k_weight: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    eps: float = 1e-6
    rms: bool = False


OPTIONS: dict[str, Any] = {
    "cos": None, "sin": None, "interleaved": False,
    "q_weight": None, "k_weight": None, "q_bias": None, "k_bias": None, "norm_eps": 1e-6, "rms": False,
}  # fmt: skip
"""Both, as the backends take them: by name, and what says nothing."""


def options(rope: Rope | None, norm: QKNorm | None) -> dict[str, Any]:
    """`OPTIONS` with the values of a call."""
    given = dict(OPTIONS)
    if rope is not None:
        given |= {"cos": rope.cos, "sin": rope.sin, "interleaved": rope.interleaved}
    if norm is not None:
        given |= {"q_weight": norm.q_weight, "k_weight": norm.k_weight, "q_bias": norm.q_bias, "k_bias": norm.k_bias}
        given |= {"norm_eps": norm.eps, "rms": norm.rms}
    return given
