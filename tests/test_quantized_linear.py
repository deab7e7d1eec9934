"""quantized_linear: both dtypes, every epilogue and config, awkward shapes, exact sums, refusals, tensor cores."""

import json

import pytest
import torch
from mutants import mutant
from test_inspect import BEST, run_python

from vitfast import ops
from vitfast.kernels import quantized_linear as kernels
from vitfast.ops import reference
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
@pytest.mark.parametrize("config", kernels.CONFIGS, ids=lambda config: config.name)
def test_configs(config, kind):
    """Several tiles each way, and more tile rows than one group."""
    rows = config.blocks["BLOCK_M"] * 9 + 5
    args, residual = operands(rows, 136, 264, kind), guarded(make(rows, 136, dtype=torch.bfloat16, seed=4))
    run = lambda *a, **k: kernels.quantized_linear(*a, config=config, **k)  # noqa: E731
    check_op(run, reference.quantized_linear, *args, activation="gelu", residual=residual)


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
        ("inner_ok = inner < K - k", "inner_ok = inner < K - k - 1"),
        ("tl.load(weight_scale + N + columns", "tl.load(weight_scale + columns"),
    ],
)
def test_wrong_kernels_are_noticed(right, wrong, kind, tmp_path):
    copy, args = mutant(kernels, right, wrong, tmp_path), operands(50, 144, 40, kind)
    check(*args, activation="swiglu")
    with pytest.raises(AssertionError):
        check_op(copy.quantized_linear, reference.quantized_linear, *args, activation="swiglu")


def test_pick_config():
    large, small = kernels.CONFIGS
    assert kernels.pick_config(256 * 197, 3072, sms=132) is large
    assert kernels.pick_config(256 * 197, 8192, sms=132, gated=True) is small
    assert kernels.pick_config(197, 768, sms=132) is small


@pytest.mark.parametrize("call", [kernels.quantized_linear, ops.quantized_linear], ids=["kernel", "op"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "got 'relu'"),
        ({"weight": torch.zeros(24, 39, dtype=torch.int8)}, r"\(7, 40\) and \(24, 39\)"),
        ({"weight": torch.zeros(24, 40)}, "weight has dtype torch.float32"),
        ({"x_scale": torch.zeros(6)}, r"x_scale has shape \(6,\), expected \(7,\)"),
        ({"weight_scale": torch.zeros(23)}, r"weight_scale has shape \(23,\)"),
        ({"bias": torch.zeros(24)}, "bias has dtype torch.float32"),
        ({"residual": torch.zeros(6, 24, dtype=torch.bfloat16)}, r"residual has shape \(6, 24\)"),
        ({"dtype": torch.float64}, "got torch.float64"),
    ],
)
def test_bad_input(change, message, call):
    names = ("x", "x_scale", "weight", "weight_scale", "bias")
    if "dtype" in change:
        names = names[:-1]
    given = dict(zip(names, operands(7, 24, 40, torch.int8), strict=False))
    given |= {name: v.to(device()) if isinstance(v, torch.Tensor) else v for name, v in change.items()}
    with pytest.raises(ValueError, match=message):
        call(**given)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_products_run_on_tensor_cores(arch):
    """FP8 from sm_89 on, int8 everywhere; no spills. sm_80 and sm_89 share one instruction."""
    rows = json.loads(run_python("-m", "vitfast", "inspect", "--arch", arch, "--kernel", "quantized_linear", "--json"))
    kinds = {kind for row in rows for kind in ("fp8e4nv", "i8") if f"_{kind}_" in row["config"]}
    assert kinds == ({"i8"} if arch == "sm_80" else {"fp8e4nv", "i8"})
    for row in rows:
        assert row["tensor_core"] == BEST.get(arch, "mma"), row["config"]
        assert row["fits"] and not row["spill_bytes"], row["config"]
