"""The C++ extension's patch_embed where it multiplies uint8 pixels in integers: how exact, and when not at all."""

import re

import pytest
import torch
from helpers.engines import PREPROCESS, SMALL
from helpers.patch_embed import GRID, inputs, packed

import vitfast
from vitfast import ops, testing
from vitfast.engine import plan_cache
from vitfast.ops import reference

LARGEST = 8355700  # the largest weight of an output channel in its integers; csrc/cpu/pixel_product.cpp
PATCH = {"patch_size": (16, 16), "channels_last": True}
INTEGERS = pytest.mark.parametrize("level", ["avx512_vnni"], indirect=True)


def why(weight, **layout):
    return ops.native.why_no_integers(weight, **(layout or PATCH))


def pack(weight, **layout):
    return ops.native.pack_patch_embed(weight, **(layout or PATCH), uint8=True)


@INTEGERS
def test_products_are_exact(level):
    """Weights that are integers in the first place: the result is the exact one, rounded to fp32 once."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-LARGEST, LARGEST + 1, (40, 768), generator=generator)
    weight[:, 7] = LARGEST
    images = torch.randint(0, 256, (2, 48, 80, 3), generator=generator, dtype=torch.uint8)
    images[0, :16, :16], images[0, :16, 16:32] = 0, 255
    weight[0], weight[1, 1:] = LARGEST, -LARGEST
    exact = reference.patches(images, (16, 16), True).long().sub(128) @ weight.t()
    assert torch.equal(packed(images, weight.float(), **PATCH), exact.double().float())


@INTEGERS
@pytest.mark.parametrize("pixel", [0, 255])
def test_longest_sums_do_not_overflow(pixel, level):
    layout = {"patch_size": (256, 256), "channels_last": True}
    images = torch.full((1, 256, 256, 1), pixel, dtype=torch.uint8)
    weight = torch.ones(3, 65536)
    weight[1] = -1
    assert why(weight, **layout) == ""
    got = packed(images, weight, **layout)
    assert torch.equal(got, (pixel - 128) * 65536 * torch.tensor([[[1.0, -1.0, 1.0]]]))
    layout["patch_size"] = (256, 257)
    assert why(torch.ones(3, 65792), **layout) == "K = 65792 is not a multiple of 4 from 4 to 65536"
    layout["patch_size"] = (7, 7)
    assert why(torch.ones(3, 147), **layout) == "K = 147 is not a multiple of 4 from 4 to 65536"


@INTEGERS
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("slope", [0, 1, None], ids=["flat", "smooth", "noise"])
def test_error_is_half_a_unit_times_the_differences_of_neighbours(slope, channels_last, level):
    """And what fp32 adds when it rounds the result: the last digits, the scale, the sum with what was left over."""
    images, weight, *_ = inputs(GRID[1], torch.float32, torch.uint8, channels_last)
    layout = {"patch_size": (14, 14), "channels_last": channels_last}
    if slope is not None:
        ramp = torch.arange(28) * slope
        ramp = 30 + ramp[:, None] + ramp
        images = (ramp[..., None] if channels_last else ramp).expand_as(images).byte().contiguous()
    rows = reference.patches(images, (14, 14), channels_last).double()
    rows = rows.unflatten(2, (-1, 3) if channels_last else (3, -1))
    along = 2 if channels_last else 3
    differences = rows.diff(dim=along).abs().sum(dim=(2, 3))
    unit = weight.abs().amax(1).double() / LARGEST
    exact = reference.patch_embed(images, weight, **layout, upcast=True)
    bound = 0.5 * unit * differences[..., None] + 2.0**-22 * exact.abs() + 3 * 64 * 2.0**-23 * unit
    error = (packed(images, weight, **layout) - exact).abs()
    assert (error <= bound).all()
    assert error.max() > 0.02 * bound.max()  # the bound says something


@INTEGERS
@pytest.mark.parametrize("width", [64, 1])
def test_weights_that_dwarf_the_others(width, level):
    """A few in an output channel, and the weight is multiplied in fp32; with more of them nothing much is lost."""
    images, weight, *_ = inputs(GRID[0], torch.float32, torch.uint8, True)
    weight = weight[:width]
    places = torch.randperm(768, generator=torch.Generator().manual_seed(0))
    for count in (1, 3, 16):
        weight[-1, places[:count]] = 1e4
        reason = why(weight)
        if count < 8:  # each of them has more than an eighth of the square sum
            noise = re.match(rf"output channel {width - 1} of the weight, .* has (\S*) times the noise of", reason)
            assert float(noise[1]) == pytest.approx((8 / count) ** 0.5, rel=0.05)
        else:
            assert reason == ""
        assert pack(weight).dtype == (torch.float32 if reason else torch.int8)
        for these in (images, images[:, :1].expand_as(images)):
            testing.check_op(packed, reference.patch_embed, these, weight, **PATCH)


@INTEGERS
def test_weights_without_a_scale(level):
    _, weight, *_ = inputs(GRID[0], torch.float32, torch.uint8, True)
    weight[5] = 0
    weight[6] = 0
    weight[6, 9] = 3.0  # alone, so that nothing is rounded
    assert why(weight) == ""
    for value in (float("inf"), float("nan"), 1e-35):
        broken = weight.clone()
        broken[17] = value
        assert why(broken) == "output channel 17 of the weight is not finite, or too small"
        assert pack(broken).dtype == torch.float32


@INTEGERS
def test_packed_form(level):
    images, weight, *rest = inputs(GRID[0], torch.float32, torch.uint8, True)
    ready = pack(weight)
    assert ready.dtype == torch.int8 and ready.shape == (64, 3 * 768 + 4 * 3 + 16)
    with pytest.raises(ValueError, match=r"images has dtype torch.float32, allowed: torch.uint8"):
        ops.native.patch_embed_packed(images.float(), ready, *rest, **PATCH)
    with pytest.raises(ValueError, match=r"needs K = 3\*16\*16 = 768, got 767"):
        ops.native.patch_embed_packed(images, ready[:, 3:].contiguous(), *rest, **PATCH)
    with pytest.raises(ValueError, match=r"bias has dtype torch.bfloat16, allowed: torch.float32"):
        ops.native.patch_embed_packed(images, ready, rest[0].bfloat16(), **PATCH)
    from vitfast import _C

    _C.limit_simd("avx512f")
    assert why(weight) == "there is no AVX-512 VNNI here"
    assert pack(weight).dtype == torch.float32
    with pytest.raises(ValueError, match="packed for integer products: there is no AVX-512 VNNI here"):
        ops.native.patch_embed_packed(images, ready, *rest, **PATCH)


@INTEGERS
def test_a_model_packs_for_the_images_it_gets(level, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: tmp_path)
    checkpoint = vitfast.Checkpoint(SMALL, testing.random_weights(SMALL), PREPROCESS)
    small = vitfast.Engine(checkpoint, device="cpu", dtype="fp32", backend="native")
    assert small.runner.weights.embed_uint8.weight.dtype == torch.int8
    assert small.runner.weights.embed_float.weight.dtype == torch.float32
    plain = vitfast.Engine(checkpoint, device="cpu", dtype="fp32", backend="torch")
    pixels = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    torch.testing.assert_close(small(pixels).tokens, plain(pixels).tokens, rtol=1e-4, atol=1e-4)
