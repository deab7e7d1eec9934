"""mlp: the one-kernel form, the two-linear form, and what is refused."""

import pytest
import torch

from vitfast import ops
from vitfast.kernels import mlp as kernels
from vitfast.kernels._common import capability
from vitfast.ops import reference
from vitfast.testing import AWKWARD_ROWS, DTYPES, check_op, device, guarded, make, strided

HALVES = (torch.float16, torch.bfloat16)


def arguments(rows, width, units, dtype, activation="gelu"):
    """x, both weights and biases, of the size of a trained block's."""
    outputs = 2 * units if activation == "swiglu" else units
    return (
        guarded(make(rows, width, dtype=dtype)),
        guarded(make(outputs, width, dtype=dtype, seed=1, scale=width**-0.5)),
        guarded(make(outputs, dtype=dtype, seed=2, scale=0.3)),
        guarded(make(width, units, dtype=dtype, seed=3, scale=units**-0.5)),
        guarded(make(width, dtype=dtype, seed=4, scale=0.3)),
    )


def extras(rows, width, dtype):
    return {
        "layer_scale": guarded(make(width, dtype=dtype, seed=5)),
        "residual": guarded(make(rows, width, dtype=dtype, seed=6)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", AWKWARD_ROWS)
def test_rows(rows, dtype):
    check_op(kernels.mlp, reference.mlp, *arguments(rows, 64, 96, dtype), **extras(rows, 64, dtype))


@pytest.mark.parametrize(
    ("width", "units"),
    [
        (192, 256),  # Ti: 128 + 64 columns, four chunks of hidden units
        (384, 128),  # S: 256 + 128 columns
        (48, 40),  # 32 + 16; hidden units that fill no chunk
        (100, 33),  # one padded tile of 128; nothing a multiple of 8
        (1, 1),  # the least
        (400, 72),  # wider than the kernel: two linear
    ],
)
def test_widths(width, units):
    for dtype in HALVES:
        check_op(kernels.mlp, reference.mlp, *arguments(7, width, units, dtype), **extras(7, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activations(activation, dtype):
    check_op(kernels.mlp, reference.mlp, *arguments(50, 48, 80, dtype, activation), activation=activation)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("config", kernels.CONFIGS, ids=lambda config: config.name)
def test_configs(config, activation):
    if capability(device()) < config.min_capability:
        pytest.skip(f"needs compute capability {config.min_capability}")
    width = 192 if "192" in config.name else 200
    inputs = arguments(131, width, 100, torch.bfloat16, activation)
    check_op(lambda *a, **k: kernels.mlp(*a, config=config, **k), reference.mlp, *inputs, activation=activation)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strided_and_without_options(dtype):
    x, w1, _, w2, _ = arguments(7, 48, 72, dtype)
    check_op(kernels.mlp, reference.mlp, strided(x), strided(w1), None, strided(w2, gap=3), None)
    check_op(kernels.mlp, reference.mlp, strided(x).view(7, 1, 48), w1, None, w2, None, residual=strided(x[:, None]))


def test_empty():
    x, *rest = arguments(1, 48, 40, torch.bfloat16)
    assert kernels.mlp(x[:0].view(0, 5, 48), *rest).shape == (0, 5, 48)


def test_through_ops():
    inputs = arguments(7, 48, 40, torch.bfloat16)
    forced = ops.mlp(*inputs, backend="triton")
    assert torch.equal(forced, kernels.mlp(*inputs))


def test_wrong_activation_is_noticed():
    """The tolerance is tight enough to tell the erf form of GELU from the tanh form in float32."""
    inputs = arguments(50, 48, 80, torch.float32)
    with pytest.raises(AssertionError, match="error"):
        check_op(lambda *a: kernels.mlp(*a, activation="gelu_tanh"), reference.mlp, *inputs)


def test_column_tiles_cover_every_width():
    for width in range(1, kernels.MAX_WIDTH + 1):
        large, small = kernels.column_tiles(width)
        assert width <= large + small <= max(16, 2 * width), width
        assert all(side == 0 or (side >= 16 and side & (side - 1) == 0) for side in (large, small)), width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "got 'relu'"),
        ({"fc1_weight": (40, 47)}, r"\(7, 48\) and \(40, 47\)"),
        ({"fc1_weight": (41, 48), "activation": "swiglu"}, "even number of fc1_weight rows, got 41"),
        ({"fc1_bias": (41,)}, r"fc1_bias has shape \(41,\), expected \(40,\)"),
        ({"fc2_weight": (48, 41)}, r"fc2_weight has shape \(48, 41\), expected \(48, 40\)"),
        ({"fc2_bias": (1,)}, r"fc2_bias has shape \(1,\)"),
        ({"layer_scale": (47,)}, r"layer_scale has shape \(47,\)"),
        ({"residual": (6, 48)}, r"residual has shape \(6, 48\)"),
    ],
)
def test_bad_input(change, message):
    names = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    keywords = dict(zip(names, arguments(7, 48, 40, torch.float16), strict=True))
    for name, value in change.items():
        keywords[name] = make(*value, dtype=torch.float16) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        kernels.mlp(**keywords)


def test_bad_dtype_stride_and_config():
    x, w1, b1, w2, b2 = arguments(7, 48, 40, torch.float16)
    with pytest.raises(ValueError, match=r"fc2_weight has dtype torch\.float32"):
        kernels.mlp(x, w1, b1, w2.float(), b2)
    with pytest.raises(ValueError, match="last axis of fc2_weight has stride 48"):
        kernels.mlp(x, w1, b1, w2.T.contiguous().T, b2)
    with pytest.raises(ValueError, match="needs C <= 384"):
        kernels.mlp(*arguments(7, 400, 40, torch.float16), config=kernels.CONFIGS[0])
