"""linear: both Triton kernels and the native one, every epilogue, folded LayerNorm, row statistics, refusals."""

import pytest
import torch
from helpers.linear import check_stats, extras, folded, implementation, operands

from vitfast import ops
from vitfast.kernels import linear as kernels
from vitfast.kernels._parts import launch
from vitfast.kernels._parts.epilogue import GROUP_M
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import AWKWARD_ROWS, DTYPES, check_op, device, make, strided

HALVES = (torch.float16, torch.bfloat16)
IMPLEMENTATIONS = [("triton", dtype) for dtype in DTYPES] + [("native", torch.float32), ("native", torch.bfloat16)]
each_implementation = pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS, ids=str)


SPLITTING = [config for config in kernels.CONFIGS if kernels.split_of(config) > 1]


def with_config(config):
    return lambda *args, **kwargs: kernels.linear(*args, config=config, **kwargs)


def needs(config):
    if launch.capability(device()) < config.min_capability:
        pytest.skip(f"{config.name} needs compute capability {config.min_capability}")


def config_dtype(config):
    return torch.float32 if config in kernels.FLOAT32_CONFIGS else torch.bfloat16


@each_implementation
@pytest.mark.parametrize("rows", [*AWKWARD_ROWS, 197])
def test_rows(rows, backend, dtype):
    check_op(implementation(backend, dtype), reference.linear, *operands(rows, 80, 72, dtype))


WIDTHS = [
    (576, 192),  # qkv of Ti
    (1000, 64),  # ImageNet classes: a last tile that is nearly empty
    (192, 768),  # fc2 of Ti
    (64, 588),  # patches of 14 x 14 x 3: rows of x no multiple of 16 bytes
    (21, 67),  # nothing a multiple of 8
    (1, 1),  # the least
    (8, 3),  # fewer columns of x than any tile
]


@pytest.mark.parametrize(("outputs", "inner"), WIDTHS)
def test_widths(outputs, inner):
    for dtype in HALVES:
        check_op(kernels.linear, reference.linear, *operands(7, outputs, inner, dtype))
    if inner < 200:
        check_op(kernels.linear, reference.linear, *operands(7, outputs, inner, torch.float32))


@pytest.mark.parametrize(("outputs", "inner"), WIDTHS)
def test_widths_native(outputs, inner):
    for rows in (1, 7, 99):  # 99: a block of 96 rows and a few
        check_op(implementation("native"), reference.linear, *operands(rows, outputs, inner, torch.float32))


@each_implementation
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("extra", ["none", "scale", "residual", "both", "norm", "norm_both"])
def test_epilogues(activation, extra, backend, dtype):
    width = 72
    args = operands(50, 2 * width if activation == "swiglu" else width, 40, dtype)
    kwargs = {"activation": activation}
    if extra.startswith("norm"):
        args, norm = folded(*args)
        kwargs |= norm
    given = {"scale": ("layer_scale",), "residual": ("residual",)}
    wanted = ("layer_scale", "residual") if extra.endswith("both") else given.get(extra, ())
    kwargs |= {name: value for name, value in extras(50, width, dtype).items() if name in wanted}
    check_op(implementation(backend, dtype), reference.linear, *args, **kwargs)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=lambda config: config.name)
def test_configs_with_everything(config):
    """Several tiles each way in one config, with every part of the epilogue."""
    needs(config)
    dtype = config_dtype(config)
    inner = 136 if dtype != torch.float32 else 40
    rows, width = (67, 136) if config in SPLITTING else (197, 264)  # slow in the interpreter: every part of every tile
    args, norm = folded(*operands(rows, width, inner, dtype))
    kwargs = {"activation": "gelu", **norm, **extras(rows, width, dtype)}
    if config.blocks["BLOCK_N"] % ops.STATS_TILE and config not in SPLITTING:
        check_op(with_config(config), reference.linear, *args, **kwargs)
    else:
        check_stats(kernels.linear(*args, **kwargs, stats=True, config=config), *args, **kwargs)


@pytest.mark.parametrize(
    "config",
    [c for c in kernels.CONFIGS if c.blocks["BLOCK_N"] <= 64 and c not in SPLITTING],
    ids=lambda config: config.name,
)
def test_configs_with_swiglu(config):
    needs(config)
    dtype = config_dtype(config)
    args, norm = folded(*operands(131, 2 * 152, 136 if dtype != torch.float32 else 40, dtype))
    check_op(with_config(config), reference.linear, *args, activation="swiglu", **norm)


