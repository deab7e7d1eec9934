"""The native linear: how it shares out its work, its SIMD levels, its sums, and what is not finite."""

import pytest
import torch
from helpers.global_state import threads
from helpers.linear import check_stats, extras, folded, implementation, operands

from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close


def test_native_takes_and_makes_many_shares():
    """Shares of rows and, where rows are few, of columns; the same bits for any number of threads."""
    linear = implementation("native")
    for rows, width in ((131, 40), (3, 600)):
        args, kwargs = operands(rows, width, 300, torch.float32), extras(rows, width, torch.float32)
        check_stats(linear(*args, **kwargs, activation="gelu", stats=True), *args, **kwargs, activation="gelu")
        results = []
        for count in (1, 3):
            with threads(count):
                results.append(linear(*args, **kwargs, activation="gelu"))
        assert torch.equal(*results)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_native_at_every_simd_level(level, activation):
    args, norm = folded(*operands(131, 264, 136, torch.float32))
    kwargs = {"activation": activation, **norm, **extras(131, 264, torch.float32)}
    check_stats(implementation("native")(*args, **kwargs, stats=True), *args, **kwargs)


def test_native_sums_are_short():
    """The error stays well under that of one long sum, which is what a deep network of fp32 products feels."""
    x, weight, bias = operands(64, 96, 3072, torch.float32)
    exact = reference.linear(x, weight, bias, upcast=True)
    columns = zip(x.split(1, 1), weight.split(1, 1), strict=True)
    one_sum = sum((a * b.T for a, b in columns), torch.zeros(64, 96)) + bias
    error = (implementation("native")(x, weight, bias) - exact).square().mean().sqrt()
    assert error < 0.5 * (one_sum - exact).square().mean().sqrt()


def test_native_infinities_and_nan():
    x = torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [60.0], [-60.0], [-0.0]])
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "silu"):
        args = (x, torch.ones(1, 1))
        wanted = reference.linear(*args, activation=activation, upcast=True)
        assert_close(implementation("native")(*args, activation=activation), wanted, wanted.float())
