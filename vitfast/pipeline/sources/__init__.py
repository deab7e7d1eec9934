"""Where images come from: files and folders, archives, tables and URLs, each image with a key of its own.

    found = find_sources(["photos/", "shards/*.tar", "list.csv", "s3://bucket/more/"])
    for item in found:
        ...

Files and folders are listed at once; the others are walked through as they are read, so that a shard of any size takes
no memory.
"""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from vitfast.images.files import ImageListing, InputError, find_images, path_text
from vitfast.pipeline.sources.archives import TAR, ZIP, Opener, is_archive, tar_items, zip_items
from vitfast.pipeline.sources.datasets import saved_files
from vitfast.pipeline.sources.item import Item, file_item
from vitfast.pipeline.sources.remote import expand, is_url, open_url, url_item
from vitfast.pipeline.sources.tables import (
    ARROW,
    LANCE,
    PARQUET,
    arrow_items,
    is_table,
    lance_items,
    list_items,
    parquet_items,
)
from vitfast.pipeline.sources.video import VIDEO, is_video, video_items

__all__ = ["Item", "Sources", "container_items", "find_sources", "is_container"]


EVERY_FRAME = 1e6
"""More frames a second than any video has."""


class Sources:
    """The images that sources hold, in order: those of files first, then what each container has.

    Attributes:
        listing: the files, and what was left out or could not be read, so far; containers add to it as they are read.
        containers: name -> how its items are read.
        count: how many images there are, None where containers have to be read to know.
    """

    def __init__(self, listing: ImageListing, containers: dict[str, Callable[[], Iterator[Item]]]) -> None:
        self.listing, self.containers = listing, containers

    @property
    def count(self) -> int | None:
        """How many images there are, None where containers have to be read to know."""
        return None if self.containers else len(self.listing.images)

    def __iter__(self) -> Iterator[Item]:
        """Every image once. A container that is damaged ends there, and `listing.unreadable` says why."""
        seen = set[str]()
        for item in map(file_item, self.listing.images):
            if self.containers:
                seen.add(item.key)
            yield item
        for name, items in self.containers.items():
            try:
                for item in items():
                    if item.key not in seen:
                        seen.add(item.key)
                        yield item
            except Exception as error:  # what tar, zip, Parquet and file systems raise of damaged or absent data
                reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                self.listing.unreadable[path_text(name)] = " ".join(reason.split())


def find_sources(
    sources: Sequence[str | Path], *, columns: Sequence[str] = (), image_column: str | None = None, fps: float = 1.0
) -> Sources:
    """The images that sources name.

    Args:
        sources: what `vitfast.images.files.find_images` takes; .tar (also compressed), .zip; .txt or .lst with a path
            or URL a line, .csv, .tsv; .parquet; .arrow; .lance; a folder that Hugging Face's `save_to_disk` wrote;
            videos; or URLs of any of these, of folders, or with a pattern.
        columns: what to carry along: columns of tables, fields of a WebDataset sample's .json.
        image_column: which column of tables has the images; by default the first with a usual name.
        fps: of videos, frames a second.

    Raises:
        ValueError: if fps is not positive.
        InputError: if a source does not exist or holds no images.
    """
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    left_out, containers = dict[str, str](), dict[str, Callable[[], Iterator[Item]]]()
    files: list[str | Path] = []
    for source in (os.fspath(source) for source in sources):
        if is_url(source):
            names = expand(source, left_out)
        elif glob.has_magic(source) and not os.path.lexists(source):
            names = sorted(path for path in glob.iglob(source, recursive=True) if not os.path.isdir(path))
            if not names:
                raise InputError(f"no files match the pattern {path_text(source)!r}")
        else:
            names = [source]
        for name in names:
            if os.path.isdir(name) and not name.lower().rstrip("/").endswith(LANCE):
                parts = saved_files(name)
                if parts is None:
                    files.append(name)
                for part in parts or ():
                    containers[part] = _reader(part, columns, image_column, left_out, fps)
            elif not (is_container(name) or is_url(name)):
                files.append(name)
            elif not (is_url(name) or os.path.isfile(name) or os.path.isdir(name)):
                raise InputError(f"no such file: {path_text(name)!r}")
            else:
                containers[name] = _reader(name, columns, image_column, left_out, fps)
    listing = find_images(files) if files else ImageListing()
    left_out |= listing.left_out
    return Sources(ImageListing(listing.images, left_out, listing.unreadable), containers)


def is_container(name: str) -> bool:
    """Whether a name's ending says archive, table or video."""
    return is_archive(name) or is_table(name) or is_video(name)


def container_items(name: str) -> Iterator[Item]:
    """The images of an archive or table, or all frames of a video, in order.

    Raises:
        Exception: what its format raises where it is damaged.
    """
    return _reader(name, (), None, {}, EVERY_FRAME)()


def _open(name: str) -> BinaryIO:
    return open(name, "rb")


def _reader(
    name: str, columns: Sequence[str], image_column: str | None, left_out: dict[str, str], fps: float
) -> Callable[[], Iterator[Item]]:
    opener: Opener = functools.partial(open_url, name) if is_url(name) else functools.partial(_open, name)
    ending = name.lower().partition("?")[0]
    if ending.endswith(TAR):
        return functools.partial(tar_items, name, opener, columns, left_out)
    if ending.endswith(ZIP):
        return functools.partial(zip_items, name, opener, columns, left_out)
    if ending.endswith(PARQUET):
        return functools.partial(parquet_items, name, opener, columns, image_column)
    if ending.endswith(ARROW):
        return functools.partial(arrow_items, name, opener, columns, image_column)
    if ending.rstrip("/").endswith(LANCE):
        return functools.partial(lance_items, name, columns, image_column)
    if ending.endswith(VIDEO):
        return functools.partial(video_items, name, opener, columns, fps)
    if is_table(ending):
        return functools.partial(list_items, name, opener, columns, image_column)
    return lambda: iter([url_item(name)])
