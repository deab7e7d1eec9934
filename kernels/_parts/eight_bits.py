"""Rows or groups of columns in 8 bits, with a scale each."""

from __future__ import annotations

import triton
import triton.language as tl

SCALE_GROUPS = (128, 64)
"""Columns of an 8-bit row that may share a scale, where a row has several; the last group covers what is left. 64 is a
head's."""


@triton.jit
def in_8_bits(value, kind: tl.constexpr):
    """Rows of fp32 [R, K], masked columns 0, in `kind` with a scale each [R]."""
    LARGEST: tl.constexpr = 448.0 if kind == tl.float8e4nv else 127.0
    amax = tl.maximum(tl.max(tl.abs(value), axis=1), 7.888609052210118e-31)  # 2^-100: no division by zero
    nan = tl.sum(value * 0.0, axis=1)  # 0 for finite rows, which a maximum does not tell
    value = value * (LARGEST / amax)[:, None]
    if kind == tl.int8:
        # Adding and taking away 1.5 * 2^23 rounds to nearest even; a NaN has no integer, its scale says it.
        value = tl.where(value == value, (value + 12582912.0) - 12582912.0, 0.0)
    return value.to(kind), amax / LARGEST + nan
