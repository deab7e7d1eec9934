"""LayerNorm, with and without a residual, and the row statistics, against the float64 reference."""

import pytest
import torch
from helpers.mutants import mutant

from vitfast import ops, testing
from vitfast.kernels import layer_norm as kernel
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import AWKWARD_ROWS, DTYPES, WIDTHS, check_op, guarded, make, strided

FP32, FP16, BF16 = DTYPES
AWKWARD_WIDTHS = {
    1: "a single column, no variance",
    7: "less than a word of 16 bytes",
    100: "less than a tile of statistics",
    129: "one more than a tile of statistics",
    1000: "not a multiple of 16",
}
OPS = ("layer_norm", "add_layer_norm", "row_stats")
LARGE_MEAN = {FP32: 1e3, FP16: 50.0, BF16: 50.0}


def affine(width, dtype):
    """Weight around 1 and bias, in memory surrounded by poison."""
    return guarded(make(width, dtype=dtype, seed=2) * 0.5 + 1), guarded(make(width, dtype=dtype, seed=3))


def residual_like(x):
    return guarded(make(*x.shape, dtype=x.dtype, seed=1))


def check(op, x, *, eps=1e-6, residual=None, module=kernel):
    """Compare one op on x, with weight, bias and residual made to fit it."""
    args = [x]
    if op == "add_layer_norm":
        args.append(residual_like(x) if residual is None else residual)
    if op != "row_stats":
        args += [*affine(x.shape[-1], x.dtype), eps]
    check_op(getattr(module, op), getattr(reference, op), *args, what=op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, *AWKWARD_WIDTHS])
@pytest.mark.parametrize("op", OPS)
def test_widths(op, width, dtype):
    check(op, guarded(make(5, width, dtype=dtype)))


