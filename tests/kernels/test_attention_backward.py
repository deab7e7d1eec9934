"""The gradients of attention: the kernels against float64 autograd."""

import itertools

import pytest
import torch
from helpers.attention_gradients import BF16, FP16, FP32, compare, inputs, random_mask
from helpers.grids import thinned
from helpers.mutants import mutant

from vitfast.kernels import attention as forward
from vitfast.kernels import attention_backward as kernel
from vitfast.testing import DTYPES, HEAD_DIMS, guarded, make, strided

# Beyond the models' head dims: a single column, less than one chunk, two chunks, the largest.
ODD_HEAD_DIMS = (1, 24, 192, 256)
TOKENS = {1: "a single token", 7: "less than a tile", 50: "B/32", 131: "prime", 197: "/16"}


def gradients(dout, q, k, v, *, bias=None, module=kernel, **kwargs):
    """The same by the kernels: dq, dk, dv and, with a bias, dbias."""
    out, stats = forward.attention_forward(q, k, v, bias=bias, **kwargs)
    *grads, dbias = module.attention_backward(
        dout, q, k, v, out, stats, bias=bias, bias_grad=bias is not None, **kwargs
    )
    assert (dbias is None) == (bias is None)
    return grads if bias is None else [*grads, dbias]


def check(q, k, v, *, dout=None, **kwargs):
    dout = guarded(make(*q.shape, dtype=q.dtype, seed=7)) if dout is None else dout
    actual = gradients(dout, q, k, v, **kwargs)
    compare(actual, dout, q, k, v, **kwargs)
    assert all(grad.is_contiguous() for grad in actual[:3])
    return actual


@pytest.mark.parametrize("head_dim", thinned([*HEAD_DIMS, *ODD_HEAD_DIMS]))
def test_head_dims(head_dim):
    check(*inputs(1, 19, 83, 2, head_dim, DTYPES[head_dim % 3]))


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


@pytest.mark.parametrize("lengths", thinned([(1, 131), (131, 1), (7, 50), (131, 7)]), ids=str)
def test_cross_attention(lengths):
    check(*inputs(1, *lengths, 2, 80, FP16))


@pytest.mark.parametrize("dtype", thinned([FP32, BF16]), ids=str)
def test_separate_strides(dtype):
    # [B, H, N, D] memory seen as [B, N, H, D]; rows with poison between; batches far apart.
    q = guarded(make(2, 3, 45, 72, dtype=dtype, seed=0)).transpose(1, 2)
    k = strided(make(2, 70, 3, 72, dtype=dtype, seed=1))
    v = guarded(make(70, 3, 2, 72, dtype=dtype, seed=2)).permute(2, 0, 1, 3)
    check(q, k, v, dout=guarded(make(2, 3, 45, 72, dtype=dtype, seed=3)).transpose(1, 2))


@pytest.mark.parametrize("gap", [1, 4], ids=["2-byte aligned", "8-byte aligned"])
def test_unaligned(gap):
    q, k, v, dout = (strided(make(1, 50, 2, 64, dtype=BF16, seed=seed), gap=gap) for seed in range(4))
    check(q, k, v, dout=dout)


def test_expanded_keys():
    # Multi-query attention: one key head seen by all through a stride of 0; each head gets its own gradient.
    q, (k, v) = guarded(make(2, 20, 4, 32)), inputs(2, 20, 33, 1, 32)[1:]
    check(q, k.expand(-1, -1, 4, -1), v.expand(-1, -1, 4, -1))


@pytest.mark.parametrize("lengths", [(50, 131), (131, 50), (131, 131), (1, 7)], ids=str)
@pytest.mark.parametrize("dtype", thinned([FP32, BF16]), ids=str)
def test_causal(lengths, dtype):
    check(*inputs(1, *lengths, 2, 64, dtype), right=0)


