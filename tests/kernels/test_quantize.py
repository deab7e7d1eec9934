"""quantize: rows in fp8 and int8, with and without LayerNorm, awkward rows and widths, refusals."""

from pathlib import Path

import pytest
import torch
from helpers.mutants import mutant

from vitfast import ops
from vitfast.kernels import quantize as kernels
from vitfast.kernels._parts import eight_bits
from vitfast.ops import reference
from vitfast.testing import AWKWARD_ROWS, DTYPES, check_op, guarded, make, strided

each_kind = pytest.mark.parametrize("kind", list(ops.QUANTIZED), ids=str)


def norm_of(width, dtype):
    """Scale and shift of a LayerNorm."""
    weight, bias = 1 + make(width, dtype=dtype, seed=1, scale=0.2), make(width, dtype=dtype, seed=2, scale=0.2)
    return guarded(weight), guarded(bias)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rows", AWKWARD_ROWS)
def test_rows(rows, norm, dtype, kind):
    affine = norm_of(192, dtype) if norm else (None, None)
    check_op(kernels.quantize, reference.quantize, guarded(make(rows, 192, dtype=dtype)), *affine, dtype=kind)


@each_kind
@pytest.mark.parametrize("width", [1, 3, 67, 384, 768, 1280, 3072, 6144])
def test_widths(width, kind):
    x = guarded(make(7, width, dtype=torch.bfloat16))
    check_op(kernels.quantize, reference.quantize, x, dtype=kind)
    check_op(kernels.quantize, reference.quantize, x, *norm_of(width, torch.bfloat16), 1e-5, dtype=kind)


@each_kind
def test_rows_of_every_size(kind):
    """Each row by its own scale, whatever the others': tiny, huge and all zero."""
    size = 10.0 ** torch.arange(-35, 36, 7, device=make(1).device)[:, None]
    x = guarded(make(len(size), 64) * size)
    x[4] = 0
    values, scale = kernels.quantize(x, dtype=kind)
    check_op(kernels.quantize, reference.quantize, x[1:], dtype=kind)
    assert not values[4].float().any() and scale.isfinite().all()
    assert (values[5:].float().abs().amax(1) == ops.QUANTIZED[kind]).all()


@each_kind
def test_rounds_to_nearest_even(kind):
    """Halves, in a row whose scale is exactly 1."""
    x = torch.tensor([[ops.QUANTIZED[kind], 0.5, 1.5, 2.5, -0.5, -1.5, 17.0, 19.0]], device=make(1).device)
    values, scale = kernels.quantize(x, dtype=kind)
    assert scale.item() == 1
    assert torch.equal(values.float(), x.to(kind).float() if kind.is_floating_point else x.round())


@each_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("implementation", [kernels.quantize, reference.quantize], ids=["triton", "torch"])
def test_nonfinite_rows(implementation, bad, kind):
    x = make(5, 40)
    x[2, 7] = bad
    _, scale = implementation(x, dtype=kind)
    assert scale.isnan().tolist() == [False, False, True, False, False]


@each_kind
def test_strided_and_leading_axes(kind):
    x = make(30, 40, dtype=torch.bfloat16)
    check_op(kernels.quantize, reference.quantize, strided(x), dtype=kind)
    values, scale = kernels.quantize(strided(x).view(2, 3, 5, 40), dtype=kind)
    assert values.shape == (2, 3, 5, 40) and scale.shape == (2, 3, 5)
    assert torch.equal(scale.view(-1), kernels.quantize(x, dtype=kind)[1])
    assert kernels.quantize(x[:0], dtype=kind)[1].shape == (0,)


@each_kind
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("squares / columns + eps", "squares / columns"),
        ("squares / columns + eps", "squares / (columns - 1) + eps"),
        ("tl.max(tl.abs(value), axis=1)", "tl.max(value, axis=1)"),
        ("LARGEST / amax", "0.5 * LARGEST / amax"),
    ],
)
def test_wrong_kernels_are_noticed(right, wrong, kind, tmp_path, monkeypatch):
    x, affine = make(16, 40, scale=0.02), norm_of(40, torch.float32)
    x[:, 0] -= 0.1  # the largest magnitude of many rows is negative
    check_op(kernels.quantize, reference.quantize, x, *affine, 1e-3, dtype=kind)
    if right in Path(kernels.__file__).read_text():
        monkeypatch.setattr(kernels, "quantize", mutant(kernels, right, wrong, tmp_path).quantize)
    else:
        monkeypatch.setattr(kernels, "in_8_bits", mutant(eight_bits, right, wrong, tmp_path).in_8_bits)
    with pytest.raises(AssertionError):
        check_op(kernels.quantize, reference.quantize, x, *affine, 1e-3, dtype=kind)


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (((4, 40),), torch.float8_e5m2, "got torch.float8_e5m2"),
        (((4, 40), (40,)), torch.int8, "go together"),
        (((4, 40), (39,), (40,)), torch.int8, r"norm_weight has shape \(39,\)"),
        (((4, 0),), torch.int8, "non-empty last axis"),
    ],
)
def test_bad_input(args, kind, message):
    with pytest.raises(ValueError, match=message):
        ops.quantize(*(make(*shape) for shape in args), dtype=kind)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        ops.quantize(make(4, 40).int(), dtype=torch.int8)


def test_too_wide():
    with pytest.raises(ops.BackendError, match="8193"):
        ops.quantize(make(1, 8193), dtype=torch.int8, backend="triton")
