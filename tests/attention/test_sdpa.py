"""vitfast.scaled_dot_product_attention: corner cases by name, routes, gradients, torch's machinery."""

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers.grids import thinned
from torch import Tensor

import vitfast
from vitfast import testing
from vitfast.attention.sdpa import Route, attention_backend, explain, scaled_dot_product_attention
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded, make

FP32, FP16, BF16 = testing.DTYPES
INF = float("inf")


def qkv(*, batch=2, heads=3, queries=9, keys=20, head_dim=16, dtype=FP32):
    return [guarded(make(batch, heads, n, head_dim, dtype=dtype, seed=i)) for i, n in enumerate((queries, keys, keys))]


@pytest.fixture
def kernels():
    with attention_backend("triton"):
        yield


@pytest.mark.usefixtures("kernels")
def test_causal_is_top_left():
    q, k, v = qkv()
    actual = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(actual[:, :, 0], v[:, :, 0])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_causal_with_scale_not_positive(scale):
    q, k, v = qkv()
    mask = torch.ones(9, 20, dtype=torch.bool, device=q.device).tril()
    oracle = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), attn_mask=mask, scale=scale)
    baseline = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    assert_close(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), oracle, baseline)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("blind", [False, -INF])
def test_rows_that_see_nothing_give_zeros(blind):
    q, k, v = qkv()
    mask = torch.ones(9, 20, dtype=torch.bool, device=q.device) if blind is False else make(9, 20)
    mask[4] = blind
    actual = scaled_dot_product_attention(q, k, v, mask)
    assert not actual[:, :, 4].any()
    assert actual[:, :, [3, 5]].any(-1).all()


@pytest.mark.usefixtures("kernels")
def test_row_of_smallest_numbers_is_an_average():
    q, k, v = qkv()
    actual = scaled_dot_product_attention(q, k, v, torch.full((9, 20), torch.finfo(FP32).min, device=q.device))
    torch.testing.assert_close(actual, v.mean(2, keepdim=True).expand_as(actual))


@pytest.mark.usefixtures("kernels")
def test_no_keys_give_zeros():
    actual = scaled_dot_product_attention(*qkv(keys=0))
    assert actual.shape == (2, 3, 9, 16)
    assert not actual.any()


def test_mask_with_causal_is_torchs_affair():
    q, k, v = qkv()
    mask = make(9, 20) > 0
    assert "is_causal" in explain(q, k, v, mask, is_causal=True).reasons[-1]
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        try:
            results.append(function(q, k, v, mask, is_causal=True))
        except RuntimeError as error:
            results.append(str(error))
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], Tensor):
        assert torch.equal(*results)


def test_dropout_applies_in_evaluation():
    q, k, v = qkv()
    assert not scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


