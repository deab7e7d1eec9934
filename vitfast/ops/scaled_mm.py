"""`quantized_linear` of the "torch" backend on CUDA in fp8: `torch._scaled_mm` with scales of rows and channels.

cuBLASLt's or CUTLASS's product, bias included, with sums promoted to fp32. It gives bf16, on which activation,
LayerScale and residual are launches of their own, and it has no scales of groups: a candidate for a plan to measure
beside the Triton kernel. No GPU has run it here; torch's own checks and its CPU form test the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast.ops import reference
from vitfast.ops.registry import Backend, Spec

MULTIPLE = 16
"""What the widths of both operands must be multiples of: their rows start at multiples of 16 bytes."""


def pack(weight: Tensor) -> Tensor:
    """The weight as it is: [N, K] row by row is what `linear` hands on, transposed."""
    return weight


def linear(
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
    """`reference.quantized_linear` with a scale for each row.

    Raises:
        ValueError: for an output other than bf16, which is all that torch has with such scales, or scales of groups.
    """
    if dtype != torch.bfloat16 or x_scale.ndim == x.ndim:
        raise ValueError(f"torch._scaled_mm takes a scale a row and gives torch.bfloat16, got {dtype}, {x_scale.shape}")
    y = torch._scaled_mm(
        x.reshape(-1, x.shape[-1]),
        weight.t(),
        scale_a=x_scale.view(-1, 1),
        scale_b=weight_scale.view(1, -1),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=False,
    ).view(*x.shape[:-1], weight.shape[0])
    return reference.scale_and_add(reference.activate(y, activation), layer_scale, residual)


CAPABILITIES = Backend(
    "torch", "quantized_linear", linear, devices=("cuda",), dtypes=("float8_e4m3fn",), min_capability=(8, 9),
    features=("swiglu",),
)  # fmt: skip


def why_not(spec: Spec) -> list[str]:
    """Every reason why `linear` cannot run a spec; empty if it can."""
    sizes = {name: spec.dims.get(name, 0) for name in ("K", "N")}
    uneven = [f"{name} {size} is no multiple of {MULTIPLE}" for name, size in sizes.items() if size % MULTIPLE]
    return CAPABILITIES.why_not(spec) + uneven
