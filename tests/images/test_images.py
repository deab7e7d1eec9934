"""vitfast.images against Pillow, transformers' own processors and timm's own transforms."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
from helpers.grids import thinned
from helpers.peers import import_timm, import_torchvision, import_transformers
from helpers.photos import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitfast import ops, testing
from vitfast.images import pillow_resize
from vitfast.images.preprocess import (
    INTERPOLATIONS,
    Preprocess,
    _resize_and_crop_tensor,
    normalize,
    preprocess_batch,
    resize_and_crop,
)

# Odd and even margins, portrait and landscape, already right, and smaller than the crop by odd and even amounts.
SHAPES = [(61, 83), (83, 61), (48, 48), (32, 32), (33, 200), (200, 33), (40, 41), (20, 25), (31, 60), (29, 29)]


def photos():
    data = pytest.importorskip("skimage.data", reason="photos come with scikit-image")
    return {
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "coffee, portrait": np.ascontiguousarray(data.coffee().swapaxes(0, 1)),
    }


def cases():
    yield from ((f"noise {h}x{w}", noise(h, w)) for h, w in SHAPES)
    yield from photos().items()


# What the processors of real checkpoints say, the sizes divided by 7 to be quick; odd crops beside even ones.
TRANSFORMERS = {
    "ViT": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 2}),
    "ViT, not square": ("ViTImageProcessor", {"size": {"height": 24, "width": 40}, "resample": 3}),
    "ViT, old file": ("ViTImageProcessor", {"size": 32}),
    "ViT, scaled to -1..1 without normalising": (
        "ViTImageProcessor",
        {"size": 32, "rescale_factor": 1 / 127.5, "do_normalize": False},
    ),
    "ViT, raw pixels normalised": (
        "ViTImageProcessor",
        {"size": 32, "do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
    ),
    "DeiT": ("DeiTImageProcessor", {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}}),
    "DeiT, old file": ("DeiTImageProcessor", {"size": 36, "crop_size": 32}),
    "CLIP": ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "CLIP, old file": ("CLIPImageProcessor", {"size": 32, "crop_size": 32}),
    "DINOv2": ("BitImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}),
    "BiT, crop larger than the image": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 25}, "crop_size": {"height": 32, "width": 31}},
    ),
    "BiT, crop only": ("BitImageProcessor", {"do_resize": False, "crop_size": {"height": 32, "width": 33}}),
    "SigLIP": ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 3}),
    "BEiT": ("BeitImageProcessor", {"size": {"height": 32, "width": 32}}),
    "BEiT, old file": ("BeitImageProcessor", {"size": 36, "crop_size": 32, "do_center_crop": True}),
    "lanczos": ("CLIPImageProcessor", {"size": 32, "crop_size": 32, "resample": 1}),
    "nearest": ("CLIPImageProcessor", {"size": 32, "crop_size": 32, "resample": 0}),
    "box": ("CLIPImageProcessor", {"size": 32, "crop_size": 32, "resample": 4}),
    "hamming": ("CLIPImageProcessor", {"size": 32, "crop_size": 32, "resample": 5}),
}


def processor_class(name):
    import_transformers()
    family = name.removesuffix("Pil").removesuffix("ImageProcessor")
    module = {"DINOv3ViT": "dinov3_vit"}.get(family, family.lower())
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


@pytest.mark.parametrize("case", thinned(TRANSFORMERS, 3))
def test_transformers_pil_processor_bit_for_bit(case, tmp_path):
    name, settings = TRANSFORMERS[case]
    processor = processor_class(name + "Pil")(**settings)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for config in ({"image_processor_type": name, **settings}, saved):
        preprocess = Preprocess.from_transformers(config)
        for what, image in cases():
            expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
            pixels = torch.from_numpy(resize_and_crop(image, preprocess))[None]
            ours = normalize(pixels, preprocess).numpy()
            assert ours.shape == expected.shape, what
            # Equal pixels give equal floats up to rounding: an error of one pixel value would be 1 / 255 / std.
            step = 1 / 255 / max(preprocess.std)
            assert np.abs(ours - expected).max() < step / 100, (case, what)


TIMM = {
    "augreg": {"input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5,) * 3},
    "default crop": {"input_size": (3, 32, 32), "interpolation": "bilinear"},
    "whole": {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"},
    "squash": {"input_size": (3, 32, 32), "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bicubic"},
    "not square": {"input_size": (3, 24, 40), "crop_pct": 0.9, "interpolation": "bicubic"},
    "not square, squash": {"input_size": (3, 24, 41), "crop_pct": 0.8, "crop_mode": "squash"},
    "enlarged crop": {"input_size": (3, 33, 33), "crop_pct": 1.3, "interpolation": "bicubic"},
    "lanczos": {"input_size": (3, 32, 32), "crop_pct": 0.95, "interpolation": "lanczos"},
}


@pytest.mark.parametrize("case", TIMM)
def test_timm_transform_bit_for_bit(case):
    config = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center", "std": (0.2, 0.25, 0.3)} | TIMM[
        case
    ]
    config.setdefault("mean", (0.485, 0.456, 0.406))
    transform = import_timm().data.create_transform(**config, is_training=False)
    preprocess = Preprocess.from_timm(config)
    for what, image in cases():
        expected = transform(Image.fromarray(image))
        pixels = torch.from_numpy(resize_and_crop(image, preprocess))[None]
        torch.testing.assert_close(normalize(pixels, preprocess)[0], expected, rtol=0, atol=2e-6, msg=f"{case} {what}")


def test_timm_defaults():
    assert Preprocess.from_timm({}) == Preprocess.from_timm(
        import_timm().data.resolve_data_config({}, {"num_classes": 1})
    )


def test_the_two_roundings_differ_where_margins_are_odd():
    """If they did not, the exactness tests above would not show which one is used."""
    image = noise(35, 35)
    floor = Preprocess((32, 32), None)
    even = Preprocess((32, 32), None, rounding="even")
    assert not np.array_equal(resize_and_crop(image, floor), resize_and_crop(image, even))


@pytest.mark.parametrize("case", ["ViT", "CLIP", "DINOv2", "SigLIP"])
def test_bound_to_transformers_torchvision_processor(case):
    """What the module's docstring promises of photos, at the sizes models take."""
    name, settings = TRANSFORMERS[case]
    settings = {key: seven_times(value) if "size" in key else value for key, value in settings.items()}
    import_torchvision()
    processor = processor_class(name)(**settings, do_rescale=False, do_normalize=False)
    preprocess = Preprocess.from_transformers({"image_processor_type": name, **settings})
    for what, photo in photos().items():
        for image in (photo, np.ascontiguousarray(photo.swapaxes(0, 1))):
            expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
            difference = np.abs(resize_and_crop(image, preprocess).astype(int) - expected.astype(int))
            height, width = image.shape[:2]
            if pillow_resize.vertical_first(height, width, *preprocess.resized(height, width)):
                assert difference.max() <= 6, what
                assert (difference > 0).mean() < 0.25, what
            else:
                assert difference.max() <= 1, what
                assert (difference > 0).mean() < 0.01, what


