"""Bands, softcap, ALiBi, shared key heads and packed sequences: the kernels, forward and backward, against float64."""

import itertools

import pytest
import torch
from helpers import oracles
from helpers.grids import thinned

from vitfast import ops, testing
from vitfast.ops import BackendError, reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import DTYPES, guarded, make, strided

FP32, FP16, BF16 = DTYPES
# Not one query: where it sees one key its gradient is zero, and rounding has nothing to be measured by.
LENGTHS = [(7, 12), (40, 70), (70, 40), (131, 131), (2, 50)]
ALIGNED = {"top left": False, "bottom right": True}
DEFAULT = [(LENGTHS[0], "top left")]
ALL = {"slopes": True, "softcap": 2.0, "left": 17, "right": 0}
OPTIONS = {
    "shared key heads": {},
    "left": {"left": 5},
    "narrow": {"left": 3, "right": 2},
    "two keys": {"left": 0, "right": 1},  # of one alone the gradients of q and k are zero, and only rounding is left
    "wide": {"left": 40, "right": 33},
    "before": {"right": -3},
    "after": {"left": -2, "right": 10},
    "softcap": {"softcap": 1.5},
    "high softcap": {"softcap": 50.0},
    "slopes": {"slopes": True},
    "all": ALL,
}


# How q, k and v lie in memory. Poison is around them and between rows.
LAYOUTS = {
    "apart": lambda *qkv: [guarded(t) for t in qkv],
    "sliced": lambda *qkv: [strided(t, gap=3) for t in qkv],  # rows that start anywhere
    "packed": lambda *qkv: [packed(t, place) for place, t in enumerate(qkv)],
}
HEAD_DIMS = [64, 72, 17]


def packed(tensor, place):
    """As one of the three in a qkv whose others are poison."""
    buffer = guarded(tensor.new_full((*tensor.shape[:-2], 3, *tensor.shape[-2:]), float("nan")))
    view = buffer.select(-3, place)
    view.copy_(tensor)
    return view


def inputs(queries, keys, dtype=FP32, head_dim=32, heads=4, key_heads=2, batch=2, layout="apart"):
    shapes = ((batch, queries, heads, head_dim), *[(batch, keys, key_heads, head_dim)] * 2)
    return LAYOUTS[layout](*(make(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)))


def rotating(first, *others, step=1):
    """Every combination in the full suite; by default one of the others for each `step`th of the first, in turn."""
    combinations = list(itertools.product(*others))
    return [
        pytest.param(
            value, *combination, marks=() if (i % step, j) == (0, i * 4 % len(combinations)) else pytest.mark.full
        )
        for i, value in enumerate(first)
        for j, combination in enumerate(combinations)
    ]


def options_of(name, queries, keys, aligned):
    options = dict(OPTIONS[name])
    if "slopes" in options:
        options["slopes"] = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.1, 0.2, 0.3, 0.4]], device=testing.device())
    return options | ({"offset": keys - queries} if aligned else {})


