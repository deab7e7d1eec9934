"""Embeddings as a folder of Parquet files with one row per image, whatever happens to the runs that write it.

    with EmbeddingFolder("embeddings", model="facebook/dinov2-small") as folder:
        paths = folder.remaining(collect(["photos/"]))
        engine = vitfast.load("facebook/dinov2-small")
        summary = write_parquet(embed_images(engine, paths), folder, engine)

The folder is a Parquet data set: read it with `read_embeddings("embeddings")`, `pyarrow.parquet.read_table`, pandas,
DuckDB or Ray Data. Columns: `path` (absolute), `embedding` (fixed-size list of float32 or float16, null for a bad
image), `status` ("ok", or why not), `note` (what was done to an unusual picture), and of the file as it was read
`file_size`, `file_mtime_ns` and `file_sha256`.

What holds at every moment, so that it holds after a kill, too: a part appears and changes as a whole; a path has at
most one row, for its older row is taken out before the part with the newer one appears; all rows have one identity
(see `vitfast.pipeline.identity`); one process writes at a time (see `vitfast.pipeline.lock`).
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitfast.images.decode import sha256
from vitfast.images.files import InputError, path_text
from vitfast.pipeline import manifest
from vitfast.pipeline.embed import OK, Result
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.lock import FolderLock
from vitfast.pipeline.parts import finished, table_of
from vitfast.pipeline.sources.item import Item, file_item
from vitfast.pipeline.stages import Stages

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

PART_ROWS, PART_SECONDS = 4096, 5.0
"""A part grows up to this many rows, and is written anew when it is this old: what a killed run can lose, with the
batches under way (see `vitfast.pipeline.embed.BATCH_SECONDS`)."""

FLOAT16_MAX = float(np.finfo(np.float16).max)

_MODEL, _IDENTITY = b"vitfast.model", b"vitfast.identity"
_PARTS, _UNFINISHED = "part-*.parquet", (".part-*.tmp", ".probe-*", f".{manifest.NAME}-*.tmp")


class OutputError(RuntimeError):
    """An output folder that can no longer be written: the message names it and says why."""


class _Row(NamedTuple):
    """Where the row of a path is, and the file as it was then; ordered by which of two rows is the better."""

    ok: bool
    part: Path
    number: int
    size: int | None
    mtime_ns: int | None


class EmbeddingFolder:
    """A folder of Parquet parts with the embeddings of one model. Opening it needs no model.

    As a context manager it is made if missing, locked, and cleared of what a killed run has left behind; one that was
    made and stays empty is taken away again.

    Args:
        folder: need not be there yet.
        model: hub id or path of the model, noted in the parts; a path is made absolute.
        overwrite: everything in the folder is to be replaced: it is taken away when the first part is written.

    Attributes:
        changed: paths, as text, that `remaining` left out although the files have changed since. skipped: how many it
            left out.
        repaired: how many doubled rows were found and taken out.

    Raises:
        InputError: if the folder cannot be made or written, or holds a part that cannot be read.
    """

    def __init__(self, folder: str | Path, model: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(folder)
        self.model = os.path.abspath(model) if os.path.exists(model) else os.fspath(model)
        self.changed: list[str] = []
        self.skipped = 0
        self.repaired = 0
        self._overwrite = overwrite
        self._lock = FolderLock(self.path)
        self._entered = 0
        self._rows: dict[str, _Row] = {}
        self._doubled: dict[Path, list[int]] = {}
        self._identities: dict[Path, tuple[str, Identity | None]] = {}
        self._seen: list[tuple[str, int, int]] = []
        self._created: list[Path] = []
        self._check()
        self._read()

    def _check(self) -> None:
        """Refuse a folder that cannot be written or made."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise self._refusal(f"{path_text(there)!r} is no folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise self._refusal(f"no permission, or read-only: {path_text(there)!r}")

    def _refusal(self, reason: str) -> InputError:
        return InputError(f"output folder {path_text(self.path)!r} cannot be written: {reason}")

    def _make(self) -> None:
        try:
            self._created = self._created or [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error.strerror or str(error)) from error

    def __enter__(self) -> EmbeddingFolder:
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

    def _clean(self) -> None:
        """Take away unfinished parts and doubled rows."""
        for pattern in _UNFINISHED:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
        self._read()
        for part, numbers in self._doubled.items():
            keep = np.ones(pq.read_metadata(part).num_rows, bool)
            keep[numbers] = False
            self._rewrite(part, keep)
            self.repaired += len(numbers)
        if self._doubled:
            self._read()

    def _read(self) -> None:
        """Read which rows there are, unless nothing has changed since they were read."""
        if self._overwrite:
            return
        for _ in range(10):  # a run that is writing may take a part away between one step and the next
            with contextlib.suppress(FileNotFoundError):
                seen = sorted((p.name, s.st_mtime_ns, s.st_size) for p in self.path.glob(_PARTS) for s in [p.stat()])
                if seen == self._seen:
                    return
                self._rows, self._doubled, self._identities = {}, {}, {}
                for name, *_ in seen:
                    self._read_part(self.path / name)
                self._seen = seen
                return
        raise InputError(f"output folder {path_text(self.path)!r} is changed all the time: another run writes it")

    def _read_part(self, part: Path) -> None:
        try:
            schema = pq.read_schema(part)
            columns = ["path", "status", *(c for c in ("file_size", "file_mtime_ns") if c in schema.names)]
            table = pq.read_table(part, columns=columns)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path_text(part)!r} is not a readable part of an embedding folder: {error}") from error
        self._identities[part] = identity_of(schema)
        unknown = [None] * len(table)
        values = [table[c].to_pylist() if c in columns else unknown for c in ("file_size", "file_mtime_ns")]
        rows = zip(table["path"].to_pylist(), pc.equal(table["status"], OK).to_pylist(), *values, strict=True)
        for number, (path, ok, size, mtime_ns) in enumerate(rows):
            row, other = _Row(ok, part, number, size, mtime_ns), self._rows.get(path)
            if other is not None:
                worse, row = sorted((row, other), key=lambda r: r[:3])  # parts are named by their time
                self._doubled.setdefault(worse.part, []).append(worse.number)
            self._rows[path] = row

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
        return self._todo(items, refresh, self._hashes() if refresh and content else {})

    def _todo(self, items: Iterable[Item], refresh: bool, hashes: dict[str, bytes]) -> Iterator[Item]:
        for item in items:
            key = item.key
            row = self._rows.get(key)
            if row is not None and row.ok:
                differs = _differs(item, row, hashes.get(key))
                if not (differs and refresh):
                    self.skipped += 1
                    if differs:
                        self.changed.append(key)
                    continue
            yield item

    def _hashes(self) -> dict[str, bytes]:
        hashes: dict[str, bytes] = {}
        for part in self._identities:
            if "file_sha256" in pq.read_schema(part).names:
                table = pq.read_table(part, columns=["path", "file_sha256"])
                hashes.update(zip(table["path"].to_pylist(), table["file_sha256"].to_pylist(), strict=True))
        return hashes

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

    def new_part(self) -> Path:
        """A name for a part, later than all others."""
        return self.path / f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"

    def write_part(self, part: Path, results: Sequence[Result], dimension: int, identity: Identity) -> None:
        """Write or replace a part as a whole. Rows that other parts have of the same paths are taken out first.

        Raises:
            OutputError: if that cannot be done; what the folder held is still there.
        """
        metadata: dict[bytes, bytes | str] = {_MODEL: self.model, _IDENTITY: identity.to_json()}
        table = table_of(results, dimension, metadata, identity.output_dtype)
        try:
            with finished(table, part) as hidden:
                for old in list(self.path.glob(_PARTS)) if self._overwrite else []:
                    old.unlink()
                self._overwrite = False  # only now: whoever was interrupted above comes here again
                self._drop(table["path"], part)
                os.replace(hidden, part)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(f"output folder {path_text(self.path)!r} cannot be written: {reason}") from error
        for number, (path, result) in enumerate(zip(table["path"].to_pylist(), results, strict=True)):
            self._rows[path] = _Row(result.status == OK, part, number, None, None)

    def note(self, identity: Identity) -> None:
        """Write the manifest (see `vitfast.pipeline.manifest`), where there is anything to note.

        Raises:
            OutputError: if that cannot be done; the parts are as they were.
        """
        parts = parts_of(self.path)
        if not parts:
            return
        try:
            manifest.write(self.path, parts, self.model, identity)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(f"output folder {path_text(self.path)!r} cannot be written: {reason}") from error

    def _drop(self, paths: pa.ChunkedArray, part: Path) -> None:
        """Take the rows of these paths out of all parts but `part`."""
        rows = (self._rows.get(path) for path in paths.to_pylist())
        for old in {row.part for row in rows if row is not None and row.part != part}:
            if old.exists():  # not if an interruption came after it had been taken away
                stored = pq.read_table(old, columns=["path"])["path"]
                self._rewrite(old, ~np.isin(stored.to_numpy(), paths.to_numpy()))

    def _rewrite(self, part: Path, keep: np.ndarray) -> None:
        """Leave only these rows in a part."""
        if keep.any():
            with finished(pq.read_table(part).filter(pa.array(keep)), part) as hidden:
                os.replace(hidden, part)
        else:
            part.unlink()


