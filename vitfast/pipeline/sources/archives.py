"""Images in tar and zip archives, WebDataset shards among them.

An uncompressed tar and a zip are read where a member lies, by many threads; a compressed tar from front to end, once.
Of a WebDataset shard (https://github.com/webdataset/webdataset) the files of one sample share their name up to the
first dot of the last part, and stand beside each other; the fields of a sample's .json, and its .txt and .cls, are
columns of its image.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from vitfast.images.decode import ImageError
from vitfast.images.formats import why_left_out
from vitfast.pipeline.sources.item import LARGEST, Item, bytes_item, in_memory, inside, refused_item

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIP = (".zip",)
SIDECARS = (".json", ".txt", ".cls")
LARGEST_SIDECAR = 16 << 20

Opener = Callable[[], BinaryIO]


def tar_items(name: str, opener: Opener, columns: Sequence[str], left_out: dict[str, str]) -> Iterator[Item]:
    """The images of a tar archive, in its order.

    Args:
        name: of the archive, for keys. opener: opens it. columns: which fields of sidecars to carry along.
        left_out: members that are no images -> why, filled in.

    Raises:
        tarfile.TarError, OSError, EOFError: where the archive is damaged, after the images before.
    """
    with opener() as file:
        archive, streamed = _opened(file)
        with archive:
            image = functools.partial(_member_item, archive, inside(name, ""), opener, streamed)
            members = _named_once(archive, name, left_out)
            if not columns:
                yield from (image(member) for member in members if not member.name.endswith(SIDECARS))
                return
            for _, sample in itertools.groupby(members, lambda member: _sample_of(member.name)):
                yield from _of_sample(archive, sample, columns, image)


def _opened(file: BinaryIO) -> tuple[tarfile.TarFile, bool]:
    """An archive, and whether it can be read from front to end only."""
    if file.seekable():
        try:
            return tarfile.open(fileobj=file, mode="r:"), False
        except tarfile.ReadError:  # compressed, or no archive
            file.seek(0)
    return tarfile.open(fileobj=file, mode="r|*"), True


def _named_once(archive: tarfile.TarFile, name: str, left_out: dict[str, str]) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive that are images or sidecars; a name that comes again is left out."""
    seen = set()
    for member in archive:
        key, reason = inside(name, member.name), why_left_out(member.name)
        if member.isdir():
            continue
        if not member.isreg():
            left_out[key] = "no regular file"
        elif member.name.endswith(SIDECARS):
            yield member
        elif reason is not None:
            left_out[key] = reason
        elif member.name in seen:
            left_out[key] = "the archive has another of this name before it"
        else:
            seen.add(member.name)
            yield member


def _sample_of(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _of_sample(
    archive: tarfile.TarFile,
    members: Iterable[tarfile.TarInfo],
    columns: Sequence[str],
    image: Callable[[tarfile.TarInfo], Item],
) -> Iterator[Item]:
    """The images among the members of one sample, with what its sidecars say."""
    images: list[Item] = []
    fields: dict[str, Any] = {}
    for member in members:
        if member.name.endswith(SIDECARS):
            content = archive.extractfile(member)
            fields |= _fields(member.name, content.read(LARGEST_SIDECAR) if content else b"")
        else:
            images.append(image(member))
    carried = {column: fields.get(column) for column in columns}
    yield from (replace(item, columns=carried) for item in images)


def _fields(name: str, content: bytes) -> dict[str, Any]:
    """What a sidecar says: the fields of a JSON object, or a text under its ending ("txt", "cls")."""
    ending = name.rpartition(".")[2]
    if ending != "json":
        return {ending: content.decode("utf-8", "replace").strip()}
    with contextlib.suppress(ValueError):
        if isinstance(fields := json.loads(content), dict):
            return fields
    return {}


def _member_item(
    archive: tarfile.TarFile, prefix: str, opener: Opener, streamed: bool, member: tarfile.TarInfo
) -> Item:
    """A member as an image. Of a stream the bytes are read now, since it is read in order."""
    key, mtime_ns = prefix + member.name, int(member.mtime * 1e9)
    if member.size > LARGEST or member.issparse():
        reason = "a sparse file in a tar archive" if member.issparse() else f"{member.size} bytes, more than {LARGEST}"
        return refused_item(key, reason)
    if streamed:
        content = archive.extractfile(member)
        return bytes_item(key, content.read() if content else b"", mtime_ns)
    reader = functools.partial(_part, opener, member.offset_data, member.size, key)
    return Item(key, reader, member.size, mtime_ns)


@contextlib.contextmanager
def _part(opener: Opener, offset: int, size: int, key: str) -> Iterator[BinaryIO]:
    with opener() as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ImageError(key, "the archive ends in the middle of it")
    with in_memory(content) as part:
        yield part


def zip_items(name: str, opener: Opener, columns: Sequence[str], left_out: dict[str, str]) -> Iterator[Item]:
    """The images of a zip archive, in its order; arguments as of `tar_items`. No columns are known.

    Raises:
        zipfile.BadZipFile, OSError: if it is damaged.
    """
    archive = zipfile.ZipFile(opener())  # open until the last item is read: threads share it, it has a lock
    seen = set()
    for member in archive.infolist():
        key = inside(name, member.filename)
        if member.is_dir():
            continue
        reason = "the archive has another of this name before it" if key in seen else why_left_out(member.filename)
        if reason is not None:
            left_out[key] = reason
            continue
        seen.add(key)
        carried = dict.fromkeys(columns)
        if member.file_size > LARGEST:
            yield refused_item(key, f"{member.file_size} bytes, more than {LARGEST}", carried)
        else:
            yield Item(key, functools.partial(_zip_member, archive, member), member.file_size, None, carried)


@contextlib.contextmanager
def _zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[BinaryIO]:
    with archive.open(member) as stream:
        content = stream.read()  # never more than the archive says: zipfile sees to that
    with in_memory(content) as file:
        yield file


def is_archive(name: str) -> bool:
    """Whether a name's ending says tar or zip."""
    return os.fspath(name).lower().endswith((*TAR, *ZIP))
