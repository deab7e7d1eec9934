"""Images and containers behind a URL: whatever fsspec has a file system for (s3://, gs://, hf://, http://, ...).

fsspec comes with huggingface-hub; most of its file systems need a package of their own, which its error names.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from vitfast.images.files import InputError
from vitfast.images.formats import why_left_out
from vitfast.pipeline.sources.item import Item, in_memory

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(name: str) -> bool:
    """Whether a source is a URL: a scheme of two letters or more and ://."""
    return _URL.match(name) is not None


def url_item(url: str, columns: Mapping[str, Any] | None = None) -> Item:
    """An image behind a URL, fetched as a whole when it is read."""
    return Item(url, functools.partial(_fetched, url), columns=columns or {})


@contextlib.contextmanager
def _fetched(url: str) -> Iterator[BinaryIO]:
    with open_url(url) as file:
        content = file.read()
    with in_memory(content) as whole:
        yield whole


def open_url(url: str) -> BinaryIO:
    """The file behind a URL, seekable where its file system is.

    Raises:
        InputError: if the scheme is unknown or needs a package that is not installed.
        Exception: what the file system raises.
    """
    import fsspec

    try:
        return fsspec.open(url, "rb").open()
    except (ImportError, ValueError) as error:
        raise InputError(f"{url!r} cannot be opened: {error}") from error


def expand(url: str, left_out: dict[str, str]) -> list[str]:
    """What a URL stands for: itself, what a pattern matches, or the images in a folder and below.

    Raises:
        InputError: if it matches nothing, or the file system cannot be used.
    """
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
        if any(sign in path for sign in "*[") and "?" not in path:
            names = [name for name in system.glob(path) if not system.isdir(name)]
        elif system.isdir(path):
            names = [name for name in system.find(path) if _is_image(name, left_out)]
        else:
            return [url]
    except Exception as error:  # what the file system, its HTTP library or a missing package raises
        raise InputError(f"{url!r} cannot be listed: {type(error).__name__}: {error}") from error
    if not names:
        raise InputError(f"{url!r} matches no files")
    return sorted(system.unstrip_protocol(name) for name in names)


def _is_image(name: str, left_out: dict[str, str]) -> bool:
    reason = why_left_out(name)
    if reason is not None:
        left_out[name] = reason
    return reason is None
