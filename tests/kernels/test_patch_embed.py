"""Patch embedding straight from the image, against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from helpers.mutants import mutant

from vitfast import ops, testing
from vitfast.kernels import patch_embed as kernel
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import DTYPES, check_op, guarded, make, strided

FP32, FP16, BF16 = DTYPES
UINT8 = torch.uint8
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
PATCHES = {
    (16, 16): "most models",
    (14, 14): "DINOv2, CLIP L: K = 588 is not a multiple of any tile",
    (32, 32): "B/32",
    (8, 8): "S/8",
    (16, 8): "not square",
    (5, 3): "K = 45, below a tile, no aligned run",
    (1, 1): "every pixel a token",
}


def make_images(*shape, dtype=UINT8, seed=0):
    """Random pixels, uint8 over the whole range, in memory surrounded by poison."""
    if dtype != UINT8:
        return guarded(make(*shape, dtype=dtype, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    return guarded(torch.randint(0, 256, shape, dtype=UINT8, generator=generator).to(testing.device()))


def make_case(
    patch=(8, 8), grid=(2, 3), batch=2, channels=3, width=40, prefix=1, pixel=UINT8, dtype=BF16, channels_last=False
):
    """Arguments of patch_embed with everything in use; the weight is such that outputs are near 1."""
    height, image_width = patch[0] * grid[0], patch[1] * grid[1]
    shape = (batch, height, image_width, channels) if channels_last else (batch, channels, height, image_width)
    k = channels * patch[0] * patch[1]
    scale = k**-0.5 / (74 if pixel == UINT8 else 1)
    tensors = {
        "images": make_images(*shape, dtype=pixel),
        "weight": guarded(make(width, k, dtype=dtype, seed=1, scale=scale)),
        "bias": guarded(make(width, dtype=dtype, seed=2)),
        "position": guarded(make(grid[0] * grid[1], width, dtype=dtype, seed=3)),
        "prefix": guarded(make(prefix, width, dtype=dtype, seed=4)),
    }
    return tensors | {"patch_size": patch, "channels_last": channels_last}


def check(module=kernel, **case):
    check_op(module.patch_embed, reference.patch_embed, **case)


@LAYOUTS
@pytest.mark.parametrize("pixel", [UINT8, BF16], ids=str)
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_patches(patch, pixel, channels_last):
    check(**make_case(patch, pixel=pixel, channels_last=channels_last))


@LAYOUTS
@pytest.mark.parametrize("pixel", [UINT8, FP32], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(channels, pixel, channels_last):
    check(**make_case(channels=channels, pixel=pixel, dtype=FP16, channels_last=channels_last))


@LAYOUTS
@pytest.mark.parametrize("pixel", [UINT8, *DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, pixel, channels_last):
    check(**make_case(pixel=pixel, dtype=dtype, channels_last=channels_last))


@pytest.mark.parametrize("prefix", [None, 0, 1, 5])
@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_optional_arguments(bias, position, prefix):
    case = make_case(prefix=prefix or 0)
    absent = {"bias": bias, "position": position, "prefix": prefix is not None}
    check(**case | {name: None for name, present in absent.items() if not present})


@pytest.mark.parametrize("width", [1, 7, 48, 129, 192, 256])
def test_widths(width):
    check(**make_case((4, 4), width=width))


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize(("batch", "grid"), [(1, (1, 1)), (1, (13, 11)), (29, (1, 5)), (3, (7, 19))])
def test_images_across_tiles(batch, grid, prefix):
    """Tiles that hold several images, part of one, and the prefix tokens of more images than fit one tile."""
    check(**make_case((2, 4), grid, batch, prefix=prefix, width=70, channels_last=True))


@pytest.mark.parametrize("config", kernel.CONFIGS, ids=lambda config: config.name)
def test_every_config(config, monkeypatch):
    monkeypatch.setattr(kernel, "pick_config", lambda *sizes: config)
    dtype, pixel = (FP32, FP32) if config.name.startswith("float32") else (BF16, UINT8)
    check(**make_case((8, 4), (5, 7), batch=4, width=144, prefix=2, dtype=dtype, pixel=pixel))


@pytest.mark.parametrize(
    "case",
    [
        {"patch": (16, 16), "grid": (14, 14), "channels_last": True},
        {"patch": (14, 14), "grid": (16, 16), "prefix": 5, "pixel": FP32},
    ],
    ids=["Ti/16", "S/14"],
)
def test_models_at_224(case):
    check(**make_case(batch=1, width=192, **case))


@LAYOUTS
@pytest.mark.parametrize("pixel", [UINT8, BF16], ids=str)
@pytest.mark.parametrize("offset", [(0, 0), (3, 5), (16, 16)], ids=str)
def test_a_crop(offset, pixel, channels_last):
    case = make_case(pixel=pixel, channels_last=channels_last)
    top, left = offset
    height, width = (16, 24)
    if channels_last:
        large = make_images(2, 40, 43, 3, dtype=pixel)
        crop = large[:, top : top + height, left : left + width]
    else:
        large = make_images(2, 3, 40, 43, dtype=pixel)
        crop = large[:, :, top : top + height, left : left + width]
    assert not crop.is_contiguous()
    check(**case | {"images": crop})


def test_views():
    nhwc, nchw = make_case(channels_last=True), make_case(channels_last=False)
    check(**nhwc | {"images": make_images(2, 16, 24, 4)[..., :3]})  # RGB of RGBA
    check(**nhwc | {"images": make_images(2, 16, 24, 4)[..., 1:]})
    check(**nhwc | {"images": make_images(2, 3, 16, 24).permute(0, 2, 3, 1)})
    check(**nchw | {"images": make_images(2, 16, 24, 3).permute(0, 3, 1, 2)})  # channels-last memory
    check(**nchw | {"images": make_images(2, 3, 24, 16).transpose(2, 3)})
    check(**nchw | {"images": make_images(4, 3, 16, 24)[::2]})
    check(**nchw | {"images": make_images(1, 3, 16, 24).expand(2, -1, -1, -1)})
    check(**nchw | {"images": make_images(2, 1, 16, 24).expand(-1, 3, -1, -1)})
    check(**nchw | {"position": strided(nchw["position"], 3), "prefix": strided(nchw["prefix"], 8)})


def test_an_empty_batch():
    case = make_case(prefix=5)
    out = kernel.patch_embed(**case | {"images": case["images"][:0]})
    assert (out.shape, out.dtype) == ((0, 11, 40), BF16)


def test_through_the_public_function():
    case = make_case(channels_last=True)
    got = ops.patch_embed(**case, backend="triton")
    assert got.is_contiguous()
    assert torch.equal(got, kernel.patch_embed(**case))


@LAYOUTS
@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_give_normalise_then_convolve(dtype, uint8, channels_last):
    images = make_images(2, 3, 28, 42) if uint8 else make_images(2, 3, 28, 42, dtype=FP32)
    convolution, bias = make(24, 3, 14, 14, scale=588**-0.5), make(24, seed=1)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if uint8 else (None, None)
    weight, shift = ops.pack_patch_embed(
        convolution, bias, mean=mean, std=std, uint8=uint8, channels_last=channels_last, dtype=dtype
    )

    pixels = images.double()
    if uint8:
        center, spread = (torch.tensor(t, device=images.device, dtype=torch.float64).view(3, 1, 1) for t in (mean, std))
        pixels = (pixels / 255 - center) / spread
    want = F.conv2d(pixels, convolution.double(), bias.double(), stride=14).flatten(2).transpose(1, 2)
    base = F.conv2d(pixels.to(dtype), convolution.to(dtype), bias.to(dtype), stride=14).flatten(2).transpose(1, 2)
    given = images.permute(0, 2, 3, 1).contiguous() if channels_last else images
    got = kernel.patch_embed(given, weight, shift, patch_size=(14, 14), channels_last=channels_last)
    assert_close(got, want, base)


MUTANTS = {
    "pixels not centred": ("- 128.0", "- 0.0"),
    "pixels centred one lower": ("- 128.0", "- 127.0"),
    "patch column off": ("patch % grid_width *", "(patch + 1) % grid_width *"),
    "channel order": ("(k // INNER % MIDDLE)", "(k // MIDDLE % INNER)"),
    "position of the batch's row": ("position + patch.to", "position + (row % (patches - 1)).to"),
    "last row of K left out": ("(k < K)", "(k < K - 1)"),
    "prefix of the first token": ("which[:, None] * prefix_stride", "0 * which[:, None]"),
    "tokens not moved behind the prefix": ("+ prefix_tokens + patch", "+ patch"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_caught(name, dtype, tmp_path):
    case = make_case((5, 3), (4, 4), prefix=2, width=24, dtype=dtype)
    check(**case)
    with pytest.raises(AssertionError, match=r"error|nan"):
        check(mutant(kernel, *MUTANTS[name], tmp_path), **case)


REJECTED = {
    "image size 16x25 is not a positive multiple of the patch 8x8": {"images": lambda t: F.pad(t, (0, 1))},
    "image size 7x24 is not a positive multiple of the patch 8x8": {"images": lambda t: t[:, :, :7]},
    "image size 16x24 is not a positive multiple of the patch 0x8": {"patch_size": lambda t: (0, 8)},
    "images must be [B, Cin, H, W], got shape (3, 16, 24)": {"images": lambda t: t[0]},
    "images has dtype torch.int32": {"images": lambda t: t.int()},
    "images [B, Cin, H, W] of shape (2, 4, 16, 24) have 4 channels, so weight needs K = 4*8*8 = 256, got 192": {
        "images": lambda t: t[:, [0, 1, 2, 0]]
    },
    "got shape (40, 3, 8, 8)": {"weight": lambda t: t.view(40, 3, 8, 8)},
    "weight must be contiguous, got strides (200, 1)": {"weight": strided},
    "weight has dtype torch.float64": {"weight": lambda t: t.double()},
    "bias has shape (39,), expected (40,)": {"bias": lambda t: t[1:]},
    "bias has dtype torch.float32, allowed: torch.bfloat16": {"bias": lambda t: t.float()},
    "position has shape (5, 40), expected (6, 40)": {"position": lambda t: t[1:]},
    "prefix has shape (1, 1, 40), expected (P, 40)": {"prefix": lambda t: t[None]},
    "last axis of position has stride 2, expected 1": {"position": lambda t: t.repeat(1, 2)[:, ::2]},
    "weight is on meta": {"weight": lambda t: t.to("meta")},
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    case = make_case()
    for name, change in REJECTED[message].items():
        case[name] = change(case[name])
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        ops.patch_embed(**case, backend="triton")
    assert message in str(caught.value)


def test_block_k_depends_on_the_dtypes_alone():
    """The order of summation, and with it a token's rounding, is the same at every batch size."""
    for dtype in DTYPES:
        for pixel in (UINT8, *DTYPES, torch.float64):
            configs = [
                kernel.pick_config(rows, width, pixel, dtype, sms)
                for rows in (1, 197, 50_000)
                for width in (7, 192, 384, 768)
                for sms in (3, 108, 132)
            ]
            assert len({config.blocks["BLOCK_K"] for config in configs}) == 1


def test_pick_config():
    def name(rows, width, pixel=UINT8, dtype=BF16):
        return kernel.pick_config(rows, width, pixel, dtype, 132).name

    assert name(256 * 196, 768) == "128x128x64"
    assert name(256 * 196, 192) == "128x64x64"
    assert name(256 * 196, 1000) == "128x64x64"
    assert name(196, 768) == "64x64x64"
    assert name(256 * 196, 768, FP32) == "128x128x32"
    assert name(256 * 196, 768, FP32, FP32) == "float32_64x128x16"