def test_programs_take_several_tiles():
    """More tiles than programs, and more tile rows than one group: the persistent loop turns."""
    for config in (kernels.TMA_CONFIGS[-1], kernels.POINTER_CONFIGS[-1]):
        needs(config)
        rows = 64 * (GROUP_M + 1) + 5
        tiles = -(-rows // 64) * 3
        if device().type == "cpu":
            assert tiles > 2 * launch.num_sms(device()) * 2
        check_op(with_config(config), reference.linear, *operands(rows, 136, 64, torch.bfloat16))


@pytest.mark.parametrize("config", SPLITTING[::2], ids=lambda config: config.name)
def test_split_inner(config):
    """Parts of several steps, the last one shorter; the bits of a row depend on nothing but the row."""
    needs(config)
    split = with_config(config)
    args = operands(67, 72, 64 * 9 + 40, torch.float16)
    check_op(split, reference.linear, *args)
    assert torch.equal(split(*args)[64:], split(args[0][64:], *args[1:]))


def test_a_lost_part_is_noticed(monkeypatch):
    class OnePartLess:
        def __getitem__(self, grid):
            return lambda *args, SPLIT_K, **kwargs: whole[grid](*args, SPLIT_K=SPLIT_K - 1, **kwargs)

    whole = kernels._linear_sum_kernel
    monkeypatch.setattr(kernels, "_linear_sum_kernel", OnePartLess())
    args = operands(9, 24, 64 * 8, torch.float16)
    with pytest.raises(AssertionError, match="error"):
        check_op(with_config(SPLITTING[-1]), reference.linear, *args)


def test_path_by_alignment():
    """The tensor memory accelerator is used where it can be, and only there."""
    x, weight, _ = operands(7, 64, 72, torch.bfloat16)
    hopper = launch.capability(device()) >= (9, 0)
    uses = kernels.uses_tma
    assert uses(64, x, weight) == hopper
    assert uses(64, strided(x), weight, x) == hopper
    assert not uses(65, x, weight)  # rows of the output
    assert not uses(64, strided(x, gap=3), weight)  # rows of x
    assert not uses(64, x, strided(weight, gap=1))
    assert not uses(64, x, weight, strided(x, gap=4))  # rows of the residual
    assert not uses(64, x[:, 1:65], weight[:, :64])  # a start between multiples of 16 bytes
    assert not uses(64, x[:1].expand(7, 72), weight)  # overlapping rows
    assert not uses(64, x.float(), weight.float())


@pytest.mark.parametrize("gap", [8, 3], ids=["aligned", "unaligned"])
@each_implementation
def test_strided(backend, dtype, gap):
    x, weight, bias = operands(50, 72, 40, dtype)
    residual = strided(make(50, 72, dtype=dtype, seed=4), gap=gap)
    check_op(
        implementation(backend, dtype), reference.linear, strided(x, gap), strided(weight, gap), bias, residual=residual
    )


@pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float16), ("native", torch.float32)])
def test_leading_axes(backend, dtype):
    linear = implementation(backend)
    x, weight, bias = operands(2 * 3 * 5, 24, 40, dtype)
    batched = strided(x).view(2, 3, 5, 40)
    y, stats = linear(batched, weight, bias, stats=True)
    assert y.shape == (2, 3, 5, 24)
    assert stats.shape == (30, 1, 2)
    assert torch.equal(y.view(30, 24), linear(x, weight, bias))
    assert torch.equal(linear(x[0], weight, bias), y.view(30, 24)[0])


@pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float16), ("native", torch.float32)])
def test_empty(backend, dtype):
    linear = implementation(backend)
    x, weight, bias = operands(1, 24, 40, dtype)
    assert linear(x[:0].view(0, 5, 40), weight, bias).shape == (0, 5, 24)
    y, stats = linear(x[:0], weight, bias, stats=True)
    assert y.shape == (0, 24)
    assert stats.shape == (0, 1, 2)


@each_implementation
@pytest.mark.parametrize("inner", [40, 128, 192, 130], ids=["one tile", "a full tile", "one and a half", "2 left"])
def test_folded_norm(inner, backend, dtype):
    """The fold equals its own reference, also where every row's mean is far from zero."""
    args, norm = folded(*operands(50, 72, inner, dtype, offset=4.0))
    check_op(implementation(backend, dtype), reference.linear, *args, **norm, eps=1e-5)


