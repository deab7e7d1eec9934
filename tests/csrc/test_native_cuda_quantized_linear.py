"""The C++ extension's CUDA quantized_linear on a GPU. Without one, see test_emulated_quantized_linear.py."""

import pytest
import torch
from helpers.native_cuda import why_no_linear
from helpers.quantized import in_groups, whole_numbers

from vitfast import ops
from vitfast.ops import reference, registry
from vitfast.testing import check_op, guarded, make, strided

FP16, BF16, E4M3 = torch.float16, torch.bfloat16, torch.float8_e4m3fn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_no_linear()), reason=why_no_linear() or "-")]


def native(*args, **kwargs):
    return registry.backend("quantized_linear", "native").call(*args, **kwargs)


def operands(m, n, k, *, grouped=False):
    x = in_groups(make(m, k)) if grouped else reference.quantize(make(m, k), dtype=E4M3)
    weight = reference.quantize(make(n, k, scale=k**-0.5, seed=1), dtype=E4M3)
    return tuple(guarded(tensor) for tensor in (*x, *weight))


def extras(m, n, dtype):
    return {
        "bias": make(n, dtype=dtype, seed=2),
        "layer_scale": make(n, dtype=dtype, seed=3),
        "residual": make(m, n, dtype=dtype, seed=4),
        "dtype": dtype,
    }


@pytest.mark.parametrize("grouped", [False, True], ids=["rows", "groups"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 16, 16), (197, 768, 768), (197, 1008, 784), (6304, 3072, 768), (6304, 768, 3072), (513, 1408, 6144)],
)
def test_sizes(m, n, k, grouped):
    check_op(native, reference.quantized_linear, *operands(m, n, k, grouped=grouped), activation="gelu")


@pytest.mark.device
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("rows", [130, 6304])
def test_epilogues(rows, activation, dtype):
    """What is requantised is a product of whole numbers, whose sums the tensor cores do not round."""
    kwargs = {"activation": activation, **extras(rows, 1536, dtype)}
    check_op(native, reference.quantized_linear, *operands(rows, 1536, 784, grouped=True), **kwargs)
    exact = tuple(tensor.cuda() for tensor in whole_numbers(rows, 1536, 784, grouped=True))
    check_op(native, reference.quantized_linear, *exact, **kwargs, requantize=True)


@pytest.mark.device
def test_views_graphs_and_repeats():
    x, x_scale, weight, weight_scale = operands(4 * 197, 1008, 768)
    x, x_scale = strided(x, 16).view(4, 197, 768), x_scale.view(4, 197)
    args = x, x_scale, strided(weight, 16), weight_scale
    check_op(native, reference.quantized_linear, *args)
    want = native(*args, requantize=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = native(*args, requantize=True)
    for _ in range(20):
        for tensor in got:
            tensor.zero_()
        graph.replay()
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want, strict=True))
    values, scale = native(x[:, :0], x_scale[:, :0], *args[2:], requantize=True)
    assert values.shape == (4, 0, 1008) and scale.shape == (4, 0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swiglu"}, "activation must be one of gelu, .* silu or None, got 'swiglu'"),
        ({"dtype": torch.float32}, "dtype must be torch.float16 or torch.bfloat16 on CUDA, got torch.float32"),
        ({"x_scale": torch.ones(16, 2)}, r"x_scale has shape \(16, 2\), expected \(16, 1\)"),
        ({"weight_scale": torch.ones(63)}, r"weight_scale has shape \(63,\)"),
        ({"bias": torch.ones(64)}, "bias has dtype torch.float32"),
        ({"x": torch.ones(16, 80, dtype=torch.int8)}, "x has dtype torch.int8"),
    ],
)
def test_rejects(change, message):
    given = dict(zip(("x", "x_scale", "weight", "weight_scale"), operands(16, 64, 80), strict=True))
    given |= {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        native(**given)


def test_rejects_widths_rows_and_devices():
    x, x_scale, weight, weight_scale = operands(16, 64, 80)
    with pytest.raises(ValueError, match="N and K must be multiples of 16 on CUDA, got 56 and 80"):
        native(x, x_scale, weight[:56], weight_scale[:56])
    with pytest.raises(ValueError, match=r"the rows of x with strides .* not all aligned to 16 bytes"):
        native(strided(x, 8), x_scale, weight, weight_scale)
    with pytest.raises(ValueError, match="weight is on cpu, but x is on cuda"):
        native(x, x_scale, weight.cpu(), weight_scale)


def test_never_the_unmeasured_default():
    args = operands(16, 64, 80)
    able, refused = registry.candidates(ops.checks.quantized_linear_spec(*args[:3], None))
    assert [entry.name for entry in able].index("torch") < [entry.name for entry in able].index("native"), refused
    _, refused = registry.candidates(ops.checks.quantized_linear_spec(*args[:3], "swiglu"))
    assert refused["native"] == ["it has no swiglu"]
