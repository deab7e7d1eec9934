"""Which files are images: folders, patterns and single files as a sorted list of paths."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitfast.images.decode import FORMATS

if TYPE_CHECKING:
    pass

ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)


class InputError(ValueError):
    """Sources or an output folder that cannot be used; the message names them and says why."""


def path_text(path: str | Path) -> str:
    """A path as text that any file or terminal takes: bytes that are not UTF-8 are written as backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def collect(sources: Sequence[str | Path]) -> list[Path]:
    """The image files that sources name, as absolute paths, sorted, each once.

    A file is taken whatever its name. A folder is searched with its subfolders (symbolic links to
    folders are not followed) for the endings of `vitfast.images.decode.FORMATS`; names that begin with a
    dot are left out. Anything else is a glob pattern (** for any depth) and must match files.

    Raises:
        InputError: if a source does not exist or holds no images, or a folder cannot be read.
    """
    found: set[str] = set()
    for source in (os.fspath(source) for source in sources):
        if os.path.isdir(source):
            files = list(_images_below(source))
            if not files:
                raise InputError(f"no images in folder {path_text(source)!r} (looked for {', '.join(ENDINGS)})")
        elif os.path.exists(source):
            files = [source]
        elif glob.has_magic(source):
            files = [path for path in glob.iglob(source, recursive=True) if not os.path.isdir(path)]
            if not files:
                raise InputError(f"no files match the pattern {path_text(source)!r}")
        else:
            raise InputError(f"no such file or folder: {path_text(source)!r}")
        found.update(map(os.path.abspath, files))
    return [Path(path) for path in sorted(found)]


def _images_below(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read folder {path_text(error.filename)!r}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, n) for n in files if n.lower().endswith(ENDINGS) and not n.startswith("."))
