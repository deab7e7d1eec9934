"""Image files as pixels: what Pillow reads, upright and in RGB, or one error with a reason."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Pillow formats that are read -> file endings looked for in folders. A file is recognised by its
first bytes, never by its ending. Formats that run other programs (EPS) are left out."""


class ImageError(ValueError):
    """An image that cannot be used. `path` is the file, `reason` one line of plain words."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@cache
def _readable() -> tuple[str, ...]:
    """Those of FORMATS that the installed Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(path: str | Path, *, exif_orientation: bool = True) -> np.ndarray:
    """Read a file as uint8 [H, W, 3] in RGB order.

    An alpha channel is dropped, grey is repeated, of an animation the first frame is taken: what
    Pillow's convert("RGB") does, and with it both transformers' `load_image` and timm's datasets.

    Args:
        path: the file. Its first bytes decide the format, not its name.
        exif_orientation: turn the image upright by its EXIF tag, as transformers' `load_image` does.
            timm's and torchvision's datasets do not: pass False to get their pixels.

    Raises:
        ImageError: if the file cannot be read, is empty, of unknown format, truncated or damaged, or
            has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (where Pillow itself only warns up to
            twice that many).
    """
    try:
        with Image.open(path, formats=_readable()) as file:
            (width, height), limit = file.size, Image.MAX_IMAGE_PIXELS
            if limit is not None and height * width > limit:
                raise ImageError(path, f"too many pixels: {height}x{width}, the limit is {limit}")
            upright = ImageOps.exif_transpose(file) if exif_orientation else file
            pixels = np.array(upright.convert("RGB"))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        empty = Path(path).stat().st_size == 0
        raise ImageError(path, "the file is empty" if empty else "not an image in a known format") from error
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"too many pixels: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(path, "no such file") from error
    except Exception as error:  # decoders raise nearly anything on damaged data: OSError, SyntaxError, struct.error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(path, f"cannot be decoded: {reason}") from error
    if pixels.size == 0:
        raise ImageError(path, f"the image has no pixels ({height}x{width})")
    return pixels