def seven_times(size):
    return {side: 7 * n for side, n in size.items()} if isinstance(size, dict) else 7 * size


def test_bound_to_transformers_dinov3_processor():
    import_torchvision()
    settings = {"size": {"height": 32, "width": 32}, "do_normalize": False}
    processor = processor_class("DINOv3ViTImageProcessor")(**settings)
    preprocess = Preprocess.from_transformers(json.loads(processor.to_json_string()))
    assert (preprocess.interpolation, preprocess.mean, preprocess.std) == ("bilinear", (0.0,) * 3, (1.0,) * 3)
    for what, image in cases():
        expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        difference = np.abs(resize_and_crop(image, preprocess) / 255 - expected).max()
        assert difference <= 1.001 / 255, (what, difference * 255)


CLIP = {"image_processor_type": "CLIPImageProcessor"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor"),
        ({"size": 224}, "None"),
        ({**CLIP, "do_center_crop": False}, "no fixed size"),
        ({**CLIP, "size": {"longest_edge": 224}}, "longest_edge"),
        ({**CLIP, "resample": 9}, "resample=9"),
        ({**CLIP, "do_pad": True}, "do_pad"),
        ({**CLIP, "rescale_factor": -1.0}, "rescale_factor"),
        ({**CLIP, "do_resize": False, "do_center_crop": False}, "no fixed size"),
    ],
)
def test_from_transformers_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        Preprocess.from_transformers(config)


def test_from_transformers_reads_what_it_should():
    assert Preprocess.from_transformers({"size": 384}, processor="ViTFeatureExtractor").size == (384, 384)
    assert Preprocess.from_transformers({"image_processor": CLIP}) == Preprocess.from_transformers(CLIP)
    bare = {"image_processor_type": "ViTImageProcessorFast", "do_resize": False, "image_mean": None}
    assert Preprocess.from_transformers(bare, image_size=384) == Preprocess(
        (384, 384), None, "bilinear", center_crop=False
    )


@pytest.mark.parametrize("config", [{"crop_mode": "border"}, {"interpolation": "random"}])
def test_from_timm_refuses(config):
    with pytest.raises(ValueError, match=next(iter(config.values()))):
        Preprocess.from_timm(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (0, 32)},
        {"size": 32},
        {"size": (32, 32.0)},
        {"resize": 0},
        {"resize": (1, 2, 3)},
        {"interpolation": "cubic"},
        {"rounding": "up"},
        {"cover": True},
        {"mean": (0.5,)},
        {"std": (0.0, 1.0, 1.0)},
    ],
)
def test_preprocess_checks_its_fields(fields):
    with pytest.raises(ValueError, match="Preprocess"):
        Preprocess(**{"size": (32, 32), "resize": 32, **fields})


