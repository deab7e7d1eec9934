"""What every kind of embedding folder has: a lock, the rows that are there, and which images are left to do.

What holds at every moment, so that it holds after a kill, too: what is written appears as a whole; a path has at most
one row; all rows have one identity (see `vitfast.pipeline.identity`); one process writes at a time (see
`vitfast.pipeline.lock`).
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, TypeVar

from vitfast.images.decode import sha256
from vitfast.images.files import InputError, path_text
from vitfast.pipeline.embed import Result
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.layout import format_of
from vitfast.pipeline.lock import FolderLock
from vitfast.pipeline.sources.item import Item, file_item

_Folder = TypeVar("_Folder", bound="Folder")

PART_ROWS = 4096
"""So many rows are written at once, at most."""


class OutputError(RuntimeError):
    """An output folder that can no longer be written: the message names it and says why."""


class Row(NamedTuple):
    """Where the row of a path is, and the file as it was then; ordered by which of two rows is the better."""

    ok: bool
    part: Path
    number: int
    size: int | None
    mtime_ns: int | None


class Told(Protocol):
    """What is told of images that were left out: see `Folder`."""

    skipped: int
    changed: list[str]


@dataclass(frozen=True)
class Known:
    """The rows that there are, by path as text; whether to take what has changed, and by which contents, if by any."""

    rows: Mapping[str, Row]
    refresh: bool = False
    hashes: Mapping[str, bytes] = field(default_factory=dict)

    def left(self, items: Iterable[Item], told: Told) -> Iterator[Item]:
        """The items that are left to do, one after another."""
        for item in items:
            key = item.key
            row = self.rows.get(key)
            if row is not None and row.ok:
                differs = _differs(item, row, self.hashes.get(key))
                if not (differs and self.refresh):
                    told.skipped += 1
                    if differs:
                        told.changed.append(key)
                    continue
            yield item


class Folder(ABC):
    """A folder with the embeddings of one model. Opening it needs no model.

    As a context manager it is made if missing, locked, and cleared of what a killed run has left behind; one that was
    made and stays empty is taken away again.

    Args:
        folder: need not be there yet.
        model: hub id or path of the model, noted in the folder; a path is made absolute.
        overwrite: everything in the folder is to be replaced: it is taken away when the first rows are written.

    Attributes:
        format: how rows are stored, "parquet" or "lance".
        changed: paths, as text, that `remaining` left out although the files have changed since. skipped: how many it
            left out.
        repaired: how many doubled rows were found and taken out.

    Raises:
        InputError: if the folder cannot be made or written, is of another format, or cannot be read.
    """

    format: ClassVar[str]

    def __init__(self, folder: str | Path, model: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(folder)
        self.model = os.path.abspath(model) if os.path.exists(model) else os.fspath(model)
        self.changed: list[str] = []
        self.skipped = 0
        self.repaired = 0
        self._overwrite = overwrite
        self._lock = FolderLock(self.path)
        self._entered = 0
        self._rows: dict[str, Row] = {}
        self._identities: dict[Path, tuple[str, Identity | None]] = {}
        self._created: list[Path] = []
        self._check()
        self._read()

    @abstractmethod
    def _read(self) -> None:
        """Read which rows there are, unless nothing has changed since they were read, or all are to be replaced."""

    @abstractmethod
    def _clean(self) -> None:
        """Take away what a killed run has left, and doubled rows; read which rows there are."""

    @abstractmethod
    def _hashes(self) -> dict[str, bytes]:
        """Path, as text -> SHA-256 of the file that was embedded."""

    @abstractmethod
    def add(self, results: Sequence[Result], dimension: int, identity: Identity) -> str:
        """Write rows, in place of those that there are of the same paths; the name of what they were written into.

        Raises:
            OutputError: if that cannot be done; what the folder held is still there.
        """

    @abstractmethod
    def _note(self, identity: Identity) -> None:
        """Write the manifest, where there is anything to note.

        Raises:
            OSError: if that cannot be done.
        """

    @property
    def room(self) -> int:
        """How many rows are to be written at once."""
        return PART_ROWS

    def _check(self) -> None:
        """Refuse a folder that cannot be written or made."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise self._refusal(f"{path_text(there)!r} is no folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise self._refusal(f"no permission, or read-only: {path_text(there)!r}")
        if format_of(self.path) not in (None, self.format):
            raise self._refusal(f"it holds a {format_of(self.path)} data set, asked for is {self.format}")

    def _refusal(self, reason: str) -> InputError:
        return InputError(f"output folder {path_text(self.path)!r} cannot be written: {reason}")

    def _make(self) -> None:
        try:
            self._created = self._created or [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error.strerror or str(error)) from error

    def __enter__(self: _Folder) -> _Folder:
        if not self._entered:
            self._make()
            self._lock.acquire()
            try:
                self._clean()
            except BaseException:
                self._lock.release()
                raise
        self._entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._lock.release()
            with contextlib.suppress(OSError):  # one that is not empty
                for path in self._created:
                    path.rmdir()

    @property
    def done(self) -> set[str]:
        """Paths, as text, that have an embedding."""
        return {path for path, row in self._rows.items() if row.ok}

    def remaining(self, paths: Iterable[Path], *, refresh: bool = False, content: bool = False) -> list[Path]:
        """The paths that have no embedding yet; images that failed before are tried again.

        Args:
            paths: all that should have one.
            refresh: take those, too, whose file has another size or modification time than when it was embedded.
            content: with `refresh`, compare the files' contents instead.
        """
        return [Path(item.path) for item in self.todo(map(file_item, paths), refresh=refresh, content=content)]

    def todo(self, items: Iterable[Item], *, refresh: bool = False, content: bool = False) -> Iterator[Item]:
        """As `remaining`, of the items of any source, one after another; `skipped` counts the others.

        The folder's files are read now, and not again as the items are taken.
        """
        self.changed, self.skipped = [], 0
        return self.known(refresh=refresh, content=content).left(items, self)

    def known(self, *, refresh: bool = False, content: bool = False) -> Known:
        """What says which images are left to do, for a process that has no folder; arguments as of `remaining`."""
        return Known(self._rows, refresh, self._hashes() if refresh and content else {})

    def check(self, identity: Identity) -> None:
        """Refuse embeddings of another identity than the folder's.

        Raises:
            InputError: with what differs, and both values.
        """
        for model, other in self._identities.values():
            if other == identity:
                continue
            why = ["settings that it does not state"] if other is None else other.differences(identity)
            raise InputError(
                f"output folder {path_text(self.path)!r} holds embeddings of {model or 'an unknown model'!r} with "
                f"{'; '.join(why)}: choose another folder, or replace them all with --overwrite (overwrite=True)"
            )

    def note(self, identity: Identity) -> None:
        """Write the manifest (see `vitfast.pipeline.manifest`), where there is anything to note.

        Raises:
            OutputError: if that cannot be done; the rows are as they were.
        """
        try:
            self._note(identity)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or str(error)
        return OutputError(f"output folder {path_text(self.path)!r} cannot be written: {reason}")


def _differs(item: Item, row: Row, digest: bytes | None) -> bool:
    """Whether an image is not the one that a row was made from; by its content if that is known."""
    try:
        if digest is None:
            stat = item.stat()
            return stat is not None and row.size is not None and stat != (row.size, row.mtime_ns)
        with item.open() as file:
            return sha256(file) != digest
    except Exception:  # gone or unreadable, in its source's own words: what is known of it stays
        return False
