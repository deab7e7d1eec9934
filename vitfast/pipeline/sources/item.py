"""One image of a source: a key that stays the same from run to run, and how its bytes are read."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vitfast.images.decode import ImageError, regular_file
from vitfast.images.files import path_text

LARGEST = 1 << 30
"""Bytes of the largest image that is read out of a container, where it has to be held in memory."""


@dataclass(frozen=True)
class Item:
    """An image that can be read, once or more.

    Attributes:
        path: a file's path; text for an image inside something else, "archive.tar::member.jpg", or a URL.
        open: a context manager that gives the bytes as a seekable file. It may raise ImageError, OSError or whatever
            the format's reader raises, which becomes the image's status.
        size, mtime_ns: what tells whether it has changed, None where that is not known before it is read.
        columns: what else the source says of it, by name.
        held: bytes that are in memory as long as the item is.
    """

    path: str | Path
    open: Callable[[], contextlib.AbstractContextManager[BinaryIO]]
    size: int | None = None
    mtime_ns: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    held: int = 0

    @property
    def key(self) -> str:
        """The path as text, by which a run knows what has been done."""
        return path_text(self.path)

    def stat(self) -> tuple[int, int | None] | None:
        """Size and time now, None where they are not known before it is read.

        Raises:
            OSError: if it is a file and is not there.
        """
        if self.size is not None:
            return self.size, self.mtime_ns
        if isinstance(self.path, Path):
            status = self.path.stat()
            return status.st_size, status.st_mtime_ns
        return None


def file_item(path: str | Path, columns: Mapping[str, Any] | None = None) -> Item:
    """An image that is a file; its size and time are looked at when it is read."""
    return Item(Path(path), lambda: regular_file(path), columns=columns or {})


def bytes_item(
    path: str, content: bytes, mtime_ns: int | None = None, columns: Mapping[str, Any] | None = None
) -> Item:
    """An image of which the bytes are there."""
    return Item(path, lambda: in_memory(content), len(content), mtime_ns, columns or {}, len(content))


def refused_item(path: str, reason: str, columns: Mapping[str, Any] | None = None) -> Item:
    """An image that cannot be read, and why."""

    def refuse() -> contextlib.AbstractContextManager[BinaryIO]:
        raise ImageError(path, reason)

    return Item(path, refuse, columns=columns or {})


@contextlib.contextmanager
def in_memory(content: bytes) -> Iterator[BinaryIO]:
    """Bytes as a file."""
    with io.BytesIO(content) as file:
        yield file


def inside(container: str | Path, name: str) -> str:
    """The key of something inside a container: of a file, made absolute, or a URL."""
    outer = os.fspath(container)
    return f"{outer if '://' in outer else os.path.abspath(outer)}::{name}"
