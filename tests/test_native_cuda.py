"""The C++ extension's CUDA attention on a GPU. Without one, see test_emulated_attention.py."""

import importlib
import importlib.util

import pytest
import torch

from vitfast import ops
from vitfast.ops import reference, registry
from vitfast.testing import check_op, guarded, make, strided

FP16, BF16 = DTYPES = (torch.float16, torch.bfloat16)


def why_not():
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    if importlib.util.find_spec("vitfast._C") is None:
        return "vitfast._C is not built"
    state = importlib.import_module("vitfast._C").build_info()["cuda"]
    return f"vitfast._C has no CUDA kernels: {state}" if state.startswith("not built") else ""


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


@pytest.mark.parametrize("tokens", [16, 17, 64, 65, 208, 209, 257, 272, 273, 320])
def test_tokens(tokens):
    check_op(native, reference.attention, *packed(3, tokens, 5, 64, BF16))


def test_many_blocks_strides_and_scales():
    check_op(native, reference.attention, *packed(64, 197, 12, 64, BF16))
    q = guarded(make(2, 3, 1000, 72, dtype=FP16)).transpose(1, 2)
    k, v = (strided(make(2, 50, 3, 72, dtype=FP16, seed=seed)) for seed in (1, 2))
    for scale in (None, -0.2, 0.0):
        check_op(native, reference.attention, q, k, v, scale=scale)
    assert not native(q, k[:, :0], v[:, :0]).any()


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