def test_causal_bias_gradient_above_the_diagonal_is_zero():
    *_, dbias = check(*inputs(1, 70, 131, 2, 32), bias=guarded(make(2, 70, 131, seed=5)), right=0)
    assert not dbias.triu(1).any()


BROADCASTS = [(2, 2, 20, 40), (1, 2, 20, 40), (2, 1, 20, 40), (2, 2, 1, 40), (2, 2, 20, 1), (1, 1, 1, 40),
              (2, 20, 40), (20, 40), (40,), (1,), ()]  # fmt: skip


@pytest.mark.parametrize("shape", thinned(BROADCASTS, 3), ids=str)
def test_bias_broadcast(shape):
    check(*inputs(2, 20, 40, 2, 32), bias=guarded(make(1, *shape, seed=5)[0]))


@pytest.mark.parametrize("shape", thinned(BROADCASTS, 3), ids=str)
def test_mask_broadcast(shape):
    check(*inputs(2, 20, 40, 2, 32), mask=random_mask(1, *shape)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", thinned(DTYPES), ids=str)
def test_bias_dtypes(dtype, bias_dtype):
    q, k, v = inputs(1, 50, 70, 2, 64, dtype)
    # Values that all three dtypes hold: the torch backend rounds the bias to q's dtype.
    bias = guarded((make(2, 50, 70, seed=5) * 8).round() / 8).to(bias_dtype)
    *_, dbias = check(q, k, v, bias=bias, mask=random_mask(1, 1, 1, 70), right=0)
    assert dbias.dtype == bias_dtype


def test_transposed_bias_and_mask():
    bias = guarded(make(70, 3, 2, 40, seed=5)).permute(2, 1, 3, 0)
    check(*inputs(2, 40, 70, 3, 32), bias=bias, mask=random_mask(70, 40).transpose(0, 1))


@pytest.mark.parametrize("scale", thinned([-0.2, 0.0, 1e-45, 0.05, 0.5]))
@pytest.mark.parametrize("causal", [False, True])
def test_scale(scale, causal):
    q, k, v = inputs(1, 40, 70, 2, 64)
    dout = make(*q.shape, seed=7)
    # A mask, as torch's own causal form gives NaN for a scale <= 0 on some versions.
    mask = torch.ones(40, 70, dtype=torch.bool, device=q.device).tril() if causal else None
    compare(gradients(dout, q, k, v, scale=scale, right=0 if causal else None), dout, q, k, v, scale=scale, mask=mask)


@pytest.mark.parametrize("dtype", thinned(DTYPES), ids=str)
def test_rows_that_see_nothing(dtype):
    q, k, v = inputs(1, 40, 70, 2, 64, dtype)
    mask = random_mask(40, 70)
    mask[[3, 10, 39]] = False
    mask[10, 69] = True  # in the last tile, after one that had nothing for this row
    dq, *_ = check(q, k, v, mask=mask)
    assert not dq[:, [3, 39]].any()
    nothing = gradients(make(*q.shape, dtype=dtype), q, k, v, mask=torch.zeros_like(mask))
    assert not any(grad.any() for grad in nothing)


def test_infinite_and_huge_bias():
    q, k, v = inputs(1, 40, 70, 2, 64)
    bias = make(40, 70, seed=5)
    bias[:, :65] = float("-inf")  # the first tile is dead, the rest is not
    bias[4] = float("-inf")
    bias[5] = torch.finfo(FP32).min  # no key is better than another: dv gets dout / 70
    dq, _, _, dbias = check(q, k, v, bias=bias)
    assert not dq[:, 4].any()
    assert not dbias[4].any()
    only = torch.zeros_like(q)
    only[:, 5] = 1.0
    torch.testing.assert_close(gradients(only, q, k, v, bias=bias)[2], torch.full_like(v, 1 / 70))


def test_nan_shows_and_stays_in_its_row():
    q, k, v = inputs(1, 5, 20, 1, 32)
    bias = make(5, 20, seed=5)
    bias[2, 4] = float("nan")
    dq, dk, dv, dbias = gradients(make(*q.shape, seed=7), q, k, v, bias=bias)
    assert all(t.isnan().all() for t in (dq[:, 2], dk, dv, dbias[2]))
    assert all(t.isfinite().all() for t in (dq[:, [0, 1, 3, 4]], dbias[[0, 1, 3, 4]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype):
    # Scores of several hundred: log-sum-exp has few bits left for the differences that count.
    q, k, v = inputs(1, 40, 131, 2, 64, dtype, scale=6.0)
    check(q, k, v, scale=1.0)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty(shape, causal):
    batch, queries, keys = shape
    q, k, v = (make(batch, n, 2, 32) for n in (queries, keys, keys))
    actual = gradients(torch.ones_like(q), q, k, v, bias=make(2, 1, keys), right=0 if causal else None)
    assert [grad.shape for grad in actual] == [q.shape, k.shape, v.shape, (2, 1, keys)]
    assert not any(grad.any() for grad in actual)


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=pytest.mark.full), BF16], ids=str)
def test_same_bits_on_every_run(dtype):
    q, k, v = inputs(2, 70, 70, 2, 72, dtype)
    dout, bias = make(*q.shape, dtype=dtype, seed=7), make(1, 2, 1, 70)
    first, second = (gradients(dout, q, k, v, bias=bias) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


LAST, NONE = (f"for start in tl.range(tail, {end}, BLOCK_TAIL, num_stages=1):\n        " for end in ("end", "tail"))
# Every mutant is a mistake that gradients of plausible size would hide: (before, after).
WRONG = {
    "delta dropped from dq": (", v_tile, v_rest, D_REST) - delta)", ", v_tile, v_rest, D_REST))"),
    "delta dropped from dk": ("- tile_delta[None, :]", ""),
    "scale dropped from dk": ("dk_acc * scale", "dk_acc"),
    "last keys dropped": (f"{LAST}acc,", f"{NONE}acc,"),
    "last queries dropped": (f"{LAST}dk,", f"{NONE}dk,"),
    "weights 2 % off": ("dv_rest, weights,", "dv_rest, weights * 1.02,"),
}


@pytest.mark.parametrize("dtype", thinned(DTYPES, len(DTYPES)), ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_caught(wrong, dtype, tmp_path):
    copy = mutant(kernel, *WRONG[wrong], tmp_path)
    q, k, v = inputs(1, 33, 65, 2, 64, dtype)
    dout = make(*q.shape, dtype=dtype, seed=7)
    compare(gradients(dout, q, k, v), dout, q, k, v)
    with pytest.raises(AssertionError, match="error"):
        compare(gradients(dout, q, k, v, module=copy), dout, q, k, v)


REJECTED = {
    "out must be contiguous, got strides": {"out": make(2, 3, 5, 32).transpose(1, 2)},
    "the last axis of dout has stride 0, expected 1": {"dout": make(2, 5, 3, 1).expand(-1, -1, -1, 32)},
    "stats is on meta": {"stats": torch.empty(2, 2, 3, 5, device="meta")},
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    named = {name: make(2, 5, 3, 32) for name in ("dout", "q", "k", "v", "out")} | {"stats": make(2, 2, 3, 5)}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        kernel.attention_backward(**named | REJECTED[message])
    assert message in str(caught.value)


def test_every_config_is_reached():
    flags = itertools.product((False, True), repeat=3)
    grid = itertools.product(("dq", "dkdv"), range(1, 257), DTYPES, flags, ((8, 0), (8, 6), (9, 0), (10, 0)))
    picked = {}
    for name, head_dim, dtype, (dense, irregular, shared), chip in grid:
        config = kernel.pick_config(name, head_dim, dtype, dense, chip, irregular, shared)
        assert config.min_capability <= chip
        picked[config.name] = config
    assert sorted(picked) == sorted(config.name for config in kernel.CONFIGS)
