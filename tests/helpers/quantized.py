"""Operands of `quantized_linear` on the CPU, rows scaled whole or in groups of columns."""

import torch
from helpers.emulated_linear import E4M3

from vitfast import testing
from vitfast.ops import reference
from vitfast.testing import guarded


def make(*shape, **kwargs):
    """`testing.make` on the CPU, where kernels are emulated, whether there is a GPU or not."""
    return testing.make(*shape, **kwargs).cpu()


def in_groups(x):
    """x [M, K] in e4m3, and a scale for each 128 columns of a row: [M, ceil(K / 128)]."""
    values, scales = zip(*(reference.quantize(part, dtype=E4M3) for part in x.split(128, dim=-1)), strict=True)
    return torch.cat([v.view(torch.uint8) for v in values], dim=-1).view(E4M3), torch.stack(scales, -1)


def whole_numbers(m, n, k, *, grouped=False):
    """x, its scales, weight and its scales, the values small whole numbers: 14 bits hold their sums, without rounding.

    The scales of x are one for a row, or `grouped`, one for each 128 columns of it.
    """
    x, weight = (make(rows, k, seed=seed, scale=1.5).round().clamp(-4, 4) for rows, seed in ((m, 0), (n, 1)))
    x_scale, weight_scale = make(m, -(-k // 128), seed=2).exp(), make(n, seed=3, scale=0.3).exp() / 50
    operands = x.to(E4M3), x_scale if grouped else x_scale[:, 0].contiguous(), weight.to(E4M3), weight_scale
    return tuple(guarded(tensor) for tensor in operands)