@dataclass
class Summary:
    """What a run did. `failed` maps path to reason, `notes` path to what was done to an unusual picture; `skipped` were
    done before, and `changed` of them have changed since; `repaired` doubled rows were taken out; seconds is wall-clock
    time from the first image to the last part; parts are the files written."""

    done: int = 0
    skipped: int = 0
    changed: list[str] = field(default_factory=list)
    repaired: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def write_parquet(
    results: Iterable[Result],
    folder: EmbeddingFolder,
    engine: Engine,
    *,
    exif_orientation: bool = True,
    output_dtype: str = "float32",
    on_result: Callable[[Result], None] | None = None,
    summary: Summary | None = None,
    stages: Stages | None = None,
) -> Summary:
    """Write results as they come; what was done is kept even if the iteration breaks off.

    Every PART_SECONDS the last part is written anew with what has come since, until it has PART_ROWS rows.

    Args:
        results: from `embed_images`.
        folder: where to; locked meanwhile.
        engine: the model, for the width of the embedding and the identity noted in the parts.
        exif_orientation: as given to `embed_images`.
        output_dtype: of the vectors as they are written, "float32" or "float16".
        on_result: called after each result, for a progress bar.
        summary: filled in as the run goes, so that it can be read after an interruption.
        stages: as given to `embed_images`; the time of writing is added to it.

    Raises:
        InputError: if another process writes the folder, or its rows were made with other weights, preprocessing,
            dtype or version.
        OutputError: if a part cannot be written, the disk being full for example; earlier rows are kept.
        ValueError: if the engine knows no preprocessing, or output_dtype is another.
    """
    identity = Identity.of(engine, exif_orientation, output_dtype)
    return write_rows(
        results, folder, engine.config.embedding_dim, identity, on_result=on_result, summary=summary, stages=stages
    )


