"""quantized_linear for sm_90a without a GPU: the linear kernel's body on e4m3 operands, under emulation."""

import pytest
import torch
from helpers.emulated import ROOT, needs_compiler
from helpers.emulated_linear import BF16, E4M3, FP16, compiled, compiled_with_fault, launch
from helpers.quantized import in_groups, make, whole_numbers

from vitfast.ops import accuracy, reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded, strided

pytestmark = [needs_compiler, pytest.mark.full]

CASES = [("e4m3", "bf16", 128), ("e4m3", "fp16", 256)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("quantized_linear"), CASES)


def run(kernels, x, x_scale, weight, weight_scale, bias=None, *, columns=256, blocks=2, seed=0, **epilogue):
    """As reference.quantized_linear; tiles of 256 columns are compiled with fp16 around them, of 128 with bf16."""
    dtype = dtype_of(columns)
    scales = {"x_scale": x_scale, "weight_scale": weight_scale}
    return launch(kernels, x, weight, dtype, bias=bias, columns=columns, blocks=blocks, seed=seed, **scales, **epilogue)


def dtype_of(columns):
    return {128: BF16, 256: FP16}[columns]


def check(kernels, *args, columns=256, blocks=2, seed=0, **epilogue):
    got = run(kernels, *args, columns=columns, blocks=blocks, seed=seed, **epilogue)
    given = epilogue | {"dtype": dtype_of(columns)}
    oracle = reference.quantized_linear(*args, **given, upcast=True)
    assert_close(got, oracle, reference.quantized_linear(*args, **given))


def operands(m, n, k, *, grouped=False):
    """x, weight and their scales; groups are of sizes far apart."""
    sizes = 4.0 ** (torch.arange(k) // 128 % 3) if grouped else 1.0
    x = in_groups(make(m, k) * sizes) if grouped else reference.quantize(make(m, k), dtype=E4M3)
    weight = reference.quantize(make(n, k, seed=1, scale=k**-0.5), dtype=E4M3)
    return tuple(guarded(tensor) for tensor in (*x, *weight))


def epilogue_of(names, m, n, columns):
    dtype = dtype_of(columns)
    made = {
        "bias": lambda: {"bias": guarded(make(n, dtype=dtype, seed=2))},
        "layer_scale": lambda: {"layer_scale": guarded(make(n, dtype=dtype, seed=3))},
        "residual": lambda: {"residual": guarded(make(m, n, dtype=dtype, seed=4))},
        "requantize": lambda: {"requantize": True},
    }
    return {key: value for name in names for key, value in (made.get(name, lambda n=name: {"activation": n})()).items()}


# M, N, K, scales of groups, columns of a tile, blocks; and why.
GRID = [
    (197, 272, 144, False, 256, 2, "tails on all sides"),
    (70, 400, 272, True, 256, 2, "tails, in the last group of x too"),
    (1, 16, 16, True, 128, 2, "the smallest"),
    (130, 144, 1040, False, 128, 4, "more steps than stages, a tile for each cluster"),
    (64, 128, 1024, True, 128, 4, "no tails, more clusters than tiles"),
]


@pytest.mark.parametrize("case", GRID, ids=lambda case: case[-1])
def test_sizes(kernels, case):
    m, n, k, grouped, columns, blocks, _ = case
    check(kernels, *operands(m, n, k, grouped=grouped), columns=columns, blocks=blocks)


EPILOGUES = [
    ("bias", "gelu"),
    ("quick_gelu", "layer_scale"),
    ("bias", "layer_scale", "residual"),
    ("requantize",),
    ("bias", "gelu", "requantize"),
    ("bias", "silu", "layer_scale", "residual", "requantize"),
]


@pytest.mark.parametrize("names", EPILOGUES, ids="+".join)
def test_epilogues(kernels, names):
    columns = (256, 128)[EPILOGUES.index(names) % 2]
    m, n, make_operands = 80, 272, whole_numbers if "requantize" in names else operands
    args = make_operands(m, n, 160, grouped="bias" in names)
    check(kernels, *args, columns=columns, **epilogue_of(names, m, n, columns))


def test_14_bits_of_random_sums(kernels):
    """What is rounded to nothing after shows them: too far off for sums in fp32, near enough for a GPU's."""
    args, given = operands(80, 272, 384), {"requantize": True, "dtype": FP16}
    got = run(kernels, *args, requantize=True)
    answers = reference.quantized_linear(*args, **given, upcast=True), reference.quantized_linear(*args, **given)
    assert_close(got, *answers, tolerances=accuracy.E4M3_PRODUCTS)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(got, *answers)


def test_mlp_of_vit_small(kernels):
    """An image through fc1, which requantises, and fc2, on as many blocks as take several tiles each."""
    fc1 = epilogue_of(("bias", "gelu", "requantize"), 197, 1536, 256)
    check(kernels, *whole_numbers(197, 1536, 384), columns=256, blocks=4, **fc1)
    fc2 = epilogue_of(("bias", "residual"), 197, 384, 128)
    check(kernels, *operands(197, 384, 1536, grouped=True), columns=128, blocks=2, **fc2)


def test_strides(kernels):
    x, x_scale, weight, weight_scale = operands(70, 80, 144)
    residual = strided(make(70, 80, dtype=BF16, seed=4), 24)
    args = strided(x, 16), x_scale, strided(weight, 48), weight_scale
    check(kernels, *args, residual=residual, columns=128)


def test_sums_of_steps_are_added_in_fp32(kernels):
    """Beside 8192, 14 bits hold no quarters: the second step's would be lost if they were added to the first's sum."""
    x, weight, one = torch.zeros(1, 384), torch.ones(16, 384), torch.ones(1)
    x[0, :32], x[0, 128:192], x[0, 256:288] = 256, 0.25, -256
    y = run(kernels, x.to(E4M3), one, weight.to(E4M3), one.repeat(16), columns=128)
    assert (y == 16).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(kernels, value):
    """Their scales are NaN, in the groups where they are not, and so are all of the group's values; others are not."""
    args = whole_numbers(20, 272, 144)
    residual = make(20, 272, dtype=BF16)
    residual[3, 200] = value
    check(kernels, *args, columns=128, residual=residual, requantize=True)
    args[1][7] = value
    check(kernels, *args, columns=128, residual=residual, requantize=True)


def test_any_order_of_threads_gives_the_same_bits(kernels):
    args, epilogue = operands(140, 144, 272), epilogue_of(EPILOGUES[-1], 140, 144, 128)
    first = run(kernels, *args, columns=128, seed=1, **epilogue)
    for seed in (100, 101):
        again = run(kernels, *args, columns=128, seed=seed, **epilogue)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(again, first, strict=True))


