"""`linear` and `quantized_linear` of the "torch" backend on a CPU, on weights packed once by oneDNN.

The products that torch.compile's CPU backend emits (`torch.ops.mkldnn`, `torch.ops.onednn`): the weight is reordered
into oneDNN's blocked layout ahead of time. They are multiplied by whatever instruction oneDNN finds here, AMX among
them, and are what a plan measures beside the extension.

`linear` fuses bias, activation and residual. The int8 product cannot: it has one scale for all of x, and ours has one
for each row, so that what follows comes in passes of its own, over sums that are scaled by channel. Scales of groups of
columns it has not at all.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitfast.ops import reference
from vitfast.ops.registry import Backend, Spec

NARROW = 16
"""Columns below which `linear` is left to the plain op: nothing is gained, and oneDNN's sums err more than its own."""
ZERO = 128
"""What stands for 0 in an int8 x as oneDNN is given it."""
MOST_INNER = 65536
"""Longest sum of products of such an x and int8 that a 32-bit integer is sure to hold."""
_FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


def why_not(spec: Spec) -> list[str]:
    """Every reason why `linear`, or `quantized_linear`, cannot run a spec, or should not; empty if it can."""
    return _capabilities(spec.op).why_not(spec)


@functools.cache
def _capabilities(op: str) -> Backend:
    if op == "quantized_linear":
        missing = "" if hasattr(torch.ops.onednn, "qlinear_pointwise") else "this torch has no int8 product of oneDNN"
        lacking = {} if torch.cpu._is_vnni_supported() else {"int8": "without VNNI, oneDNN's sums of int8 may saturate"}
        return Backend(
            "torch", op, quantized_linear, ("cpu",), ("int8",), limits={"K": (1, MOST_INNER)}, lacking=lacking,
            features=("swiglu",), missing=missing,
        )  # fmt: skip
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    supported = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    lacking = {
        dtype: f"oneDNN has no {dtype} on this CPU"
        for dtype, question in supported.items()
        if has and not getattr(torch.ops.mkldnn, question)()
    }
    return Backend(
        "torch", "linear", linear, ("cpu",), ("float32", *supported), limits={"N": (NARROW, 2**31)}, lacking=lacking,
        missing="" if has else "this torch has no packed linear of oneDNN",
    )  # fmt: skip


def pack(weight: Tensor) -> Tensor:
    """Reorder a contiguous fp32, bf16 or fp16 CPU weight [N, K] into oneDNN's layout; only `linear` below reads it."""
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


def pack_quantized(weight: Tensor) -> Tensor:
    """Reorder a contiguous int8 CPU weight [N, K] into oneDNN's layout; only `quantized_linear` below reads it."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`reference.quantized_linear` in int8 with a scale for each row; weight is a `pack_quantized` one.

    Raises:
        ValueError: for scales of groups of columns.
    """
    if x_scale.ndim == x.ndim:
        raise ValueError(
            f"oneDNN's int8 product has no scales of groups of columns, got x_scale {tuple(x_scale.shape)}"
        )
    exact = torch.float32
    zeros = weight_scale.new_zeros(weight_scale.shape, dtype=torch.int32)
    # oneDNN multiplies signed x by plain loops, some thousand times slower, and x + 128 with a zero point of 128 by the
    # CPU's instructions.
    unsigned = x.contiguous().view(torch.uint8) ^ ZERO
    y = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, ZERO, weight, weight_scale, zeros, None, 1.0, 0, exact, "none", [], ""
    )
    y.mul_(x_scale[..., None])
    bias, layer_scale, residual = (t if t is None else t.to(exact) for t in (bias, layer_scale, residual))
    if bias is not None:
        y.add_(bias)
    return reference.scale_and_add(reference.activate(y, activation), layer_scale, residual).to(dtype)