def run(call, q, k, v, dout):
    """The output and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = call(*leaves)
    if not out.requires_grad:  # the oracle's, where no query sees a key: zeros that come from nothing
        return [out, *map(torch.zeros_like, leaves)]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def check(kernels, oracle, torchs, q, k, v, dout):
    """The output and each gradient by itself."""
    wide = [t.double() for t in (q, k, v)]
    assert_close(run(kernels, q, k, v, dout), run(oracle, *wide, dout), run(torchs, q, k, v, dout), "out, dq, dk, dv")


def check_options(q, k, v, **options):
    check(
        lambda *t: ops.attention(*t, **options, backend="triton"),
        lambda *t: oracles.attention(*t, **options)[0],
        lambda *t: reference.attention(*t, **options),
        q, k, v, guarded(make(*q.shape, dtype=q.dtype, seed=5)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "aligned"),
    [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.full)
     for case in itertools.product(LENGTHS, ALIGNED)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, lengths, aligned):
    check_options(*inputs(*lengths), **options_of(name, *lengths, ALIGNED[aligned]))


@pytest.mark.parametrize("dtype", [pytest.param(FP16, marks=pytest.mark.full), BF16], ids=str)
@pytest.mark.parametrize(("name", "layout", "head_dim"), rotating(OPTIONS, LAYOUTS, HEAD_DIMS, step=3))
def test_half_precision(name, layout, head_dim, dtype):
    check_options(*inputs(40, 70, dtype, head_dim, layout=layout), **options_of(name, 40, 70, True))


@pytest.mark.parametrize(("name", "layout", "head_dim", "dtype"), rotating(OPTIONS, LAYOUTS, HEAD_DIMS, [FP16, BF16]))
def test_log_sum_exp(name, layout, head_dim, dtype):
    options = options_of(name, 70, 40, True)
    q, k, v = inputs(70, 40, dtype, head_dim, layout=layout)
    out, lse = ops.attention(q, k, v, **options, return_lse=True, backend="triton")
    wanted = oracles.attention(q, k, v, **options)
    torchs = reference.attention(q, k, v, **options), oracles.attention(q, k, v, **options, dtype=FP32)[1]
    assert_close((out, lse), wanted, torchs, "out, lse")


SEQUENCES = {
    "mixed": ([3, 70, 1], [5, 40, 66]),
    "empty ones": ([0, 33, 2, 0], [2, 0, 40, 0]),
    "one": ([67], [67]),
}


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=testing.device())


def each_sequence(function, lengths_q, lengths_k, slopes=None, **options):
    """Packed sequences by a function of one."""

    def call(q, k, v):
        parts = zip(q.split(lengths_q, 1), k.split(lengths_k, 1), v.split(lengths_k, 1), strict=True)
        outs = []
        for i, (a, b, c) in enumerate(parts):
            own = {} if slopes is None else {"slopes": slopes[i]}
            outs.append(function(a, b, c, **options, **own, offset=b.shape[1] - a.shape[1]))
        return torch.cat(outs, 1)

    return call


def check_packed(sequences, name, dtype, head_dim, layout):
    lengths_q, lengths_k = SEQUENCES[sequences]
    options = dict(OPTIONS[name])
    if "slopes" in options:
        options["slopes"] = make(len(lengths_q), 4, seed=7).abs()
    q, k, v = inputs(sum(lengths_q), sum(lengths_k), dtype, head_dim, batch=1, layout=layout)
    lengths = {"cu_queries": cumulative(lengths_q), "cu_keys": cumulative(lengths_k, torch.int64)}
    longest = {"max_queries": max(lengths_q) + 1, "max_keys": max(lengths_k)}
    check(
        lambda *t: ops.attention(*t, **options, **lengths, **longest, backend="triton"),
        each_sequence(lambda *t, **own: oracles.attention(*t, **own)[0], lengths_q, lengths_k, **options),
        each_sequence(reference.attention, lengths_q, lengths_k, **options),
        q, k, v, guarded(make(*q.shape, dtype=dtype, seed=5)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sequences", "name"),
    [*thinned(itertools.product(["mixed"], ["shared key heads", "narrow", "left", "softcap", "all"]), unpack=True),
     ("empty ones", "all"), ("one", "left"),
     *(pytest.param(*case, marks=pytest.mark.full) for case in (("empty ones", "left"), ("one", "all")))],
)  # fmt: skip
def test_packed(sequences, name):
    check_packed(sequences, name, FP32, 32, "apart")


@pytest.mark.parametrize(
    ("name", "layout", "head_dim", "dtype"),
    rotating(["shared key heads", "narrow", "softcap", "all"], LAYOUTS, HEAD_DIMS, [FP16, BF16]),
)
def test_packed_in_half_precision(name, layout, head_dim, dtype):
    check_packed("mixed", name, dtype, head_dim, layout)


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


def bits(q, k, v, dout, bias=None, **options):
    """The output and the gradients, the bias's included."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, bias) if t is not None]
    out = ops.attention(*leaves[:3], bias=None if bias is None else leaves[3], **options, backend="triton")
    return [out, *torch.autograd.grad(out, leaves, dout)]


BATCHED = {
    "plain": {},
    "shared key heads": {"heads": 4},
    "causal, shared key heads": {"heads": 4, "right": 0},
    "window": {"left": 9, "right": 3},
    "softcap": {"softcap": 2.0},
    "bias": {"bias": make(3, 2, 197, 197, seed=6)},
    "mask": {"mask": make(3, 1, 197, 197, seed=6) > -0.5},
}


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize(
    ("name", "head_dim", "tokens"),
    [
        *thinned(itertools.product(BATCHED, [64], [50]), unpack=True),
        *(pytest.param(*case, marks=pytest.mark.full) for case in itertools.product(BATCHED, [80], [50])),
        *(pytest.param(*case, marks=pytest.mark.full) for case in itertools.product(BATCHED, [64, 80], [197])),
    ],
)
def test_a_sequence_has_the_same_bits_in_any_batch(name, head_dim, tokens, dtype):
    options = {"heads": 2} | BATCHED[name]
    q, k, v = inputs(tokens, tokens, dtype, head_dim, options.pop("heads"), batch=3)
    dout = make(*q.shape, dtype=dtype, seed=5)
    own = {key: value[..., :tokens, :tokens] for key, value in options.items() if key in ("bias", "mask")}
    together = bits(q, k, v, dout, **options | own)
    alone = bits(*(t[1:2] for t in (q, k, v, dout)), **options | {key: value[1:2] for key, value in own.items()})
    for single, shared in zip(alone, together, strict=True):
        assert torch.equal(single, shared[1:2])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "name", ["causal, shared key heads", *(pytest.param(name, marks=pytest.mark.full) for name in ("plain", "window"))]
)
def test_a_packed_sequence_has_the_same_bits_in_any_batch(name, dtype):
    options = {"heads": 2} | BATCHED[name]
    q, k, v = inputs(90, 90, dtype, 64, options.pop("heads"), batch=1)
    dout = make(*q.shape, dtype=dtype, seed=5)

    def packed(rows, lengths, longest):
        bounds = cumulative(lengths)
        call = {"cu_queries": bounds, "cu_keys": bounds, "max_queries": longest, "max_keys": longest}
        return bits(*(t[:, rows] for t in (q, k, v, dout)), **options, **call)

    together = packed(slice(90), [33, 50, 7], 400)  # as if a long one were among them: tiles of more rows
    for single, shared in zip(packed(slice(33, 83), [50], 50), together, strict=True):
        assert torch.equal(single, shared[:, 33:83])
