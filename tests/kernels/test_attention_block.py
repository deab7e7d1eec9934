"""attention_block: its one launch against the composition of the parts, and what is refused."""

import pytest
import torch

from vitfast import ops
from vitfast.kernels import attention_block as kernels
from vitfast.kernels._parts.launch import capability
from vitfast.ops import reference, registry
from vitfast.ops.accuracy import assert_close
from vitfast.testing import AWKWARD_ROWS, check_op, device, guarded, make, strided

HALVES = (torch.float16, torch.bfloat16)


def arguments(batch, tokens, width, heads, head_dim, dtype, sharpness=1.0):
    """x, both weights and biases, of the size of a trained block's; scores grow with `sharpness` squared."""
    inner = heads * head_dim
    return (
        guarded(make(batch, tokens, width, dtype=dtype)),
        guarded(make(3 * inner, width, dtype=dtype, seed=1, scale=sharpness * width**-0.5)),
        guarded(make(3 * inner, dtype=dtype, seed=2, scale=0.3)),
        guarded(make(width, inner, dtype=dtype, seed=3, scale=inner**-0.5)),
        guarded(make(width, dtype=dtype, seed=4, scale=0.3)),
    )


def extras(x):
    return {
        "layer_scale": guarded(make(x.shape[2], dtype=x.dtype, seed=5)),
        "residual": guarded(make(*x.shape, dtype=x.dtype, seed=6)),
    }


def check(*inputs, **options):
    check_op(kernels.attention_block, reference.attention_block, *inputs, **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", AWKWARD_ROWS)
def test_tokens(tokens, dtype):
    inputs = arguments(2, tokens, 40, 1, 32, dtype)
    check(*inputs, heads=1, **extras(inputs[0]))


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "head_dim"),
    [
        (197, 192, 3, 64),  # Ti/16 at 224: 128 + 64 columns
        (65, 384, 6, 64),  # S: 256 + 128 columns; one token more than a tile
        (50, 96, 3, 32),  # one padded tile of 128
        (9, 100, 3, 64),  # heads together wider than x, nothing of x a multiple of 8
        (9, 200, 1, 32),  # and narrower, less than a chunk of columns
        (7, 1, 1, 32),  # the least
    ],
)
def test_widths(tokens, width, heads, head_dim):
    inputs = arguments(1, tokens, width, heads, head_dim, torch.bfloat16)
    check(*inputs, heads=heads, **extras(inputs[0]))


@pytest.mark.parametrize("head_dim", [64, pytest.param(32, marks=pytest.mark.full)])
@pytest.mark.parametrize("config", kernels.CONFIGS, ids=lambda config: config.name)
def test_configs(config, head_dim):
    if capability(device()) < config.min_capability:
        pytest.skip(f"needs compute capability {config.min_capability}")
    width = 192 if "192" in config.name else 200
    inputs = arguments(1, 67, width, 1, head_dim, torch.bfloat16)
    check_op(
        lambda *a, **k: kernels.attention_block(*a, config=config, **k), reference.attention_block, *inputs, heads=1
    )


def test_sharp_softmax():
    """Scores of tens, whose largest turns up in any tile of keys."""
    check(*arguments(1, 200, 48, 1, 32, torch.float16, sharpness=4.0), heads=1)


def folded(x, qkv_weight, qkv_bias, *proj):
    """The arguments with a LayerNorm folded into qkv, and the option that says so."""
    width = x.shape[-1]
    gamma, beta = 1 + make(width, dtype=x.dtype, seed=7, scale=0.2), make(width, dtype=x.dtype, seed=8, scale=0.2)
    weight, weight_sum, bias = ops.fold_norm(qkv_weight, qkv_bias, gamma, beta)
    return (x, guarded(weight), guarded(bias), *proj), {"weight_sum": guarded(weight_sum)}


