"""The C++ extension's CUDA kernels on a GPU. Without one, see test_emulated_*.py."""

import pytest
import torch
from helpers.native_cuda import BF16, DTYPES, FP16, why_no_linear, why_not

from vitfast import ops
from vitfast.ops import reference, registry
from vitfast.ops.accuracy import assert_close
from vitfast.testing import check_op, guarded, make, strided

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]


def native(*args, **kwargs):
    return registry.backend("attention", "native").call(*args, **kwargs)


def packed(batch, tokens, heads, d, dtype):
    return guarded(make(batch, tokens, 3, heads, d, dtype=dtype)).unbind(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 88, 96, 104, 128])
@pytest.mark.parametrize("tokens", [1, 50, 197])
def test_head_dims(tokens, head_dim, dtype):
    check_op(native, reference.attention, *packed(2, tokens, 3, head_dim, dtype))


@pytest.mark.device
@pytest.mark.parametrize("tokens", [16, 17, 64, 65, 200, 201, 208, 209, 257, 264, 265, 272, 273, 320])
def test_tokens(tokens):
    check_op(native, reference.attention, *packed(3, tokens, 5, 64, BF16))


def test_many_blocks_strides_and_scales():
    check_op(native, reference.attention, *packed(64, 197, 12, 64, BF16))
    q = guarded(make(2, 3, 1000, 72, dtype=FP16)).transpose(1, 2)
    k, v = (strided(make(2, 50, 3, 72, dtype=FP16, seed=seed)) for seed in (1, 2))
    for scale in (None, -0.2, 0.0):
        check_op(native, reference.attention, q, k, v, scale=scale)
    assert not native(q, k[:, :0], v[:, :0]).any()


def test_nan_of_one_image_stays_there():
    qkv = make(3, 50, 3, 2, 64, dtype=BF16)
    qkv[1] = float("nan")
    check_op(native, reference.attention, *guarded(qkv).unbind(2))


@pytest.mark.device
def test_what_the_kernel_for_hopper_leaves_to_the_other():
    q, k, v = packed(2, 197, 3, 64, BF16)
    check_op(native, reference.attention, q, k[:1].expand(2, -1, -1, -1), v[:, :, :1].expand(-1, -1, 3, -1))


@pytest.mark.device
def test_in_a_graph():
    q, k, v = packed(2, 197, 3, 64, BF16)
    want = native(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = native(q, k, v)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: ((q, k, v), {"causal": True}), "takes no bias, no mask and no causal"),
        (lambda q, k, v: ((q[..., :48], k[..., :48], v[..., :48]), {}), "head dim must be one of 32, .* got 48"),
        (lambda q, k, v: ((q, *(t.repeat(1, 33, 1, 1) for t in (k, v))), {}), "at most 320 on CUDA, got 330"),
        (lambda q, k, v: ((q, strided(k, 4), v), {}), "the rows of k with strides .* are not all aligned to 16 bytes"),
        (lambda q, k, v: ((q.float(), k.float(), v.float()), {}), "q has dtype torch.float32"),
        (lambda q, k, v: ((q, k.cpu(), v), {}), "k and v must be on cuda"),
    ],
)
def test_rejects(change, message):
    args, kwargs = change(*packed(1, 10, 2, 64, BF16))
    with pytest.raises(ValueError, match=message):
        native(*args, **kwargs)


def test_never_the_unmeasured_default():
    q, k, v = packed(1, 50, 2, 64, BF16)
    able, _ = registry.candidates(registry.Spec.of("attention", q, head_dim=64, queries=50, keys=50))
    assert [entry.name for entry in able].index("torch") < [entry.name for entry in able].index("native")
    assert torch.equal(ops.attention(q, k, v, backend="native"), native(q, k, v))


needs_linear = pytest.mark.skipif(bool(why_no_linear()), reason=why_no_linear() or "-")


def native_linear(*args, **kwargs):
    return registry.backend("linear", "native").call(*args, **kwargs)


def operands(m, n, k, dtype=BF16):
    x, weight = make(m, k, dtype=dtype), make(n, k, dtype=dtype, scale=k**-0.5, seed=1)
    return guarded(x), guarded(weight), guarded(make(n, dtype=dtype, seed=2))


@needs_linear
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 8, 8), (197, 768, 768), (197, 1000, 768), (6304, 2304, 768), (6304, 3072, 768), (6304, 768, 3072),
     (25216, 576, 192), (513, 1408, 6144)],
)  # fmt: skip
def test_linear_sizes(m, n, k, dtype):
    check_op(native_linear, reference.linear, *operands(m, n, k, dtype), activation="gelu")


@pytest.mark.device
@needs_linear
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"])
@pytest.mark.parametrize("rows", [130, 6304])
def test_linear_epilogues(rows, activation):
    x, weight, bias = operands(rows, 1536, 776)
    width = 768 if activation == "swiglu" else 1536
    extras = {"layer_scale": make(width, dtype=BF16, seed=3), "residual": make(rows, width, dtype=BF16, seed=4)}
    norm = {"row_stats": reference.row_stats(x), "weight_sum": weight.float().sum(1)}
    for kwargs in (extras, norm, extras | norm):
        check_op(native_linear, reference.linear, x, weight, bias, activation=activation, **kwargs)
    y, stats = native_linear(x, weight, bias, activation=activation, **extras, stats=True)
    assert_close(stats, reference.row_stats(y, upcast=True), reference.row_stats(y))


@pytest.mark.device
@needs_linear
def test_linear_views_graphs_and_repeats():
    x, weight, bias = guarded(make(4, 197, 1024, dtype=BF16))[..., 64:832], *operands(1, 1000, 768)[1:]
    check_op(native_linear, reference.linear, x, weight, bias)
    want = native_linear(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = native_linear(x, weight, bias)
    for _ in range(20):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)
    assert not native_linear(x[:, :0], weight, bias).numel()


@needs_linear
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: ((x, w[:63], b[:63]), {}), "N and K must be multiples of 8 on CUDA, got 63 and 72"),
        (
            lambda x, w, b: ((x[:, 1:65], w[:, 1:65], b), {}),
            "the rows of x with strides .* not all aligned to 16 bytes",
        ),
        (lambda x, w, b: ((x, w, b[:10]), {}), "bias has shape"),
        (lambda x, w, b: ((x, w, b.float()), {}), "bias has dtype torch.float32"),
        (lambda x, w, b: ((x, w, b), {"activation": "relu"}), "activation must be one of gelu, .*, got 'relu'"),
        (lambda x, w, b: ((x, w, b), {"row_stats": make(16, 1, 2)}), "only one was given"),
        (lambda x, w, b: ((x, w.cpu(), b), {}), "weight is on cpu, but x is on cuda"),
    ],
)
def test_linear_rejects(change, message):
    args, kwargs = change(*operands(16, 64, 72))
    with pytest.raises((ValueError, RuntimeError), match=message):
        native_linear(*args, **kwargs)


@needs_linear
def test_linear_is_never_the_unmeasured_default():
    able, _ = registry.candidates(registry.Spec("linear", "cuda", BF16, (9, 0), {"M": 8, "K": 8, "N": 8}))
    assert [entry.name for entry in able].index("torch") < [entry.name for entry in able].index("native")