def write_rows(
    results: Iterable[Result],
    folder: EmbeddingFolder,
    dimension: int,
    identity: Identity,
    *,
    on_result: Callable[[Result], None] | None = None,
    summary: Summary | None = None,
    stages: Stages | None = None,
) -> Summary:
    """As `write_parquet`, where the model is in another process: of it there are the width of its embeddings and its
    identity.
    """
    summary = Summary() if summary is None else summary
    stages = Stages() if stages is None else stages
    rows: dict[str, Result] = {}
    part, unwritten = folder.new_part(), 0
    started = written = time.perf_counter()

    def flush() -> None:
        nonlocal part, unwritten, written
        if unwritten:
            with stages.spent("write"):
                folder.write_part(part, list(rows.values()), dimension, identity)
            if (name := path_text(part)) not in summary.parts:
                summary.parts.append(name)
            if len(rows) >= PART_ROWS:
                part = folder.new_part()
                rows.clear()
            unwritten = 0
        written = time.perf_counter()

    with folder:
        folder.check(identity)
        summary.repaired = folder.repaired
        try:
            for result in results:
                text = path_text(result.path)
                if identity.output_dtype == "float16":
                    _refuse_overflow(result)
                rows[text] = replace(result, logits=None)
                unwritten += 1
                if result.status == OK:
                    summary.done += 1
                else:
                    summary.failed[text] = result.status
                if result.note:
                    summary.notes[text] = result.note
                if on_result is not None:
                    on_result(result)
                if len(rows) >= PART_ROWS or time.perf_counter() - written >= PART_SECONDS:
                    flush()
        finally:
            try:
                flush()
                folder.note(identity)
            except KeyboardInterrupt:  # it came in the last moment
                flush()
                folder.note(identity)
                raise
            summary.seconds = time.perf_counter() - started
            summary.images_per_second = (summary.done + len(summary.failed)) / max(summary.seconds, 1e-9)
    return summary


