"""Pillow's image resampling in integer operations: the same pixels, bit for bit, for a batch on any device by the op
`resample` (`resize`), and for an image on a CPU by the C++ extension (`resize_window`), in a fraction of Pillow's time.

One axis after the other, in the order Pillow takes (`vertical_first`). Output pixel i sees the input
around c = (i + 1/2) s, where s = in / out; tap j has weight f((j + 1/2 - c) / max(s, 1)), normalised to
sum 1: the filter f widens when the image shrinks (antialiasing). Pillow then computes in fixed point:
weights are rounded to 22 fractional bits, and after each axis the sum is rounded and clipped to 0..255.
All of that fits int32, so nothing depends on the device or on the order of a sum.

Source: Pillow's documentation of its filters and the fixed-point format of its 8-bit resampling.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

FRACTION_BITS = 22
"""32 bits less 8 for the pixel and 2 for the sign and for weights beyond 1 (negative lobes)."""


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -1/2."""
    x, a = np.abs(x), -0.5
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _elementwise(function: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of the C library, which Pillow calls: NumPy's own may differ in the last bit."""
    of_objects = np.frompyfunc(function, 1, 1)
    return lambda x: of_objects(x).astype(np.float64)


_sin, _cos = _elementwise(math.sin), _elementwise(math.cos)


def _sinc(x: np.ndarray) -> np.ndarray:
    x = np.where(x == 0, 1e-20, x) * math.pi
    return _sin(x) / x


_HAMMING = float(np.float32(0.54)), float(np.float32(0.46))
"""Pillow's window has its two constants in single precision, and is 1 at 0 all the same."""


def _hamming(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    window = _HAMMING[0] + _HAMMING[1] * _cos(x * math.pi)
    return np.where(x == 0, 1.0, np.where(x < 1, _sinc(x) * window, 0.0))


FILTERS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "box": (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    "bilinear": (1.0, lambda x: np.maximum(1.0 - np.abs(x), 0.0)),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, lambda x: np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)),
}
"""Name -> (half width, weight at a distance in output pixels)."""


