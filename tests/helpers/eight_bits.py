"""Operands of the C++ extension's int8 ops on the CPU, and the tests that all levels share."""

import torch

from vitfast.ops import reference
from vitfast.testing import guarded, make

INT8 = torch.int8
SHAPES = [(1, 16, 16), (3, 33, 5), (15, 130, 131), (29, 64, 768), (197, 264, 300), (5, 1000, 128)]
"""M, N, K: one row; widths that are not whole panels, tiles, words or groups."""


def rows(m, k, group=0):
    """x int8 [m, k] and its scales: [m], or one for each `group` columns."""
    x, scale = reference.quantize(make(m, k).cpu(), dtype=INT8)
    if group:
        scale = scale[:, None] * make(m, -(-k // group), seed=4).cpu().float().abs()
    return guarded(x), guarded(scale)


def weight(n, k):
    """An int8 weight [n, k] and its scales [n]."""
    values, scale = reference.quantize(make(n, k, scale=k**-0.5, seed=1).cpu(), dtype=INT8)
    return guarded(values), guarded(scale)


def extras(m, n, dtype):
    """Bias, LayerScale and residual, in the output's dtype."""
    named = {"bias": make(n, dtype=dtype, seed=2), "layer_scale": make(n, dtype=dtype, seed=3)}
    named["residual"] = make(m, n, dtype=dtype, seed=5)
    return {name: guarded(tensor.cpu()) for name, tensor in named.items()} | {"dtype": dtype}
