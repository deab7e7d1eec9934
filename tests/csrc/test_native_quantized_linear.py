"""The C++ extension's int8 ops on the CPU: quantize, and quantized_linear where there is AVX2 or AVX-512 VNNI."""

import pytest
import torch
from helpers.eight_bits import INT8, SHAPES, extras, rows, weight
from helpers.global_state import threads
from helpers.grids import thinned
from helpers.scripts import python

from vitfast import ops
from vitfast.ops import native, reference, registry
from vitfast.testing import check_op, guarded, make, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPEC = registry.Spec("quantized_linear", "cpu", INT8)
INTEGERS = pytest.mark.parametrize("level", ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"], indirect=True)
BELOW = pytest.mark.parametrize("level", ["default"], indirect=True)


def quantized_linear(*args, **kwargs):
    return native.quantized_linear(*args, **kwargs)


@INTEGERS
@pytest.mark.parametrize("group", [0, 128, 64], ids=["rows", "groups", "heads"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_sizes(m, n, k, group, level):
    check_op(quantized_linear, reference.quantized_linear, *rows(m, k, group), *weight(n, k))


@INTEGERS
@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"])
def test_epilogues(activation, dtype, requantize, level):
    n = 264
    kwargs = extras(37, n // 2 if activation == "swiglu" else n, dtype)
    kwargs["bias"] = make(n, dtype=dtype, seed=2).cpu()
    kwargs |= {"activation": activation, "requantize": requantize}
    check_op(quantized_linear, reference.quantized_linear, *rows(37, 132, 128), *weight(n, 132), **kwargs)


@INTEGERS
def test_sums_are_exact(level):
    """In int32, from the least and the largest bytes: fp32 would round them, and pairs of them saturate 16 bits."""
    m, n, k = 16, 40, 65536
    x = torch.randint(-128, 128, (m, k), dtype=INT8, generator=torch.Generator().manual_seed(0))
    w = torch.randint(-128, 128, (n, k), dtype=INT8, generator=torch.Generator().manual_seed(1))
    x[0], x[1], w[0], w[1], w[2], w[3] = -128, 127, -128, 127, 0, -127
    x[2, ::2], x[2, 1::2], w[4, ::2], w[4, 1::2] = -128, 127, 127, -127
    x[3, : k // 2], x[3, k // 2 :] = 127, -128
    got = quantized_linear(x, torch.ones(m), w, torch.ones(n), dtype=torch.float32)
    assert torch.equal(got, (x.long() @ w.long().T).float())
    with pytest.raises(ValueError, match=r"K from 1 to 65536, do not fit: \(16, 65537\)"):
        quantized_linear(torch.cat((x, x[:, :1]), 1), torch.ones(m), torch.cat((w, w[:, :1]), 1), torch.ones(n))


@INTEGERS
def test_shares_of_rows_and_columns_give_the_same_bits(level):
    for m, n in ((131, 40), (3, 600), (70, 300)):
        args, kwargs = (*rows(m, 300), *weight(n, 300)), extras(m, n, torch.bfloat16)
        results = []
        for count in (1, 2, 3, 7):
            with threads(count):
                results.append(quantized_linear(*args, **kwargs, activation="gelu"))
        assert all(torch.equal(results[0], other) for other in results[1:])
        check_op(quantized_linear, reference.quantized_linear, *args, **kwargs, activation="gelu")


@INTEGERS
def test_views_axes_and_empty(level):
    (x, x_scale), (w, w_scale) = rows(12, 96), weight(48, 96)
    for args in (
        (strided(x), x_scale, strided(w), strided(w_scale)),
        (x.view(2, 6, 96), x_scale.view(2, 6), w, w_scale),
        (x.view(2, 6, 96).transpose(0, 1), x_scale.view(2, 6).transpose(0, 1), w, w_scale),
        (x[0], x_scale[0], w, w_scale),
    ):
        check_op(quantized_linear, reference.quantized_linear, *args)
    assert quantized_linear(x[:0], x_scale[:0], w, w_scale).shape == (0, 48)
    assert quantized_linear(x, x_scale, w[:0], w_scale[:0]).shape == (12, 0)


@INTEGERS
def test_rows_that_are_not_finite(level):
    x, x_scale = rows(20, 64)
    x_scale[3] = float("nan")
    args = (x, x_scale, *weight(130, 64))
    check_op(quantized_linear, reference.quantized_linear, *args)
    values, scale = quantized_linear(*args, requantize=True)
    assert scale[3].isnan().all() and not values[3].any() and scale[:3].isfinite().all()


@INTEGERS
def test_public_op_and_a_deliberately_wrong_one(level):
    args = (*rows(20, 64), *weight(33, 64))
    entry = registry.backend("quantized_linear", "native")
    assert torch.equal(ops.quantized_linear(*args, backend="native"), entry.call(*args))
    packed = native.pack_quantized(args[2])

    def wrong(x, x_scale, w, w_scale):
        return native.quantized_linear_packed(x, x_scale, packed ^ 1, w_scale)

    with pytest.raises(AssertionError, match="exceeds"):
        check_op(wrong, reference.quantized_linear, *args)


@INTEGERS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 64, dtype=torch.uint8)}, "x has dtype torch.uint8, allowed: torch.int8"),
        ({"x": torch.zeros(4, 60, dtype=INT8)}, r"do not fit: \(4, 60\) and \(33, 64\)"),
        ({"packed": torch.zeros(33, 128, dtype=INT8)[:, ::2]}, r"not as pack_quantized_linear returned it: strides"),
        ({"x_scale": torch.ones(5)}, r"x_scale has shape \(5,\), expected \(4,\)"),
        ({"x_scale": torch.ones(4, 3)}, r"x_scale has shape \(4, 3\) for x of shape \(4, 64\); its columns share"),
        ({"weight_scale": torch.ones(32)}, r"weight_scale has shape \(32,\), expected \(33,\)"),
        ({"bias": torch.ones(33)}, "bias has dtype torch.float32, allowed: torch.bfloat16"),
        ({"residual": torch.ones(4, 32).bfloat16()}, r"residual has shape \(4, 32\), expected \(4, 33\)"),
        ({"activation": "relu"}, "activation must be one of gelu, .* got 'relu'"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, .* got torch.float64"),
    ],
)
def test_bad_input(change, message, level):
    (x, x_scale), (w, w_scale) = rows(4, 64), weight(33, 64)
    good = {"x": x, "x_scale": x_scale, "packed": native.pack_quantized(w), "weight_scale": w_scale}
    native.quantized_linear_packed(**good)
    with pytest.raises(ValueError, match=message):
        native.quantized_linear_packed(**{**good, **change})


@INTEGERS
def test_odd_swiglu(level):
    with pytest.raises(ValueError, match="quantized_linear: swiglu needs an even number of weight rows, got 33"):
        native.quantized_linear_packed(*rows(4, 64), native.pack_quantized(weight(33, 64)[0]), torch.ones(33),
                                       activation="swiglu")  # fmt: skip


@BELOW
def test_levels_below_refuse(level):
    with pytest.raises(ValueError, match="quantized_linear: there is no AVX2 here"):
        quantized_linear(*rows(4, 64), *weight(33, 64))


@pytest.mark.parametrize("level", thinned(["default", "avx2"]))
def test_a_cpu_without_avx2_takes_the_next_backend(level):
    """VITFAST_SIMD is read once, by a process of its own."""
    script = (
        "import torch; from vitfast.ops.registry import Spec, candidates\n"
        "able, refused = candidates(Spec('quantized_linear', 'cpu', torch.int8))\n"
        "print('native' in [entry.name for entry in able], refused.get('native'))\n"
    )
    pytest.importorskip("vitfast._C", reason="vitfast._C is not built (a C++ compiler builds it on install)")
    done = python(script, VITFAST_SIMD=level)
    if level == "avx2" and registry.backend("quantized_linear", "native").why_not(SPEC) == []:
        assert done == "True None"
    else:
        assert done == "False ['there is no AVX2 here']"


@pytest.mark.parametrize("level", ["default", "avx2", "avx512f", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 100, 768, 773])
def test_quantize(width, dtype, norm, level):
    call = registry.backend("quantize", "native").call
    affine = [guarded(make(width, dtype=dtype, seed=seed).cpu()) for seed in (1, 2)] if norm else []
    x = guarded(make(37, width, dtype=dtype).cpu())
    check_op(call, reference.quantize, x, *affine, dtype=INT8)
    check_op(call, reference.quantize, strided(x), *map(strided, affine), dtype=INT8)


@pytest.mark.parametrize("level", ["default", "avx2", "avx512f", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 33, 99])
def test_rows_that_are_not_finite_are_zeros_with_a_scale_of_nan(at, dtype, norm, level):
    x = make(6, 100, dtype=dtype).cpu()
    x[1, at], x[2, at], x[3, at] = float("nan"), float("inf"), float("-inf")
    x[4] = 0
    affine = [torch.ones(100, dtype=dtype), torch.zeros(100, dtype=dtype)] if norm else []
    values, scale = registry.backend("quantize", "native").call(x, *affine, dtype=INT8)
    assert scale[1:4].isnan().all() and not values[1:5].any()
    assert scale[[0, 4, 5]].isfinite().all() and (values[[0, 5]].abs().amax(-1) == 127).all()


def test_a_misspelt_level_is_refused():
    pytest.importorskip("vitfast._C", reason="vitfast._C is not built (a C++ compiler builds it on install)")
    script = "from vitfast.ops import registry; print(registry.backend('linear', 'native').missing)"
    message = "a SIMD level must be one of default, avx2, avx512f, avx512_vnni, avx512_bf16, got sse9"
    assert message in python(script, VITFAST_SIMD="sse9")


def test_quantize_rows_that_are_not_finite_or_zero():
    pytest.importorskip("vitfast._C", reason="vitfast._C is not built (a C++ compiler builds it on install)")
    call = registry.backend("quantize", "native").call
    x = make(6, 40).cpu()
    x[1, 7], x[2, 39], x[3], x[4] = float("nan"), float("-inf"), 0.0, 1e-38
    values, scale = call(x, dtype=INT8)
    assert scale[1].isnan() and scale[2].isnan() and not values[1:4].any()
    want = reference.quantize(x, dtype=INT8)
    assert torch.equal(values, want[0])
    torch.testing.assert_close(scale, want[1], equal_nan=True)
    assert call(x[:0], dtype=INT8)[0].shape == (0, 40)
    for change, message in (
        ({"dtype": torch.float8_e4m3fn}, "dtype must be torch.int8 on the CPU, got torch.float8_e4m3fn"),
        ({"norm_weight": torch.ones(40)}, "norm_weight and norm_bias go together"),
        ({"norm_weight": torch.ones(4), "norm_bias": torch.ones(40)}, r"norm_weight has shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call(x, **{"dtype": INT8, **change})
