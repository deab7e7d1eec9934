"""Operands of `linear` and checks of its results."""

import pytest
import torch

from vitfast import ops
from vitfast.kernels import linear as kernels
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import device, guarded, make


def implementation(backend, dtype=torch.float32):
    """The launcher of one backend; skips the test with the reasons where it cannot run in that dtype."""
    if backend == "triton":
        return kernels.linear
    entry = ops.registry.backend("linear", backend)
    if reasons := entry.why_not(ops.Spec("linear", device().type, dtype)):
        pytest.skip("; ".join(reasons))
    return entry.call


def operands(rows, outputs, inner, dtype, offset=0.0):
    """x, weight and bias of the size of a trained block's; `offset` is added to x."""
    return (
        guarded(make(rows, inner, dtype=dtype) + offset),
        guarded(make(outputs, inner, dtype=dtype, seed=1, scale=inner**-0.5)),
        guarded(make(outputs, dtype=dtype, seed=2, scale=0.3)),
    )


def extras(rows, width, dtype):
    """LayerScale and residual for an output of this size."""
    return {
        "layer_scale": guarded(make(width, dtype=dtype, seed=3)),
        "residual": guarded(make(rows, width, dtype=dtype, seed=4)),
    }


def folded(x, weight, bias):
    """x with its statistics, and weight and bias with a LayerNorm folded in: `linear`'s arguments."""
    inner = x.shape[-1]
    gamma = 1 + make(inner, dtype=x.dtype, seed=5, scale=0.2)
    weight, weight_sum, bias = ops.fold_norm(weight, bias, gamma, make(inner, dtype=x.dtype, seed=6, scale=0.2))
    row_stats = guarded(ops.row_stats(x, backend="torch"))
    return (x, guarded(weight), guarded(bias)), {"row_stats": row_stats, "weight_sum": guarded(weight_sum)}


def check_stats(result, *args, **kwargs):
    """Compare y with the references, and the statistics beside it with those of y as stored."""
    y, stats = result
    assert_close(y, reference.linear(*args, **kwargs, upcast=True), reference.linear(*args, **kwargs))
    assert_close(stats, reference.row_stats(y, upcast=True), reference.row_stats(y))