def test_folded_norm_is_layer_norm():
    """The fold gives LayerNorm then linear, in float32, where the two differ by rounding only."""
    x, weight, bias = operands(50, 72, 136, torch.float32, offset=2.0)
    gamma, beta = 1 + make(136, seed=5, scale=0.2), make(136, seed=6, scale=0.2)
    weight_folded, weight_sum, bias_folded = ops.fold_norm(weight, bias, gamma, beta)
    got = kernels.linear(
        x, weight_folded, bias_folded, row_stats=ops.row_stats(x, backend="torch"), weight_sum=weight_sum, eps=1e-3
    )
    normed = reference.layer_norm(x, gamma, beta, 1e-3, upcast=True)
    want = reference.linear(normed, weight, bias, upcast=True)
    baseline = reference.linear(
        x, weight_folded, bias_folded, row_stats=ops.row_stats(x, backend="torch"), weight_sum=weight_sum, eps=1e-3
    )
    assert_close(got, want, baseline)


@each_implementation
@pytest.mark.parametrize("width", [40, 128, 192, 264], ids=["one tile", "a full tile", "one and a half", "8 left"])
def test_stats(width, backend, dtype):
    args = operands(131, width, 40, dtype)
    kwargs = extras(131, width, dtype)
    kwargs["residual"] += 100.0  # a mean far above the deviations, where E[x^2] - mean^2 would fail
    check_stats(implementation(backend, dtype)(*args, **kwargs, stats=True), *args, **kwargs)


def test_stats_feed_the_next_norm():
    """Two linear in a row, the second folding the LayerNorm of the first's output by its statistics."""
    args = operands(50, 192, 40, torch.float32)
    x, row_stats = kernels.linear(*args, stats=True)
    (_, weight, bias), norm = folded(x, *operands(1, 72, 192, torch.float32)[1:])
    norm["row_stats"] = row_stats
    check_op(kernels.linear, reference.linear, x, weight, bias, **norm, activation="gelu")


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_wrong_results_are_noticed(backend):
    """A dropped eps, unbiased statistics, a forgotten tile of them, and tanh for erf all fail."""
    args, norm = folded(*operands(64, 72, 136, torch.float32))
    unbiased = norm["row_stats"].clone()
    unbiased[..., 1] *= 136 / 135
    partial = norm["row_stats"].clone()
    partial[:, 1, 1] = 0
    for change in ({"eps": 0.0}, {"row_stats": unbiased}, {"row_stats": partial}, {"activation": "gelu_tanh"}):
        right = {**norm, "eps": 1e-3, "activation": "gelu"}
        with pytest.raises(AssertionError, match="error"):
            assert_close(
                implementation(backend)(*args, **(right | change)),
                reference.linear(*args, **right, upcast=True),
                reference.linear(*args, **right),
            )


def test_through_ops():
    args = operands(7, 72, 40, torch.bfloat16)
    y, stats = ops.linear(*args, activation="gelu", stats=True, backend="triton")
    wanted = kernels.linear(*args, activation="gelu", stats=True)
    assert torch.equal(y, wanted[0])
    assert torch.equal(stats, wanted[1])


