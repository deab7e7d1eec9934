"""Images by the keys that an embedding folder has of them, and small pictures of them for a page."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Iterator

from vitfast.images.decode import ImageFile
from vitfast.pipeline.sources import container_items, is_container
from vitfast.pipeline.sources.item import Item, file_item
from vitfast.pipeline.sources.remote import is_url, url_item

THUMBNAIL = 160
"""The longer side of a small picture, in pixels."""


def container_of(key: str) -> str | None:
    """The archive or table that a key like "photos.tar::cat.jpg" is in; None for a file or URL of its own."""
    at = key.find("::")
    while at >= 0:
        if is_container(key[:at]):
            return key[:at]
        at = key.find("::", at + 2)
    return None


def items_of(keys: Iterable[str]) -> Iterator[Item]:
    """The images of these keys, in any order; those that are not there any more are left out, or fail when opened.

    A container is walked through once, until all that is wanted of it was found.
    """
    inside: dict[str, set[str]] = {}
    for key in keys:
        container = container_of(key)
        if container is not None:
            inside.setdefault(container, set()).add(key)
        elif is_url(key):
            yield url_item(key)
        else:
            yield file_item(_path(key))
    for container, wanted in inside.items():
        try:
            for item in container_items(container):
                if item.key in wanted:
                    wanted.discard(item.key)
                    yield item
                if not wanted:
                    break
        except Exception:  # damaged or gone, in its format's own words: a page shows names where it has no pictures
            continue


def _path(key: str) -> str:
    r"""The path that `path_text` made a key of: \xNN is a byte again."""
    return os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), key.encode()))


def thumbnails(keys: Iterable[str], side: int = THUMBNAIL, exif_orientation: bool = True) -> dict[str, str]:
    """Small JPEGs as data URLs, by key; what cannot be read is left out.

    Args:
        side: the longer side, in pixels. exif_orientation: see `vitfast.images.decode.open_image`.
    """
    made = {}
    for item in items_of(keys):
        try:
            with item.open() as file, ImageFile(file, item.path, exif_orientation) as image:
                picture = image.decode()
        except Exception:  # whatever its source raises: a page shows its name alone
            continue
        picture.thumbnail((side, side))
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=80)
        made[item.key] = "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
    return made


def name_of(key: str) -> str:
    """The last part of a key, for a caption."""
    return os.path.basename(key.rpartition("::")[2]) or key