def test_resize_and_crop_refuses():
    preprocess = Preprocess((32, 32), (40, 40), center_crop=False)
    with pytest.raises(ValueError, match=r"40x40.*32x32"):
        resize_and_crop(noise(50, 50), preprocess)
    for wrong in (noise(4, 4)[..., :2], noise(4, 4)[0], noise(4, 4).astype(np.float32), noise(0, 4)):
        with pytest.raises(ValueError, match="uint8"):
            resize_and_crop(wrong, preprocess)
    thin = noise(2, 100_000)  # 600 kB would become 300 MB
    with pytest.raises(ValueError, match="1000x50000000"):
        resize_and_crop(thin, Preprocess((32, 32), 1000))


def test_tensor_path_on_the_cpu_is_exact():
    preprocess = Preprocess((32, 33), 40, "bicubic")
    images = np.stack([noise(61, 83, seed) for seed in range(3)])
    out = preprocess_batch(torch.from_numpy(images), preprocess)
    assert out.shape == (3, 32, 33, 3)
    assert out.dtype == torch.uint8
    for image, one in zip(images, out, strict=True):
        assert np.array_equal(one.numpy(), resize_and_crop(image, preprocess))


def test_tensor_path_leaves_images_of_the_right_size():
    images = torch.from_numpy(noise(32, 33))[None].to(testing.device())
    assert preprocess_batch(images, Preprocess((32, 33), 32)) is images
    assert preprocess_batch(images, Preprocess((32, 33), 40), resample=ops.resample) is not images
    empty = images.new_empty(0, 50, 60, 3)
    assert preprocess_batch(empty, Preprocess((32, 33), 40)).shape == (0, 32, 33, 3)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("resize", [25, 32, 37, 150, (37, 41), None])
def test_tensor_path_off_the_cpu_is_exact(interpolation, resize):
    """The GPU's path; here on whatever device there is."""
    preprocess = Preprocess((32, 33), resize, interpolation)
    for image in [*(noise(h, w) for h, w in SHAPES), photos()["chelsea"][::2, ::2]]:
        on_device = torch.from_numpy(image)[None].to(testing.device())
        out = _resize_and_crop_tensor(on_device, preprocess, ops.resample)[0].cpu()
        assert np.array_equal(out.numpy(), resize_and_crop(image, preprocess)), image.shape


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 120), st.integers(1, 120)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from(INTERPOLATIONS),
    st.integers(0, 3),
)
def test_resample_is_pillow(size, out, interpolation, seed):
    image = noise(*size, seed)
    if seed == 3:
        image = image // 128 * 255  # overshoots the most
    expected = Image.fromarray(image).resize(out[::-1], Image.Resampling[interpolation.upper()])
    ours = pillow_resize.resize(torch.from_numpy(image).to(testing.device()), out, interpolation, ops.resample)
    assert np.array_equal(ours.cpu().numpy(), np.array(expected))


@pytest.mark.parametrize(("length", "out"), [(450, 383), (519, 395), (694, 464), (542, 304), (580, 445)])
def test_hamming_has_pillows_constants(length, out):
    """Sizes at which a weight with 0.54 and 0.46 in double precision rounds to another integer."""
    image = noise(24, length, length)
    expected = Image.fromarray(image).resize((out, 24), Image.Resampling.HAMMING)
    ours = pillow_resize.resize(torch.from_numpy(image), (24, out), "hamming", ops.resample)
    assert np.array_equal(ours, np.array(expected))


def test_resample_refuses_an_unknown_filter():
    with pytest.raises(ValueError, match="'cubic'"):
        pillow_resize.resize(torch.zeros(4, 4, 3, dtype=torch.uint8), (2, 2), "cubic", ops.resample)


@pytest.mark.parametrize("shape", [(61, 83, 3), (1, 61, 83, 1), (1, 0, 83, 3)])
def test_preprocess_batch_refuses(shape):
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\]"):
        preprocess_batch(torch.zeros(shape, dtype=torch.uint8), Preprocess((32, 32), 32))
    with pytest.raises(ValueError, match="float32"):
        preprocess_batch(torch.zeros(1, 61, 83, 3), Preprocess((32, 32), 32))


def test_images_on_a_device_need_to_be_told_what_resamples_them():
    images = torch.empty(1, 61, 83, 3, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match=r"images on meta need resample, as in resample=vitfast\.ops\.resample"):
        preprocess_batch(images, Preprocess((32, 32), 32))


def test_normalize():
    preprocess = Preprocess((2, 2), None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    images = torch.from_numpy(noise(2, 2))[None]
    out = normalize(images, preprocess)
    assert out.shape == (1, 3, 2, 2)
    assert out.is_contiguous()
    assert math.isclose(out[0, 1, 1, 0].item(), (images[0, 1, 0, 1].item() / 255 - 0.2) / 0.25, rel_tol=1e-5)
    assert normalize(images, preprocess, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="uint8"):
        normalize(images[..., :2], preprocess)


def test_taps_are_copied_to_a_device_once():
    device = torch.device("cpu")
    first = pillow_resize._taps_on(device, 37, 20, "bicubic")
    assert all(a is b for a, b in zip(first, pillow_resize._taps_on(device, 37, 20, "bicubic"), strict=True))
