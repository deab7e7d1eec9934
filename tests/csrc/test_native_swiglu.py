"""SwiGLU in the epilogues of the native linear and quantized_linear, and as a pass of its own where it is none."""

import pytest
import torch
from helpers.eight_bits import rows as int8_rows
from helpers.eight_bits import weight as int8_weight
from helpers.global_state import threads
from helpers.linear import check_stats, extras, folded, implementation, operands

from vitfast.ops import native, reference
from vitfast.testing import check_op, guarded, make

WIDTHS = [32, 96, 128, 160, 640]
"""Of the output: a panel; no whole chunk, no whole block; several."""
BF16 = pytest.mark.parametrize("level", ["avx512_bf16"], indirect=True)
INTEGERS = pytest.mark.parametrize("level", ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"], indirect=True)


def check(m, width, k, dtype):
    """Beside the reference, with a folded norm and everything after it; and without."""
    args, norm = folded(*operands(m, 2 * width, k, dtype))
    kwargs = {"activation": "swiglu", **norm, **extras(m, width, dtype)}
    check_stats(implementation("native", dtype)(*args, **kwargs, stats=True), *args, **kwargs)
    x, weight, _ = args
    check_op(implementation("native", dtype), reference.linear, x, weight, None, activation="swiglu")


@pytest.mark.parametrize("width", WIDTHS)
def test_fp32_at_every_level(width, level):
    check(31, width, 136, torch.float32)


@pytest.mark.parametrize(("m", "k"), [(1, 7), (12, 128), (197, 300)])
def test_fp32_rows_and_depths(m, k, level):
    check(m, 160, k, torch.float32)


@BF16
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("m", "k"), [(1, 7), (14, 128), (197, 67)])
def test_bf16(m, width, k, level):
    check(m, width, k, torch.bfloat16)


@BF16
def test_bf16_is_rounded_once(level):
    """Gate and up projection stay in fp32: what is left is the rounding of the result."""
    x, weight, bias = operands(64, 256, 96, torch.bfloat16)
    exact = reference.linear(x, weight, bias, activation="swiglu", upcast=True)
    got = implementation("native", torch.bfloat16)(x, weight, bias, activation="swiglu")
    assert (got - exact).square().mean().sqrt() < 1.02 * (exact.bfloat16() - exact).square().mean().sqrt()


@INTEGERS
@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_int8(width, dtype, requantize, level):
    m, k = 37, 132
    kwargs = {name: guarded(make(*shape, dtype=dtype, seed=seed).cpu()) for name, shape, seed in (
        ("bias", (2 * width,), 2), ("layer_scale", (width,), 3), ("residual", (m, width), 5),
    )}  # fmt: skip
    kwargs |= {"activation": "swiglu", "dtype": dtype, "requantize": requantize}
    for group in (0, 128, 64):
        check_op(native.quantized_linear, reference.quantized_linear, *int8_rows(m, k, group),
                 *int8_weight(2 * width, k), **kwargs)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    for m, width in ((131, 32), (3, 640), (70, 320)):
        args, kwargs = operands(m, 2 * width, 300, dtype), extras(m, width, dtype)
        results = []
        for count in (1, 3, 7):
            with threads(count):
                results.append(implementation("native", dtype)(*args, **kwargs, activation="swiglu"))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_infinities_and_nan():
    x = torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [200.0], [-200.0], [-0.0]])
    weight = torch.ones(64, 1)
    wanted = reference.linear(x, weight, activation="swiglu", upcast=True)
    got = implementation("native")(x, weight, activation="swiglu")
    torch.testing.assert_close(got.double(), wanted, equal_nan=True, rtol=1e-6, atol=1e-37)


def test_a_width_of_no_whole_panels_is_a_pass_of_its_own():
    """The op itself refuses it; other widths are its own, so that the result is the same."""
    implementation("native")
    op = torch.ops.vitfast_native.linear_packed
    for width, own in ((32, True), (20, False), (33, False)):
        x, weight, bias = operands(5, 2 * width, 16, torch.float32)
        packed = native.pack(weight)
        check_op(native.linear, reference.linear, x, weight, bias, activation="swiglu")
        rest = (bias, "swiglu", None, None, None, None, 1e-6, False)
        if own:
            assert torch.equal(op(x, packed, *rest)[0], native.linear_packed(x, packed, bias, activation="swiglu"))
        else:
            message = f"linear: swiglu reads a packed weight whose rows are a multiple of 64, got {2 * width}"
            with pytest.raises(ValueError, match=message):
                op(x, packed, *rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_scale": torch.ones(64)}, r"layer_scale has shape \(64,\), expected \(32,\)"),
        ({"residual": torch.ones(5, 64)}, r"residual has shape \(5, 64\), expected \(5, 32\)"),
        ({"bias": torch.ones(32)}, r"bias has shape \(32,\), expected \(64,\)"),
    ],
)
def test_bad_shapes(change, message):
    implementation("native")
    x, weight, bias = operands(5, 64, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        native.linear_packed(x, native.pack(weight), **({"bias": bias} | change), activation="swiglu")
