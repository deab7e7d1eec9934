"""resample: an axis of uint8 images by Pillow's weights, and whole resizes by it: Pillow's bits."""

import numpy as np
import pytest
import torch
from helpers.mutants import mutant
from helpers.photos import noise
from PIL import Image

from vitfast.images import pillow_resize
from vitfast.images.pillow_resize import FILTERS
from vitfast.images.preprocess import Preprocess, _resize_and_crop_tensor, resize_and_crop
from vitfast.kernels import resample as kernels
from vitfast.testing import device, guarded, poisoned_allocations


def tensors(images, length, out, interpolation):
    """Images and the tables of an axis, on the device and inside poisoned memory."""
    tables = (torch.from_numpy(table) for table in pillow_resize._taps(length, out, interpolation))
    return [guarded(tensor.to(device())) for tensor in (torch.from_numpy(images), *tables)]


def batch(count, height, width, channels=3):
    """Noise, and of every second image only black and white, which overshoots the most."""
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    images[::2] = images[::2] // 128 * 255
    return images


def pillow(image, size, interpolation):
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling[interpolation.upper()]))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("length", "out"), [(40, 17), (17, 40), (1, 5), (33, 1), (9, 9)])
def test_an_axis(length, out, axis):
    """Against sums in NumPy's 64 bits; sizes that fill no tile."""
    images = batch(2, length, 7) if axis == 1 else batch(2, 19, length)
    first, weights = pillow_resize._taps(length, out, "lanczos")
    expected = sum(
        np.take(images, first + tap, axis).astype(np.int64) * weights[:, tap].reshape(-1, *[1] * (3 - axis))
        for tap in range(weights.shape[1])
    )
    expected = ((expected + (1 << 21)) >> 22).clip(0, 255)
    with poisoned_allocations():
        ours = kernels.resample(*tensors(images, length, out, "lanczos"), axis=axis)
    assert ours.dtype == torch.uint8 and ours.is_contiguous()
    assert np.array_equal(ours.cpu().numpy(), expected)


CASES = [
    ("bicubic", (61, 83), (32, 43)),
    ("bilinear", (30, 20), (45, 61)),
    ("lanczos", (97, 13), (24, 24)),
    ("box", (50, 50), (50, 9)),
    ("hamming", (40, 70), (9, 70)),
]


def check_resize(interpolation, size, out, count=2):
    images = batch(count, *size)
    given = guarded(torch.from_numpy(images).to(device()))
    ours = pillow_resize.resize(given, out, interpolation, backend="triton").cpu().numpy()
    assert np.array_equal(ours, np.stack([pillow(image, out, interpolation) for image in images])), (size, out)


@pytest.mark.parametrize(("interpolation", "size", "out"), CASES, ids=[case[0] for case in CASES])
def test_a_resize_is_pillows(interpolation, size, out):
    check_resize(interpolation, size, out)


@pytest.mark.full
@pytest.mark.parametrize("interpolation", FILTERS)
def test_many_resizes_are_pillows(interpolation):
    random = np.random.default_rng(len(interpolation))
    for case in range(20):
        size, out = ([int(side) for side in random.integers(1, most, 2)] for most in (140, 90))
        if case % 5 == 0:
            size[0] = int(random.integers(600, 900))  # so tall that the order of the passes turns
            size[1] = int(random.integers(1, 6))
        check_resize(interpolation, tuple(size), tuple(out), count=int(random.integers(1, 4)))


def test_axes_before_the_image_and_none():
    images = torch.from_numpy(noise(20, 30)).to(device())
    one = pillow_resize.resize(images, (8, 9), "bicubic", backend="triton")
    several = pillow_resize.resize(images.expand(2, 3, 20, 30, 3), (8, 9), "bicubic", backend="triton")
    assert several.shape == (2, 3, 8, 9, 3) and torch.equal(several[1, 2], one)
    assert pillow_resize.resize(images.expand(0, 20, 30, 3), (8, 9), "bicubic", backend="triton").shape == (0, 8, 9, 3)


def test_a_model_that_is_forced_to_triton_prepares_images_by_it(monkeypatch):
    """On a device; `preprocess_batch` on the CPU is Pillow's own."""
    calls, original = [], kernels.resample
    monkeypatch.setattr(
        kernels, "resample", lambda *args, **options: calls.append(options) or original(*args, **options)
    )
    settings, image = Preprocess((24, 25), 30), noise(61, 83)
    for backend, count in (("triton", 2), ("torch", 0)):
        calls.clear()
        given = torch.from_numpy(image)[None].to(device())
        ours = _resize_and_crop_tensor(given, settings, backend)[0].cpu().numpy()
        assert np.array_equal(ours, resize_and_crop(image, settings)) and len(calls) == count


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("1 << 21", "0"),
        ("tl.maximum(total >> 22, 0)", "total >> 22"),
        ("tl.minimum(tl.maximum(total >> 22, 0), 255)", "tl.maximum(total >> 22, 0)"),
        ("pixel += inner", "pixel += 1"),
        ("column % inner", "0"),
        ("row < rows", "row <= rows"),
    ],
)
def test_wrong_kernels_are_noticed(right, wrong, tmp_path, monkeypatch):
    wrong_kernel = mutant(kernels, right, wrong, tmp_path)
    images = batch(3, 33, 40)
    given = tensors(images, 40, 17, "lanczos")
    expected = kernels.resample(*given, axis=2)
    monkeypatch.setattr(torch, "empty", inside(torch.empty))
    ours = wrong_kernel.resample(*given, axis=2)
    edge = ours._base[-4096:] if ours._base is not None else ours[:0]
    assert not torch.equal(ours, expected) or (edge != 77).any()


def inside(empty):
    """torch.empty, but within memory of which every byte is 77."""

    def allocate(shape, **options):
        size = int(np.prod(shape))
        whole = empty(size + 8192, **options).fill_(77)
        return whole[4096 : 4096 + size].view(shape)

    return allocate


def test_refusals():
    images, first, weights = tensors(batch(1, 8, 9), 9, 4, "bicubic")
    for given, axis, message in (
        (
            (images.float(), first, weights),
            2,
            r"must be torch.uint8 with 4 axes, got torch.float32 \(1, 8, 9, 3\)",
        ),
        ((images[0], first, weights), 2, "images must be torch.uint8 with 4 axes"),
        ((images, first.int(), weights), 2, "first must be torch.int64 with 1 axes"),
        ((images, first, weights.long()), 2, "weights must be torch.int32 with 2 axes"),
        ((images, first, weights), 3, "axis must be 1 or 2, got 3"),
        ((images, first[:2], weights), 2, r"first \(2,\) and weights \(4, "),
        ((images[:, :, :3].contiguous(), first, weights), 2, "more taps than axis 2"),
        ((images[:, :, ::2], first, weights), 2, "images must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.resample(*given, axis=axis)
    with pytest.raises(ValueError, match="backend must be 'torch' or 'triton', got 'native'"):
        pillow_resize.resize(images, (4, 4), "bicubic", backend="native")
