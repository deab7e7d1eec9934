"""The flash-attn functions against a naive float64 reference with flash-attn's conventions."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import oracles
from helpers.grids import thinned
from torch import Tensor

import vitfast
from vitfast import testing
from vitfast.attention.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from vitfast.attention.sdpa import attention_backend
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded, make

FP32, FP16, BF16 = testing.DTYPES
NONE = (-1, -1)
each_backend = pytest.mark.parametrize("backend", ["auto", "triton"])


def reference(q, k, v, softmax_scale=None, causal=False, window_size=NONE, softcap=0.0, alibi_slopes=None, dtype=None):
    """The oracle by flash-attn's arguments, aligned at the bottom right; a query that sees no key has lse +inf."""
    left, right = (None if side < 0 else side for side in window_size)
    out, lse = oracles.attention(
        q, k, v, left=left, right=0 if causal else right, offset=k.shape[1] - q.shape[1], softcap=softcap,
        slopes=alibi_slopes, scale=softmax_scale, dtype=dtype or torch.float64,
    )  # fmt: skip
    return out, lse.masked_fill(lse == -float("inf"), float("inf"))


def inputs(queries=7, keys=12, heads=4, kv_heads=4, head_dim=16, batch=2, dtype=FP32):
    shapes = ((batch, queries, heads, head_dim), *[(batch, keys, kv_heads, head_dim)] * 2)
    return [guarded(make(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]


def check(actual, q, k, v, **options):
    """Against the float64 reference; what fp32 arithmetic alone costs is the baseline."""
    lse = None
    if isinstance(actual, tuple):
        actual, lse, third = actual
        assert third is None
    oracle = reference(q, k, v, **options)
    baseline = reference(q, k, v, **options, dtype=FP32)
    assert actual.is_contiguous()
    assert_close(actual, oracle[0], baseline[0].to(actual.dtype))
    if lse is not None:
        assert_close(lse, oracle[1], baseline[1])


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
OPTIONS = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left window": {"window_size": (3, -1)},
    "right window": {"window_size": (-1, 2)},
    "this key only": {"window_size": (0, 0)},
    "causal, scale 0": {"causal": True, "softmax_scale": 0.0},
    "causal, scale below 0": {"causal": True, "softmax_scale": -0.5},
    "causal window": {"causal": True, "window_size": (3, 5)},
    "softcap": {"softcap": 1.5},
    "softcap causal": {"softcap": 0.8, "causal": True, "softmax_scale": 0.5},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi per batch": {"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)]), "causal": True},
    "all": {"alibi_slopes": SLOPES, "softcap": 2.0, "window_size": (5, -1), "causal": True, "softmax_scale": -0.3},
}
LENGTHS = [(7, 12), (12, 7), (9, 9), (1, 6)]
LENGTHS_BY_DEFAULT = [LENGTHS[0], *(pytest.param(lengths, marks=pytest.mark.full) for lengths in LENGTHS[1:])]