@pytest.mark.parametrize("width", [3000, 5000, kernel.MAX_COLUMNS])
def test_widths_beyond_the_models(width):
    for op in OPS:
        check(op, guarded(make(2, width, dtype=BF16)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", AWKWARD_ROWS)
@pytest.mark.parametrize("op", OPS)
def test_rows(op, rows, dtype):
    check(op, guarded(make(rows, 192, dtype=dtype)))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", AWKWARD_ROWS)
@pytest.mark.parametrize("width", [*WIDTHS, *AWKWARD_WIDTHS])
@pytest.mark.parametrize("op", OPS)
def test_rows_and_widths(op, width, rows, dtype):
    check(op, guarded(make(rows, width, dtype=dtype)))


@pytest.mark.parametrize("op", OPS)
def test_leading_axes(op):
    check(op, guarded(make(100)))
    check(op, guarded(make(2, 3, 5, 100)))
    check(op, guarded(make(1, 197, 192, dtype=BF16)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [8, 3])
@pytest.mark.parametrize("op", OPS)
def test_strided(op, gap, dtype):
    check(op, strided(make(7, 192, dtype=dtype), gap))
    check(op, strided(make(3, 5, 100, dtype=dtype), gap))
    check(op, guarded(make(3, 9, 192, dtype=dtype))[:, 0])  # the CLS tokens
    check(op, guarded(make(14, 192, dtype=dtype))[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_of_another_stride(dtype):
    x, residual = make(2, 7, 200, dtype=dtype), make(2, 7, 200, dtype=dtype, seed=5)
    check("add_layer_norm", strided(x, 24), residual=strided(residual, 8))
    check("add_layer_norm", guarded(x), residual=strided(residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [100, 129, 768, 1664])
@pytest.mark.parametrize("op", OPS)
def test_large_mean(op, width, dtype):
    check(op, guarded(make(7, width, dtype=dtype) + LARGE_MEAN[dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 100, 768, 1000])
@pytest.mark.parametrize("op", ["layer_norm", "row_stats"])
def test_constant_rows(op, width, dtype):
    """No variance at all: eps alone keeps the deviations, which are 0 but for rounding, finite and small."""
    values = torch.tensor([0.0, 1.1, -LARGE_MEAN[dtype], LARGE_MEAN[dtype] / 3])
    x = guarded(values[:, None].expand(4, width).to(testing.device(), dtype))
    check(op, x)
    weight, bias = affine(width, dtype)
    torch.testing.assert_close(kernel.layer_norm(x, weight, bias), bias.expand(4, width), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 0.5])
def test_eps(eps, dtype):
    x = guarded(make(7, 192, dtype=dtype, scale=1e-3))
    check("layer_norm", x, eps=eps)
    check("add_layer_norm", x, eps=eps, residual=guarded(make(7, 192, dtype=dtype, scale=1e-3, seed=4)))


@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_nan_and_inf_stay_in_their_rows(op):
    x = make(9, 100)
    x[2, 17], x[5, 99], x[8, 0] = float("nan"), float("inf"), -float("inf")
    check(op, guarded(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [100, 768])
def test_a_row_does_not_depend_on_the_others(width, dtype):
    x, (weight, bias) = make(131, width, dtype=dtype), affine(width, dtype)
    y, stats = kernel.layer_norm(x, weight, bias), kernel.row_stats(x)
    for row in (0, 77, 130):
        alone = guarded(x[row : row + 1])
        assert torch.equal(kernel.layer_norm(alone, weight, bias), y[row : row + 1])
        assert torch.equal(kernel.row_stats(alone), stats[row : row + 1])


@pytest.mark.parametrize("width", [100, 129, 192, 768])
def test_stats_combine_to_mean_and_rstd(width):
    x = guarded(make(7, width) * 3 + 20)
    mean, rstd = reference.combine_stats(kernel.row_stats(x), width, 1e-6)
    for got, want, base in (
        (mean, x.double().mean(-1), x.mean(-1)),
        (rstd, (x.double().var(-1, correction=0) + 1e-6).rsqrt(), (x.var(-1, correction=0) + 1e-6).rsqrt()),
    ):
        assert_close(got, want, base)


def test_results_are_contiguous():
    x = strided(make(2, 5, 100))
    weight, bias = affine(100, FP32)
    results = [kernel.layer_norm(x, weight, bias), *kernel.add_layer_norm(x, x, weight, bias), kernel.row_stats(x)]
    assert all(result.is_contiguous() for result in results)
    assert [result.shape for result in results] == [x.shape] * 3 + [(10, 1, 2)]


def test_no_rows():
    x, (weight, bias) = make(0, 5, 200), affine(200, FP32)
    assert kernel.layer_norm(x, weight, bias).shape == (0, 5, 200)
    assert [part.shape for part in kernel.add_layer_norm(x, x, weight, bias)] == [(0, 5, 200)] * 2
    assert kernel.row_stats(x).shape == (0, 2, 2)


def test_through_the_public_functions():
    x, residual, (weight, bias) = make(7, 100), make(7, 100, seed=1), affine(100, FP32)
    for op, args in (
        ("layer_norm", (x, weight, bias)),
        ("add_layer_norm", (x, residual, weight, bias)),
        ("row_stats", (x,)),
    ):
        got = getattr(ops, op)(*args, backend="triton")
        torch.testing.assert_close(got, getattr(kernel, op)(*args), rtol=0, atol=0)
    with pytest.raises(ops.BackendError, match=r"width 8193 is outside 1\.\.8192"):
        ops.row_stats(make(1, kernel.MAX_COLUMNS + 1), backend="triton")


MUTANTS = {
    "eps dropped": ("squares / columns + eps", "squares / columns + 0 * eps"),
    "unbiased variance": ("squares / columns", "squares / (columns - 1)"),
    "masked columns counted": ("tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]"),
    "weight left out": ("* gain + shift", "+ shift"),
    "residual not added": ("value += added.to(tl.float32)", "value += 0 * added.to(tl.float32)"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_caught(name, dtype, tmp_path):
    op = "add_layer_norm" if name == "residual not added" else "layer_norm"
    # Few columns, and a variance near eps: neither mistake is small there.
    x = make(9, 7, dtype=dtype, scale=1e-3)
    check(op, x)
    wrong = mutant(kernel, *MUTANTS[name], tmp_path)
    with pytest.raises(AssertionError, match="error"):
        check(op, x, module=wrong)


def test_an_uncorrected_mean_is_caught(tmp_path):
    """In fp32 only: in half types the rounding of the mean is far below that of the inputs."""
    x = torch.full((7, 1000), LARGE_MEAN[FP32] / 3, device=testing.device())
    wrong = mutant(kernel, "- correction[:, None]", "", tmp_path)
    with pytest.raises(AssertionError, match="error"):
        check("layer_norm", x, module=wrong)


def rejected(message, call):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        call()
    assert message in str(caught.value)


X = (4, 100)
REJECTED = {
    "x has dtype torch.float64": lambda x, w, b: (x.double(), w, b),
    "x has dtype torch.int32": lambda x, w, b: (x.int(), w, b),
    "weight has dtype torch.float16, allowed: torch.float32": lambda x, w, b: (x, w.half(), b),
    "weight has shape (99,), expected (100,)": lambda x, w, b: (x, w[1:], b),
    "bias has shape (1, 100), expected (100,)": lambda x, w, b: (x, w, b[None]),
    "x must have a non-empty last axis, got shape (4, 0)": lambda x, w, b: (x[:, :0], w, b),
    "x must have a non-empty last axis, got shape ()": lambda x, w, b: (x[0, 0], w, b),
}
REJECTED_BY_THE_KERNEL = {
    "the last axis of x has stride 4, expected 1": lambda x, w, b: (x.T.contiguous().T, w, b),
    "the last axis of bias has stride 2": lambda x, w, b: (x, w, b.repeat(2)[::2]),
    "with shape (2, 3, 100) and strides (400, 100, 1) cannot be viewed": lambda x, w, b: (
        x.repeat(2, 1).view(2, 4, 100)[:, 1:], w, b),
    "is on meta": lambda x, w, b: (x.to("meta"), w, b),
}  # fmt: skip


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    x, weight, bias = REJECTED[message](make(*X), *affine(X[-1], FP32))
    rejected(message, lambda: ops.layer_norm(x, weight, bias))
    if "weight" not in message and "bias" not in message:
        rejected(message, lambda: ops.row_stats(x))


@pytest.mark.parametrize("message", REJECTED_BY_THE_KERNEL)
def test_rejects_strides_and_devices(message):
    x, weight, bias = REJECTED_BY_THE_KERNEL[message](make(*X), *affine(X[-1], FP32))
    rejected(message, lambda: kernel.layer_norm(x, weight, bias))
    if "bias" not in message:
        rejected(message, lambda: kernel.row_stats(x))


def test_rejects_rows_that_are_too_wide():
    x, affine_of = make(1, 8200), affine(8200, FP32)
    for call in (lambda: kernel.layer_norm(x, *affine_of), lambda: kernel.row_stats(x)):
        rejected("the last axis has 8200 elements, allowed are 1 to 8192", call)


def test_rejects_a_residual_that_does_not_fit():
    x, (weight, bias) = make(*X), affine(X[-1], FP32)
    for residual, message in (
        (x[:3], "residual has shape (3, 100), expected (4, 100)"),
        (x.half(), "residual has dtype torch.float16, allowed: torch.float32"),
    ):
        rejected(message, lambda residual=residual: ops.add_layer_norm(x, residual, weight, bias))
    message = "the last axis of residual has stride 4, expected 1"
    rejected(message, lambda: kernel.add_layer_norm(x, x.T.contiguous().T, weight, bias))
