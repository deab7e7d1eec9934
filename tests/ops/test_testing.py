"""The test support itself: a check that cannot fail, or a poison that does not bite, protects nothing."""

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import vitfast
from vitfast import testing
from vitfast.ops import accuracy, reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import make

ROOT = Path(vitfast.__file__).parents[1]
EPS = 1e-6


def layer_norm(x, *, eps=EPS, unbiased=False, upcast=False):
    """A LayerNorm without affine part, written out here so that it can be made wrong."""
    wide = x.double() if upcast else x.float()
    y = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, correction=int(unbiased)) + eps).sqrt()
    return y if upcast else y.to(x.dtype)


def check(actual, x):
    assert_close(actual, layer_norm(x, upcast=True), layer_norm(x), what="layer_norm")


@pytest.fixture(params=testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def x(request):
    return make(7, 24, dtype=request.param)


def test_assert_close_passes_a_correct_result(x):
    check(layer_norm(x), x)


def test_assert_close_passes_another_order_of_summation():
    x = make(7, 768)
    flipped = layer_norm(x.flip(-1)).flip(-1)
    check(flipped, x)


def test_assert_close_fails_when_eps_is_dropped():
    x = make(7, 768, scale=1e-2)  # a variance of 1e-4: eps is worth half a per cent
    check(layer_norm(x), x)
    with pytest.raises(AssertionError, match="max error"):
        check(layer_norm(x, eps=0), x)


def test_assert_close_fails_when_the_variance_is_unbiased(x):
    with pytest.raises(AssertionError, match="relative RMS error"):
        check(layer_norm(x, unbiased=True), x)


def test_assert_close_sees_an_unbiased_variance_at_full_width():
    x = make(7, 768)  # 1 part in 1536
    with pytest.raises(AssertionError, match="max error"):
        check(layer_norm(x, unbiased=True), x)


def test_assert_close_fails_for_one_wrong_element(x):
    """By the rule: twice torch's error and two ulps of the largest value are allowed, no more."""
    oracle, baseline = layer_norm(x, upcast=True), layer_norm(x)
    slack = 2 * (baseline.double() - oracle).abs().max() + 2 * accuracy.TOLERANCES[x.dtype].ulp * oracle.abs().max()
    for factor, right in ((0.4, True), (2.0, False)):
        actual = oracle.to(x.dtype)
        actual[3, 5] += factor * slack
        if right:
            check(actual, x)
        else:
            with pytest.raises(AssertionError, match="max error"):
                check(actual, x)


def test_assert_close_fails_for_many_small_errors(x):
    """Each within the bound on one element, together beyond the bound on the RMS."""
    oracle = torch.full((64, 64), 1.0, dtype=torch.float64, device=x.device)
    oracle[0, 0] = 64.0
    error = 1 + 4 * accuracy.TOLERANCES[x.dtype].rms
    actual = (oracle * error).to(x.dtype)
    actual[0, 0] = 64.0
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(actual, oracle, oracle.to(x.dtype))


def test_bounds_for_e4m3_products_still_see_a_lost_column():
    """One of 3072, the largest K of ViT-B/16."""
    x, weight = (make(rows, 3072, seed=rows).to(torch.float8_e4m3fn) for rows in (64, 128))
    ones = [torch.ones(rows, device=x.device) for rows in (64, 128)]

    def product(columns, **options):
        given = (x[:, :columns], ones[0], weight[:, :columns], ones[1])
        return reference.quantized_linear(*given, dtype=torch.float32, **options)

    oracle, baseline = product(3072, upcast=True), product(3072)
    assert_close(baseline, oracle, baseline, tolerances=accuracy.E4M3_PRODUCTS)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(product(3071), oracle, baseline, tolerances=accuracy.E4M3_PRODUCTS)


def test_bounds_for_e4m3_are_for_gpus():
    """Triton's interpreter, and torch on a CPU, add such products in fp32."""
    for dtype in testing.DTYPES:
        assert accuracy.tolerances_for((make(2, dtype=dtype), None, 0)) is accuracy.TOLERANCES
    on_gpu = {"gelu": accuracy.E4M3_PRODUCTS, "swiglu": accuracy.GATED_E4M3_PRODUCTS}
    for activation, bounds in on_gpu.items():
        tolerances = accuracy.tolerances_for((make(2), make(2).to(torch.float8_e4m3fn)), activation)
        assert tolerances is (bounds if testing.device().type == "cuda" else accuracy.TOLERANCES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assert_close_wants_nan_and_inf_in_the_same_places(x, value):
    kind = "nan" if value != value else "inf"
    oracle, baseline = layer_norm(x, upcast=True), layer_norm(x)
    actual = baseline.clone()
    actual[0, 0] = value
    with pytest.raises(AssertionError, match=f"{kind} in other places"):
        assert_close(actual, oracle, baseline)
    oracle[0, 0] = baseline[0, 0] = value
    assert_close(actual, oracle, baseline)
    actual[0, 0], actual[0, 1] = 0, value
    with pytest.raises(AssertionError, match=f"{kind} in other places"):
        assert_close(actual, oracle, baseline)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_baseline_that_is_not_finite_excuses_nothing(x, value):
    oracle, baseline = layer_norm(x, upcast=True), layer_norm(x)
    baseline[0, 0] = value
    assert_close(layer_norm(x), oracle, baseline)
    with pytest.raises(AssertionError, match="max error"):
        assert_close(layer_norm(x) + 1, oracle, baseline)


def test_assert_close_wants_dtype_and_shape():
    x = make(7, 24, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"dtype torch\.float32, expected torch\.bfloat16"):
        check(layer_norm(x.float()), x)
    with pytest.raises(AssertionError, match=r"shape \(24, 7\), expected \(7, 24\)"):
        check(layer_norm(x).T, x)


def test_assert_close_compares_sequences_pairwise():
    x = make(7, 24)
    oracle, right, wrong = layer_norm(x, upcast=True), layer_norm(x), layer_norm(x) + 1
    assert_close((right, right), (oracle, oracle), (right, right))
    with pytest.raises(AssertionError, match=r"pair\[1\]"):
        assert_close((right, wrong), (oracle, oracle), (right, right), what="pair")
    with pytest.raises(AssertionError):
        assert_close((right,), (oracle, oracle), (right, right))


def test_check_op_runs_the_op_and_both_references():
    x = make(7, 24)
    testing.check_op(layer_norm, layer_norm, x)
    with pytest.raises(AssertionError, match="wrong op"):
        testing.check_op(lambda x: layer_norm(x) * 1.01, layer_norm, x, what="wrong op")


def allocate_in(module):
    """What torch's allocators give to code of the named module."""
    code = """
        def allocate(like):
            return torch.empty(64), torch.empty_like(like), like.new_empty(8, 8), torch.empty(64, dtype=torch.int32)
    """
    scope = {"__name__": module, "torch": torch}
    exec(textwrap.dedent(code), scope)
    return scope["allocate"](torch.zeros(64))


def test_poison_fills_allocations_of_vitfast():
    with testing.poisoned_allocations():
        *floats, integers = allocate_in("vitfast.models.vit")
    assert all(tensor.isnan().all() for tensor in floats)
    assert (integers == torch.iinfo(torch.int32).max).all()


@pytest.mark.parametrize("nested", [False, True])
def test_poison_leaves_allocations_of_others_alone(monkeypatch, nested):
    """Looked at by what is filled: fresh memory may hold anything, NaN too."""
    filled = []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: filled.append(value))
    with testing.poisoned_allocations() if nested else contextlib.nullcontext():  # conftest.py has one already
        torch.empty(4)
        allocate_in("elsewhere")
        assert filled == []
        allocate_in("vitfast.models.vit")
        assert len(filled) == 4


def test_poison_ends_with_its_block():
    code = """
        import torch
        from vitfast import testing
        originals = torch.empty, torch.empty_like, torch.Tensor.new_empty
        with testing.poisoned_allocations():
            assert torch.empty is not originals[0]
        assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == originals
    """
    run_python(code)


@triton.jit
def _sum_kernel(
    y,  # [1]
    x,  # [SIZE]
    size,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + offsets, mask=offsets < size, other=0.0).to(tl.float32)))


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_guarded_shows_an_out_of_bounds_read(dtype):
    x = testing.guarded(make(100, dtype=dtype))
    y = x.new_zeros(1)
    _sum_kernel[(1,)](y, x, 100, BLOCK=128)
    assert y.isfinite().all()
    _sum_kernel[(1,)](y, x, 101, BLOCK=128)
    assert y.isnan().all()
    _sum_kernel[(1,)](y, x[1:], 100, BLOCK=128)
    assert y.isnan().all()