@lru_cache(maxsize=64)
def taps(length: int, out: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """The first input pixel of each output pixel, and the fixed-point weights of those from there on.

    Returns:
        int64 [out] and int32 [out, taps]; first + taps is at most length. Weights that a pixel does not need are 0.
    """
    step = length / out
    if interpolation == "nearest":
        centers = np.cumsum(np.concatenate([[step * 0.5], np.full(out - 1, step)]))  # summed up, as Pillow does
        first = np.clip(centers.astype(np.int64), 0, length - 1)
        return first, np.full((out, 1), 1 << FRACTION_BITS, np.int32)
    half_width, weight = FILTERS[interpolation]
    widening = max(step, 1.0)
    support = half_width * widening
    centers = (np.arange(out) + 0.5) * step
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), length)
    index = first + np.arange((last - first).max())[:, None]
    weights = np.where(index < last, weight((index - centers + 0.5) * (1.0 / widening)), 0.0)
    weights /= weights.sum(axis=0)  # one tap after another, as Pillow does
    fixed = np.trunc(weights * (1 << FRACTION_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    behind = np.maximum(first + len(fixed) - length, 0)  # what would reach beyond the end begins earlier
    tap = np.arange(len(fixed))[:, None] - behind
    fixed = np.where(tap >= 0, np.take_along_axis(fixed, np.maximum(tap, 0), axis=0), 0)
    return first - behind, np.ascontiguousarray(fixed.T)


@lru_cache(maxsize=64)
def _taps_on(device: torch.device, length: int, out: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """`taps` on a device. Kept there: to copy them makes the host wait for all that a GPU has been given before."""
    first, weights = taps(length, out, interpolation)
    return torch.from_numpy(first).to(device), torch.from_numpy(weights).to(device)


def vertical_first(height: int, width: int, rows: int, columns: int) -> bool:
    """Whether the installed Pillow, from height x width to rows x columns, resizes the vertical axis first.

    Since the first pass rounds, the order shows in the pixels. Pillow 13 takes the cheaper one for tall
    images; 12.2 and 12.3 do for very tall ones; before that columns always came first.
    """
    version = tuple(int(part) for part in PIL.__version__.split(".")[:2])
    if version >= (13, 0):
        return rows < height and height - rows > 2 * (width - columns)
    return version >= (12, 2) and rows < height and height > 100 * width


def resize_bytes(size: tuple[int, int], new: tuple[int, int], interpolation: str) -> int:
    """Bytes that Pillow's `Image.resize` of an RGB image takes beside the image itself: weights, passes, result.

    Args:
        size, new: (height, width) before and after.
        interpolation: as `resize`.
    """
    if size == new:
        return 0
    half_width = FILTERS[interpolation][0] if interpolation in FILTERS else 0.0
    weights = [
        8 * out * (2 * math.ceil(half_width * max(length / out, 1.0)) + 1)
        for length, out in zip(size, new, strict=True)
        if length != out
    ]
    between = new[0] * size[1] if vertical_first(*size, *new) else size[0] * new[1]
    return sum(weights) + 4 * (between + new[0] * new[1])


Resample = Callable[..., Tensor]
"""One axis of uint8 images by weights: `vitfast.ops.resample`, or one of its backends."""


def resize(images: Tensor, size: tuple[int, int], interpolation: str, resample: Resample) -> Tensor:
    """Resize to (height, width), giving the pixels of Pillow's `Image.resize`.

    Args:
        images: uint8 [..., H, W, C] with H and W at least 1.
        size: (height, width) of the result.
        interpolation: "nearest" or one of FILTERS.
        resample: what resamples an axis, called once for each that changes its length.

    Returns:
        uint8 [..., height, width, C] on the same device.

    Raises:
        ValueError: for an interpolation that is not known.
    """
    if interpolation != "nearest" and interpolation not in FILTERS:
        raise ValueError(f"interpolation must be 'nearest' or one of {', '.join(FILTERS)}, got {interpolation!r}")
    *lead, height, width, channels = images.shape
    batch = images.reshape(math.prod(lead), height, width, channels).contiguous()
    passes = [(2, size[1]), (1, size[0])]
    if vertical_first(height, width, *size):
        passes.reverse()
    for axis, out in passes:
        if batch.shape[axis] == out:
            continue
        first, weights = _taps_on(batch.device, batch.shape[axis], out, interpolation)
        nearest = interpolation == "nearest"
        batch = batch.index_select(axis, first) if nearest else resample(batch, first, weights, axis=axis)
    return batch.view(*lead, *size, channels)


@cache
def has_native() -> bool:
    """Whether the C++ extension is here, and a CPU on which `resize_window` takes less time than Pillow."""
    try:
        extension = importlib.import_module("vitfast._C")
    except ImportError:  # `vitfast doctor` says why; Pillow itself gives the same pixels
        return False
    return extension.build_info()["simd"] != "default"


MOST_TAPS = 1 << 22
"""Weights of one axis that `resize_window` makes: more than any photo needs, and less than would be felt in memory."""
_STRIP_BYTES = 1 << 20
"""Of a Pillow image so much is copied at once, to be read from cache; and never more than lies in one piece."""

Window = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns, from and to."""


def suits_native(size: tuple[int, int], new: tuple[int, int], interpolation: str) -> bool:
    """Whether `resize_window` is for this. Arguments as of `resize_bytes`."""
    if interpolation not in FILTERS or not has_native():
        return False
    half_width = FILTERS[interpolation][0]
    counts = (out * (2 * half_width * max(length / out, 1.0) + 1) for length, out in zip(size, new, strict=True))
    return max(counts) <= MOST_TAPS


def resize_window(
    image: np.ndarray | Image.Image, new: tuple[int, int], interpolation: str, window: Window
) -> np.ndarray:
    """A window of an image resized by the C++ extension: the pixels of Pillow's `Image.resize` and `crop`.

    Only what the window shows is computed, on the calling thread alone.

    Args:
        image: uint8 [H, W, 3], or a Pillow image in RGB.
        new: (height, width) of the whole result.
        interpolation: one of FILTERS.
        window: the part that is wanted, within `new`.

    Returns:
        uint8 [rows, columns, 3].
    """
    size = (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[0], image.shape[1])
    rows, columns = (
        _Part.of(*axis, interpolation, *part) for axis, part in zip(zip(size, new, strict=True), window, strict=True)
    )
    strips: list[Tensor] = []
    if vertical_first(size[0], size[1], new[0], new[1]):
        step = max(_STRIP_BYTES // (4 * (rows.end - rows.begin)), 1)
        for begin in range(columns.begin, columns.end, step):
            strip = _Strip(image, rows.begin, rows.end, begin, min(begin + step, columns.end))
            strips.append(rows.resample(strip.pixels, 1))
        result = columns.resample(_joined(strips, 2), 2)
    else:
        step = max(_STRIP_BYTES // (4 * (columns.end - columns.begin)), 1)
        for begin in range(rows.begin, rows.end, step):
            strip = _Strip(image, begin, min(begin + step, rows.end), columns.begin, columns.end)
            strips.append(columns.resample(strip.pixels, 2))
        result = rows.resample(_joined(strips, 1), 1)
    return np.ascontiguousarray(result[0, ..., :3].numpy())


def _joined(strips: list[Tensor], axis: int) -> Tensor:
    """Strips side by side; not by torch, which would wake its threads for it while a model needs the cores."""
    return strips[0] if len(strips) == 1 else torch.from_numpy(np.concatenate([s.numpy() for s in strips], axis))


@dataclass(frozen=True)
class _Part:
    """A part of an axis of the result: the input's pixels that it is made of, and how.

    Without weights the axis keeps its length.
    """

    begin: int
    end: int
    first: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, length: int, out: int, interpolation: str, begin: int, end: int) -> _Part:
        if length == out:
            return cls(begin, end)
        first, weights = (of_all[begin:end] for of_all in taps(length, out, interpolation))
        low, high = int(first.min()), int(first.max()) + weights.shape[1]
        return cls(low, high, torch.from_numpy(first - low), torch.from_numpy(weights))

    def resample(self, pixels: Tensor, axis: int) -> Tensor:
        """Resample an axis of uint8 [1, H, W, C] that begins at `begin`; 1 is H, 2 is W."""
        if self.first is None:
            return torch.from_numpy(pixels.numpy().copy())  # the strip's own memory is not for long
        keep = 3 if axis == 2 else None  # a Pillow image has a fourth byte, which is no colour
        return torch.ops.vitfast_native.resample(pixels, self.first, self.weights, axis=axis, keep=keep)


class _Strip:
    """Pixels of a part of an image, uint8 [1, h, w, 3 or 4], for as long as this is there; not to be written."""

    def __init__(self, image: np.ndarray | Image.Image, top: int, bottom: int, left: int, right: int) -> None:
        if isinstance(image, np.ndarray):
            part = image[top:bottom, left:right]
            fits_torch = part.flags.writeable and min(part.strides) > 0
            self.pixels = torch.from_numpy(part if fits_torch else part.copy())[None]
            return
        crop = image.crop((left, top, right, bottom))
        if not hasattr(crop, "__arrow_c_array__"):  # Pillow before 11.2
            self.pixels = torch.from_numpy(np.array(crop))[None]
            return
        import pyarrow as pa

        self._buffer = pa.array(crop).flatten().buffers()[1]  # Pillow's own memory: three bytes of colour and one more
        memory = (ctypes.c_uint8 * self._buffer.size).from_address(self._buffer.address)
        count = 4 * crop.height * crop.width
        self.pixels = torch.frombuffer(memory, dtype=torch.uint8, count=count).view(1, crop.height, crop.width, 4)
