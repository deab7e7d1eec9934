"""Element-wise activations of the epilogues, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")
"""What a product's epilogue may be asked for; "swiglu" takes two products and is not element-wise."""


@triton.jit
def erf_gelu(x):
    """x * Phi(x), the exact GELU (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def tanh_gelu(x):
    """The tanh approximation of GELU; tanh(u) is written as 2*sigmoid(2u) - 1."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def quick_gelu(x):
    """x * sigmoid(1.702 x), as CLIP uses it."""
    return x * tl.sigmoid(1.702 * x)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Element-wise activation by name; "" is the identity. x is fp32."""
    if ACTIVATION == "gelu":
        x = erf_gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = tanh_gelu(x)
    elif ACTIVATION == "quick_gelu":
        x = quick_gelu(x)
    elif ACTIVATION == "silu":
        x = silu(x)
    return x