def test_guarded_keeps_values_shape_and_alignment():
    x = make(3, 5, 7, dtype=torch.float16)
    copy = testing.guarded(x.transpose(0, 1))
    assert torch.equal(copy, x.transpose(0, 1))
    assert copy.is_contiguous()
    assert copy.data_ptr() % 16 == 0


def test_strided_keeps_values_and_poisons_the_gaps_and_ends():
    x = make(3, 5)
    view = testing.strided(x, gap=8)
    assert torch.equal(view, x)
    assert view.stride() == (13, 1)
    whole = view.as_strided((5, 13), (13, 1), view.storage_offset() - 13)  # a row before and a row after
    assert whole[:, 5:].isnan().all()
    assert whole[[0, -1]].isnan().all()


def test_make_is_reproducible_and_scaled():
    assert torch.equal(make(4, 1000, seed=3), make(4, 1000, seed=3))
    assert not torch.equal(make(4, 1000, seed=3), make(4, 1000, seed=4))
    assert make(4, 10_000, scale=0.1).std().item() == pytest.approx(0.1, rel=0.05)
    assert make(2, dtype=torch.bfloat16).dtype == torch.bfloat16


DOT = """
    import torch, triton, triton.language as tl
    from vitfast import testing

    @triton.jit
    def product(y, a, b, SIZE: tl.constexpr):
        rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
        total = tl.dot(tl.load(a + rows * SIZE + columns), tl.load(b + rows * SIZE + columns))
        tl.store(y + rows * SIZE + columns, total)

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))

    def error():
        y = torch.full((32, 32), float("nan"))
        product[(1,)](y, a, b, SIZE=32)
        return ((y - a.float() @ b.float()).norm() / y.norm()).nan_to_num(1.0).item()
"""


