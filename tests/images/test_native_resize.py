"""The C++ extension's resize: Pillow's pixels, bit for bit, at every SIMD level, and its refusals."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.global_state import threads
from helpers.photos import noise
from PIL import Image

from vitfast.images import pillow_resize, preprocess
from vitfast.images.pillow_resize import FILTERS, resize_window, suits_native, vertical_first
from vitfast.images.preprocess import Preprocess, resize_and_crop
from vitfast.ops import reference

pytest.importorskip("vitfast._C", reason="vitfast._C is not built (a C++ compiler builds it on install)")

LEVELS = ["default", "avx2", "avx512_vnni"]


def some_side(random):
    """Sides of thumbnails and photos, and the lengths around vectors and what fills them up."""
    return int(random.choice([random.integers(1, 40), random.integers(40, 300), random.integers(300, 1200)]))


def some_image(random, height, width):
    """As an array, writable or not, with gaps between rows, turned; or a Pillow image."""
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if random.random() < 0.3:
        pixels = pixels // 128 * 255  # overshoots the most
    kind = random.integers(5)
    if kind == 0:
        wider = np.zeros((height, width + 3, 3), np.uint8)
        wider[:, 1:-2] = pixels
        return pixels, wider[:, 1:-2]
    if kind == 1:
        return pixels, np.ascontiguousarray(pixels[::-1])[::-1]
    if kind == 2:
        frozen = pixels.copy()
        frozen.flags.writeable = False
        return pixels, frozen
    return pixels, Image.fromarray(pixels) if kind == 3 else pixels


def check_cases(seed, count):
    random, tall = np.random.default_rng(seed), 0
    for case in range(count):
        size, new = (some_side(random), some_side(random)), (some_side(random), some_side(random))
        if random.random() < 0.2:
            new = (size[0], new[1]) if random.random() < 0.5 else (new[0], size[1])
        name = str(random.choice(list(FILTERS)))
        begins = [int(random.integers(0, side)) for side in new]
        ends = [int(random.integers(begin, side)) + 1 for begin, side in zip(begins, new, strict=True)]
        pixels, given = some_image(random, *size)
        expected = Image.fromarray(pixels).resize(new[::-1], Image.Resampling[name.upper()])
        expected = np.asarray(expected)[begins[0] : ends[0], begins[1] : ends[1]]
        ours = resize_window(given, new, name, ((begins[0], ends[0]), (begins[1], ends[1])))
        assert ours.flags.c_contiguous and ours.flags.owndata | ours.flags.writeable
        assert np.array_equal(ours, expected), (seed, case, size, new, name, begins, ends, type(given))
        tall += vertical_first(*size, *new)
    assert tall or count < 50  # both orders of the passes were there


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_window_is_pillows(level):
    check_cases(0, 60)


@pytest.mark.full
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_two_thousand_windows_are_pillows(level):
    check_cases(1, 2000)


@pytest.mark.parametrize("strip", [1, 4000])
def test_strips_join(strip, monkeypatch):
    """A picture in strips of one row, or of a few; tall and wide."""
    monkeypatch.setattr(pillow_resize, "_STRIP_BYTES", strip)
    for size, new in (((90, 50), (20, 31)), ((400, 40), (20, 31)), ((40, 400), (50, 31))):
        image = Image.fromarray(noise(*size))
        expected = np.asarray(image.resize(new[::-1], Image.Resampling.BICUBIC))
        assert np.array_equal(resize_window(image, new, "bicubic", ((0, new[0]), (0, new[1]))), expected)


def test_images_take_it(monkeypatch):
    """resize_and_crop gives the same with and without the extension, and takes it where it can."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return resize_window(*arguments)

    monkeypatch.setattr(preprocess, "resize_window", counted)
    monkeypatch.setattr(pillow_resize, "has_native", lambda: True)  # where Pillow is faster, too
    for settings in (
        Preprocess((32, 33), 40),
        Preprocess((32, 33), 20),  # padded
        Preprocess((32, 33), (32, 33), "lanczos"),
        Preprocess((32, 33), 37, "bilinear", rounding="even"),
    ):
        for image in (noise(61, 83), Image.fromarray(noise(300, 50))):
            calls.clear()
            ours = resize_and_crop(image, settings)
            assert len(calls) == 1
            with monkeypatch.context() as context:
                context.setattr(pillow_resize, "has_native", lambda: False)
                assert np.array_equal(ours, resize_and_crop(image, settings))
            assert len(calls) == 1
    resize_and_crop(noise(61, 83), Preprocess((32, 33), 40, "nearest"))
    assert len(calls) == 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
