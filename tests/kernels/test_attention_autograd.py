"""torch.ops.vitfast.attention as torch differentiates it: autograd, autocast, compile, opcheck."""

import pytest
import torch
from helpers.attention_gradients import BF16, FP16, FP32, compare, random_mask

from vitfast import ops
from vitfast.kernels import attention as forward
from vitfast.ops import heads, reference, registry
from vitfast.testing import make

# slopes, softcap, left, right, offset, scale; no packed sequences
OPTIONS = (None, 0.0, None, 0, 0, 0.3, None, None, 0, 0)


def leaves(dtype=FP32, bias_shape=(2, 1, 7)):
    q, k, v = (make(1, n, 2, 24, dtype=dtype, seed=seed) for seed, n in enumerate((5, 7, 7)))
    return [t.requires_grad_() for t in (q, k, v, make(*bias_shape, seed=5))]


def run(q, k, v, bias, backend="triton", mask=None):
    return ops.attention(q, k, v, bias=bias, mask=mask, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_op_gradients(backend):
    q, k, v, bias = leaves()
    mask = random_mask(1, 1, 1, 7)
    out = run(q, k, v, bias, backend, mask)
    actual = torch.autograd.grad(out.mean(), (q, k, v, bias))  # mean: a gradient of stride 0
    dout = torch.full_like(out, 1 / out.numel())
    compare(actual, dout, q, k, v, bias=bias, mask=mask)


def test_public_function_is_differentiable():
    q, k, v, bias = leaves()
    ours, torchs = (
        torch.autograd.grad(ops.attention(q, k, v, bias=bias, backend=backend).square().sum(), (q, k, v, bias))
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(ours, torchs)


def test_only_what_needs_a_gradient_gets_one():
    q, k, v, bias = (t.detach() for t in leaves())
    v.requires_grad_()
    run(q, k, v, bias).sum().backward()
    assert v.grad is not None
    assert q.grad is k.grad is bias.grad is None


def test_statistics_are_made_for_a_backward_only(monkeypatch):
    q, k, v, bias = leaves()
    monkeypatch.setattr(forward, "attention_forward", lambda *args, **kwargs: pytest.fail("made for nothing"))
    with torch.no_grad():
        assert run(q, k, v, bias).grad_fn is None
    with torch.inference_mode():
        run(q, k, v, bias)
    run(*(t.detach() for t in (q, k, v, bias)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    q, k, v, bias = leaves()
    arguments = (q, k, v, bias, random_mask(5, 7), *OPTIONS, *heads.OPTIONS.values(), backend)
    torch.library.opcheck(torch.ops.vitfast.attention.default, arguments)


@pytest.mark.full
def test_opcheck_of_both_halves():
    q, k, v, bias = leaves()
    torch.library.opcheck(torch.ops.vitfast.attention_forward.default, (q, k, v, bias, None, *OPTIONS))
    q, k, v, bias = (t.detach() for t in (q, k, v, bias))
    out, stats = torch.ops.vitfast.attention_forward(q, k, v, bias, None, *OPTIONS)
    for bias_grad in (False, True):
        arguments = (torch.ones_like(out), q, k, v, out, stats, bias, None, *OPTIONS, bias_grad)
        torch.library.opcheck(torch.ops.vitfast.attention_backward.default, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_in_one_graph_with_its_gradient(backend):
    arguments = leaves()
    compiled = torch.compile(lambda *args: run(*args, backend), fullgraph=True, backend="aot_eager")
    expected, actual = (
        torch.autograd.grad(call(*arguments).square().sum(), arguments)
        for call in (lambda *args: run(*args, backend), compiled)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_autocast(dtype):
    q, k, v, bias = leaves()
    with torch.autocast(q.device.type, dtype):
        out = run(q, k, v, bias)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert [t.grad.dtype for t in (q, k, v, bias)] == [FP32] * 4
    low = [t.detach().to(dtype) for t in (q, k, v)]
    torch.testing.assert_close(out, run(*low, bias.detach()))


def test_second_derivative_is_refused():
    q, k, v, bias = leaves()
    (dq,) = torch.autograd.grad(run(q, k, v, bias).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()


def test_backend_without_a_gradient_is_refused(monkeypatch):
    entry = ops.Backend("native", "attention", reference.attention)
    monkeypatch.setattr(registry, "backend", lambda op, name: entry)
    with pytest.raises(ops.BackendError, match="'native' has no gradient"):
        run(*leaves(), "native")
