"""The native linear: how it shares out its work, its SIMD levels, its sums, and what is not finite."""

import pytest
import torch
from helpers.global_state import threads
from helpers.grids import thinned
from helpers.linear import check_stats, extras, folded, implementation, operands
from helpers.scripts import python

from vitfast.ops import native, reference, registry
from vitfast.ops.accuracy import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_takes_and_makes_many_shares(dtype):
    """Shares of rows and, where rows are few, of columns; the same bits for any number of threads."""
    linear = implementation("native", dtype)
    for rows, width in ((131, 40), (3, 600), (70, 300)):
        args, kwargs = operands(rows, width, 300, dtype), extras(rows, width, dtype)
        check_stats(linear(*args, **kwargs, activation="gelu", stats=True), *args, **kwargs, activation="gelu")
        results = []
        for count in (1, 3, 7):
            with threads(count):
                results.append(linear(*args, **kwargs, activation="gelu"))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_native_at_every_simd_level(level, activation):
    args, norm = folded(*operands(131, 264, 136, torch.float32))
    kwargs = {"activation": activation, **norm, **extras(131, 264, torch.float32)}
    check_stats(implementation("native")(*args, **kwargs, stats=True), *args, **kwargs)


@pytest.mark.parametrize(("rows", "outputs", "inner"), [(1, 33, 900), (217, 40, 1537), (440, 300, 769)])
def test_native_in_several_blocks_of_rows_columns_and_depth(rows, outputs, inner, level):
    """And a last panel that is no whole one."""
    args, norm = folded(*operands(rows, outputs, inner, torch.float32))
    kwargs = {**norm, **extras(rows, outputs, torch.float32)}
    check_stats(implementation("native")(*args, **kwargs, stats=True), *args, **kwargs)


def test_native_sums_are_short():
    """The error stays well under that of one long sum, which is what a deep network of fp32 products feels."""
    x, weight, bias = operands(64, 96, 3072, torch.float32)
    exact = reference.linear(x, weight, bias, upcast=True)
    columns = zip(x.split(1, 1), weight.split(1, 1), strict=True)
    one_sum = sum((a * b.T for a, b in columns), torch.zeros(64, 96)) + bias
    error = (implementation("native")(x, weight, bias) - exact).square().mean().sqrt()
    assert error < 0.33 * (one_sum - exact).square().mean().sqrt()


def test_native_infinities_and_nan():
    x = torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [60.0], [-60.0], [-0.0]])
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "silu"):
        args = (x, torch.ones(1, 1))
        wanted = reference.linear(*args, activation=activation, upcast=True)
        assert_close(implementation("native")(*args, activation=activation), wanted, wanted.float())


BF16 = pytest.mark.parametrize("level", ["avx512_bf16"], indirect=True)


@BF16
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"])
@pytest.mark.parametrize(("outputs", "inner"), [(1, 1), (8, 3), (21, 67), (1000, 64), (264, 136), (64, 3072)])
def test_native_in_bf16(outputs, inner, activation, level):
    """Widths that are no whole panels, tiles or pairs, and an odd K, with every epilogue."""
    if activation == "swiglu" and outputs % 2:
        pytest.skip("swiglu needs an even number of weight rows")
    args, norm = folded(*operands(31, outputs, inner, torch.bfloat16))
    width = outputs // 2 if activation == "swiglu" else outputs
    kwargs = {"activation": activation, **norm, **extras(31, width, torch.bfloat16)}
    check_stats(implementation("native", torch.bfloat16)(*args, **kwargs, stats=True), *args, **kwargs)


@BF16
def test_native_in_bf16_sums_in_fp32(level):
    """Of 4096 products: sums kept in bf16 would be off by far more than the result's own rounding."""
    args = operands(16, 40, 4096, torch.bfloat16)
    exact, got = reference.linear(*args, upcast=True), implementation("native", torch.bfloat16)(*args)
    error = (got - exact).square().mean().sqrt()
    assert error < 1.02 * (exact.bfloat16() - exact).square().mean().sqrt()


GELU_INPUTS = torch.cat((torch.linspace(-9, 9, 80001), torch.tensor([-3e38, -1e4, -1e-20, 0.0, 1e-20, 1e4, 3e38])))


@pytest.mark.parametrize("columns", [1, 16, 128])
def test_native_gelu_is_within_a_rounding(level, columns):
    """Off by no more than a rounding of the result, 5e-8 where it is small, and exact at its ends."""
    x = GELU_INPUTS
    weight = torch.ones(columns, 1)
    got = implementation("native")(x[:, None].contiguous(), weight, activation="gelu").double()
    exact = torch.nn.functional.gelu(x.double())[:, None]
    assert ((got - exact).abs() <= 5e-8 + 2.0**-23 * exact.abs()).all()
    assert not got[x < -9].any() and (got[x > 9] == x[x > 9, None]).all()


@BF16
def test_native_gelu_in_bf16_is_rounded_once(level):
    x = GELU_INPUTS.bfloat16()
    got = implementation("native", torch.bfloat16)(x[:, None], torch.ones(64, 1).bfloat16(), activation="gelu").double()
    exact = torch.nn.functional.gelu(x.double())[:, None]
    assert ((got - exact).abs() <= 5e-8 + 2.0**-8 * exact.abs()).all()


@BF16
def test_native_in_bf16_infinities_and_nan(level):
    x = torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [60.0], [-60.0], [-0.0]]).bfloat16()
    for activation in (None, "gelu", "gelu_tanh", "quick_gelu", "silu"):
        args = (x, torch.ones(1, 1).bfloat16())
        wanted = reference.linear(*args, activation=activation, upcast=True)
        got = implementation("native", torch.bfloat16)(*args, activation=activation)
        assert_close(got, wanted, reference.linear(*args, activation=activation))


@pytest.mark.parametrize("level", thinned(["avx512_vnni", "default", "avx2", "avx512f"], 4), indirect=True)
def test_native_in_bf16_is_refused_below(level):
    entry = registry.backend("linear", "native")
    with pytest.raises(ValueError, match="linear: there is no AVX512-BF16 here"):
        entry.call(*operands(4, 8, 8, torch.bfloat16))
    script = (
        "import torch; from vitfast.ops.registry import Spec, candidates\n"
        "able, refused = candidates(Spec('linear', 'cpu', torch.bfloat16))\n"
        "print('native' in [entry.name for entry in able], refused.get('native'))\n"
    )
    assert python(script, VITFAST_SIMD=level) == "False ['there is no AVX512-BF16 here']"


@BF16
def test_native_in_bf16_packs_in_pairs(level):
    x, weight, bias = operands(5, 33, 7, torch.bfloat16)
    packed = native.pack(weight)
    assert packed.shape == (33, 8)
    assert torch.equal(native.linear_packed(x, packed, bias), native.linear(x, weight, bias))
    with pytest.raises(ValueError, match=r"K >= 1, packed in pairs, do not fit: \(5, 6\) and \(33, 8\)"):
        native.linear_packed(x[:, :6], packed, bias)
    with pytest.raises(ValueError, match=r"weight has dtype torch.float32, allowed: torch.bfloat16"):
        native.linear_packed(x, packed.float(), bias)
    with pytest.raises(ValueError, match=r"bias has dtype torch.float32, allowed: torch.bfloat16"):
        native.linear_packed(x, packed, bias.float())
