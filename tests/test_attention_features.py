"""Bands, softcap, ALiBi, shared key heads and packed sequences: the kernels, forward and backward, against float64."""

import itertools

import pytest
import torch

from vitfast import ops, testing
from vitfast.ops import BackendError, reference
from vitfast.testing import DTYPES, assert_close, guarded, make

FP32, FP16, BF16 = DTYPES
LENGTHS = [(7, 12), (40, 70), (70, 40), (131, 131), (1, 50)]
LONG_TESTS = [LENGTHS[0], LENGTHS[2], *(pytest.param(n, marks=pytest.mark.full) for n in (LENGTHS[1], *LENGTHS[3:]))]
ALL = {"slopes": True, "softcap": 2.0, "left": 17, "right": 0}
OPTIONS = {
    "shared key heads": {},
    "left": {"left": 5},
    "narrow": {"left": 3, "right": 2},
    "this key only": {"left": 0, "right": 0},
    "wide": {"left": 40, "right": 33},
    "before": {"right": -3},
    "after": {"left": -2, "right": 10},
    "softcap": {"softcap": 1.5},
    "high softcap": {"softcap": 50.0},
    "slopes": {"slopes": True},
    "all": ALL,
}


def inputs(queries, keys, dtype=FP32, head_dim=32, heads=4, key_heads=2, batch=2):
    shapes = ((batch, queries, heads, head_dim), *[(batch, keys, key_heads, head_dim)] * 2)
    return [guarded(make(*shape, dtype=dtype, seed=seed)) for seed, shape in enumerate(shapes)]


def options_of(name, queries, keys, aligned):
    options = dict(OPTIONS[name])
    if "slopes" in options:
        options["slopes"] = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.1, 0.2, 0.3, 0.4]], device=testing.device())
    return options | ({"offset": keys - queries} if aligned else {})


def run(call, q, k, v, dout):
    """The output and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return out.detach(), torch.cat([grad.flatten() for grad in grads])  # one bound: where a row sees one key, dq is 0


def check(actual, q, k, v, dout, **options):
    wide = [t.double() for t in (q, k, v)]
    oracle = run(lambda *t: reference.attention(*t, **options, upcast=True), *wide, dout)
    baseline = run(lambda *t: reference.attention(*t, **options), q, k, v, dout)
    assert_close(actual, oracle, baseline)


@pytest.mark.parametrize("aligned", [False, True], ids=["top left", "bottom right"])
@pytest.mark.parametrize("lengths", LONG_TESTS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, lengths, aligned):
    options = options_of(name, *lengths, aligned)
    q, k, v = inputs(*lengths)
    dout = make(*q.shape, seed=5)
    actual = run(lambda *t: ops.attention(*t, **options, backend="triton"), q, k, v, dout)
    check(actual, q, k, v, dout, **options)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision(name, dtype):
    options = options_of(name, 40, 70, True)
    q, k, v = inputs(40, 70, dtype, head_dim=80)
    dout = make(*q.shape, dtype=dtype, seed=5)
    check(run(lambda *t: ops.attention(*t, **options, backend="triton"), q, k, v, dout), q, k, v, dout, **options)


SEQUENCES = {
    "mixed": ([3, 70, 1], [5, 40, 66]),
    "empty ones": ([0, 33, 2, 0], [2, 0, 40, 0]),
    "one": ([67], [67]),
}


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=testing.device())


@pytest.mark.parametrize("name", ["shared key heads", "narrow", "left", "softcap", "all"])
@pytest.mark.parametrize("sequences", SEQUENCES)
def test_packed(sequences, name):
    lengths_q, lengths_k = SEQUENCES[sequences]
    options = dict(OPTIONS[name])
    if "slopes" in options:
        options["slopes"] = make(len(lengths_q), 4, seed=7).abs()
    shapes = (1, sum(lengths_q), 4, 32), *[(1, sum(lengths_k), 2, 32)] * 2
    q, k, v = (guarded(make(*shape, seed=seed)) for seed, shape in enumerate(shapes))
    dout = make(*q.shape, seed=5)
    packed = {"cu_queries": cumulative(lengths_q), "cu_keys": cumulative(lengths_k, torch.int64)}
    longest = {"max_queries": max(lengths_q) + 1, "max_keys": max(lengths_k)}

    def one_by_one(upcast):
        def call(q, k, v):
            parts = zip(q.split(lengths_q, 1), k.split(lengths_k, 1), v.split(lengths_k, 1), strict=True)
            outs = []
            for i, (a, b, c) in enumerate(parts):
                own = options | ({"slopes": options["slopes"][i]} if "slopes" in options else {})
                outs.append(reference.attention(a, b, c, **own, offset=b.shape[1] - a.shape[1], upcast=upcast))
            return torch.cat(outs, 1)

        return call

    packed_call = {**options, **packed, **longest}
    actual = run(lambda *t: ops.attention(*t, **packed_call, backend="triton"), q, k, v, dout)
    oracle = run(one_by_one(True), *(t.double() for t in (q, k, v)), dout)
    assert_close(actual, oracle, run(one_by_one(False), q, k, v, dout))


@pytest.mark.parametrize("place", [0, 6, 7, 9])
def test_packed_sequences_cannot_reach_each_other(place):
    q, k, v = inputs(10, 10, batch=1)
    q[:, place] = k[:, place] = v[:, place] = float("nan")
    lengths = cumulative([7, 3])
    out = ops.attention(
        q, k, v, cu_queries=lengths, cu_keys=lengths, max_queries=7, max_keys=7, backend="triton"
    )  # fmt: skip
    clean = out[:, 7:] if place < 7 else out[:, :7]
    assert clean.isfinite().all()


def test_the_torch_backend_has_no_packed_sequences():
    q, k, v = inputs(10, 10, batch=1)
    lengths = cumulative([7, 3])
    with pytest.raises(BackendError, match="it has no packed sequences"):
        ops.attention(q, k, v, cu_queries=lengths, cu_keys=lengths, max_queries=7, max_keys=7, backend="torch")
    with pytest.raises(BackendError, match="it has no log-sum-exp"):
        ops.attention(q, k, v, return_lse=True, backend="torch")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("tokens", [50, 197])
def test_a_sequence_has_the_same_bits_in_any_batch(tokens, head_dim, dtype):
    q, k, v = inputs(tokens, tokens, dtype, head_dim, heads=1, key_heads=1, batch=3)
    dout = make(*q.shape, dtype=dtype, seed=5)
    together = [t.requires_grad_() for t in (q, k, v)]
    out = ops.attention(*together, backend="triton")
    grads = torch.autograd.grad(out, together, dout)
    alone = [t[1:2].detach().requires_grad_() for t in together]
    single = ops.attention(*alone, backend="triton")
    assert torch.equal(single, out[1:2])
    for own, shared in zip(torch.autograd.grad(single, alone, dout[1:2]), grads, strict=True):
        assert torch.equal(own, shared[1:2])
