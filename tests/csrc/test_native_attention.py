"""The C++ extension's attention on the CPU, at every SIMD level this machine has, against the oracle."""

import importlib.util

import pytest
import torch
from helpers.global_state import threads

from vitfast import ops, testing
from vitfast.ops import checks, reference, registry
from vitfast.ops.accuracy import assert_close
from vitfast.testing import HEAD_DIMS, TOKENS, check_op, guarded, strided

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vitfast._C") is None,
    reason="vitfast._C is not built (a C++ compiler builds it on install)",
)

FP32, BF16 = DTYPES = (torch.float32, torch.bfloat16)
# Beyond the models' head dims: one column, odd ones, less than a vector, the largest.
ODD_HEAD_DIMS = (1, 3, 17, 24, 48, 192, 255, 256)
# Lengths around the block shapes (24 queries, 64 keys), and the shortest.
LENGTHS = (1, 7, 15, 16, 17, 23, 24, 25, 63, 64, 65, 131)


@pytest.fixture(autouse=True)
def _poison_in_cpp():
    """Deterministic mode fills what C++ allocates with NaN, a thread's buffers included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def native(*args, **kwargs):
    return registry.backend("attention", "native").call(*args, **kwargs)


def make(*shape, **kwargs):
    return testing.make(*shape, **kwargs).cpu()


def inputs(batch, queries, keys, heads, head_dim, dtype=FP32, scale=1.0):
    """q, k, v in memory surrounded by poison."""
    lengths = (queries, keys, keys)
    return [
        guarded(make(batch, n, heads, head_dim, dtype=dtype, seed=seed, scale=scale)) for seed, n in enumerate(lengths)
    ]


def random_mask(*shape, keep=0.7):
    return guarded(torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < keep)


def check(*args, **kwargs):
    check_op(native, reference.attention, *args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, *ODD_HEAD_DIMS])
def test_head_dims(level, head_dim, dtype):
    check(*inputs(2, 19, 83, 3, head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths(level, tokens, dtype):
    check(*inputs(1, tokens, tokens, 2, 20, dtype))
    check(*inputs(1, 5, tokens, 2, 20, dtype))
    check(*inputs(1, tokens, 5, 2, 20, dtype), right=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 20, 64, 67, 128])
def test_int8_output(level, head_dim, dtype):
    """A scale for each head of a row; heads of sizes far apart."""
    q, k, v = inputs(2, 19, 83, 3, head_dim, dtype)
    v = v * torch.tensor([1.0, 1e-3, 1e-6], dtype=dtype)[:, None]
    check(q, k, v, quantize=torch.int8)
    check(q, k, v, quantize=torch.int8, right=0, bias=make(1, 3, 19, 83, seed=5))
    v[1, 7, 2, 0] = float("nan")
    values, scale = native(q, k, v, quantize=torch.int8)
    assert scale[1, :, 2].isnan().all() and not values[1, :, 2].any() and scale[0].isfinite().all()
    for empty in ((q, k[:, :0], v[:, :0]), (q[:0], k[:0], v[:0])):
        check(*empty, quantize=torch.int8)


def test_int8_output_by_the_public_op():
    q, k, v = inputs(1, 9, 12, 2, 64, BF16)
    got = ops.attention(q, k, v, quantize=torch.int8, backend="native")
    assert all(map(torch.equal, got, native(q, k, v, quantize=torch.int8)))
    with pytest.raises(registry.BackendError, match="it has no float8_e4m3fn output"):
        ops.attention(q, k, v, quantize=torch.float8_e4m3fn, backend="native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_packed(tokens, dtype):
    qkv = guarded(make(2, tokens, 3, 2, 64, dtype=dtype))
    check(*qkv.unbind(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_separate_strides(dtype):
    # [B, H, N, D] memory seen as [B, N, H, D]; rows with poison between; batches far apart.
    q = guarded(make(2, 3, 45, 72, dtype=dtype, seed=0)).transpose(1, 2)
    k = strided(make(2, 70, 3, 72, dtype=dtype, seed=1))
    v = guarded(make(70, 3, 2, 72, dtype=dtype, seed=2)).permute(2, 0, 1, 3)
    check(q, k, v)


def test_unaligned_and_expanded():
    check(*(strided(make(1, 50, 2, 64, dtype=BF16, seed=seed), gap=1) for seed in range(3)))
    k, v = (guarded(make(2, 33, 1, 32, seed=seed)).expand(-1, -1, 4, -1) for seed in (1, 2))  # multi-query attention
    check(guarded(make(2, 20, 4, 32)), k, v)


@pytest.mark.parametrize("lengths", [(50, 131), (131, 50), (131, 131), (1, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal(level, lengths, dtype):
    check(*inputs(1, *lengths, 2, 64, dtype), right=0)


BROADCASTS = [(2, 2, 20, 40), (1, 2, 20, 40), (2, 1, 20, 40), (2, 2, 1, 40), (2, 2, 20, 1), (20, 40), (40,), (1,), ()]


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_bias_and_mask_broadcast(shape):
    check(*inputs(2, 20, 40, 2, 32), bias=guarded(make(1, *shape, seed=5)[0]))
    check(*inputs(2, 20, 40, 2, 32), mask=random_mask(1, *shape)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", testing.DTYPES, ids=str)
def test_bias_mask_and_causal_together(level, dtype, bias_dtype):
    # Bias values that all three dtypes hold: the torch backend rounds the bias to q's dtype.
    bias = guarded((make(2, 50, 70, seed=5) * 8).round() / 8).to(bias_dtype)
    check(*inputs(1, 50, 70, 2, 64, dtype), bias=bias, mask=random_mask(1, 1, 1, 70), right=0)


def test_transposed_bias_and_mask():
    bias = guarded(make(70, 3, 2, 40, seed=5)).permute(2, 1, 3, 0)
    check(*inputs(2, 40, 70, 3, 32), bias=bias, mask=random_mask(70, 40).transpose(0, 1))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-45, 0.05, 0.5])
def test_scale(scale):
    check(*inputs(1, 40, 70, 2, 64), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing(level, dtype):
    q, k, v = inputs(1, 40, 70, 2, 64, dtype)
    mask = random_mask(40, 70)
    mask[[3, 10, 39]] = False
    mask[10, 69] = True
    check(q, k, v, mask=mask)
    actual = native(q, k, v, mask=mask)
    assert not actual[:, [3, 39]].any()
    assert torch.equal(actual[:, 10], v[:, 69])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_huge_and_nan_bias(level, dtype):
    q, k, v = inputs(1, 40, 70, 2, 64, dtype)
    bias = make(40, 70, seed=5, dtype=dtype)
    bias[:, :65] = float("-inf")
    bias[4] = float("-inf")
    bias[5] = torch.finfo(dtype).min  # no key is better than another: a plain average
    check(q, k, v, bias=bias)
    assert not native(q, k, v, bias=bias)[:, 4].any()
    bias[1, 3], bias[2, 69] = float("inf"), float("nan")
    actual = native(q, k, v, bias=bias)
    assert actual[:, [1, 2]].isnan().all()
    assert actual[:, [0, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(level, dtype):
    # Scores of several hundred: the exponential overflows unless the maximum is taken off first.
    check(*inputs(1, 40, 131, 2, 64, dtype, scale=6.0), scale=1.0)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty(shape, causal):
    batch, queries, keys = shape
    q, k, v = (make(batch, n, 2, 32) for n in (queries, keys, keys))
    actual = native(q, k, v, right=0 if causal else None, mask=random_mask(1, 1, 1, keys))
    assert actual.shape == q.shape
    assert not actual.any()


def test_threads_agree():
    # Blocks of one head on different threads: each packs the head's keys for itself.
    args = inputs(1, 131, 83, 3, 64)
    with threads(1):
        one = native(*args)
    with threads(3):
        assert torch.equal(native(*args), one)
    check(*args)


def test_output_is_contiguous():
    q, k, v = inputs(2, 50, 50, 3, 72)
    assert native(q.transpose(1, 2).contiguous().transpose(1, 2), k, v).is_contiguous()


def test_public_op_reaches_it():
    q, k, v = inputs(3, 20, 70, 2, 64)
    key_mask = torch.arange(70) < torch.tensor([70, 33, 0])[:, None]
    want = native(q, k, v, mask=key_mask[:, None, None])
    assert torch.equal(ops.attention(q, k, v, key_mask=key_mask, backend="native"), want)
    able, _ = registry.candidates(checks.attention_spec(q, k))
    assert able[0].name == "torch"  # never the unmeasured default


def test_what_it_cannot_do_has_reasons():
    q, k, v = inputs(1, 5, 5, 2, 32)
    with pytest.raises(registry.BackendError, match="no gradient of attention"):
        ops.attention(q.requires_grad_(), k, v, backend="native")
    half = [t.detach().half() for t in (q, k, v)]
    with pytest.raises(registry.BackendError, match="dtype float16 is not among float32, bfloat16"):
        ops.attention(*half, backend="native")
    with pytest.raises(ValueError, match=r"q has dtype torch.float16, allowed: torch.float32, torch.bfloat16"):
        native(*half)
    spec = registry.Spec("attention", "cpu", FP32, None, {"head_dim": 257})
    assert registry.backend("attention", "native").why_not(spec) == ["head_dim 257 is outside 1..256"]


REJECTED = {
    "q must be [B, N, H, D], got shape (5, 32)": lambda q, k, v: ((q[0, :, 0], k, v), {}),
    "k has shape (2, 5, 2, 32), expected (2, 5, 3, 32)": lambda q, k, v: ((q, k[:, :, :2], v), {}),
    "v has shape (2, 4, 3, 32), expected (2, 5, 3, 32)": lambda q, k, v: ((q, k, v[:, :4]), {}),
    "v has dtype torch.bfloat16": lambda q, k, v: ((q, k, v.bfloat16()), {}),
    "q has dtype torch.float64": lambda q, k, v: ((q.double(), k, v), {}),
    "last axis of k has stride 15, expected 1": lambda q, k, v: (
        (q, k.transpose(1, 3).contiguous().transpose(1, 3), v),
        {},
    ),
    "head dim must be 1..256, got 320": lambda q, k, v: ([t.repeat(1, 1, 1, 10) for t in (q, k, v)], {}),
    "mask has dtype torch.float32": lambda q, k, v: ((q, k, v), {"mask": make(5, 5)}),
    "bias has dtype torch.bool": lambda q, k, v: ((q, k, v), {"bias": random_mask(5, 5)}),
    "bias of shape (4, 5) cannot be broadcast to (2, 3, 5, 5)": lambda q, k, v: ((q, k, v), {"bias": make(4, 5)}),
    "mask of shape (1, 2, 3, 5, 5) cannot": lambda q, k, v: ((q, k, v), {"mask": random_mask(1, 2, 3, 5, 5)}),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects_in_the_same_words(message):
    (q, k, v), kwargs = REJECTED[message](*(make(2, 5, 3, 32, seed=seed) for seed in range(3)))
    with pytest.raises(ValueError, match="attention: ") as ours:
        native(q, k, v, **kwargs)
    assert message in str(ours.value)
    # The public op takes more dtypes, and fewer key heads: the registry's entry refuses those for native.
    if "float64" in message or "(2, 5, 2, 32)" in message:
        return
    with pytest.raises(ValueError, match="attention: ") as theirs:
        checks.check_attention(q, k, v, bias=kwargs.get("bias"), mask=kwargs.get("mask"))
    assert str(ours.value).partition(", allowed")[0] == str(theirs.value).partition(", allowed")[0]


@pytest.mark.parametrize("wrong", ["scale", "last key", "rounded weights"])
def test_wrong_results_are_caught(wrong):
    q, k, v = inputs(1, 40, 70, 2, 64)
    if wrong == "scale":
        broken = native(q, k, v, scale=1.0001 / 8)
    elif wrong == "last key":
        broken = native(q, k[:, :-1], v[:, :-1])
    else:  # weights rounded to bf16 before the second product
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 8, dim=-1).bfloat16().float()
        broken = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    oracle, baseline = reference.attention(q, k, v, upcast=True), reference.attention(q, k, v)
    with pytest.raises(AssertionError, match="error"):
        assert_close(broken, oracle, baseline)


def test_limit_simd_refuses_other_names():
    from vitfast import _C

    with pytest.raises(ValueError, match="must be one of default, avx2, avx512f, avx512_vnni, avx512_bf16, got sse9"):
        _C.limit_simd("sse9")