def test_pick_config():
    """Large tiles for much work, small ones for little, and never one that cannot run."""

    def name(M, N, dtype, *, tma, K=768, sms=132, gated=False, stats=False, hopper=True):
        return kernels.pick_config(kernels.Problem(M, N, K, dtype, tma, gated, stats, hopper), sms).name

    half = torch.bfloat16
    assert name(256 * 197, 768, half, tma=True, K=192) == "tma_128x128x64_pair"  # epilogues hidden
    assert name(256 * 197, 768, half, tma=True, K=192, stats=True) == "tma_128x128x64_pair"
    assert "pair" not in name(256 * 197, 768, half, tma=True, K=192, stats=True, hopper=False)  # its registers spill
    for width, depth in ((3072, 768), (1024, 4096)):  # operands shared: L2 gives no more
        assert name(256 * 197, width, half, tma=True, K=depth) == "tma_128x256x64"
    assert name(256 * 197, 3072, half, tma=False) == "128x128x64"
    assert name(197, 576, half, tma=True, K=192) == "tma_64x64x64"
    assert name(197, 192, half, tma=True, K=192, stats=True) == "tma_64x128x64"
    few = {"tma": True, "stats": True, "sms": 132}
    assert name(197, 768, half, K=3072, **few) == "tma_64x128x64_split4"  # 24 tiles, 48 steps
    assert name(2 * 197, 768, half, K=768, **few) == "tma_64x128x64"  # 42 tiles, but only 12 steps
    assert "split" not in name(197, 768, half, K=3072, **few | {"sms": 12})  # as many tiles as that
    assert name(197, 768, half, K=3072, **few, gated=True) == "tma_64x128x64"
    assert name(256 * 197, 4096, half, tma=True, gated=True) == "tma_64x64x64"
    assert name(256 * 197, 4096, half, tma=False, gated=True) == "128x64x64"
    assert name(197, 192, torch.float32, tma=False, stats=True).startswith("float32")
    for rows in (1, 197, 50432):
        for stats in (False, True):
            for gated in (False, True):
                for tma, dtype in ((True, half), (False, half), (False, torch.float32)):
                    problem = kernels.Problem(rows, 768, 3072, dtype, tma, gated, stats)
                    assert kernels.why_not(kernels.pick_config(problem, sms=108), problem) == []


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "got 'relu'"),
        ({"weight": (24, 39)}, r"\(7, 40\) and \(24, 39\)"),
        ({"x": (7, 0), "weight": (24, 0)}, "K >= 1"),
        ({"weight": (23, 40), "bias": (23,), "activation": "swiglu"}, "even number of weight rows, got 23"),
        ({"bias": (25,)}, r"bias has shape \(25,\), expected \(24,\)"),
        ({"layer_scale": (23,)}, r"layer_scale has shape \(23,\)"),
        ({"residual": (6, 24)}, r"residual has shape \(6, 24\), expected \(7, 24\)"),
        ({"weight_sum": (24,)}, "go together"),
        ({"row_stats": (7, 2, 2), "weight_sum": (24,)}, r"row_stats has shape \(7, 2, 2\), expected \(7, 1, 2\)"),
        ({"row_stats": (7, 1, 2), "weight_sum": (7,)}, r"weight_sum has shape \(7,\)"),
    ],
)
def test_bad_input(change, message, backend):
    keywords = dict(zip(("x", "weight", "bias"), operands(7, 24, 40, torch.float32), strict=True))
    for name, value in change.items():
        keywords[name] = make(*value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        (implementation(backend) if backend == "native" else ops.linear)(**keywords)


def test_bad_dtype_and_stride():
    x, weight, bias = operands(8, 24, 40, torch.float16)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        ops.linear(x.double(), weight, bias, backend="triton")
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float32"):
        ops.linear(x, weight.float(), bias, backend="triton")
    with pytest.raises(ValueError, match="last axis of x has stride 8"):
        kernels.linear(x.T.contiguous().T, weight, bias)
    with pytest.raises(ValueError, match="cannot be viewed as rows"):
        kernels.linear(x.view(2, 4, 40).transpose(0, 1), weight, bias)
    with pytest.raises(ValueError, match="row_stats must be contiguous"):
        kernels.linear(x, weight, bias, row_stats=make(8, 2, 2)[:, :1], weight_sum=make(24))


def test_bad_config():
    configs = {config.name: config for config in kernels.CONFIGS}
    x, weight, bias = operands(8, 24, 40, torch.float16)
    with pytest.raises(ValueError, match="needs compute capability"):
        kernels.linear(strided(x, gap=3), weight, bias, config=configs["tma_64x64x64"])
    with pytest.raises(ValueError, match="no multiple of 128 columns"):
        kernels.linear(x, weight, bias, stats=True, config=configs["64x64x64"])
    with pytest.raises(ValueError, match="splits K, which swiglu's two sums cannot"):
        kernels.linear(x, weight, activation="swiglu", config=configs["64x64x64_split4"])
    with pytest.raises(ValueError, match="not one for"):
        kernels.linear(x, weight, bias, config=configs["float32_32x64x32"])
    if launch.capability(device()) >= (9, 0):
        with pytest.raises(ValueError, match="two accumulators"):
            kernels.linear(x, weight[:16], activation="swiglu", config=configs["tma_128x256x64"])
