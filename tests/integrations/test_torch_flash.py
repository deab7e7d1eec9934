"""vitfast in torch's registry of flash attention: activated, restored, and what aten's op gets from it."""

import pytest
import torch
from helpers import peers
from torch._subclasses.fake_tensor import FakeTensorMode

import vitfast.attention.sdpa
from vitfast.integrations import torch_flash
from vitfast.ops.accuracy import PEER_TOLERANCE
from vitfast.testing import device, make

registry = torch.nn.attention
NAME = "aten::_scaled_dot_product_flash_attention"
needs_registry = pytest.mark.skipif(
    not hasattr(registry, "restore_flash_attention_impl"), reason=f"torch {torch.__version__} has no registry"
)


def kernel(key="CUDA"):
    """The registrations of aten's op for a dispatch key, as torch's dispatcher prints them."""
    lines = torch._C._dispatch_dump(NAME).splitlines()
    return [line for line in lines if line.startswith(f"{key}:") or line.startswith(f"{key} ")]


@needs_registry
def test_activated_and_restored():
    before = kernel()
    with torch_flash.use():
        assert registry.current_flash_attention_impl() == "vitfast"
        assert "vitfast" in registry.list_flash_attention_impls()
        assert kernel() != before
        assert "torch_flash" in "".join(kernel())
        assert registry._cur_sdpa_kernel_backends(with_priority=True)[0] == registry.SDPBackend.FLASH_ATTENTION
    assert registry.current_flash_attention_impl() is None
    assert kernel() == before


@needs_registry
def test_what_was_active_comes_back():
    log = []

    class Other:
        def remove(self):
            log.append("removed")

    registry.register_flash_attention_impl("other", register_fn=lambda: log.append("put in") or Other())
    registry.activate_flash_attention_impl("other")
    try:
        with pytest.raises(KeyError), torch_flash.use():
            raise KeyError
        assert registry.current_flash_attention_impl() == "other"
        assert log == ["put in", "removed", "put in"]
    finally:
        registry.restore_flash_attention_impl()


def test_torch_without_a_registry(monkeypatch):
    monkeypatch.delattr(registry, "restore_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match="cannot restore flash attention implementations"):
        torch_flash.register()
    with pytest.raises(RuntimeError, match="replace_attention"), torch_flash.use():
        pass


@pytest.fixture
def on_this_device():
    """The implementation under the key of the device at hand; without a GPU, aten's op has none for the CPU."""
    handle = torch_flash._Handle(device().type.upper())
    yield
    handle.remove()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward_of_atens_op(causal, packed, dtype, on_this_device):
    """Values and log-sum-exp against float64; shapes, strides and dtypes as torch.compile assumes them."""
    q, k, v = (make(2, 3, 17, 16, seed=seed, dtype=dtype) for seed in range(3))
    if packed:
        q, k, v = make(2, 17, 3, 3, 16, dtype=dtype).permute(2, 0, 3, 1, 4)
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3)
    scores = q.double() @ k.double().mT * 0.3
    if causal:
        scores = scores.masked_fill(~torch.ones(17, 17, dtype=torch.bool, device=device()).tril(), float("-inf"))
    oracle = scores.softmax(-1) @ v.double()
    plain = torch.nn.functional.scaled_dot_product_attention(q.cpu(), k.cpu(), v.cpu(), is_causal=causal, scale=0.3)
    vitfast.testing.assert_close(found[0], oracle, plain.to(device()))
    assert (found[1] - scores.logsumexp(-1)).abs().max() <= PEER_TOLERANCE * scores.logsumexp(-1).abs().max()
    with FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda") for x in (q, k, v)]
        expected = torch.ops.aten._scaled_dot_product_flash_attention(*fakes, 0.0, causal, scale=0.3)
    for got, fake in zip(found, expected, strict=True):
        if isinstance(fake, torch.Tensor):
            assert (got.shape, got.stride(), got.dtype) == (fake.shape, fake.stride(), fake.dtype)
        else:
            assert got == fake


def test_dropout_is_refused(on_this_device):
    q = make(1, 1, 4, 16, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"no dropout and no debug mask, got dropout_p=0\.5"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.5)


@pytest.mark.gpu
@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="aten's own choice of flash exists on CUDA only")
@needs_registry
def test_a_model_on_a_gpu():
    """An unmodified model comes to the kernel, and its gradient, torch's own, agrees."""
    model = peers.timm_model(**peers.TIMM | {"embed_dim": 96}).to("cuda", torch.bfloat16)
    images = make(2, 3, 32, 32, dtype=torch.bfloat16)
    expected = model(images)
    wanted = torch.autograd.grad(expected.float().sin().sum(), list(model.parameters()))
    seen, original = [], torch_flash._flash_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flash, "_flash_attention", lambda *a, **k: seen.append(1) or original(*a, **k))
        with torch_flash.use():
            actual = model(images)
            gradients = torch.autograd.grad(actual.float().sin().sum(), list(model.parameters()))
    assert len(seen) == 2
    for got, want in zip((actual, *gradients), (expected, *wanted), strict=True):
        assert (got - want).float().norm() <= vitfast.testing.MODEL_TOLERANCES[torch.bfloat16].rms * want.float().norm()