@pytest.mark.parametrize(
    ("width", "heads"),
    [
        (192, 1),  # tiles of statistics of 128 and 64 columns
        (384, 1),  # of 128, 128 and 128, the first two in one column tile
        (100, 2),  # one that is padded
    ],
)
def test_folded_norm_and_stats(width, heads):
    x, *weights = arguments(2, 67, width, heads, 32, torch.bfloat16)
    x += 3.0  # a mean far above the deviations
    inputs, norm = folded(x, *weights)
    options = {**norm, "heads": heads, "eps": 1e-5, "residual": x, "layer_scale": extras(x)["layer_scale"]}
    y, stats = kernels.attention_block(*inputs, **options, stats=True)
    assert_close(
        y, reference.attention_block(*inputs, **options, upcast=True), reference.attention_block(*inputs, **options)
    )
    assert_close(stats, reference.row_stats(y, upcast=True), reference.row_stats(y))


def test_mistakes_are_noticed():
    """In the norm, in which columns belong to a head, and in one token that is not seen."""
    inputs, norm = folded(*arguments(1, 67, 64, 2, 32, torch.float16))
    right = {**norm, "heads": 2, "eps": 1e-2}
    oracle, baseline = (reference.attention_block(*inputs, **right, upcast=upcast) for upcast in (True, False))

    def of_first(tokens, **options):
        return kernels.attention_block(inputs[0][:, :tokens], *inputs[1:], **options)[:, :66]

    assert_close(of_first(67, **right), oracle[:, :66], baseline[:, :66])
    no_sum = {"weight_sum": torch.zeros_like(norm["weight_sum"])}
    for tokens, change in ((67, {"eps": 0.0}), (67, no_sum), (67, {"heads": 1}), (66, {})):
        with pytest.raises(AssertionError, match="error"):
            assert_close(of_first(tokens, **(right | change)), oracle[:, :66], baseline[:, :66])


def test_programs_of_an_image():
    by_name = {config.name: config for config in kernels.CONFIGS}

    def programs(batch, tokens, config="width192", sms=132):
        return kernels.programs_of_image(batch, tokens, by_name[config], sms)

    assert [programs(batch, 197) for batch in (1, 66, 100, 132, 133, 1000)] == [4, 4, 2, 2, 1, 1]  # 4 tiles
    assert programs(32, 197, "width384") == 4 and programs(64, 197, "width384") == 2
    assert programs(200, 320, sms=300) == 3  # of 5 tiles, 2 + 2 + 1
    assert programs(120, 320, sms=240) == 3  # 4 would leave one without a tile
    assert programs(1, 1) == 1


def test_bits_do_not_depend_on_the_batch(monkeypatch):
    """Alone, several programs share an image; in a batch one has it to itself."""
    launched = []
    original = kernels.programs_of_image
    monkeypatch.setattr(kernels, "programs_of_image", lambda *a: launched.append(original(*a)) or launched[-1])
    monkeypatch.setattr(kernels.launch, "num_sms", lambda device: 1)
    x, *weights = arguments(2, 131, 40, 1, 32, torch.bfloat16)
    together = kernels.attention_block(x, *weights, heads=1)
    alone = kernels.attention_block(x[1:], *weights, heads=1)
    assert torch.equal(alone[0], together[1])
    assert launched == [1, 2]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strided_and_without_options(dtype):
    x, qkv_weight, _, proj_weight, _ = arguments(2, 7, 48, 1, 32, dtype)
    check(strided(x), strided(qkv_weight), None, strided(proj_weight, gap=3), None, heads=1)
    check(x, qkv_weight, None, proj_weight, None, heads=1, residual=strided(x))


def test_empty():
    x, *rest = arguments(1, 3, 48, 1, 32, torch.bfloat16)
    assert kernels.attention_block(x[:0], *rest, heads=1).shape == (0, 3, 48)
    y, stats = kernels.attention_block(x[:, :0], *rest, heads=1, stats=True)
    assert (y.shape, stats.shape) == ((1, 0, 48), (0, 1, 2))


