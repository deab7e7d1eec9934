"""`linear` of the "torch" backend on CPU, fp32, with weights packed once by oneDNN.

The same oneDNN product that torch.compile's CPU backend emits (`torch.ops.mkldnn`): the weight
is reordered into oneDNN's blocked layout ahead of time, and bias, activation and residual are
fused into the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast.ops import reference

_FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


def available() -> bool:
    """Whether this torch has oneDNN and its packed linear."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(weight: Tensor) -> Tensor:
    """Reorder a contiguous fp32 CPU weight [N, K] into oneDNN's layout; only `linear` below reads it."""
    rows = 1024  # a hint: any large row count gives the same layout
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear` without a folded norm; weight is a `pack`ed one."""
    if residual is not None and layer_scale is None and activation is None:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    else:
        fused = activation if activation in _FUSED else None
        name, algorithm = _FUSED[fused]
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
        if fused != activation:
            y = reference.activate(y, activation)
        y = reference.scale_and_add(y, layer_scale, residual)
    return (y, reference.row_stats(y)) if stats else y
