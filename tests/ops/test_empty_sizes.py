"""Sizes of zero and one at every op and backend: a product of nothing is refused by all alike, no rows are no work."""

import importlib.util

import pytest
import torch

from vitfast import ops, testing
from vitfast.ops import reference

built = importlib.util.find_spec("vitfast._C") is not None
BACKENDS = (None, "torch", "triton", pytest.param("native", marks=pytest.mark.skipif(not built, reason="not built")))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
make = testing.make


def embed(channels, width=16, batch=2, channels_last=False, pixels=torch.float32, **kwargs):
    shape = (batch, 8, 8, channels) if channels_last else (batch, channels, 8, 8)
    images = make(*shape).to(pixels)
    layout = {"patch_size": (4, 4), "channels_last": channels_last}
    return ops.patch_embed(images, make(width, 16 * channels), make(width), **layout, **kwargs)


@every_backend
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_without_channels(channels_last, pixels, backend):
    with pytest.raises(ValueError, match=r"patch_embed: images .* of shape \(2, .*\) have no channels"):
        embed(0, channels_last=channels_last, pixels=pixels, backend=backend)


@every_backend
@pytest.mark.parametrize("norm", [False, True])
def test_products_over_nothing(norm, backend):
    kwargs = {"backend": backend}
    if norm:
        kwargs |= {"row_stats": make(5, 0, 2), "weight_sum": make(4)}
    with pytest.raises(ValueError, match=r"linear: .* with K >= 1 do not fit: \(5, 0\) and \(4, 0\)"):
        ops.linear(make(5, 0), make(4, 0), make(4), **kwargs)
    with pytest.raises(ValueError, match=r"quantized_linear: .* with K >= 1 do not fit"):
        ops.quantized_linear(make(5, 0).to(torch.int8), make(5), make(4, 0).to(torch.int8), make(4), backend=backend)


@pytest.mark.parametrize("backend", [None, "torch", "triton"])
def test_halves_of_a_block_over_nothing(backend):
    with pytest.raises(ValueError, match=r"mlp \(fc1\): .* with K >= 1 do not fit: \(5, 0\) and \(8, 0\)"):
        ops.mlp(make(5, 0), make(8, 0), make(8), make(0, 8), make(0), backend=backend)
    with pytest.raises(ValueError, match=r"mlp: fc1_weight must have rows, got shape \(0, 4\)"):
        ops.mlp(make(5, 4), make(0, 4), make(0), make(4, 0), make(4), backend=backend)
    with pytest.raises(ValueError, match=r"attention_block: .* qkv_weight .* got \(1, 5, 4\) and \(0, 4\)"):
        ops.attention_block(make(1, 5, 4), make(0, 4), None, make(4, 0), None, heads=2, backend=backend)


@pytest.mark.parametrize("backend", [None, "torch", "triton"])
def test_statistics_of_nothing(backend):
    for x in (make(3, 0), make(1)[0]):
        with pytest.raises(ValueError, match=r"row_stats: x must have a non-empty last axis, got shape \("):
            ops.row_stats(x, backend=backend)
    with pytest.raises(ValueError, match=r"row_stats: x has dtype torch.int32"):
        ops.row_stats(make(3, 4).int(), backend=backend)


@every_backend
def test_statistics_of_no_columns(backend):
    with pytest.raises(ValueError, match=r"linear: stats needs weight rows, got weight of shape \(0, 8\)"):
        ops.linear(make(5, 8), make(0, 8), stats=True, backend=backend)


@every_backend
def test_no_rows(backend):
    assert embed(3, batch=0, backend=backend).shape == (0, 4, 16)
    y, stats = ops.linear(make(0, 8), make(16, 8), make(16), stats=True, backend=backend)
    assert y.shape == (0, 16)
    assert stats.shape == (0, 1, 2)
    assert ops.layer_norm(make(0, 8), make(8), make(8), backend=backend).shape == (0, 8)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("inner", [1, 2, 3])
def test_few_columns_in_int8(inner, rows, backend):
    """torch's own product of int8 is wrong with a single column, and says nothing."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (n, inner), generator=generator).to(torch.int8) for n in (rows, 4))
    x_scale, weight_scale = make(rows).abs().cpu(), make(4).abs().cpu()
    y = ops.quantized_linear(x, x_scale, weight, weight_scale, dtype=torch.float32, backend=backend)
    exact = reference.quantized_linear(x, x_scale, weight, weight_scale, dtype=torch.float32, upcast=True)
    by_hand = (x.double()[:, None] * weight.double()).sum(-1) * x_scale.double()[:, None] * weight_scale.double()
    assert torch.equal(exact, by_hand)
    testing.assert_close(y, exact, exact.float())