def on_device(options):
    return {name: x.to(testing.device()) if isinstance(x, Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS_BY_DEFAULT, ids=str)
@each_backend
def test_options(name, lengths, backend):
    options = on_device(OPTIONS[name])
    q, k, v = inputs(*lengths)
    with attention_backend(backend):
        check(flash_attn_func(q, k, v, **options), q, k, v, **options)
        check(flash_attn_func(q, k, v, **options, return_attn_probs=True), q, k, v, **options)


@pytest.mark.parametrize("name", ["causal", "causal, scale 0", "causal, scale below 0"])
@each_backend
def test_causal_with_as_many_keys_as_queries(name, backend):
    """Where a flag may stand for the mask."""
    q, k, v = inputs(9, 9)
    with attention_backend(backend):
        check(flash_attn_func(q, k, v, **OPTIONS[name]), q, k, v, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "lengths", [(20, 33), *(pytest.param(lengths, marks=pytest.mark.full) for lengths in ((33, 20), (33, 33)))], ids=str
)
def test_kernels(name, lengths):
    options = on_device(OPTIONS[name])
    q, k, v = inputs(*lengths, batch=2)
    with attention_backend("triton"):
        check(flash_attn_func(q, k, v, **options), q, k, v, **options)


@pytest.mark.parametrize("dtype", thinned([FP16, BF16]), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@each_backend
def test_half_precision(name, dtype, backend):
    options = on_device(OPTIONS[name])
    q, k, v = inputs(dtype=dtype)
    with attention_backend(backend):
        check(flash_attn_func(q, k, v, **options), q, k, v, **options)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_alibi_far_away_keeps_its_digits(dtype):
    # |i - j| beyond what half precision holds: a bias rounded to q's dtype would be off by whole units.
    q, k, v = inputs(1, 700, heads=1, kv_heads=1, dtype=dtype, batch=1)
    slopes = torch.tensor([-0.9], device=q.device)  # negative: the far keys count most
    check(flash_attn_func(q, k, v, alibi_slopes=slopes), q, k, v, alibi_slopes=slopes)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", ["plain", "causal", "all"])
@pytest.mark.parametrize("lse", [False, True])
@each_backend
def test_fewer_key_heads(kv_heads, name, lse, backend):
    options = on_device(OPTIONS[name])
    q, k, v = inputs(kv_heads=kv_heads)
    with attention_backend(backend):
        check(flash_attn_func(q, k, v, **options, return_attn_probs=lse), q, k, v, **options)


@pytest.mark.parametrize("name", ["plain", "causal", "all"])
def test_packed(name):
    options = on_device(OPTIONS[name])
    qkv = guarded(make(2, 9, 3, 4, 16))
    kv = guarded(make(2, 12, 2, 2, 16))
    check(flash_attn_qkvpacked_func(qkv, **options), *qkv.unbind(2), **options)
    q = qkv[:, :, 0]
    check(flash_attn_kvpacked_func(q, kv, **options), q, *kv.unbind(2), **options)
    assert isinstance(flash_attn_qkvpacked_func(qkv, return_attn_probs=True), tuple)
    assert isinstance(flash_attn_kvpacked_func(q, kv, return_attn_probs=True), tuple)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("lse", [False, True])
def test_empty(shape, lse):
    batch, queries, keys = shape
    q, k, v = inputs(queries, keys, batch=batch)
    result = flash_attn_func(q, k, v, causal=True, return_attn_probs=lse)
    out = result[0] if lse else result
    assert out.shape == q.shape
    assert not out.any()
    if lse:
        assert (result[1] == float("inf")).all()


# -- sequences of different lengths --------------------------------------------------------------

SEQUENCES = {
    "mixed": ([3, 7, 1], [5, 4, 6]),
    "same": ([4, 2], [4, 2]),
    "empty ones": ([0, 3, 2, 0], [2, 0, 4, 0]),
    "one": ([6], [9]),
    "nothing": ([0, 0], [0, 0]),
}


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=testing.device())


def each_sequence(q, k, v, lengths_q, lengths_k, **options):
    """The reference one sequence after another: out [tokens, H, D] and lse [H, tokens]."""
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    for i, (q_part, k_part, v_part) in enumerate(parts):
        slope = slopes if slopes is None or slopes.ndim == 1 else slopes[i]
        out, lse = reference(q_part[None], k_part[None], v_part[None], **options, alibi_slopes=slope)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sequences", thinned(SEQUENCES))
@each_backend
def test_varlen(name, sequences, backend):
    lengths_q, lengths_k = SEQUENCES[sequences]
    options = on_device(OPTIONS[name])
    if name == "alibi per batch":
        options["alibi_slopes"] = make(len(lengths_q), 4, seed=7).abs()
    q, k, v = (guarded(make(sum(n), h, 16, seed=i)) for i, (n, h) in enumerate([(lengths_q, 4), *[(lengths_k, 2)] * 2]))
    call = (q, k, v, cumulative(lengths_q), cumulative(lengths_k), max(lengths_q) + 1, max(lengths_k))
    oracle = each_sequence(q, k, v, lengths_q, lengths_k, **options)
    baseline = each_sequence(q, k, v, lengths_q, lengths_k, **options, dtype=FP32)
    with attention_backend(backend):
        assert_close(flash_attn_varlen_func(*call, **options), oracle[0], baseline[0])
        out, lse, third = flash_attn_varlen_func(*call, **options, return_attn_probs=True)
    assert third is None
    assert_close((out, lse), oracle, baseline)


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_packed_on_the_kernels(causal):
    lengths = [3, 11, 0, 6]
    qkv = guarded(make(20, 3, 2, 16))
    with attention_backend("triton"):
        actual = flash_attn_varlen_qkvpacked_func(qkv, cumulative(lengths, torch.int64), 11, causal=causal)
    oracle, _ = each_sequence(*qkv.unbind(1), lengths, lengths, causal=causal)
    baseline, _ = each_sequence(*qkv.unbind(1), lengths, lengths, causal=causal, dtype=FP32)
    assert_close(actual, oracle, baseline)


@each_backend
@pytest.mark.parametrize("place", [0, 6, 7, 9])
def test_varlen_sequences_cannot_reach_each_other(place, backend):
    lengths = [7, 3]
    qkv = guarded(make(10, 3, 2, 16))
    qkv[place] = float("nan")
    with attention_backend(backend):
        actual = flash_attn_varlen_qkvpacked_func(qkv, cumulative(lengths), 8)
    first = place < 7
    assert actual[:7].isnan().all() == first
    assert actual[7:].isnan().all() != first
    assert (actual[7:] if first else actual[:7]).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has synchronisations to count")
@pytest.mark.gpu
@pytest.mark.device
def test_varlen_does_not_synchronise():
    qkv, lengths = make(10, 3, 2, 16, dtype=FP16), cumulative([7, 3])
    flash_attn_varlen_qkvpacked_func(qkv, lengths, 7, causal=True)  # compiles, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_varlen_qkvpacked_func(qkv, lengths, 7, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- gradients, dropout, compile -----------------------------------------------------------------


def torchs_own(q, k, v, softmax_scale=None, causal=False, window_size=NONE, softcap=0.0, alibi_slopes=None):
    """What torch's op gives, the options written as a bias; it has no softcap."""
    if softcap:
        return reference(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, dtype=q.dtype)[0]
    queries, keys = q.shape[1], k.shape[1]
    distance = torch.arange(keys, device=q.device) - torch.arange(keys - queries, keys, device=q.device)[:, None]
    left, right = (side if side >= 0 else keys + queries for side in window_size)
    seen = (distance >= -left) & (distance <= (0 if causal else right))
    slopes = torch.zeros(q.shape[2], device=q.device) if alibi_slopes is None else alibi_slopes
    bias = (-slopes[..., None, None] * distance.abs()).masked_fill(~seen, -float("inf"))
    free = not causal and window_size == NONE and alibi_slopes is None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, None if free else bias, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, deterministic):
    options = on_device(OPTIONS[name])
    tensors = [t.requires_grad_() for t in inputs(kv_heads=2)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    weight = make(2, 7, 4, 16, seed=9)

    def gradients(out, of):
        """In one tensor: where a row sees one key, the queries' gradient is nothing but rounding."""
        return torch.cat([g.flatten() for g in torch.autograd.grad((out * weight.to(out.dtype)).sum(), of)])

    actual = gradients(flash_attn_func(*tensors, **options, deterministic=deterministic), tensors)
    oracle = gradients(reference(*wide, **options)[0], wide)
    baseline = gradients(torchs_own(*tensors, **options), tensors)
    assert_close(actual, oracle, baseline)


@pytest.mark.parametrize("softcap", [0.0, 1.0])
def test_dropout(softcap):
    q, k, v = inputs(keys=400, heads=1, kv_heads=1, head_dim=8)
    v = torch.ones_like(v)
    torch.manual_seed(0)
    sums = flash_attn_func(q, k, v, dropout_p=0.5, softcap=softcap)
    assert sums.std() > 0.01  # weights no longer sum to 1 ...
    assert abs(sums.mean() - 1) < 0.1  # ... but on average


def test_autocast_leaves_the_formula_alone():
    q, k, v = inputs()
    with torch.autocast(q.device.type, BF16):
        for softcap in (0.0, 2.0):
            check(flash_attn_func(q, k, v, softcap=softcap), q, k, v, softcap=softcap)


@each_backend
def test_compiles(backend):
    torch._dynamo.reset()
    q, k, v = inputs(20, 20)

    def call(q, k, v):
        return flash_attn_func(q, k, v, causal=True, window_size=(5, 0)) * 2

    with attention_backend(backend):
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v))