def run_python(code: str, **environment: str) -> str:
    """Run code (a file, as Triton reads its source) in a fresh process; gives its stdout."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | environment
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def bf16_errors(tmp_path_factory):
    """Relative errors of tl.dot on bf16 in the interpreter: as it is, repaired, and repaired twice."""
    script = tmp_path_factory.mktemp("dot") / "dot.py"
    script.write_text(
        textwrap.dedent(DOT)
        + "errors = [error()]\n"
        + "for _ in range(2):\n    testing.repair_interpreter()\n    errors.append(error())\n"
        + "print(*errors)\n"
    )
    code = f"import runpy; runpy.run_path({str(script)!r})"
    return [float(word) for word in run_python(code, TRITON_INTERPRET="1").split()]


def test_bf16_dot_in_the_interpreter_still_needs_the_repair(bf16_errors):
    assert bf16_errors[0] > 0.5, (
        f"Triton {triton.__version__} multiplies bf16 rightly in its interpreter (error {bf16_errors[0]:.1e}). "
        "Once the oldest supported Triton does so too, delete vitfast.testing.repair_interpreter, its call in "
        "conftest.py and the tests of it here."
    )


def test_bf16_dot_in_the_interpreter_is_right_when_repaired(bf16_errors):
    assert max(bf16_errors[1:]) < 1e-6


CAST = """
import torch, triton, triton.language as tl
from vitfast import testing

@triton.jit
def narrow(out, x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))

def wrong(dtype, extremes):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[:4] = torch.tensor(extremes)
    out = torch.empty(1024, dtype=dtype)
    narrow[(1,)](out, x, 1024)
    return int((out.float() != x.to(dtype).float()).sum())

cases = (torch.bfloat16, [float("inf"), -float("inf"), 3.4e38, 1e-40]), (torch.float8_e4m3fn, [448, -448, 2**-9, 1e-5])
before = [wrong(*case) for case in cases]
testing.repair_interpreter()
print(*before, *[wrong(*case) for case in cases])
"""


def test_rounding_in_the_interpreter_needs_the_repair(tmp_path):
    """Casts to bf16 and fp8 are cut off instead of rounded; repaired, they are torch's own."""
    script = tmp_path / "cast.py"
    script.write_text(CAST)
    counts = run_python(f"import runpy; runpy.run_path({str(script)!r})", TRITON_INTERPRET="1").split()
    bf16, fp8, *after = map(int, counts)
    assert bf16 > 0, f"Triton {triton.__version__} rounds to bf16 rightly: cast_impl's repair can go"
    assert fp8 > 0, f"Triton {triton.__version__} rounds to fp8 rightly: create_fp_to_fp's repair can go"
    assert after == [0, 0]


@triton.jit
def _sum_of_offsets(y, step, N: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    tl.store(y + rows + tl.arange(0, N)[None, :] * N, rows * step + tl.arange(0, N)[None, :])


@pytest.mark.skipif(testing.device().type != "cpu", reason="a GPU wraps around without a word")
def test_the_interpreter_refuses_an_integer_that_overflows():
    """An index computed in 32 bits is a wrong one on tensors that no test has the memory for."""
    y = torch.full((64,), -1)
    _sum_of_offsets[(1,)](y, 10, N=8)
    rows = torch.arange(8)
    assert torch.equal(y.view(8, 8), (rows * 10 + rows[:, None]))
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflows in mul: 0 to 7000000000"):
        _sum_of_offsets[(1,)](y, 10**9, N=8)
