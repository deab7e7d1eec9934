"""quantized_linear: both dtypes, every epilogue and config, awkward shapes, exact sums, refusals, tensor cores."""

import pytest
import torch
from helpers.inspected import TENSOR_CORES, inspected
from helpers.mutants import mutant

from vitfast import ops
from vitfast.kernels import quantized_linear as kernels
from vitfast.ops import checks, reference, registry
from vitfast.testing import AWKWARD_ROWS, DTYPES, check_op, device, guarded, make, strided

each_kind = pytest.mark.parametrize("kind", list(ops.QUANTIZED), ids=str)


def operands(rows, outputs, inner, kind, dtype=torch.bfloat16):
    """x, weight, their scales and bias, of the size of a trained block's."""
    x = reference.quantize(make(rows, inner), dtype=kind)
    weight = reference.quantize(make(outputs, inner, seed=1, scale=inner**-0.5), dtype=kind)
    return (*(guarded(t) for t in (*x, *weight)), guarded(make(outputs, dtype=dtype, seed=2, scale=0.3)))


def check(*args, **kwargs):
    check_op(kernels.quantized_linear, reference.quantized_linear, *args, **kwargs)


@each_kind
@pytest.mark.parametrize("rows", [*AWKWARD_ROWS, 197])
def test_rows(rows, kind):
    check(*operands(rows, 80, 72, kind))


@each_kind
@pytest.mark.parametrize(("outputs", "inner"), [(576, 192), (192, 768), (64, 588), (21, 67), (1, 1), (8, 3)])
def test_widths(outputs, inner, kind):
    check(*operands(7, outputs, inner, kind))


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("extra", [(), ("layer_scale", "residual")], ids=["bare", "both"])
def test_epilogues(extra, activation, dtype, kind):
    args = operands(50, 144 if activation == "swiglu" else 72, 40, kind, dtype)
    given = {"layer_scale": make(72, dtype=dtype, seed=3), "residual": make(50, 72, dtype=dtype, seed=4)}
    check(*args, activation=activation, dtype=dtype, **{name: guarded(given[name]) for name in extra})


@each_kind
@pytest.mark.parametrize("config", [*kernels.TMA_CONFIGS, *kernels.POINTER_CONFIGS[:2]], ids=lambda config: config.name)
def test_configs(config, kind):
    """Several tiles each way, and more tile rows than one group; the last config is for `requantize` below."""
    rows = config.blocks["BLOCK_M"] * 9 + 5
    args, residual = (
        operands(rows, 136, 272 if config in kernels.TMA_CONFIGS else 264, kind),
        guarded(make(rows, 136, dtype=torch.bfloat16, seed=4)),
    )
    run = lambda *a, **k: kernels.quantized_linear(*a, config=config, **k)  # noqa: E731
    check_op(run, reference.quantized_linear, *args, activation="gelu", residual=residual)


def in_groups(x, kind, group=ops.SCALE_GROUP):
    """x in 8 bits with a scale for each 128 columns of a row, or each 64."""
    parts = [reference.quantize(part, dtype=kind) for part in x.split(group, dim=-1)]
    values, scales = zip(*parts, strict=True)
    return guarded(torch.cat([v.view(torch.int8) for v in values], dim=-1).view(kind)), guarded(torch.stack(scales, -1))