@pytest.mark.parametrize("size", [(900, 700), (224, 700)], ids=str)
def test_decoding_threads_wake_no_others(size):
    """torch would start a team of its own for each thread that decodes, beside the one that runs the model."""
    plan = Preprocess(size=(224, 224), resize=(224, 224), center_crop=False)
    images = [noise(*size), Image.fromarray(noise(*size))]
    seen = []

    def decode():
        seen.append(set(os.listdir("/proc/self/task")))
        for image in images:
            resize_and_crop(image, plan)
            seen.append(set(os.listdir("/proc/self/task")))

    with threads(2):
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
    assert len(seen) == 3 and not set.union(*seen) - seen[0]  # those of other tests may end meanwhile


def test_what_would_take_too_much_memory_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(pillow_resize, "has_native", lambda: True)
    assert suits_native((4000, 3000), (224, 224), "lanczos")
    assert not suits_native((1, 100_000_000), (1, 224), "bicubic")
    assert not suits_native((40, 40), (20, 20), "nearest")


def arguments(**changes):
    given = {
        "images": torch.zeros(1, 8, 9, 3, dtype=torch.uint8),
        "first": torch.tensor([0, 5]),
        "weights": torch.ones(2, 4, dtype=torch.int32),
        "axis": 2,
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(1, 8, 9, 3)}, "images has dtype torch.float32"),
        ({"images": torch.zeros(8, 9, 3, dtype=torch.uint8)}, r"must be \[B, H, W, C\], got shape \(8, 9, 3\)"),
        ({"axis": 3}, "axis must be 1 or 2, got 3"),
        ({"axis": 1}, r"first\[1\] is 5, and 4 taps from there do not lie within 0 .. 8"),
        ({"first": torch.tensor([0, -1])}, r"first\[1\] is -1"),
        ({"first": torch.tensor([0])}, r"first has shape \(1,\), expected \(2,\)"),
        ({"first": torch.tensor([0, 1], dtype=torch.int32)}, "first has dtype torch.int32"),
        ({"keep": 4}, "keep must be 3 or fewer, got 4"),
        ({"axis": 1, "first": torch.tensor([0, 4]), "keep": 2}, "keep must be 3 for axis 1, got 2"),
        ({"weights": torch.full((2, 4), 1 << 23, dtype=torch.int32)}, "a weight is 8388608, allowed are -8355711"),
    ],
)
def test_refusals(changes, message):
    given = arguments(**changes)
    tensors = [given.pop(name) for name in ("images", "first", "weights")]
    with pytest.raises(ValueError, match=message):
        torch.ops.vitfast_native.resample(*tensors, **given)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize(
    ("channels", "keep"), [(1, None), (2, 1), (3, 2), (3, 3), (4, 3), (4, None), (5, None), (5, 4)]
)
def test_channels(channels, keep, level):
    """Any number of them, the last ones left out; a batch is its images."""
    images = torch.randint(0, 256, (2, 7, 60, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, weights = (torch.from_numpy(table) for table in pillow_resize.taps(60, 9, "bicubic"))
    ours = torch.ops.vitfast_native.resample(images, first, weights, axis=2, keep=keep)
    assert torch.equal(ours, reference.resample(images, first, weights, axis=2)[..., :keep])