def test_through_ops():
    inputs = arguments(1, 7, 48, 1, 32, torch.bfloat16)
    assert torch.equal(
        ops.attention_block(*inputs, heads=1, backend="triton"), kernels.attention_block(*inputs, heads=1)
    )
    assert torch.equal(ops.attention_block(*inputs, heads=1), reference.attention_block(*inputs, heads=1))


def test_every_reason_of_a_refusal():
    spec = ops.Spec("attention_block", "cuda", torch.float32, (7, 5), {"width": 768, "head_dim": 72, "tokens": 197})
    reasons = registry.backend("attention_block", "triton").why_not(spec)
    parts = ("dtype float32", "7.5 is below 8.0", "width 768 is outside 1..384", "head_dim 72 is not among 32, 64")
    assert len(reasons) == len(parts) and all(part in reason for part, reason in zip(parts, reasons, strict=True))
    with pytest.raises(ops.BackendError, match="dtype float32"):
        ops.attention_block(*arguments(1, 7, 48, 1, 32, torch.float32), heads=1, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (7, 48)}, r"x must be \[B, N, C\] and qkv_weight \[3 \* heads \* D, C\], got \(7, 48\)"),
        ({"heads": 5}, r"\(192, 48\) for 5 heads"),
        ({"heads": 0}, "for 0 heads"),
        ({"qkv_weight": (192, 47)}, r"\(qkv\): x \[..., K\] and weight \[N, K\] .* do not fit: .* and \(192, 47\)"),
        ({"qkv_bias": (191,)}, r"\(qkv\): bias has shape \(191,\), expected \(192,\)"),
        ({"proj_weight": (48, 63)}, r"proj_weight has shape \(48, 63\), expected \(48, 64\)"),
        ({"proj_bias": (64,)}, r"proj_bias has shape \(64,\), expected \(48,\)"),
        ({"layer_scale": (47,)}, r"layer_scale has shape \(47,\)"),
        ({"residual": (2, 7, 48)}, r"residual has shape \(2, 7, 48\), expected \(1, 7, 48\)"),
        ({"weight_sum": (64,)}, r"weight_sum has shape \(64,\), expected \(192,\)"),
        ({"weight_sum": (192,)}, r"weight_sum has dtype torch\.float16"),
    ],
)
def test_bad_input(change, message):
    names = ("x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    keywords = dict(zip(names, arguments(1, 7, 48, 2, 32, torch.float16), strict=True)) | {"heads": 2}
    for name, value in change.items():
        keywords[name] = make(*value, dtype=torch.float16) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        ops.attention_block(**keywords, backend="triton")


def test_what_no_config_can_run():
    x, *rest = arguments(1, 7, 385, 2, 32, torch.float16)
    with pytest.raises(ValueError, match=r"width384.* cannot run this call: it needs C <= 384, got 385"):
        kernels.attention_block(x, *rest, heads=2)
    with pytest.raises(ValueError, match=r"it needs a head dim of 32 or 64, got 40"):
        kernels.attention_block(*arguments(1, 7, 48, 2, 40, torch.float16), heads=2)
    with pytest.raises(ValueError, match=r"it needs 16 bits, got torch\.float32"):
        kernels.attention_block(*arguments(1, 7, 48, 2, 32, torch.float32), heads=2)


def test_bad_dtype_and_stride():
    x, qkv_weight, qkv_bias, proj_weight, proj_bias = arguments(1, 7, 48, 2, 32, torch.float16)
    with pytest.raises(ValueError, match=r"proj_weight has dtype torch\.float32"):
        ops.attention_block(x, qkv_weight, qkv_bias, proj_weight.float(), proj_bias, heads=2)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float16, allowed: torch\.float32"):
        ops.attention_block(x.float(), qkv_weight, qkv_bias, proj_weight, proj_bias, heads=2)
    with pytest.raises(ValueError, match="last axis of proj_weight has stride 48"):
        kernels.attention_block(x, qkv_weight, qkv_bias, proj_weight.T.contiguous().T, proj_bias, heads=2)
