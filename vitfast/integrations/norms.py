"""The norms that models have for the heads of q and k, read so that a kernel can do them."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitfast.ops import QKNorm

_KINDS = {
    "torch.nn.modules.normalization.LayerNorm": False,
    "timm.layers.norm.LayerNorm": False,
    "timm.layers.norm.RmsNorm": True,
}
"""Path of a class -> whether it is an RMSNorm."""


def read_norms(q_norm: nn.Module, k_norm: nn.Module, head_dim: int) -> tuple[bool, QKNorm | None]:
    """Whether a kernel could take the place of these modules, and what it would do; nothing for two nn.Identity.

    Modules with hooks, or a forward of their own, are left to run.
    """
    both: tuple[Any, Any] = (q_norm, k_norm)
    if any(norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__ for norm in both):
        return False, None
    if type(q_norm) is type(k_norm) is nn.Identity:
        return True, None
    kind = f"{type(q_norm).__module__}.{type(q_norm).__qualname__}"
    if type(q_norm) is not type(k_norm) or kind not in _KINDS or q_norm.eps != k_norm.eps:
        return False, None
    if any(norm.weight is None or tuple(norm.normalized_shape) != (head_dim,) for norm in both):
        return False, None
    q_bias, k_bias = (getattr(norm, "bias", None) for norm in both)
    return True, QKNorm(both[0].weight, both[1].weight, q_bias, k_bias, both[0].eps, _KINDS[kind])
