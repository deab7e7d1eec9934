"""Pictures as users have them, Pillow images, arrays, paths and URLs, made into what a model takes."""

from __future__ import annotations

import contextlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitfast.images.decode import ImageError, ImageFile, eight_bit, regular_file
from vitfast.images.preprocess import Preprocess, resize_and_crop
from vitfast.version import __version__

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"
"""One picture: a path, a URL, a Pillow image, or a uint8 array [H, W, 3]."""

MAX_BYTES = 256 << 20
"""The largest file that is fetched from a URL."""
_SECONDS = 30
_THREADS = 8


def is_picture(item: Any) -> bool:
    """Whether this is one picture by itself: a Pillow image, a path, a URL, or an array [H, W, C]."""
    return isinstance(item, (str, os.PathLike, Image.Image, np.ndarray))


def read_pictures(items: Sequence[Any], preprocess: Preprocess) -> Tensor:
    """Pictures resized and cropped to the model's size, as its own processor does it; several are read side by side.

    Args:
        items: Pillow images (as they are: EXIF is not looked at), uint8 arrays [H, W, 3], paths and http(s) URLs of
            image files (turned upright by EXIF, see `vitfast.images.decode.open_image`).

    Returns:
        uint8 [B, h, w, 3].

    Raises:
        ImageError: for a file or URL that cannot be read; it names the path and the reason.
        ValueError: for anything else, with its number in the list.
    """

    def one(numbered: tuple[int, Any]) -> np.ndarray:
        number, item = numbered
        try:
            return resize_and_crop(_opened(item, preprocess), preprocess)
        except ImageError:
            raise
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from error

    if not items:
        return torch.empty(0, *preprocess.size, 3, dtype=torch.uint8)
    if len(items) == 1:
        return torch.from_numpy(one((0, items[0])))[None]
    with ThreadPoolExecutor(min(_THREADS, len(items)), thread_name_prefix="vitfast-decode") as pool:
        return torch.from_numpy(np.stack(list(pool.map(one, enumerate(items)))))


def _opened(item: Any, preprocess: Preprocess) -> np.ndarray | Image.Image:
    if isinstance(item, Image.Image):
        try:
            return eight_bit(item, "a Pillow image")[0].convert("RGB")
        except OSError as error:  # Pillow reads a file's pixels when they are asked for
            raise ImageError(
                getattr(item, "filename", "") or "a Pillow image", f"cannot be decoded: {error}"
            ) from error
    if isinstance(item, np.ndarray):
        return item
    if isinstance(item, (str, os.PathLike)):
        with _file(item) as file, ImageFile(file, os.fspath(item)) as image:
            image.prepare_for(preprocess)
            return image.decode()
    raise ValueError(f"expected a Pillow image, a uint8 array [H, W, 3], a path or a URL, got {type(item).__name__}")


@contextlib.contextmanager
def _file(item: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    if isinstance(item, str) and item.lower().startswith(("http://", "https://")):
        with _fetched(item) as file:
            yield file
    else:
        with regular_file(Path(item).expanduser()) as file:
            yield file


@contextlib.contextmanager
def _fetched(url: str) -> Iterator[BinaryIO]:
    """The content of a URL, in a file that goes away.

    Raises:
        ImageError: if it cannot be fetched, or is larger than MAX_BYTES.
    """
    with tempfile.TemporaryFile() as file:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": f"vitfast/{__version__}"})
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                left = MAX_BYTES
                while chunk := answer.read(min(left + 1, 1 << 20)):
                    left -= len(chunk)
                    if left < 0:
                        raise ImageError(url, f"more than {MAX_BYTES} bytes")
                    file.write(chunk)
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
            if isinstance(error, ImageError):
                raise
            reason = getattr(error, "reason", None) or error
            raise ImageError(url, f"cannot be fetched: {reason}") from error
        file.seek(0)
        yield file