# What is changed in which file, and how it must show: the trap's words, or "" for a wrong result.
BODY, EPILOGUE = "cuda/linear.cuh", "cuda/linear_epilogue.cuh"
X, WEIGHT = "operand(x + 32 * i), ", "operand(weight + half * 128 * 128 + 32 * i), i > 0"
WAIT = "product_wait<0>();\n      if (half"
SCALE = "lane % 4 == 0 && row0 < p.m) store_float("
BARRIER = "if (c.residual) named_barrier(1 + group, 128);"
FAULTS = {
    "a row's first scale for all groups": (BODY, "load_float(scale0 + step * next)", "load_float(scale0)", ""),
    "the next group's scale": (BODY, "x_scale + static", "x_scale + (c.x_groups > 1) + static", "out of bounds"),
    "the scale of the row above": (BODY, "scales_of(row + 8)", "scales_of(row + 7)", ""),
    "rows beyond x have scales": (BODY, "row < c.m ? row : c.m - 1", "row", "out of bounds"),
    "one channel's scale for eight": (EPILOGUE, "scales + where", "scales + where - 8 * j", ""),
    "no wait between a step's sums and the next's": (BODY, WAIT, WAIT[len("product_wait<0>();") :], ""),
    "operands advanced by half a product": (BODY, X, X.replace("32", "16"), ""),
    "operands advanced by two products": (BODY, X, X.replace("32", "64"), ""),
    "sums of the last step kept": (BODY, WEIGHT, WEIGHT.replace("i > 0", "step + i > 0"), ""),
    "the second half's weights": (BODY, WEIGHT, WEIGHT.replace("128 * 128", "64 * 128"), ""),
    "stage given back after half of it": (BODY, "half + 1 == kColumns / 128) release", "half == 0) release", ""),
    "columns beyond y have a say in its scale": (EPILOGUE, "if (8 * j >= left) continue;", "", ""),
    "a quarter of a row's columns has none": (
        EPILOGUE,
        "return max_or_nan(x, shuffle_xor(x, 2));",
        "return x;",
        "",
    ),
    "a NaN overlooked": (EPILOGUE, "most0 = max_or_nan(most0, max_or_nan(", "most0 = fmaxf(most0, fmaxf(", ""),
    "scales of rows beyond y": (EPILOGUE, "row0 < p.m) store_float(", "row0 <= p.m) store_float(", "out of bounds"),
    "scales of columns beyond y": (EPILOGUE, f"left > 0 && {SCALE}", SCALE, "out of bounds"),
    "halves of y's columns exchanged": (EPILOGUE, "odd ? far : near", "odd ? near : far", ""),
    "y over a residual that others still read": (BODY, BARRIER, "", "race"),
    "y's boxes where 16-bit ones would be": (BODY, "first_column / share", "first_column", ""),
}  # fmt: skip


def test_faults_are_changes_of_what_is_there():
    for name, (file, old, *_) in FAULTS.items():
        assert old in (ROOT / "csrc" / file).read_text(), name


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_show(kernels, fault, tmp_path):
    *change, trap = FAULTS[fault]
    faulty = compiled_with_fault(tmp_path, CASES[1:], change)
    # Two tile rows, one row of y in the last; two tile columns, 16 columns of y in the last; four steps.
    args, m, n = whole_numbers(129, 272, 400, grouped=True), 129, 272
    args[1][5, 2] = float("nan")
    epilogue = epilogue_of(("bias", "residual"), m, n, 256)
    epilogue["bias"][-2:] = 20  # what columns beyond y would have, were they counted

    def both(kernels):
        check(kernels, *args, **epilogue)
        check(kernels, *args, **epilogue, requantize=True)

    both(kernels)
    with pytest.raises(RuntimeError if trap else (AssertionError, RuntimeError), match=trap or None):
        both(faulty)
