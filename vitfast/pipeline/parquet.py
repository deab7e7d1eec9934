"""Embeddings as a folder of Parquet files with one row per image, whatever happens to the runs that write it.

    with EmbeddingFolder("embeddings", model="facebook/dinov2-small") as folder:
        paths = folder.remaining(collect(["photos/"]))
        engine = vitfast.load("facebook/dinov2-small")
        summary = write_parquet(embed_images(engine, paths), folder, engine)

The folder is a Parquet data set: read it with `read_embeddings("embeddings")`, `pyarrow.parquet.read_table`, pandas,
DuckDB or Ray Data. Columns: `path` (absolute), `embedding` (fixed-size list of float32 or float16, null for a bad
image), `status` ("ok", or why not), `note` (what was done to an unusual picture), `width` and `height` of the picture
upright (null where it could not be decoded), and of the file as it was read `file_size`, `file_mtime_ns` and
`file_sha256`.

What holds at every moment, so that it holds after a kill, too: a part appears and changes as a whole; a path has at
most one row, for its older row is taken out before the part with the newer one appears; and what every kind of folder
keeps (see `vitfast.pipeline.folder`).
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitfast.images.files import InputError, path_text
from vitfast.pipeline import manifest
from vitfast.pipeline.embed import OK, Result
from vitfast.pipeline.folder import Folder, OutputError, Row
from vitfast.pipeline.identity import Identity, described, identity_of
from vitfast.pipeline.layout import PARTS, files_of
from vitfast.pipeline.parts import finished, table_of
from vitfast.pipeline.reading import read_embeddings
from vitfast.pipeline.writing import Summary, write_parquet, write_rows

__all__ = ["EmbeddingFolder", "OutputError", "Summary", "read_embeddings", "write_parquet", "write_rows"]

_UNFINISHED = (".part-*.tmp", ".probe-*", f".{manifest.NAME}-*.tmp")


class EmbeddingFolder(Folder):
    """A folder of Parquet parts (see `vitfast.pipeline.folder.Folder`).

    A part grows up to PART_ROWS rows, and is written anew as it does.
    """

    format = "parquet"

    def __init__(self, folder: str | Path, model: str | Path, *, overwrite: bool = False) -> None:
        self._doubled: dict[Path, list[int]] = {}
        self._seen: list[tuple[str, int, int]] = []
        self._part: Path | None = None
        self._growing: dict[str, Result] = {}  # the rows of that part
        super().__init__(folder, model, overwrite=overwrite)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._part, self._growing = None, {}

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
                seen = sorted((p.name, s.st_mtime_ns, s.st_size) for p in self.path.glob(PARTS) for s in [p.stat()])
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
        self._identities[part] = identity_of(schema.metadata)
        unknown = [None] * len(table)
        values = [table[c].to_pylist() if c in columns else unknown for c in ("file_size", "file_mtime_ns")]
        rows = zip(table["path"].to_pylist(), pc.equal(table["status"], OK).to_pylist(), *values, strict=True)
        for number, (path, ok, size, mtime_ns) in enumerate(rows):
            row, other = Row(ok, part, number, size, mtime_ns), self._rows.get(path)
            if other is not None:
                worse, row = sorted((row, other), key=lambda r: r[:3])  # parts are named by their time
                self._doubled.setdefault(worse.part, []).append(worse.number)
            self._rows[path] = row

    def _hashes(self) -> dict[str, bytes]:
        hashes: dict[str, bytes] = {}
        for part in self._identities:
            if "file_sha256" in pq.read_schema(part).names:
                table = pq.read_table(part, columns=["path", "file_sha256"])
                hashes.update(zip(table["path"].to_pylist(), table["file_sha256"].to_pylist(), strict=True))
        return hashes

    @property
    def room(self) -> int:
        """How many rows the part that grows still takes."""
        return super().room - len(self._growing)

    def add(self, results: Sequence[Result], dimension: int, identity: Identity) -> str:
        """Write rows into the part that grows; its path."""
        part = self._part = self._part or self.new_part()
        self._growing |= {path_text(result.path): result for result in results}
        self.write_part(part, list(self._growing.values()), dimension, identity)
        if self.room <= 0:
            self._part, self._growing = None, {}
        return path_text(part)

    def new_part(self) -> Path:
        """A name for a part, later than all others."""
        return self.path / f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"

    def write_part(self, part: Path, results: Sequence[Result], dimension: int, identity: Identity) -> None:
        """Write or replace a part as a whole. Rows that other parts have of the same paths are taken out first.

        Raises:
            OutputError: if that cannot be done; what the folder held is still there.
        """
        table = table_of(results, dimension, described(self.model, identity), identity.output_dtype)
        try:
            with finished(table, part) as hidden:
                for old in list(self.path.glob(PARTS)) if self._overwrite else []:
                    old.unlink()
                self._overwrite = False  # only now: whoever was interrupted above comes here again
                self._drop(table["path"], part)
                os.replace(hidden, part)
        except OSError as error:
            raise self._failure(error) from error
        for number, (path, result) in enumerate(zip(table["path"].to_pylist(), results, strict=True)):
            self._rows[path] = Row(result.status == OK, part, number, None, None)

    def _note(self, identity: Identity) -> None:
        if parts := files_of(self.path):
            schema = pa.unify_schemas([pq.read_schema(part).remove_metadata() for part in parts])
            rows = {part: pq.read_metadata(part).num_rows for part in parts}
            manifest.write(self.path, rows, sum(rows.values()), schema, self.model, identity)

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