ERRORS = {
    "fewer heads without enable_gqa": lambda q, k, v: ((q, k[:, :2], v[:, :2]), {}),
    "heads that do not divide": lambda q, k, v: ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
    "dtype mismatch": lambda q, k, v: ((q, k.half(), v), {}),
    "integers": lambda q, k, v: ((q.int(), k.int(), v.int()), {}),
    "one axis": lambda q, k, v: ((q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}),
    "integer mask": lambda q, k, v: ((q, k, v, torch.ones(9, 20, dtype=torch.int32, device=q.device)), {}),
    "mask too small": lambda q, k, v: ((q, k, v, make(9, 19)), {}),
    "head dims differ": lambda q, k, v: ((q, k[..., :8], v), {}),
    "no tensor": lambda q, k, v: (([1.0], k, v), {}),
    "is_causal is no bool": lambda q, k, v: ((q, k, v), {"is_causal": 1}),
    "scale is no number": lambda q, k, v: ((q, k, v), {"scale": "1"}),
    "dropout_p is no number": lambda q, k, v: ((q, k, v), {"dropout_p": "0"}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_torchs(case):
    args, kwargs = ERRORS[case](*qkv())
    with pytest.raises(Exception) as torchs:  # noqa: PT011 - whatever torch raises
        F.scaled_dot_product_attention(*args, **kwargs)
    with pytest.raises(torchs.type) as ours:
        scaled_dot_product_attention(*args, **kwargs)
    assert str(ours.value) == str(torchs.value)
    with pytest.raises(vitfast.BackendError), attention_backend("triton"):
        scaled_dot_product_attention(*args, **kwargs)


# -- routes --------------------------------------------------------------------------------------


class Tagged(Tensor):
    """A subclass, which may mean anything."""


ROUTES = {
    "dropout_p is 0.1": lambda q, k, v: ((q, k, v), {"dropout_p": 0.1}),
    "value has head dim 8": lambda q, k, v: ((q, k, v[..., :8]), {}),
    "head dim 0 is outside 1..256": lambda q, k, v: ((q[..., :0], k[..., :0], v[..., :0]), {}),
    "head dim 272 is outside": lambda q, k, v: ([t.repeat(1, 1, 1, 17) for t in (q, k, v)], {}),
    "dtype float64": lambda q, k, v: ([t.double() for t in (q, k, v)], {}),
    "5, 5 and 5 axes": lambda q, k, v: ([t[None] for t in (q, k, v)], {}),
    "key has 2 heads, which do not divide query's 3": lambda q, k, v: (
        (q, k[:, :2], v[:, :2]),
        {"enable_gqa": True},
    ),
    "query is a Tagged": lambda q, k, v: ((q.as_subclass(Tagged), k, v), {}),
    "scale is inf": lambda q, k, v: ((q, k, v), {"scale": INF}),
    "need broadcasting": lambda q, k, v: ((q, k[:1], v[:1]), {}),
    "last axis of key has stride 20": lambda q, k, v: ((q, k.mT.contiguous().mT, v), {}),
    "key is not a dense tensor": lambda q, k, v: ((q, k.to_sparse(), v), {}),
    "query is on meta": lambda q, k, v: ((q, k.to("meta"), v), {}),
}


@pytest.mark.parametrize("reason", ROUTES)
def test_reasons(reason):
    args, kwargs = ROUTES[reason](*qkv())
    route = explain(*args, **kwargs)
    assert route.backend == "torch"
    wanted = reason.replace("query is on meta", "key is on meta")
    assert any(wanted in given for given in route.reasons), route.reasons
    with pytest.raises(vitfast.BackendError) as caught, attention_backend("triton"):
        scaled_dot_product_attention(*args, **kwargs)
    assert wanted in str(caught.value)


def test_all_reasons_are_told():
    q, k, v = qkv()
    with (
        pytest.raises(vitfast.BackendError, match=r"dropout_p.*dtypes.*head dim") as caught,
        attention_backend("triton"),
    ):
        explain(q, k.half(), v[..., :8], dropout_p=0.5)
    assert str(caught.value).count(";") >= 2


def test_taken_calls_have_no_reason(kernels):
    q, k, v = qkv()
    assert explain(q, k, v) == Route("triton")
    assert explain(q, k[:, :1], v[:, :1], enable_gqa=True) == Route("triton")
    assert explain(torch.cat([q, q], 1), k, v, enable_gqa=True) == Route("triton")
    assert explain(q[0], k[0], v[0]) == Route("triton")
    assert explain(q[0, 0], k[0, 0], v[0, 0]) == Route("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the route depends on the table shipped for it")
def test_unmeasured_device_takes_torch():
    route = explain(*qkv())
    assert route.backend == "torch"
    assert "no measurement" in route.reasons[0]


def test_choices_nest_and_end():
    q, k, v = qkv()
    before = explain(q, k, v)
    with attention_backend("torch"):
        assert "attention_backend('torch')" in explain(q, k, v).reasons[0]
        with attention_backend("triton"):
            assert explain(q, k, v).backend == "triton"
        with pytest.raises(ZeroDivisionError), attention_backend("triton"):
            raise ZeroDivisionError
        assert explain(q, k, v).backend == "torch"
    assert explain(q, k, v) == before


def test_overlapping_choices():
    # Two threads' contexts end in the order they began.
    q, k, v = qkv()
    before = explain(q, k, v)
    first, second = attention_backend("torch"), attention_backend("triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert explain(q, k, v).backend == "triton"
    second.__exit__(None, None, None)
    assert explain(q, k, v) == before


def test_choices_from_many_threads():
    q, k, v = qkv()
    before = explain(q, k, v)

    def enter_and_leave():
        for _ in range(50):
            with attention_backend("triton"):
                explain(q, k, v)

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert explain(q, k, v) == before


def test_unknown_choice():
    with (
        pytest.raises(ValueError, match=r"one of \('auto', 'torch', 'triton'\), got 'flash'"),
        attention_backend("flash"),
    ):
        pass


def test_public_names():
    assert vitfast.scaled_dot_product_attention is scaled_dot_product_attention
    assert vitfast.explain is explain
    assert vitfast.attention_backend is attention_backend


# -- gradients -----------------------------------------------------------------------------------

GRADIENTS = {
    "plain": lambda q, k, v: ((q, k, v), {}),
    "causal": lambda q, k, v: ((q, k, v), {"is_causal": True}),
    "scale": lambda q, k, v: ((q, k, v), {"scale": 0.1}),
    "one key head": lambda q, k, v: ((q, k[:, :1], v[:, :1]), {"enable_gqa": True}),
    "half the key heads": lambda q, k, v: ((torch.cat([q, q.flip(1)], 1), k, v), {"enable_gqa": True}),
    "three axes": lambda q, k, v: ((q[0], k[0], v[0]), {}),
    "bool mask": lambda q, k, v: ((q, k, v, make(9, 20) > -0.5), {}),
    "bias": lambda q, k, v: ((q, k, v, make(9, 20)), {}),
    "bias per head": lambda q, k, v: ((q, k, v, make(3, 9, 20)), {}),
    "bias per batch and head": lambda q, k, v: ((q, k, v, make(2, 3, 9, 20)), {}),
    "bias per key": lambda q, k, v: ((q, k, v, make(2, 1, 1, 20)), {}),
    "bias, three axes": lambda q, k, v: ((q[0], k[0], v[0], make(3, 9, 20)), {}),
}


@pytest.mark.parametrize("dtype", thinned([FP32, BF16]), ids=str)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_the_kernels(case, dtype):
    args, kwargs = GRADIENTS[case](*qkv(dtype=dtype, head_dim=24))
    args = [t if t.dtype == torch.bool else t.to(dtype) for t in args]
    weight = make(*args[0].shape, dtype=dtype, seed=8)

    def gradients(function, kind):
        leaves = [t.detach() if t.dtype == torch.bool else t.detach().to(kind).requires_grad_() for t in args]
        function(*leaves, **kwargs).backward(weight.to(kind))
        return torch.cat([t.grad.flatten() for t in leaves if t.requires_grad])  # one vector, one bound

    oracle = gradients(F.scaled_dot_product_attention, torch.float64)
    baseline = gradients(F.scaled_dot_product_attention, dtype)
    with attention_backend("triton"):
        actual = gradients(scaled_dot_product_attention, dtype)
    assert_close(actual, oracle, baseline)


def test_training_compiles():
    torch._dynamo.reset()
    inputs = qkv()
    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in inputs]
        with attention_backend("triton"):
            function(*leaves).square().sum().backward()
        results.append([t.grad for t in leaves])
    torch.testing.assert_close(*results)


def test_gradients_of_the_torch_route():
    leaves = [t.requires_grad_() for t in qkv()]
    actual, wanted = (
        torch.autograd.grad(function(*leaves, is_causal=True).square().sum(), leaves)
        for function in (scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(actual, wanted)


# -- torch's machinery ---------------------------------------------------------------------------


def both(q, k, v, mask=None):
    return scaled_dot_product_attention(q, k, v, mask, scale=0.3) * 2


def test_compiles_whole_and_follows_the_choice():
    torch._dynamo.reset()
    inputs = (*qkv(), make(9, 20))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    eager = both(*inputs)
    assert torch.equal(compiled(*inputs), eager)
    with attention_backend("triton"):
        by_kernels = both(*inputs)
        actual = compiled(*inputs)
        assert torch.equal(actual, by_kernels)
        assert actual.stride() == by_kernels.stride()
    with attention_backend("torch"):
        assert torch.equal(compiled(*inputs), F.scaled_dot_product_attention(*inputs, scale=0.3) * 2)
    torch.testing.assert_close(by_kernels, eager)


@pytest.mark.usefixtures("kernels")
def test_compiles_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 12, 20):
        inputs = qkv(queries=tokens, keys=tokens)
        assert torch.equal(compiled(*inputs), both(*inputs))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return scaled_dot_product_attention(q, k, v)

    inputs = tuple(qkv())
    program = torch.export.export(Attention(), inputs, strict=strict)
    assert any("vitfast.attention" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*inputs), scaled_dot_product_attention(*inputs))


def test_vmap_takes_torch_or_refuses():
    q, k, v = qkv()
    batches = [torch.stack([t, t.flip(0)]) for t in (q, k, v)]
    actual = torch.vmap(scaled_dot_product_attention)(*batches)
    wanted = torch.stack([F.scaled_dot_product_attention(*parts) for parts in zip(*batches, strict=True)])
    torch.testing.assert_close(actual, wanted)
    with pytest.raises(vitfast.BackendError, match=r"torch\.func"), attention_backend("triton"):
        torch.vmap(scaled_dot_product_attention)(*batches)


def test_forward_mode_is_refused(kernels):
    q, k, v = qkv()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(vitfast.BackendError, match="forward-mode"):
            scaled_dot_product_attention(dual, k, v)


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, FP32])
def test_autocast(mask_dtype):
    q, k, v = qkv()
    mask = None if mask_dtype is None else (make(9, 20) > 0).to(mask_dtype)
    with torch.autocast(q.device.type, BF16):
        wanted = F.scaled_dot_product_attention(q, k, v, mask)
        assert torch.equal(scaled_dot_product_attention(q, k, v, mask), wanted)
        with attention_backend("triton"):
            actual = scaled_dot_product_attention(q, k.half(), v, mask)
    rounded = [t.to(BF16).double() for t in (q, k.half(), v)]
    wide = mask if mask_dtype in (None, torch.bool) else mask.double()
    assert_close(actual, F.scaled_dot_product_attention(*rounded, wide), wanted)


def test_nested_tensors_take_torch():
    parts = [make(2, n, 8, seed=n) for n in (5, 3)]
    nested = torch.nested.nested_tensor(parts)
    assert explain(nested, nested, nested).backend == "torch"
    with pytest.raises(vitfast.BackendError, match="dense"), attention_backend("triton"):
        scaled_dot_product_attention(nested, nested, nested)
