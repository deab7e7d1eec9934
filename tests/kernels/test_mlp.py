"""mlp: the one-kernel form, the two-linear form, and what is refused."""

import pytest
import torch

from vitfast import ops
from vitfast.kernels import mlp as kernels
from vitfast.kernels._parts.launch import capability
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
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
        (48, 40),  # one padded tile of 64; hidden units that fill no chunk
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


def folded(x, w1, b1, w2, b2):
    """The arguments with a LayerNorm folded into fc1, and the option that says so."""
    width = x.shape[-1]
    gamma, beta = 1 + make(width, dtype=x.dtype, seed=7, scale=0.2), make(width, dtype=x.dtype, seed=8, scale=0.2)
    w1, weight_sum, b1 = ops.fold_norm(w1, b1, gamma, beta)
    return (x, guarded(w1), guarded(b1), w2, b2), {"weight_sum": guarded(weight_sum)}


def check_norm_and_stats(inputs, config=None, **options):
    inputs, norm = folded(*inputs)
    options = {**norm, "eps": 1e-5, "residual": inputs[0], **options}
    y, stats = kernels.mlp(*inputs, stats=True, config=config, **options)
    assert_close(y, reference.mlp(*inputs, **options, upcast=True), reference.mlp(*inputs, **options))
    assert_close(stats, reference.row_stats(y, upcast=True), reference.row_stats(y))


@pytest.mark.parametrize(
    ("width", "units", "activation"),
    [
        (192, 72, "gelu"),  # tiles of statistics of 128 and 64 columns
        (192, 40, "swiglu"),
        (384, 24, "swiglu"),  # two linear
        (100, 33, "gelu"),  # one that is padded
    ],
)
def test_folded_norm_and_stats(width, units, activation):
    x, *weights = arguments(67, width, units, torch.bfloat16, activation)
    x += 3.0  # a mean far above the deviations
    check_norm_and_stats((x, *weights), activation=activation)


@pytest.mark.parametrize("width", [384, 320])
def test_folded_norm_and_stats_of_wide_rows(width):
    """Three tiles of statistics, the first two in one column tile: one kernel where it is asked for by name."""
    x, *weights = arguments(67, width, 40, torch.bfloat16)
    config = next(config for config in kernels.CONFIGS if config.name == "width384_norm")
    x += 3.0
    check_norm_and_stats((x, *weights), config=config)
    check_norm_and_stats((x, *weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded_norm_and_stats_in_every_dtype(dtype):
    check_norm_and_stats(arguments(7, 48, 40, dtype), layer_scale=make(48, dtype=dtype, seed=5))


def test_a_wrong_eps_or_sum_is_noticed():
    inputs, norm = folded(*arguments(50, 48, 80, torch.float16))
    right = {**norm, "eps": 1e-2}
    for change in ({"eps": 0.0}, {"weight_sum": torch.zeros_like(norm["weight_sum"])}):
        with pytest.raises(AssertionError, match="error"):
            assert_close(
                kernels.mlp(*inputs, **(right | change)),
                reference.mlp(*inputs, **right, upcast=True),
                reference.mlp(*inputs, **right),
            )


def test_pick_config():
    def name(width, gated=False, norm=False, capability=(9, 0)):
        return kernels.pick_config(kernels.Problem(width, torch.float16, gated, norm, capability)).name

    assert name(192, norm=True) == "width192" and name(192, gated=True) == "width192_swiglu"
    assert name(192, capability=(8, 0)) == "width192_sm80"
    assert [name(384), name(384, norm=True), name(384, gated=True)] == ["width384", "width384_norm", "width384_swiglu"]

    def one(width, dtype, gated, norm, capability=(9, 0)):
        return kernels.is_one_kernel(kernels.Problem(width, dtype, gated, norm, capability))

    assert one(384, torch.float16, gated=False, norm=False) and one(192, torch.float16, gated=True, norm=True)
    for features in ({"gated": False, "norm": True}, {"gated": True, "norm": False}):  # products of 8 columns on Hopper
        able = {chip: one(384, torch.float16, **features, capability=chip) for chip in ((8, 0), (9, 0), (10, 0))}
        assert able == {(8, 0): True, (9, 0): False, (10, 0): True}
    assert not one(384, torch.float16, gated=True, norm=True) and not one(48, torch.float32, gated=False, norm=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strided_and_without_options(dtype):
    x, w1, _, w2, _ = arguments(7, 48, 72, dtype)
    check_op(kernels.mlp, reference.mlp, strided(x), strided(w1), None, strided(w2, gap=3), None)
    check_op(kernels.mlp, reference.mlp, strided(x).view(7, 1, 48), w1, None, w2, None, residual=strided(x[:, None]))


def test_empty():
    x, *rest = arguments(1, 48, 40, torch.bfloat16)
    assert kernels.mlp(x[:0].view(0, 5, 48), *rest).shape == (0, 5, 48)
    assert kernels.mlp(x[:0], *rest, stats=True)[1].shape == (0, 1, 2)


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
        ({"fc1_weight": (41, 48), "activation": "swiglu"}, "even number of weight rows, got 41"),
        ({"fc1_bias": (41,)}, r"bias has shape \(41,\), expected \(40,\)"),
        ({"fc2_weight": (48, 41)}, r"fc2_weight has shape \(48, 41\), expected \(48, 40\)"),
        ({"fc2_bias": (1,)}, r"fc2_bias has shape \(1,\)"),
        ({"layer_scale": (47,)}, r"layer_scale has shape \(47,\)"),
        ({"residual": (6, 48)}, r"residual has shape \(6, 48\)"),
        ({"weight_sum": (41,)}, r"weight_sum has shape \(41,\), expected \(40,\)"),
        ({"weight_sum": (40,)}, r"weight_sum has dtype torch\.float16"),
    ],
)
def test_bad_input(change, message):
    names = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    keywords = dict(zip(names, arguments(7, 48, 40, torch.float16), strict=True))
    for name, value in change.items():
        keywords[name] = make(*value, dtype=torch.float16) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        ops.mlp(**keywords, backend="triton")


def test_bad_dtype_stride_and_config():
    x, w1, b1, w2, b2 = arguments(7, 48, 40, torch.float16)
    with pytest.raises(ValueError, match=r"fc2_weight has dtype torch\.float32"):
        ops.mlp(x, w1, b1, w2.float(), b2, backend="triton")
    with pytest.raises(ValueError, match="last axis of fc2_weight has stride 48"):
        kernels.mlp(x, w1, b1, w2.T.contiguous().T, b2)
    with pytest.raises(ValueError, match="needs C <= 384"):
        kernels.mlp(*arguments(7, 400, 40, torch.float16), config=kernels.CONFIGS[0])
