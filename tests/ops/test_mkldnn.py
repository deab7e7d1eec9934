"""oneDNN's packed products as the torch backend's linear and quantized_linear on a CPU, and their place in a plan."""

import dataclasses
import time

import pytest
import torch
from helpers.eight_bits import INT8, SHAPES, extras, rows, weight
from helpers.engines import SMALL

from vitfast.engine import planner, sites
from vitfast.models.plan import SITES
from vitfast.ops import mkldnn, reference, registry
from vitfast.ops.registry import Spec
from vitfast.testing import check_op, guarded, make, strided

CPU = torch.device("cpu")
ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"]
LINEAR, QUANTIZED = (registry.backend(op, "torch") for op in ("linear", "quantized_linear"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def dtype(request):
    """A dtype, where oneDNN has it here."""
    return skip_unless(Spec("linear", "cpu", request.param)).dtype


@pytest.fixture
def int8():
    """Only where oneDNN has int8 here."""
    skip_unless(Spec("quantized_linear", "cpu", INT8))


@pytest.fixture
def fresh(monkeypatch):
    """What this machine can is looked at anew, before and after."""
    mkldnn._capabilities.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    mkldnn._capabilities.cache_clear()


def skip_unless(spec):
    if reasons := mkldnn.why_not(spec):
        pytest.skip("; ".join(reasons))
    return spec


def linear(x, w, bias=None, **epilogue):
    return mkldnn.linear(x, mkldnn.pack(w), bias, **epilogue)


def quantized_linear(x, x_scale, w, *args, **epilogue):
    return mkldnn.quantized_linear(x, x_scale, mkldnn.pack_quantized(w), *args, **epilogue)


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_sizes(m, n, k, dtype):
    x, w, b = (make(*shape, dtype=dtype, seed=i).cpu() for i, shape in enumerate([(m, k), (n, k), (n,)]))
    w.mul_(k**-0.5)
    check_op(linear, reference.linear, guarded(x), guarded(w), guarded(b))
    check_op(linear, reference.linear, strided(x), guarded(w), None)
    assert linear(x[:0], w, b).shape == (0, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_epilogues(activation, scaled, added, dtype):
    x, w, b = (make(*shape, dtype=dtype).cpu() for shape in [(2, 7, 48), (64, 48), (64,)])
    out = 32 if activation == "swiglu" else 64
    kwargs = {
        "activation": activation,
        "layer_scale": make(out, dtype=dtype).cpu() if scaled else None,
        "residual": make(2, 7, out, dtype=dtype).cpu() if added else None,
    }
    check_op(linear, reference.linear, x, w, b, **kwargs)
    y, stats = linear(x, w, b, **kwargs, stats=True)
    assert torch.equal(y, linear(x, w, b, **kwargs)) and torch.equal(stats, reference.row_stats(y))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_sizes(m, n, k, int8):
    (x, x_scale), (w, w_scale) = rows(m, k), weight(n, k)
    check_op(quantized_linear, reference.quantized_linear, x, x_scale, w, w_scale)
    check_op(quantized_linear, reference.quantized_linear, strided(x), strided(x_scale), w, strided(w_scale))
    assert quantized_linear(x[:0], x_scale[:0], w, w_scale).shape == (0, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_epilogues(activation, dtype, int8):
    n = 264
    kwargs = extras(37, n // 2 if activation == "swiglu" else n, dtype) | {"bias": make(n, dtype=dtype, seed=2).cpu()}
    given = (*rows(37, 132), *weight(n, 132))
    check_op(quantized_linear, reference.quantized_linear, *given, **kwargs, activation=activation)
    check_op(quantized_linear, reference.quantized_linear, *given, activation=activation, dtype=dtype)


def test_int8_sums_are_exact(int8):
    """From the least and the largest bytes, as long as they may be."""
    m, n, k = 16, 40, mkldnn.MOST_INNER
    x = torch.randint(-128, 128, (m, k), dtype=INT8, generator=torch.Generator().manual_seed(0))
    w = torch.randint(-128, 128, (n, k), dtype=INT8, generator=torch.Generator().manual_seed(1))
    x[0], x[1], w[0], w[1], w[2] = -128, 127, -128, 127, 0
    got = quantized_linear(x, torch.ones(m), w, torch.ones(n), dtype=torch.float32)
    assert torch.equal(got, (x.double() @ w.double().T).float())


def test_int8_rows_that_are_not_finite_and_images(int8):
    (x, x_scale), (w, w_scale) = rows(12, 96), weight(48, 96)
    check_op(quantized_linear, reference.quantized_linear, x.view(2, 6, 96), x_scale.view(2, 6), w, w_scale)
    broken = x_scale.clone()
    broken[3] = float("nan")
    check_op(quantized_linear, reference.quantized_linear, x, broken, w, w_scale)


def test_a_wrong_one_is_caught(int8):
    args = (*rows(20, 64), *weight(33, 64))
    with pytest.raises(AssertionError, match="exceeds"):
        check_op(lambda x, s, w, t: quantized_linear(x, s, w ^ 1, t), reference.quantized_linear, *args)


def test_group_scales_are_refused(int8):
    with pytest.raises(ValueError, match=r"no scales of groups of columns, got x_scale \(4, 2\)"):
        quantized_linear(*rows(4, 256, 128), *weight(16, 256))


@pytest.mark.parametrize(
    ("spec", "reasons"),
    [
        (Spec("linear", "cpu", torch.float32, dims={"N": 16, "K": 1}), []),
        (Spec("linear", "cpu", torch.float32, dims={"N": 15}), ["N 15 is outside 16..2147483648"]),
        (Spec("linear", "cuda", torch.float32, (9, 0)), ["device cuda is not among cpu"]),
        (Spec("linear", "cpu", torch.float64), ["dtype float64 is not among float32, bfloat16, float16"]),
        (Spec("quantized_linear", "cpu", torch.float8_e4m3fn), ["dtype float8_e4m3fn is not among int8"]),
        (Spec("quantized_linear", "cuda", INT8, (9, 0)), ["device cuda is not among cpu"]),
    ],
)
def test_every_reason_against_it(spec, reasons):
    found = mkldnn.why_not(spec)
    if spec.op == "quantized_linear" and not torch.cpu._is_vnni_supported():
        pytest.skip("no VNNI here: that is one more reason")
    assert found == reasons
    assert bool(planner.packed_op(LINEAR, spec)) == (not reasons) or spec.op != "linear"


def test_int8_reasons(int8):
    plain = Spec("quantized_linear", "cpu", INT8, dims={"M": 9, "K": 64, "N": 64})
    assert planner.packed_op(QUANTIZED, plain) == (mkldnn.pack_quantized, mkldnn.quantized_linear)
    assert mkldnn.why_not(dataclasses.replace(plain, features=("swiglu",))) == []
    for feature in ("scale groups", "scale groups of 64"):
        asked = dataclasses.replace(plain, features=(feature,))
        assert mkldnn.why_not(asked) == [f"it has no {feature}"] and planner.packed_op(QUANTIZED, asked) is None
    asked = dataclasses.replace(plain, dims={"K": mkldnn.MOST_INNER + 1})
    assert mkldnn.why_not(asked) == ["K 65537 is outside 1..65536"]


def test_a_cpu_without_the_instructions_says_so(fresh):
    fresh.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    for kind, question in (("bfloat16", "_is_mkldnn_bf16_supported"), ("float16", "_is_mkldnn_fp16_supported")):
        fresh.setattr(torch.ops.mkldnn, question, lambda: False)
        assert mkldnn.why_not(Spec("linear", "cpu", getattr(torch, kind))) == [f"oneDNN has no {kind} on this CPU"]
    spec = Spec("quantized_linear", "cpu", INT8)
    assert mkldnn.why_not(spec) == ["without VNNI, oneDNN's sums of int8 may saturate"]
    assert planner.packed_op(QUANTIZED, spec) is None
    assert mkldnn.why_not(Spec("linear", "cpu", torch.float32)) == []


def test_a_torch_without_onednn_says_so(fresh):
    fresh.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for dtype in DTYPES:
        assert mkldnn.why_not(Spec("linear", "cpu", dtype)) == ["this torch has no packed linear of oneDNN"]
    assert planner.packed_op(LINEAR, Spec("linear", "cpu", torch.float32)) is None


@pytest.mark.parametrize("site", ["qkv", "proj", "fc1", "fc2"])
@pytest.mark.parametrize("quantized", [None, INT8], ids=str)
def test_a_plan_measures_it_beside_the_extension(site, quantized):
    name = f"quantized_{site}" if quantized else site
    case = sites.site_case(SMALL, SITES[name], 1, CPU, torch.bfloat16, quantized)
    entries = [registry.backend(case.op, backend) for backend in ("native", "torch")]
    for entry in entries:
        if reasons := entry.why_not(case.spec):
            pytest.skip("; ".join(reasons))
    skip_unless(case.spec)
    run = planner.planned_call(entries[1], case.spec, case.inputs())
    assert run.func is (mkldnn.quantized_linear if quantized else mkldnn.linear)
    _, record = planner.measure(case, entries, CPU)
    assert record["ms"].keys() == {"native", "torch"} and not record["refused"]


@pytest.mark.usefixtures("int8")
def test_the_int8_product_runs_in_the_cpus_instructions():
    """Given signed numbers oneDNN takes plain loops, which are a thousand times slower than its product in fp32."""
    x, weight = (torch.randint(-127, 128, (size, 768), dtype=torch.int8) for size in (197, 768))
    packed, wide = mkldnn.pack_quantized(weight), weight.float()

    def least(call):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    product = least(lambda: mkldnn.quantized_linear(x, torch.ones(197), packed, torch.ones(768)))
    assert product < 30 * least(lambda: x.float() @ wide.T)
