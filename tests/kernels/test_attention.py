"""The attention kernel against the float64 reference, in every form the op accepts."""

import itertools

import pytest
import torch
from helpers.grids import thinned

from vitfast import ops, testing
from vitfast.kernels import attention as kernel
from vitfast.kernels._parts.attention_arguments import head_chunks
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import DTYPES, HEAD_DIMS, check_op, guarded, make, strided

FP32, FP16, BF16 = DTYPES
# Beyond the models' head dims: a single column, less than one chunk, two chunks, the largest.
ODD_HEAD_DIMS = (1, 24, 48, 192, 256)
TOKENS = {1: "a single token", 7: "less than a tile", 50: "B/32", 131: "prime", 197: "/16", 257: "/14: one key left"}


def inputs(batch, queries, keys, heads, head_dim, dtype=FP32, scale=1.0):
    """q, k, v in memory surrounded by poison."""
    lengths = (queries, keys, keys)
    return [
        guarded(make(batch, n, heads, head_dim, dtype=dtype, seed=seed, scale=scale)) for seed, n in enumerate(lengths)
    ]


def random_mask(*shape, keep=0.7, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return guarded((torch.rand(*shape, generator=generator) < keep).to(testing.device()))


def check(*args, **kwargs):
    check_op(kernel.attention, reference.attention, *args, **kwargs)


@pytest.mark.parametrize("head_dim", thinned([*HEAD_DIMS, *ODD_HEAD_DIMS]))
def test_head_dims(head_dim):
    dtype = DTYPES[head_dim % 3]
    check(*inputs(1, 19, 83, 2, head_dim, dtype))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, *ODD_HEAD_DIMS])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims_all(head_dim, dtype, causal):
    check(*inputs(2, 67, 83, 3, head_dim, dtype), right=0 if causal else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", thinned(TOKENS))
def test_packed(tokens, dtype):
    qkv = guarded(make(1, tokens, 3, 1, 64, dtype=dtype))
    check(*qkv.unbind(2))


def test_long():
    qkv = guarded(make(1, 577, 3, 1, 72, dtype=BF16))
    check(*qkv.unbind(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_separate_strides(dtype):
    # [B, H, N, D] memory seen as [B, N, H, D]; rows with poison between; batches far apart.
    q = guarded(make(2, 3, 45, 72, dtype=dtype, seed=0)).transpose(1, 2)
    k = strided(make(2, 70, 3, 72, dtype=dtype, seed=1))
    v = guarded(make(70, 3, 2, 72, dtype=dtype, seed=2)).permute(2, 0, 1, 3)
    check(q, k, v)


@pytest.mark.parametrize("lengths", [(1, 131), (131, 1), (7, 50), (131, 7)], ids=str)
def test_cross_attention(lengths):
    check(*inputs(1, *lengths, 2, 80, FP16))


@pytest.mark.parametrize("gap", [1, 4], ids=["2-byte aligned", "8-byte aligned"])
def test_unaligned(gap):
    views = [strided(make(1, 50, 2, 64, dtype=BF16, seed=seed), gap=gap) for seed in range(3)]
    check(*views)


def test_expanded_keys():
    # Multi-query attention: one key head seen by all through a stride of 0.
    q, k, v = inputs(2, 20, 33, 1, 32)
    q = guarded(make(2, 20, 4, 32))
    check(q, k.expand(-1, -1, 4, -1), v.expand(-1, -1, 4, -1))


@pytest.mark.parametrize("lengths", [(50, 131), (131, 50), (131, 131), (1, 7)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_causal(lengths, dtype):
    check(*inputs(1, *lengths, 2, 64, dtype), right=0)


def test_causal_is_top_left():
    q, k, v = inputs(1, 3, 70, 1, 16)
    actual = kernel.attention(q, k, v, right=0)
    torch.testing.assert_close(actual[:, 0], v[:, 0])


BROADCASTS = [(2, 2, 20, 40), (1, 2, 20, 40), (2, 1, 20, 40), (2, 2, 1, 40), (2, 2, 20, 1), (1, 1, 1, 40),
              (2, 20, 40), (20, 40), (40,), (1,), ()]  # fmt: skip


@pytest.mark.parametrize("shape", thinned(BROADCASTS), ids=str)
def test_bias_broadcast(shape):
    check(*inputs(2, 20, 40, 2, 32), bias=guarded(make(1, *shape, seed=5)[0]))


@pytest.mark.parametrize("shape", thinned(BROADCASTS), ids=str)
def test_mask_broadcast(shape):
    check(*inputs(2, 20, 40, 2, 32), mask=random_mask(1, *shape)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", thinned(DTYPES), ids=str)
def test_bias_dtypes(dtype, bias_dtype):
    q, k, v = inputs(1, 50, 70, 2, 64, dtype)
    # Values that all three dtypes hold: the torch backend rounds the bias to q's dtype.
    bias = guarded((make(2, 50, 70, seed=5) * 8).round() / 8).to(bias_dtype)
    check(q, k, v, bias=bias, mask=random_mask(1, 1, 1, 70), right=0)


def test_transposed_bias_and_mask():
    bias = guarded(make(70, 3, 2, 40, seed=5)).permute(2, 1, 3, 0)
    mask = random_mask(70, 40).transpose(0, 1)
    check(*inputs(2, 40, 70, 3, 32), bias=bias, mask=mask)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_key_mask_through_ops(dtype):
    q, k, v = inputs(3, 20, 70, 2, 64, dtype)
    lengths = torch.tensor([70, 33, 0], device=q.device)
    key_mask = torch.arange(70, device=q.device) < lengths[:, None]
    mask = random_mask(20, 70)
    actual = ops.attention(q, k, v, mask=mask, key_mask=key_mask, backend="triton")
    joined = mask & key_mask[:, None, None, :]
    oracle = reference.attention(q, k, v, mask=joined, upcast=True)
    assert_close(actual, oracle, reference.attention(q, k, v, mask=joined))
    assert not actual[2].any()


@pytest.mark.parametrize("scale", thinned([-0.2, 0.0, 1e-45, 0.05, 0.5]))
@pytest.mark.parametrize("causal", [False, True])
def test_scale(scale, causal):
    q, k, v = inputs(1, 40, 70, 2, 64)
    check(q, k, v, scale=scale, right=0 if causal and scale > 0 else None)
    if causal:  # torch's own causal form gives NaN for a scale <= 0 on some versions
        mask = torch.ones(40, 70, dtype=torch.bool, device=q.device).tril()
        oracle = reference.attention(q, k, v, scale=scale, right=0, upcast=True)
        baseline = reference.attention(q, k, v, scale=scale, mask=mask)
        assert_close(kernel.attention(q, k, v, scale=scale, right=0), oracle, baseline)


@pytest.mark.parametrize("scale", [None, -0.125, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing(dtype, scale):
    q, k, v = inputs(1, 40, 70, 2, 64, dtype)
    mask = random_mask(40, 70)
    mask[[3, 10, 39]] = False
    mask[10, 69] = True  # in the last tile, after one that had nothing for this row
    check(q, k, v, mask=mask, scale=scale)
    actual = kernel.attention(q, k, v, mask=mask, scale=scale)
    assert not actual[:, [3, 39]].any()
    assert actual[:, 10].any()


def test_infinite_and_huge_bias():
    q, k, v = inputs(1, 40, 70, 2, 64)
    bias = make(40, 70, seed=5)
    bias[:, :65] = float("-inf")  # the first tile is dead, the rest is not
    bias[4] = float("-inf")
    bias[5] = torch.finfo(FP32).min  # no key is better than another: a plain average
    actual = kernel.attention(q, k, v, bias=bias)
    check(q, k, v, bias=bias)
    assert not actual[:, 4].any()
    torch.testing.assert_close(actual[:, 5], v.mean(dim=1))


def test_positive_infinity_and_nan_show():
    q, k, v = inputs(1, 5, 20, 1, 32)
    bias = make(5, 20, seed=5)
    bias[1, 3], bias[2, 4] = float("inf"), float("nan")
    actual = kernel.attention(q, k, v, bias=bias)
    assert actual[:, [1, 2]].isnan().all()
    assert actual[:, [0, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype):
    # Scores of several hundred: the exponential overflows unless the maximum is taken off first.
    q, k, v = inputs(1, 40, 131, 2, 64, dtype, scale=6.0)
    check(q, k, v, scale=1.0)


def test_huge_logits():
    # Scores of 1e11: one rounding of the shift is worth more than exp2 can hold.
    q, k, v = inputs(1, 40, 131, 2, 64, torch.float32, scale=1e5)
    check(q, k, v)


@pytest.mark.parametrize(("dtype", "largest"), [(FP16, 1e8), (BF16, 1e9)], ids=str)
def test_where_huge_logits_end(dtype, largest):
    """docs/numerics.md has these bounds, up to which a half-precision call without bias or gradient is right."""
    q, k, v = inputs(1, 40, 131, 2, 64, dtype)
    scale = largest / torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).abs().max().item()
    check(q, k, v, scale=scale)
    with pytest.raises(AssertionError, match=r"nan in other|inf in other|error"):
        check(q, k, v, scale=scale * 20)
    bias = torch.zeros((), device=q.device)  # the scores are then made whole before their largest is taken off
    check(q, k, v, scale=scale * 20, bias=bias)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty(shape, causal):
    batch, queries, keys = shape
    q, k, v = (make(batch, n, 2, 32) for n in (queries, keys, keys))
    actual = kernel.attention(q, k, v, right=0 if causal else None, mask=random_mask(1, 1, 1, keys))
    assert actual.shape == q.shape
    assert not actual.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, -0.2, 3.0])
def test_log_sum_exp(dtype, scale):
    q, k, v = inputs(2, 40, 70, 2, 72, dtype)
    bias, mask = guarded(make(2, 40, 1, seed=5)), random_mask(2, 1, 40, 70)
    mask[:, :, 7] = False
    out, lse = kernel.attention(q, k, v, bias=bias, mask=mask, right=0, scale=scale, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (72**-0.5 if scale is None else scale)
    scores = (scores + bias).masked_fill(~mask.tril(), float("-inf"))
    oracle = scores.logsumexp(-1)
    assert_close(lse, oracle, oracle.float())
    assert lse[:, :, 7].eq(float("-inf")).all()
    kwargs = {"bias": bias, "mask": mask, "scale": scale}
    baseline = reference.attention(q, k, v, **kwargs | {"mask": mask.tril()})
    assert_close(out, reference.attention(q, k, v, **kwargs, right=0, upcast=True), baseline)


def test_output_is_contiguous_and_complete():
    q, k, v = inputs(2, 50, 50, 3, 72, BF16)
    actual = kernel.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    assert actual.is_contiguous()
    assert actual.isfinite().all()


GOOD = (2, 5, 3, 32)
REJECTED = {
    "q must be [B, N, H, D], got shape (5, 32)": lambda q, k, v: ((q[0, :, 0], k, v), {}),
    "the heads of k must divide q's, got 2 and 3": lambda q, k, v: ((q, k[:, :, :2], v[:, :, :2]), {}),
    "v has shape (2, 4, 3, 32), expected (2, 5, 3, 32)": lambda q, k, v: ((q, k, v[:, :4]), {}),
    "v has dtype torch.float16": lambda q, k, v: ((q, k, v.half()), {}),
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
    "k is on meta": lambda q, k, v: ((q, k.to("meta"), v), {}),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    args, kwargs = REJECTED[message](*(make(*GOOD, seed=seed) for seed in range(3)))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        ops.attention(*args, **kwargs, backend="triton")
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", ["scale", "last key", "rounded weights"])
def test_wrong_kernels_are_caught(wrong, dtype):
    q, k, v = inputs(1, 40, 70, 2, 64, dtype)
    if wrong == "scale":
        broken = kernel.attention(q, k, v, scale=1.02 / 8)
    elif wrong == "last key":
        broken = kernel.attention(q, k[:, :-1], v[:, :-1])
    else:  # the unnormalised weights summed after a rounding to 4 bits
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / 8
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = (weights * 16).round() / 16
        weights = weights / weights.sum(-1, keepdim=True)
        broken = torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).to(dtype)
    oracle, baseline = reference.attention(q, k, v, upcast=True), reference.attention(q, k, v)
    with pytest.raises(AssertionError, match="error"):
        assert_close(broken, oracle, baseline)


@pytest.mark.parametrize(
    ("head_dim", "chunks"),
    {1: (16, 0), 16: (16, 0), 24: (32, 0), 48: (32, 16), 64: (64, 0), 72: (64, 16), 76: (64, 16), 80: (64, 16),
     88: (64, 32), 96: (64, 32), 104: (128, 0), 112: (128, 0), 160: (128, 32), 192: (128, 64), 256: (256, 0)}.items(),
)  # fmt: skip
def test_head_chunks(head_dim, chunks):
    assert head_chunks(head_dim) == chunks


def test_every_config_is_reached():
    chips, either = ((8, 0), (8, 6), (9, 0), (10, 0)), (False, True)
    picked = {}
    for head_dim, queries, dtype, chip, *options in itertools.product(
        range(1, 257), (50, 577), DTYPES, chips, either, either
    ):
        dense, heads_change = options
        kind = "heads" if heads_change else "dense" if dense else "half"
        if dtype == FP32:
            kind = "fp32 heads" if heads_change else "fp32"
        problem = kernel.Problem(head_dim, queries, queries, dtype, chip, kind)
        config = kernel.pick_config(problem)
        assert kernel.why_not(config, problem) == []
        picked[config.name] = config
    assert sorted(picked) == sorted(config.name for config in kernel.GENERAL_CONFIGS)
