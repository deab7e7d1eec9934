"""resample: an axis of uint8 images by Pillow's weights, and whole resizes by it: Pillow's bits."""

import numpy as np
import pytest
import torch
from helpers.engines import engine
from helpers.mutants import mutant
from helpers.photos import noise
from PIL import Image

from vitfast import ops
from vitfast.images import pillow_resize
from vitfast.images.pillow_resize import FILTERS
from vitfast.images.preprocess import Preprocess, _resize_and_crop_tensor, resize_and_crop
from vitfast.kernels import resample as kernels
from vitfast.ops import reference, registry
from vitfast.testing import AWKWARD_ROWS, check_op, device, guarded, poisoned_allocations


def tensors(images, length, out, interpolation):
    """Images and the tables of an axis, on the device and inside poisoned memory."""
    tables = (torch.from_numpy(table) for table in pillow_resize.taps(length, out, interpolation))
    return [guarded(tensor.to(device())) for tensor in (torch.from_numpy(images), *tables)]


def batch(count, height, width, channels=3):
    """Noise, and of every second image only black and white, which overshoots the most."""
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    images[::2] = images[::2] // 128 * 255
    return images


def pillow(image, size, interpolation):
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling[interpolation.upper()]))


def backends():
    """Ours, as functions of what the reference takes."""
    for name in ("triton", "native"):
        entry = registry.backend("resample", name)
        why = "; ".join(entry.why_not(registry.Spec("resample", device().type, torch.uint8)))
        yield pytest.param(entry.call, id=name, marks=pytest.mark.skipif(bool(why), reason=why))


each_backend = pytest.mark.parametrize("run", list(backends()))
each_axis = pytest.mark.parametrize("axis", [1, 2])


@each_backend
@each_axis
@pytest.mark.parametrize(("length", "out"), [(40, 17), (17, 40), (1, 5), (33, 1), (9, 9)])
def test_an_axis(length, out, axis, run):
    """Sizes that fill no tile; the reference against sums in NumPy's 64 bits, the backends against the reference."""
    images = batch(2, length, 7) if axis == 1 else batch(2, 19, length)
    first, weights = pillow_resize.taps(length, out, "lanczos")
    expected = sum(
        np.take(images, first + tap, axis).astype(np.int64) * weights[:, tap].reshape(-1, *[1] * (3 - axis))
        for tap in range(weights.shape[1])
    )
    expected = ((expected + (1 << 21)) >> 22).clip(0, 255)
    given = tensors(images, length, out, "lanczos")
    for upcast, dtype in ((False, torch.uint8), (True, torch.float64)):
        ours = reference.resample(*given, axis=axis, upcast=upcast)
        assert ours.dtype == dtype and np.array_equal(ours.cpu().numpy(), expected)
    with poisoned_allocations():
        check_op(run, reference.resample, *given, axis=axis)
    assert run(*given, axis=axis).is_contiguous()


@each_backend
@each_axis
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("rows", AWKWARD_ROWS)
def test_rows_and_channels(rows, channels, axis, run):
    """Along a row there are so many rows, across them so many columns."""
    images = batch(2, 21, rows, channels) if axis == 1 else batch(2, rows, 21, channels)
    check_op(run, reference.resample, *tensors(images, 21, 8, "bicubic"), axis=axis)


def test_a_pixel_that_is_off_by_one_is_wrong():
    """The rule of all ops, with bounds of nothing."""
    given = tensors(batch(1, 9, 9), 9, 4, "bicubic")
    off = lambda *args, **options: reference.resample(*args, **options) ^ 1  # noqa: E731
    with pytest.raises(AssertionError, match="max error 1"):
        check_op(off, reference.resample, *given, axis=1)


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
    ours = pillow_resize.resize(given, out, interpolation, kernels.resample).cpu().numpy()
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
    one = pillow_resize.resize(images, (8, 9), "bicubic", kernels.resample)
    several = pillow_resize.resize(images.expand(2, 3, 20, 30, 3), (8, 9), "bicubic", kernels.resample)
    assert several.shape == (2, 3, 8, 9, 3) and torch.equal(several[1, 2], one)
    none = pillow_resize.resize(images.expand(0, 20, 30, 3), (8, 9), "bicubic", kernels.resample)
    assert none.shape == (0, 8, 9, 3)


def test_an_engine_prepares_images_by_the_backend_that_it_is_given():
    """On a device; on the CPU Pillow's own resize, or the extension's, does it."""
    calls, settings, image = [], Preprocess((24, 25), 30), noise(61, 83)

    def counted(*args, axis):
        calls.append(axis)
        return kernels.resample(*args, axis=axis)

    given = torch.from_numpy(image)[None].to(device())
    ours = _resize_and_crop_tensor(given, settings, counted)[0].cpu().numpy()
    assert np.array_equal(ours, resize_and_crop(image, settings)) and calls == [2, 1]
    for backend, call in (("triton", kernels.resample), ("torch", reference.resample), ("auto", reference.resample)):
        assert engine(backend=backend).runner._resample is call, backend


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
        ((images.float(), first, weights), 2, "images has dtype torch.float32, allowed: torch.uint8"),
        ((images[0], first, weights), 2, r"images must be \[B, H, W, C\], got shape \(8, 9, 3\)"),
        ((images, first.int(), weights), 2, "first has dtype torch.int32, allowed: torch.int64"),
        ((images, first, weights.long()), 2, "weights has dtype torch.int64, allowed: torch.int32"),
        ((images, first, weights), 3, "axis must be 1 or 2, got 3"),
        ((images, first[:2], weights), 2, r"first has shape \(2,\), expected \(4,\)"),
        ((images[:, :, :3].contiguous(), first, weights), 2, r"at most 3 taps.*got shape \(4, "),
        ((images[..., ::2], first, weights), 2, "images must be contiguous, got strides"),
        ((images, first.to("meta"), weights), 2, "first is on meta"),
    ):
        for backend in (None, "torch", "triton"):
            with pytest.raises(ValueError, match=f"^resample: .*{message}"):
                ops.resample(*given, axis=axis, backend=backend)
    with pytest.raises(ValueError, match="images must be contiguous"):
        kernels.resample(images[:, :, ::2], first, weights, axis=2)