def test_varlen_compiles():
    torch._dynamo.reset()
    qkv, lengths = make(10, 3, 2, 16), cumulative([7, 3])

    def call(qkv, lengths):
        return flash_attn_varlen_qkvpacked_func(qkv, lengths, 7, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, lengths), call(qkv, lengths))


# -- interface -----------------------------------------------------------------------------------

COMMON = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
          "return_attn_probs"]  # fmt: skip
SIGNATURES = {
    flash_attn_func: ["q", "k", "v", *COMMON],
    flash_attn_qkvpacked_func: ["qkv", *COMMON],
    flash_attn_kvpacked_func: ["q", "kv", *COMMON],
    flash_attn_varlen_func: ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", *COMMON,
                             "block_table"],
    flash_attn_varlen_qkvpacked_func: ["qkv", "cu_seqlens", "max_seqlen", *COMMON],
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature(function):
    parameters = inspect.signature(function).parameters
    assert list(parameters) == SIGNATURES[function]
    defaults = [0.0, None, False, (-1, -1), 0.0, None, False, False]
    assert [parameters[name].default for name in COMMON] == defaults
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert getattr(vitfast, function.__name__) is function


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="attn_mask"):
        flash_attn_func(*inputs(), attn_mask=None)


REJECTED = {
    "dropout_p must be in [0, 1), got 1.0": {"dropout_p": 1.0},
    "return_attn_probs needs dropout_p = 0": {"dropout_p": 0.5, "return_attn_probs": True},
    "softcap must be 0 (off) or positive, got -1.0": {"softcap": -1.0},
    "window_size must be two numbers": {"window_size": (-2, 0)},
    "alibi_slopes must be [H] or [B, H] = (2, 4), got (3,)": {"alibi_slopes": torch.ones(3)},
    "q must be [B, N, H, D], got shape (7, 4, 16)": {"q": make(7, 4, 16)},
    "q has dtype torch.float64": {"q": make(2, 7, 4, 16).double()},
    "k has dtype torch.float16": {"k": make(2, 12, 4, 16).half()},
    "k has shape (2, 11, 4, 16), v (2, 12, 4, 16)": {"k": make(2, 11, 4, 16)},
    "q has head dim 8, k and v 16": {"q": make(2, 7, 4, 8)},
    "the heads of k and v must divide q's, got 4 and 6": {"q": make(2, 7, 6, 16)},
    "q has batch size 1, k and v 2": {"q": make(1, 7, 4, 16)},
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    named = dict(zip("qkv", inputs(), strict=True)) | on_device(REJECTED[message])
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        flash_attn_func(**named)
    assert message in str(caught.value)


VARLEN_REJECTED = {
    "qkv must be [tokens, 3, H, D]": {"qkv": make(10, 2, 2, 16)},
    "cu_seqlens_q must be int32 or int64 [B + 1]": {"cu_seqlens": torch.tensor([0.0, 10.0])},
    "max_seqlen_q must not be negative, got -1": {"max_seqlen": -1},
}
VARLEN_REJECTED_ON_CPU = {
    "max_seqlen_q = 6, got [0, 7, 10]": {"max_seqlen": 6},
    "rise from 0 to the 10 tokens": {"cu_seqlens": torch.tensor([0, 7, 11])},
    "got [1, 7, 10]": {"cu_seqlens": torch.tensor([1, 7, 10])},
    "got [0, 12, 10]": {"cu_seqlens": torch.tensor([0, 12, 10])},
}


@pytest.mark.parametrize("message", [*VARLEN_REJECTED, *VARLEN_REJECTED_ON_CPU])
def test_varlen_rejects(message):
    if message in VARLEN_REJECTED_ON_CPU and testing.device().type != "cpu":
        pytest.skip("lengths on a GPU are not read: that would be a synchronisation")
    cases = VARLEN_REJECTED | VARLEN_REJECTED_ON_CPU
    named = {"qkv": make(10, 3, 2, 16), "cu_seqlens": cumulative([7, 3]), "max_seqlen": 7} | on_device(cases[message])
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        flash_attn_varlen_qkvpacked_func(**named)
    assert message in str(caught.value)


def test_paged_keys_are_refused():
    q, k, v = (make(10, 2, 16, seed=i) for i in range(3))
    lengths = cumulative([7, 3])
    with pytest.raises(ValueError, match="block_table"):
        flash_attn_varlen_func(q, k, v, lengths, lengths, 7, 7, block_table=torch.zeros(2, 2, dtype=torch.int32))
