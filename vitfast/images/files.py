"""Which files are images: folders, patterns and single files as a sorted list of paths, and what was left out."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitfast.images.formats import FORMATS, readable, why_left_out


class InputError(ValueError):
    """Sources or an output folder that cannot be used; the message names them and says why."""


def path_text(path: str | Path) -> str:
    r"""A path as UTF-8 text, a different one for each path.

    Bytes that are not UTF-8 are written as \xNN. So that no other name looks like that, the backslash of a name that
    has such a sequence of its own is written as \x5c. All other names are as they are, control characters included.
    """
    escaped = re.sub(rb"\\(?=x[0-9a-f]{2})", rb"\\x5c", os.fsencode(path))
    return escaped.decode("utf-8", "backslashreplace")


@dataclass
class ImageListing:
    """What sources hold.

    Attributes:
        images: absolute paths, sorted, each once.
        left_out: files and linked folders that were passed over in folders -> why.
        unreadable: folders below a source that cannot be read -> why.
    """

    images: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def find_images(sources: Sequence[str | Path]) -> ImageListing:
    """The image files that sources name, and what was left out.

    A file is taken whatever its name. A folder is searched with its subfolders for the endings of
    `vitfast.images.formats.FORMATS`, as far as they can be read here. Names that begin with a dot and symbolic links to
    folders are left out; of folders whose name begins with a dot nothing is looked at. Anything else is a glob pattern
    (** for any depth) and must match files.

    Raises:
        InputError: if a source does not exist, holds no images, or is a folder that cannot be read.
    """
    listing, images = ImageListing(), set[str]()
    for source in (os.fspath(source) for source in sources):
        if os.path.isdir(source):
            files = _images_below(source, listing)
        elif os.path.lexists(source):
            files = [source]
        elif glob.has_magic(source):
            files = [path for path in glob.iglob(source, recursive=True) if not os.path.isdir(path)]
            if not files:
                raise InputError(f"no files match the pattern {path_text(source)!r}")
        else:
            raise InputError(f"no such file or folder: {path_text(source)!r}")
        images.update(map(os.path.abspath, files))
    listing.images = [Path(path) for path in sorted(images)]
    return listing


def collect(sources: Sequence[str | Path]) -> list[Path]:
    """The images of `find_images`, for callers who do not ask what was left out.

    Raises:
        InputError: as there, and if any folder cannot be read.
    """
    listing = find_images(sources)
    for folder, reason in listing.unreadable.items():
        raise InputError(f"cannot read folder {folder!r}: {reason}")
    return listing.images


def _images_below(source: str, listing: ImageListing) -> list[str]:
    """The images in a folder and below; what is not taken goes into `listing`."""
    images, here = [], ImageListing()

    def note(error: OSError) -> None:
        reason = error.strerror or str(error)
        if error.filename == source:
            raise InputError(f"cannot read folder {path_text(source)!r}: {reason}") from error
        here.unreadable[path_text(os.path.abspath(error.filename))] = reason

    for parent, folders, files in os.walk(source, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path):
                here.left_out[path_text(os.path.abspath(path))] = "a link to a folder"
        for path in (os.path.join(parent, name) for name in sorted(files)):
            reason = why_left_out(path)
            if reason is None:
                images.append(path)
            else:
                here.left_out[path_text(os.path.abspath(path))] = reason
    if not images:
        endings = ", ".join(ending for name in readable() for ending in FORMATS[name])
        left = next(iter({**here.unreadable, **here.left_out}.items()), None)
        also = f"; left out: {left[0]!r} ({left[1]})" if left else ""
        raise InputError(f"no images in folder {path_text(source)!r} (looked for {endings}){also}")
    listing.left_out |= here.left_out
    listing.unreadable |= here.unreadable
    return images
