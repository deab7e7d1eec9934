"""Which image formats are read: Pillow's own and those of optional plugins, with the endings of their files."""

from __future__ import annotations

import importlib
import os
import re
import struct
from functools import cache
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

FORMATS = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp",),
    "DDS": (".dds",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif", ".hif", ".heics", ".heifs"),
    "ICNS": (".icns",),
    "ICO": (".ico",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "JXL": (".jxl",),
    "PCX": (".pcx",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
}
"""Formats that are read, by Pillow's names -> file endings looked for in folders. A file is recognised by its first
bytes, never by its ending; NO_SIGNATURE are the exception. Left out are formats that run other programs (EPS), hold
measurements and not pictures (FITS, SPIDER, HDF5), are films (FLI, MPEG), or that Pillow only has a stub for."""

NO_SIGNATURE = ("TGA",)
"""Formats that nothing in the file tells from garbage: tried only where the ending says so."""

ICONS = ("ICNS", "ICO")
"""Formats that hold pictures of other formats (see `icon_pixels`)."""

PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
"""Formats that Pillow reads with a plugin -> the module, and the package to install."""


@cache
def readable() -> tuple[str, ...]:
    """Those of FORMATS that Pillow and the plugins installed here can read."""
    Image.init()
    for name, (module, _) in PLUGINS.items():
        if name not in Image.OPEN:
            try:
                plugin = importlib.import_module(module)  # pillow_jxl registers itself
            except ImportError:
                continue  # `why_left_out` says of each such file what to install
            getattr(plugin, "register_heif_opener", lambda: None)()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def format_of(path: str) -> str | None:
    """The format that a file's ending stands for, or None."""
    ending = os.path.splitext(path)[1].lower()
    return next((name for name, endings in FORMATS.items() if ending in endings), None)


def why_left_out(path: str) -> str | None:
    """None for a file whose ending is looked for; else the reason why it is passed over."""
    name = format_of(path)
    if name is None:
        return "no known ending of an image"
    if os.path.basename(path).startswith("."):
        return "its name begins with a dot"
    if name not in readable():
        how = f"install {PLUGINS[name][1]}" if name in PLUGINS else "this Pillow was built without it"
        return f"{name} cannot be read here: {how}"
    return None


def identify(file: BinaryIO, path: str) -> Image.Image:
    """Read the header of an image, as `PIL.Image.open` does but without its limit on pixels: that is the caller's.

    Raises:
        UnidentifiedImageError: if no format takes the file.
        Exception: whatever else a format raises on damaged data.
    """
    prefix = file.read(16)
    own = format_of(path)
    for name in readable():
        if name in NO_SIGNATURE and name != own:
            continue
        factory, accept = Image.OPEN[name]
        try:
            accepted = accept(prefix) if accept else True
            if accepted and not isinstance(accepted, str):  # a string is a plugin's reason why not
                file.seek(0)
                return factory(file, "")  # by its name Pillow would map it: scrambled if turned, a crash if it shrinks
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # what a format raises for a file that is not its own
    raise UnidentifiedImageError(f"cannot identify image file {path!r}")


def icon_pixels(file: BinaryIO) -> int:
    """Pixels of the largest PNG or JPEG 2000 in an icon, which may be more than its directory says."""
    file.seek(0)
    content = file.read()
    file.seek(0)
    sides = (struct.unpack(">II", match[1]) for match in re.finditer(rb"(?:IHDR|ihdr)(.{8})", content, re.DOTALL))
    return max((width * height for width, height in sides), default=0)


def jxl_size(file: BinaryIO) -> tuple[int, int] | None:
    """(width, height) from the header of a JPEG XL file, without decoding it; None for any other file.

    Source: ISO/IEC 18181-1 (codestream: signature, then SizeHeader) and 18181-2 (boxes around it).
    """
    file.seek(0)
    start = file.read(4096)
    file.seek(0)
    if start[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        box = max(start.find(b"jxlc"), start.find(b"jxlp"))
        start = start[box + (4 if start[box : box + 4] == b"jxlc" else 8) :] if box >= 0 else b""
    if start[:2] != b"\xff\x0a":
        return None
    bits, used = int.from_bytes(start[2:16], "little"), 0

    def take(count: int) -> int:
        nonlocal used
        used += count
        return bits >> (used - count) & (1 << count) - 1

    small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height, ratio = side(), take(3)
    if ratio == 0:
        return side(), height
    above, below = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * above // below, height
