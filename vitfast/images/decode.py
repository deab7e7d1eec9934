"""Image files as pixels: what Pillow reads, upright and in 8-bit RGB, or one error with a reason."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from vitfast.images.formats import ICONS, NO_SIGNATURE, icon_pixels, identify, jxl_size

if TYPE_CHECKING:
    from vitfast.images.preprocess import Preprocess

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
_TRANSPOSED = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
          stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}  # fmt: skip

_DECODER_BYTES = {"AVIF": 12, "HEIF": 12, "JPEG2000": 16, "JXL": 24, "WEBP": 12, "TIFF": 8, "GIF": 4, "PSD": 4}
"""Bytes a pixel that a format's decoder holds beside the image that it fills."""
_PROGRESSIVE_BYTES = 6
"""Of a progressive JPEG all coefficients are held: two bytes for each of at most three components."""

DRAFT_SHRINK = 3
"""A draft is at least so many times as large as what it is resized to. Then the pixels of six photographs differed from
those of the whole pictures by 0.7 of 255 in the root mean square, and by 6 at most; were it twice, by 1.9 and 13."""


class ImageError(ValueError):
    """An image that cannot be used. `path` is the file, `reason` one line of plain words."""

    def __init__(self, path: str | Path, reason: str) -> None:
        reason = " ".join(reason.split())
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ImageFile:
    """An image file of which the header has been read, and no pixel yet.

        with regular_file(path) as file, ImageFile(file, path) as image:
            pixels = image.decode()

    Args and errors are those of `open_image`.

    Attributes:
        width, height: of what `decode` will read, before it is turned upright.
        size: (height, width) of the whole picture, upright; known once it is decoded.
        note: what is done to this picture beyond plain decoding, or "".
    """

    def __init__(
        self, file: BinaryIO, path: str | Path, exif_orientation: bool = True, max_pixels: int | None = None
    ) -> None:
        self._file, self._path, self._exif_orientation = file, path, exif_orientation
        self._limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
        self._image: Image.Image | None = None
        self.note = ""
        with _reasons(path):
            if file.seek(0, os.SEEK_END) == 0:
                raise ImageError(path, "the file is empty")
            file.seek(0)
            size = jxl_size(file)  # its plugin decodes all when it opens a file, so that has to wait for `decode`
            kind, mode, progressive = "JXL", "RGBA", False
            if size is None:
                self._image = image = identify(file, os.fspath(path))
                size, kind, mode = image.size, image.format or "", image.mode
                progressive = "progressive" in image.info
            self.width, self.height = size
            self._stored = size
            if self.width < 1 or self.height < 1:
                raise ImageError(path, f"the image has no pixels ({self.height}x{self.width})")
            if kind in NO_SIGNATURE:
                self.note = f"taken for {kind} by its ending"
            full = self.width * self.height
            if kind in ICONS and (inner := icon_pixels(file)) > full:
                raise ImageError(path, f"an icon that says {self.height}x{self.width} and holds {inner} pixels")
            if self._limit is not None and full > self._limit:
                self._reduce(self._limit)
        decoder = _PROGRESSIVE_BYTES if progressive else _DECODER_BYTES.get(kind, 0)
        self._steps = 1 + (mode != "RGB") + exif_orientation  # decoded, converted, turned: four bytes a pixel each
        self._decoder_bytes = full * decoder

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._image is not None:
            self._image.close()

    @property
    def bytes(self) -> int:
        """What `decode` will take in memory at most, estimated."""
        return self._decoder_bytes + self.width * self.height * 4 * self._steps

    def prepare_for(self, preprocess: Preprocess) -> None:
        """If `preprocess.draft`, have a JPEG decoded at 1/8, 1/4 or 1/2 of its size.

        The least that is a whole number of pixels, so that nothing is moved, and DRAFT_SHRINK times what it is then
        resized to, turned by EXIF or not.
        """
        if not preprocess.draft or self.note:  # reduced already
            return
        rows, columns = preprocess.resized(self.height, self.width)
        turned_columns, turned_rows = preprocess.resized(self.width, self.height)
        most = min(self.height / max(rows, turned_rows), self.width / max(columns, turned_columns)) / DRAFT_SHRINK
        for scale in (8, 4, 2):
            if scale <= most and self.height % scale == self.width % scale == 0 and self._draft(scale):
                return

    def _draft(self, scale: int) -> bool:
        """Have a JPEG decoded at 1/scale of its size; whether that was possible."""
        image, width, height = self._image, self.width, self.height
        if not isinstance(image, JpegImageFile):
            return False
        image.draft(None, (max(width // scale, 1), max(height // scale, 1)))
        if image.size != (-(-width // scale), -(-height // scale)):
            return False
        self.width, self.height = image.size
        return True

    def _reduce(self, limit: int) -> None:
        """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size, the largest that fits; refuse anything else."""
        width, height = self.width, self.height
        for scale in (2, 4, 8):
            if -(-width // scale) * -(-height // scale) <= limit:
                if not self._draft(scale):
                    break
                self.note = f"read at 1/{scale} of its {height}x{width} pixels, which are over the limit of {limit}"
                return
        raise ImageError(self._path, f"too many pixels: {height}x{width}, the limit is {limit}")

    def decode(self) -> Image.Image:
        """The picture in RGB, upright.

        Raises:
            ImageError: if it is damaged, or its pixels are numbers without a known range.
        """
        with _reasons(self._path):
            image: Image.Image = self._image or identify(self._file, os.fspath(self._path))
            self._image = None  # it is the caller's, and what is converted or turned is not held here besides
            image.load()
            turn = _TURNS.get(_orientation(image)) if self._exif_orientation else None
            image, note = eight_bit(image, self._path)
            self.note = note or self.note
            reduced = (self.width, self.height) != self._stored
            width, height = self._stored if reduced else image.size
            self.size = (width, height) if turn in _TRANSPOSED else (height, width)
            if image.mode != "RGB":  # Pillow would copy it
                image = image.convert("RGB")
            return image if turn is None else image.transpose(turn)


def eight_bit(image: Image.Image, path: str | Path) -> tuple[Image.Image, str]:
    """An image with 16 bits, 32 bits or floats a pixel scaled to 8, and a note of that; any other as it is.

    Raises:
        ImageError: if its pixels are numbers without a known range.
    """
    tags = getattr(image, "tag_v2", {})
    if not image.mode.startswith("I") and image.mode != "F":
        return image, ""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        bits = int(np.max(tags.get(258, 16)))  # a TIFF of 12 bits has this mode, too
        grey = (values >> (bits - 8)).astype(np.uint8)
    else:
        low, high = _range(image)
        if low is None or high is None or not low < high or not np.isfinite(values).all():
            kind = "floating-point" if image.mode == "F" else "32-bit or signed"
            raise ImageError(path, f"{kind} pixels without a known range; convert the picture to 8 or 16 bit")
        grey = ((values.clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
    if tags.get(262) == 0:  # white is zero
        grey = 255 - grey
    return Image.fromarray(grey), f"{image.mode} grey scaled to 8 bits (the model's own processor would clip it at 255)"


def _range(image: Image.Image) -> tuple[float | None, float | None]:
    """The values of black and white that a file states for pixels that are not 8 or 16 bits unsigned."""
    if image.format == "PPM" and image.mode == "I":
        return 0, 65535  # what Pillow scales any maximum above 255 to
    tags = getattr(image, "tag_v2", {})
    stated = [tags.get(low, (None,)) for low in (340, 341)]  # SMinSampleValue, SMaxSampleValue
    low, high = (value[0] if isinstance(value, tuple) else value for value in stated)
    return low, high


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the data is junk; only read, since not all can be rewritten."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (
        Exception
    ):  # of junk Pillow raises SyntaxError, struct.error, ValueError, ...; the picture is as it was stored
        return 1
    return value if isinstance(value, int) else 1


@contextlib.contextmanager
def _reasons(path: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageError."""
    try:
        yield
    except (ImageError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(path, "not an image in a known format") from error
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"too many pixels: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(path, "no such file") from error
    except MemoryError as error:
        raise ImageError(path, "cannot be decoded: not enough memory") from error
    # Decoders raise nearly anything on damaged data; those in Rust not even an Exception.
    except BaseException as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(path, f"cannot be decoded: {reason}") from error


@contextlib.contextmanager
def regular_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; anything else is refused, and never waited for.

    Raises:
        ImageError: if there is no such file, it is a pipe, a device, a directory, or it cannot be read.
    """
    with _reasons(path):
        _refuse_irregular(path, os.stat(path))  # before it is opened: to open a device may do something
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _refuse_irregular(path, os.fstat(file.fileno()))
        yield file


def _refuse_irregular(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ImageError(path, f"not a regular file but {kind}")


def sha256(file: BinaryIO) -> bytes:
    """The hash of a whole file, which is left at its beginning."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    file.seek(0)
    return digest.digest()


def open_image(path: str | Path, *, exif_orientation: bool = True, max_pixels: int | None = None) -> np.ndarray:
    """Read a file as uint8 [H, W, 3] in RGB order.

    An alpha channel is dropped, grey is repeated, of an animation the first frame is taken: what
    Pillow's convert("RGB") does, and with it both transformers' `load_image` and timm's datasets. Grey of 16 bits is
    scaled to 8, where those clip it at 255, and so is grey of any numbers for which the file states a range.

    Args:
        path: a regular file. Its first bytes decide the format, not its name.
        exif_orientation: turn the image upright by its EXIF tag, as transformers' `load_image` does.
            timm's and torchvision's datasets do not: pass False to get their pixels.
        max_pixels: the largest picture to decode; `PIL.Image.MAX_IMAGE_PIXELS` by default. A JPEG that is larger is
            decoded at 1/2, 1/4 or 1/8 of its size (draft mode), the largest that fits.

    Raises:
        ImageError: if the file cannot be read, is empty, of unknown format, truncated or damaged, has more than
            `max_pixels` pixels and is no JPEG, or holds floating-point pixels without a known range.
    """
    with regular_file(path) as file, ImageFile(file, path, exif_orientation, max_pixels) as image:
        return np.array(image.decode())