@each_kind
@pytest.mark.parametrize("config", kernels.CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize(("inner", "group"), [(1, 128), (264, 128), (200, 64), (272, 128), (208, 64)])
def test_scales_of_groups(inner, group, config, kind):
    """Groups whose sizes are far apart, the last a short one, and residual and LayerScale after."""
    if (inner % 16 == 0) != (config in kernels.TMA_CONFIGS):
        pytest.skip("the others' rows")
    x = make(70, inner) * 10.0 ** (torch.arange(inner, device=device()) // group - 1)
    args = (*in_groups(x, kind, group), *operands(70, 136, inner, kind)[2:])
    extra = {"residual": make(70, 136, dtype=torch.bfloat16, seed=4), "layer_scale": make(136, dtype=torch.bfloat16)}
    run = lambda *a, **k: kernels.quantized_linear(*a, config=config, **k)  # noqa: E731
    check_op(run, reference.quantized_linear, *args, **extra)


@each_kind
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("width", [1, 128, 300])
def test_requantized_output(width, activation, kind):
    """Values and the scales of their groups, of 8-bit operands with scales of rows or of groups."""
    args = operands(50, 2 * width if activation == "swiglu" else width, 200, kind)
    check(*args, activation=activation, requantize=True)
    grouped = in_groups(make(50, 200), kind)
    check(*grouped, *args[2:], activation=activation, requantize=True)


@each_kind
def test_requantized_output_at_every_config(kind):
    for config in kernels.CONFIGS:
        args = operands(150, 272, 80, kind) if config in kernels.TMA_CONFIGS else operands(150, 264, 72, kind)
        run = lambda *a, config=config, **k: kernels.quantized_linear(*a, config=config, **k)  # noqa: E731
        if config.blocks["BLOCK_N"] == ops.SCALE_GROUP:
            check_op(run, reference.quantized_linear, *args, requantize=True)
        else:
            with pytest.raises(ValueError, match=config.name):
                run(*args, requantize=True)


def test_groups_are_known_by_their_number():
    x, weight = torch.zeros(2, 3, 130, dtype=torch.int8), torch.zeros(8, 130, dtype=torch.int8)
    found = {(): (0, ()), (2,): (128, ("scale groups",)), (3,): (64, ("scale groups of 64",)), (4,): (0, ())}
    for scales, (group, features) in found.items():
        x_scale = torch.ones(2, 3, *scales)
        assert kernels.scale_group(x, x_scale) == reference.scale_group(x, x_scale) == group
        assert checks.quantized_linear_spec(x, x_scale, weight, None).features == features
    keys = {kernels.Problem(8, 768, 768, torch.int8, group=group).key for group in (0, *ops.SCALE_GROUPS)}
    assert len(keys) == 3


@each_kind
def test_the_reference_requantizes_what_it_would_return(kind):
    args = operands(9, 300, 72, kind, torch.float32)
    values, scale = reference.quantized_linear(*args, activation="gelu", requantize=True)
    want, want_scale = in_groups(reference.quantized_linear(*args, activation="gelu", dtype=torch.float32), kind)
    assert torch.equal(values.float(), want.float()) and torch.equal(scale, want_scale)


@each_kind
@pytest.mark.parametrize("implementation", [kernels.quantized_linear, reference.quantized_linear])
def test_no_rows_and_one_axis(implementation, kind):
    x, x_scale, *rest = operands(3, 24, 40, kind)
    assert implementation(x[:0], x_scale[:0], *rest).shape == (0, 24)
    assert implementation(x[:0], x_scale[:0], *rest, requantize=True)[1].shape == (0, 1)
    assert torch.equal(implementation(x[0], x_scale[0], *rest), implementation(x, x_scale, *rest)[0])


@pytest.mark.parametrize("implementation", [kernels.quantized_linear, reference.quantized_linear])
def test_a_nan_stays_in_its_row(implementation):
    x, x_scale, *rest = operands(5, 300, 40, torch.int8)
    x_scale[2] = float("nan")
    _, scale = implementation(x, x_scale, *rest, requantize=True)
    assert scale.isnan().all(1).tolist() == scale.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("implementation", [kernels.quantized_linear, reference.quantized_linear])
def test_int8_sums_are_exact(implementation):
    """A sum beyond fp32's 24 bits, of which fp32 would lose the last product."""
    x = torch.full((1, 4096), 127, dtype=torch.int8, device=device())
    weight = x.clone()
    weight[0, -1] = 126
    one = torch.ones(1, device=device())
    total = 127 * 127 * 4096 - 127
    y = implementation(x, one, weight, one, dtype=torch.float32)
    assert y.item() == torch.tensor(total, dtype=torch.float32).item()


def test_strided_and_leading_axes():
    x, x_scale, weight, weight_scale, bias = operands(30, 24, 48, torch.int8)
    residual = strided(make(30, 24, dtype=torch.bfloat16, seed=4))
    check(strided(x, 16), x_scale, strided(weight, 16), weight_scale, bias, residual=residual)
    y = kernels.quantized_linear(x.view(2, 15, 48), x_scale.view(2, 15), weight, weight_scale, bias)
    assert torch.equal(y.view(30, 24), kernels.quantized_linear(x, x_scale, weight, weight_scale, bias))
    assert kernels.quantized_linear(x[:0], x_scale[:0], weight, weight_scale).shape == (0, 24)


@each_kind
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mask=row_ok, other=0.0)[:, None]", "mask=row_ok, other=0.0)[:, None] * 1.02"),
        ("tl.load(weight_scale + columns", "tl.load(weight_scale + columns * 0"),
        ("k_ok = offsets_k < K - k", "k_ok = offsets_k < K - k - 1"),
        ("tl.load(weight_scale + N + columns", "tl.load(weight_scale + columns"),
    ],
)
def test_wrong_kernels_are_noticed(right, wrong, kind, tmp_path):
    copy, args = mutant(kernels, right, wrong, tmp_path), operands(50, 144, 40, kind)
    check(*args, activation="swiglu")
    with pytest.raises(AssertionError):
        check_op(copy.quantized_linear, reference.quantized_linear, *args, activation="swiglu")