def _refuse_overflow(result: Result) -> None:
    """A vector that float16 cannot hold is none."""
    if result.embedding is not None and (largest := float(np.abs(result.embedding).max())) > FLOAT16_MAX:
        result.status = f"the embedding does not fit float16: it has {largest:.4g}, allowed is {FLOAT16_MAX:.0f}"
        result.embedding = None


def _differs(item: Item, row: _Row, digest: bytes | None) -> bool:
    """Whether an image is not the one that a row was made from; by its content if that is known."""
    try:
        if digest is None:
            stat = item.stat()
            return stat is not None and row.size is not None and stat != (row.size, row.mtime_ns)
        with item.open() as file:
            return sha256(file) != digest
    except Exception:  # gone or unreadable, in its source's own words: what is known of it stays
        return False


def parts_of(folder: str | Path) -> list[Path]:
    """The parts of an embedding folder, in the order of their rows."""
    return sorted(Path(folder).glob(_PARTS))


def read_embeddings(folder: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of an embedding folder, as columns (see this module), or some columns of them.

    Raises:
        InputError: if it holds no parts, a part that cannot be read, two rows of one path, or rows of two identities.
    """
    parts = parts_of(folder)
    wanted = None if columns is None else [*columns]
    try:
        tables = [pq.read_table(part, columns=wanted, memory_map=True) for part in parts]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path_text(folder)!r} is not a readable embedding folder: {error}") from error
    if not tables:
        raise InputError(f"{path_text(folder)!r} holds no embeddings")
    if len({(table.schema.metadata or {}).get(_IDENTITY) for table in tables}) > 1:
        raise InputError(f"{path_text(folder)!r} mixes embeddings of different models or settings")
    table = pa.concat_tables(tables, promote_options="default")  # parts may differ in what sources carried along
    doubled = len(table) - len(pc.unique(table["path"])) if "path" in table.column_names else 0
    if doubled:
        raise InputError(
            f"{path_text(folder)!r} has more than one row for {doubled} paths; the next run that writes it repairs that"
        )
    return table


def identity_of(schema: pa.Schema) -> tuple[str, Identity | None]:
    """The model's name and the identity that the schema of an embedding folder carries; None where it states none."""
    metadata = schema.metadata or {}
    return metadata.get(_MODEL, b"").decode(), Identity.from_json(metadata.get(_IDENTITY))
