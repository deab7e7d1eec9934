"""Pillow's image resampling in integer torch operations: the same pixels, bit for bit, on any device.

One axis after the other, in the order Pillow takes (`vertical_first`). Output pixel i sees the input
around c = (i + 1/2) s, where s = in / out; tap j has weight f((j + 1/2 - c) / max(s, 1)), normalised to
sum 1: the filter f widens when the image shrinks (antialiasing). Pillow then computes in fixed point:
weights are rounded to 22 fractional bits, and after each axis the sum is rounded and clipped to 0..255.
All of that fits int32, so nothing depends on the device or on the order of a sum.

Source: Pillow's documentation of its filters and the fixed-point format of its 8-bit resampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

FRACTION_BITS = 22
"""32 bits less 8 for the pixel and 2 for the sign and for weights beyond 1 (negative lobes)."""


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -1/2."""
    x, a = np.abs(x), -0.5
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _hamming(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(x * math.pi)), 0.0)


FILTERS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "box": (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    "bilinear": (1.0, lambda x: np.maximum(1.0 - np.abs(x), 0.0)),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, lambda x: np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0.0)),
}
"""Name -> (half width, weight at a distance in output pixels)."""


@lru_cache(maxsize=64)
def _taps(length: int, out: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """Index of the input pixel, and fixed-point weight, of each tap of each output pixel.

    Returns:
        int64 and int32 [taps, out]. Taps that a pixel does not use have weight 0 and a valid index.
    """
    step = length / out
    if interpolation == "nearest":
        centers = np.cumsum(np.concatenate([[step * 0.5], np.full(out - 1, step)]))  # summed up, as Pillow does
        index = np.clip(centers.astype(np.int64), 0, length - 1)[None]
        return index, np.full(index.shape, 1 << FRACTION_BITS, np.int32)
    half_width, weight = FILTERS[interpolation]
    widening = max(step, 1.0)
    support = half_width * widening
    centers = (np.arange(out) + 0.5) * step
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), length)
    index = first + np.arange(math.ceil(support) * 2 + 1)[:, None]
    weights = np.where(index < last, weight((index - centers + 0.5) * (1.0 / widening)), 0.0)
    weights /= weights.sum(axis=0)
    fixed = np.trunc(weights * (1 << FRACTION_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    used = (fixed != 0).any(axis=1)
    return np.minimum(index, length - 1)[used], fixed[used]


@lru_cache(maxsize=64)
def _taps_on(device: torch.device, length: int, out: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """`_taps` on a device. Kept there: to copy them makes the host wait for all that a GPU has been given before."""
    index, weights = _taps(length, out, interpolation)
    return torch.from_numpy(index).to(device), torch.from_numpy(weights).to(device)


def vertical_first(height: int, width: int, rows: int, columns: int) -> bool:
    """Whether the installed Pillow, from height x width to rows x columns, resizes the vertical axis first.

    Since the first pass rounds, the order shows in the pixels. Pillow 13 takes the cheaper one for tall
    images; 12.2 and 12.3 do for very tall ones; before that columns always came first.
    """
    import PIL  # for its version only

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


def resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize to (height, width), giving the pixels of Pillow's `Image.resize`.

    Args:
        images: uint8 [..., H, W, C] with H and W at least 1.
        size: (height, width) of the result.
        interpolation: "nearest" or one of FILTERS.

    Returns:
        uint8 [..., height, width, C] on the same device.

    Raises:
        ValueError: for an interpolation that is not known.
    """
    if interpolation != "nearest" and interpolation not in FILTERS:
        raise ValueError(f"interpolation must be 'nearest' or one of {', '.join(FILTERS)}, got {interpolation!r}")
    height, width = images.shape[-3:-1]
    passes = [(-2, size[1]), (-3, size[0])]
    if vertical_first(height, width, *size):
        passes.reverse()
    for axis, out in passes:
        if images.shape[axis] == out:
            continue
        index, weights = _taps_on(images.device, images.shape[axis], out, interpolation)
        if interpolation == "nearest":
            images = images.index_select(axis, index[0])
            continue
        shape = (out,) + (1,) * (-axis - 1)
        half = 1 << (FRACTION_BITS - 1)  # rounds the shift below to nearest
        total = torch.full((1,), half, dtype=torch.int32, device=images.device)
        for pixel, factor in zip(index, weights, strict=True):
            total = total + images.index_select(axis, pixel) * factor.view(shape)
        images = (total >> FRACTION_BITS).clamp_(0, 255).to(torch.uint8)
    return images
