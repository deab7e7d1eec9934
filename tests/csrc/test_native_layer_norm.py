"""The C++ extension's layer_norm and add_layer_norm on the CPU, against the oracle."""

import importlib.util

import pytest
import torch
from helpers.global_state import threads

from vitfast import ops, testing
from vitfast.ops import checks, reference, registry
from vitfast.ops.accuracy import assert_close
from vitfast.testing import AWKWARD_ROWS, WIDTHS, check_op, guarded, strided

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vitfast._C") is None,
    reason="vitfast._C is not built (a C++ compiler builds it on install)",
)

DTYPES = (torch.float32, torch.bfloat16)
OPS = ("layer_norm", "add_layer_norm")
AWKWARD_WIDTHS = (1, 7, 63, 64, 65, 100, 129, 1000)
LARGE_MEAN = {torch.float32: 1e3, torch.bfloat16: 50.0}


def make(*shape, **kwargs):
    return testing.make(*shape, **kwargs).cpu()


def affine(width, dtype):
    return guarded(make(width, dtype=dtype, seed=2) * 0.5 + 1), guarded(make(width, dtype=dtype, seed=3))


def native(op):
    return registry.backend(op, "native").call


def arguments(op, x, residual=None, eps=1e-6):
    """x, weight, bias and eps; for add_layer_norm the residual too."""
    if op == "layer_norm":
        return [x, *affine(x.shape[-1], x.dtype), eps]
    if residual is None:
        residual = guarded(make(*x.shape, dtype=x.dtype, seed=1))
    return [x, residual, *affine(x.shape[-1], x.dtype), eps]


def check(op, x, **kwargs):
    check_op(native(op), getattr(reference, op), *arguments(op, x, **kwargs), what=op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, *AWKWARD_WIDTHS])
@pytest.mark.parametrize("op", OPS)
def test_widths(op, width, dtype):
    check(op, guarded(make(5, width, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", AWKWARD_ROWS)
@pytest.mark.parametrize("op", OPS)
def test_rows_and_leading_axes(op, rows, dtype):
    check(op, guarded(make(rows, 192, dtype=dtype)))
    check(op, guarded(make(2, rows, 3, 40, dtype=dtype)))
    check(op, guarded(make(100, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [8, 3])
@pytest.mark.parametrize("op", OPS)
def test_strided(op, gap, dtype):
    check(op, strided(make(3, 5, 100, dtype=dtype), gap))
    check(op, guarded(make(3, 9, 192, dtype=dtype))[:, 0])  # the CLS tokens
    x = guarded(make(7, 64, dtype=dtype))
    check("add_layer_norm", x, residual=strided(make(7, 64, dtype=dtype, seed=4), gap))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_large_mean_and_eps(op, dtype):
    for width in (100, 768):
        check(op, guarded(make(7, width, dtype=dtype) + LARGE_MEAN[dtype]))
    for eps in (0.0, 1e-5, 0.5):
        small = [guarded(make(7, 192, dtype=dtype, scale=1e-3, seed=seed)) for seed in (4, 5)]
        check(op, small[0], residual=small[1] if op == "add_layer_norm" else None, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 100, 768, 1000])
def test_constant_rows(width, dtype):
    """No variance at all: eps alone keeps the deviations, which are 0 but for rounding, finite and small."""
    values = torch.tensor([0.0, 1.1, -LARGE_MEAN[dtype], LARGE_MEAN[dtype] / 3])
    x = guarded(values[:, None].expand(4, width).to(dtype))
    check("layer_norm", x)
    weight, bias = affine(width, dtype)
    torch.testing.assert_close(native("layer_norm")(x, weight, bias), bias.expand(4, width), rtol=0, atol=1e-5)


def test_infinity_and_nan_stay_in_their_row():
    x = make(4, 100)
    x[1, 3], x[2, 99] = float("inf"), float("nan")
    check("layer_norm", x)


@pytest.mark.parametrize("op", OPS)
def test_empty_threads_and_strided_parameters(op):
    out = native(op)(*arguments(op, make(0, 5, 40)))
    assert (out if op == "layer_norm" else out[0]).shape == (0, 5, 40)
    x, *others = arguments(op, make(131, 40))
    with threads(3):
        three = native(op)(x, *others)
    with threads(1):
        assert all(torch.equal(a, b) for a, b in zip(three, native(op)(x, *others), strict=True))
    *tensors, weight, bias, eps = x, *others
    spread = [t.repeat_interleave(2)[::2] for t in (weight, bias)]
    check_op(native(op), getattr(reference, op), *tensors, *spread, eps)


def test_public_ops_reach_it_and_it_is_not_the_default():
    x, weight, bias, eps = arguments("layer_norm", make(3, 40))
    want = native("layer_norm")(x, weight, bias, eps)
    assert torch.equal(ops.layer_norm(x, weight, bias, eps, backend="native"), want)
    y, total = ops.add_layer_norm(x, x, weight, bias, eps, backend="native")
    assert torch.equal(total, x + x)
    assert torch.equal(y, native("layer_norm")(x + x, weight, bias, eps))
    able, _ = registry.candidates(registry.Spec.of("layer_norm", x, width=40))
    assert able[0].name == "torch"
    with pytest.raises(registry.BackendError, match="dtype float16 is not among float32, bfloat16"):
        ops.layer_norm(x.half(), weight.half(), bias.half(), backend="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": make(3, 40).double()}, "x has dtype torch.float64"),
        ({"x": make(3, 0)}, r"x must have a non-empty last axis, got shape \(3, 0\)"),
        ({"weight": make(39)}, r"weight has shape \(39,\), expected \(40,\)"),
        ({"bias": make(40).bfloat16()}, "bias has dtype torch.bfloat16"),
        ({"residual": make(40)}, r"residual has shape \(40,\), expected \(3, 40\)"),
        ({"residual": make(3, 40).double()}, "residual has dtype torch.float64"),
    ],
)
def test_bad_input_is_refused_in_the_same_words(change, message):
    keywords = {"x": make(3, 40), "residual": make(3, 40), "weight": make(40), "bias": make(40)} | change
    with pytest.raises(ValueError, match="add_layer_norm: " + message) as ours:
        native("add_layer_norm")(**keywords)
    with pytest.raises(ValueError, match="add_layer_norm: ") as theirs:
        checks.check_norm("add_layer_norm", **{**keywords})
    assert str(ours.value).partition(", allowed")[0] == str(theirs.value).partition(", allowed")[0]


def test_layouts_that_would_need_a_copy_are_refused():
    weight, bias = affine(40, torch.float32)
    with pytest.raises(ValueError, match=r"layer_norm: the last axis of x has stride 2, expected 1"):
        native("layer_norm")(make(3, 80)[:, ::2], weight, bias)
    with pytest.raises(
        ValueError, match=r"x with shape \(2, 3, 40\) and strides \(40, 80, 1\) cannot be viewed as rows"
    ):
        native("layer_norm")(make(3, 2, 40).transpose(0, 1), weight, bias)


@pytest.mark.parametrize("wrong", ["eps dropped", "unbiased variance"])
def test_wrong_results_are_caught(wrong):
    x, weight, bias, eps = arguments("layer_norm", make(7, 192, scale=1e-2), eps=1e-5)
    if wrong == "eps dropped":
        broken = native("layer_norm")(x, weight, bias, 0.0)
    else:
        broken = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + eps).sqrt() * weight + bias
    oracle = reference.layer_norm(x, weight, bias, eps, upcast=True)
    with pytest.raises(AssertionError, match="error"):
        assert_close(broken, oracle, reference.layer_norm(x, weight, bias, eps))
