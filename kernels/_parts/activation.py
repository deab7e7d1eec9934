"""Element-wise activations of the epilogues, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")
"""What a product's epilogue may be asked for; "swiglu" takes two products and is not element-wise."""

HARDWARE_TANH = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether `fast_tanh` is the GPU's instruction: the interpreter has no inline assembly."""


@triton.jit
def erf_gelu(x):
    """x * Phi(x), the exact GELU (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def fast_tanh(x):
    """tanh by one instruction, to a relative error of 2^-11 (PTX ISA, tanh.approx.f32); exact in the interpreter."""
    if HARDWARE_TANH:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def fast_gelu(x):
    """The exact GELU to 1e-3 or 2^-12 |x|, whichever is more: for outputs of 16 bits.

    erf(x / sqrt(2)) is tanh(x * (c0 + c1 x² + c2 x⁴)) to 2.9e-5 of GELU, a fit of our own; where x² > 30 both are 1 to
    the last bit, and the polynomial would turn back. Below -3.9, where GELU is nearly 0, tanh's error must not grow
    with x. Nine instructions, where the error function takes 36.
    """
    square = tl.minimum(x * x, 30.0)
    tanh = fast_tanh(x * (0.797570344 + square * (0.0369573079 - square * 0.000344753544)))
    half = 0.5 * tl.maximum(x, -3.9)
    return half + half * tanh


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
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Element-wise activation by name; "" is the identity. x is fp32, and so is what is made of it if EXACT."""
    if ACTIVATION == "gelu":
        x = erf_gelu(x) if EXACT else fast_gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = tanh_gelu(x)
    elif ACTIVATION == "quick_gelu":
        x = quick_gelu(x)
    elif ACTIVATION == "silu":
        x = silu(x)
    return x