@each_kind
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("+ k // BLOCK_K", ""),
        ("(value, y.dtype.element_ty)", "(value * 1.1, y.dtype.element_ty)"),
        ("tl.cdiv(N, BLOCK_N) + tile_n, group_scale", "tl.cdiv(N, BLOCK_N) + tile_n, group_scale * 0.99"),
    ],
)
def test_wrong_groups_are_noticed(right, wrong, kind, tmp_path):
    copy = mutant(kernels, right, wrong, tmp_path)
    args = (*in_groups(make(50, 264), kind), *operands(50, 264, 264, kind)[2:])
    check(*args, requantize=True)
    with pytest.raises(AssertionError):
        check_op(copy.quantized_linear, reference.quantized_linear, *args, requantize=True)


@each_kind
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("x_scale + rows, mask=row_ok, other=0.0)[:, None]", "x_scale + rows, mask=row_ok, other=0.0)[:, None] * 1.02"),
        ("kept = residual.load([first_row, first_column])", "kept = residual.load([first_row, 0])"),
        ("first_row, first_column = tile_m * BLOCK_M, tile_n", "first_row, first_column = tile_m * 0, tile_n"),
    ],
)
def test_wrong_tma_kernels_are_noticed(right, wrong, kind, tmp_path):
    copy, args = mutant(kernels, right, wrong, tmp_path), operands(150, 136, 48, kind)
    residual = make(150, 136, dtype=torch.bfloat16, seed=4)
    assert kernels.problem_of(*args, residual=residual).tma
    check(*args, residual=residual)
    with pytest.raises(AssertionError):
        check_op(copy.quantized_linear, reference.quantized_linear, *args, residual=residual)


def test_swiglu_is_a_feature():
    """For backends without it: of the calls that have it, and of those alone."""
    x, x_scale, weight, *_ = operands(3, 24, 40, torch.int8)
    plain, gated = (checks.quantized_linear_spec(x, x_scale, weight, name) for name in ("gelu", "swiglu"))
    without = registry.Backend("native", "quantized_linear", print, dtypes=("int8",), features=("scale groups",))
    assert not without.why_not(plain) and without.why_not(gated) == ["it has no swiglu"]
    assert not registry.backend("quantized_linear", "torch").why_not(gated)
    assert "it has no swiglu" not in registry.backend("quantized_linear", "triton").why_not(gated)


def test_pick_config():
    large, small, one_group = kernels.POINTER_CONFIGS
    by_tma, small_by_tma = kernels.TMA_CONFIGS

    def pick(M, N, **flags):
        return kernels.pick_config(kernels.Problem(M, N, 768, torch.int8, **flags), sms=132)

    assert pick(256 * 197, 3072) is large
    assert pick(256 * 197, 8192, gated=True) is small
    assert pick(197, 768) is small
    assert pick(256 * 197, 3072, requantize=True) is large
    assert pick(256 * 197, 8192, gated=True, requantize=True) is one_group
    assert pick(256 * 197, 3072, tma=True) is pick(256 * 197, 3072, tma=True, requantize=True) is by_tma
    assert pick(197, 768, tma=True) is small_by_tma
    assert pick(256 * 197, 8192, tma=True, gated=True) is small


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "got 'relu'"),
        ({"weight": torch.zeros(24, 39, dtype=torch.int8)}, r"\(7, 40\) and \(24, 39\)"),
        ({"weight": torch.zeros(24, 40)}, "weight has dtype torch.float32"),
        ({"x_scale": torch.zeros(6)}, r"x_scale has shape \(6,\), expected \(7,\)"),
        ({"x_scale": torch.zeros(7, 2)}, r"x_scale has shape \(7, 2\), expected \(7, 1\)$"),
        ({"weight_scale": torch.zeros(23)}, r"weight_scale has shape \(23,\)"),
        ({"bias": torch.zeros(24)}, "bias has dtype torch.float32"),
        ({"residual": torch.zeros(6, 24, dtype=torch.bfloat16)}, r"residual has shape \(6, 24\)"),
        ({"dtype": torch.float64}, "got torch.float64"),
    ],
)
def test_bad_input(change, message):
    names = ("x", "x_scale", "weight", "weight_scale", "bias")
    if "dtype" in change:
        names = names[:-1]
    given = dict(zip(names, operands(7, 24, 40, torch.int8), strict=False))
    given |= {name: v.to(device()) if isinstance(v, torch.Tensor) else v for name, v in change.items()}
    with pytest.raises(ValueError, match=message):
        ops.quantized_linear(**given)


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_products_run_on_tensor_cores(arch):
    """FP8 from sm_89 on, int8 everywhere; no spills. sm_80 and sm_89 share one instruction."""
    rows = inspected(arch, "quantized_linear")
    kinds = {kind for row in rows for kind in ("fp8e4nv", "i8") if f"_{kind}_" in row["config"]}
    assert kinds == ({"i8"} if arch == "sm_80" else {"fp8e4nv", "i8"})
    for row in rows:
        assert row["tensor_core"] == TENSOR_CORES[arch], row["config"]
        assert row["fits"] and not row["spill_bytes"], row["config"]
