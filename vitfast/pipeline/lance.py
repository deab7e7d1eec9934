"""Embeddings as a Lance dataset, with the columns and what holds of a folder of Parquet files.

    with LanceFolder("embeddings.lance", model="facebook/dinov2-small") as folder:
        items = folder.todo(find_sources(["photos/"]))
        engine = vitfast.load("facebook/dinov2-small")
        write_parquet(embed_images(engine, items), folder, engine)

Rows are added by commits, each of which appears as a whole. At a run's end small files are put together, and versions
of the dataset before that are taken away, but for those that have a tag. Needs `pip install 'vitfast[lance]'`.

Where a disk is full Lance (14.0 at least) commits files that are cut short, and says nothing: files are compared with
what the dataset says of their size after each commit, and a version with one that is not as it says counts for nothing.

Source: https://lance.org/format/
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from vitfast.images.files import InputError, path_text
from vitfast.pipeline import manifest
from vitfast.pipeline.embed import OK, Result
from vitfast.pipeline.folder import Folder, Row
from vitfast.pipeline.identity import Identity, described, identity_of
from vitfast.pipeline.layout import files_of, format_of
from vitfast.pipeline.parts import table_of
from vitfast.pipeline.sources.tables import lance_library

ERRORS = (OSError, ValueError, RuntimeError)
"""What Lance raises of a dataset that is damaged, or of a disk that is full."""


def latest(folder: str | Path) -> Any:
    """The dataset in a folder at its last version whose files are whole; None if there is none.

    Raises:
        InputError: if pylance is not installed. OSError, ValueError, RuntimeError: what Lance raises.
    """
    if format_of(folder) != LanceFolder.format:
        return None
    where, lance = os.fspath(folder), lance_library()
    dataset = lance.dataset(where)
    if _whole(dataset, folder):
        return dataset
    older = sorted((version["version"] for version in dataset.versions()), reverse=True)
    datasets = (lance.dataset(where, version=number) for number in older)
    return next((dataset for dataset in datasets if _whole(dataset, folder)), None)


def _whole(dataset: Any, folder: str | Path) -> bool:
    """Whether the files of a dataset's version have the sizes that it says, where it says them."""
    files = (file for fragment in dataset.get_fragments() for file in fragment.data_files() if file.file_size_bytes)
    return all(_size(Path(folder, "data", file.path)) == file.file_size_bytes for file in files)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def read(folder: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a Lance dataset, or some columns of them, with the metadata of its schema.

    Raises:
        InputError: if pylance is not installed, or no version of the dataset is whole.
        OSError, ValueError, RuntimeError: what Lance raises.
    """
    dataset = latest(folder)
    if dataset is None:
        raise InputError("none of its versions is whole")
    return dataset.to_table(columns=columns).replace_schema_metadata(dataset.schema.metadata)


class LanceFolder(Folder):
    """A folder that is a Lance dataset (see `vitfast.pipeline.folder.Folder`)."""

    format = "lance"

    def __init__(self, folder: str | Path, model: str | Path, *, overwrite: bool = False) -> None:
        self._lance = lance_library()
        self._version: int | None = None
        self._doubled: list[int] = []
        super().__init__(folder, model, overwrite=overwrite)

    def _dataset(self) -> Any:
        """The dataset as it is now, None if there is none."""
        return self._lance.dataset(os.fspath(self.path)) if format_of(self.path) else None

    def _read(self) -> None:
        if self._overwrite:
            return
        try:
            dataset = latest(self.path)
            if dataset is None or dataset.version == self._version:
                return
            columns = ["path", "status", "file_size", "file_mtime_ns", "_rowid"]
            rows = dataset.to_table(columns=columns[:-1], with_row_id=True).to_pydict()
        except ERRORS as error:
            raise InputError(
                f"{path_text(self.path)!r} is not a readable Lance dataset of embeddings: {error}"
            ) from error
        self._version = dataset.version
        self._identities = {self.path: identity_of(dataset.schema.metadata)}
        self._rows, self._doubled = {}, []
        for path, status, size, mtime_ns, number in zip(*(rows[column] for column in columns), strict=True):
            row, other = Row(status == OK, self.path, number, size, mtime_ns), self._rows.get(path)
            if other is not None:
                worse, row = sorted((row, other), key=lambda r: r[:3])
                self._doubled.append(worse.number)
            self._rows[path] = row

    def _clean(self) -> None:
        for path in self.path.glob(f".{manifest.NAME}-*.tmp"):
            path.unlink(missing_ok=True)
        try:
            if not self._overwrite:
                self._go_back()
        except ERRORS as error:
            raise self._refusal(str(error)) from error
        self._read()
        if self._doubled:
            self._dataset().delete(f"_rowid IN ({', '.join(map(str, self._doubled))})")
            self.repaired += len(self._doubled)
            self._read()

    def _go_back(self) -> bool:
        """Make the last version that is whole the dataset's last one; whether another was."""
        dataset, whole = self._dataset(), latest(self.path)
        if dataset is None or (whole is not None and whole.version == dataset.version):
            return False
        if whole is not None:
            whole.restore()
        else:
            self._remove()
        return True

    def _remove(self) -> None:
        for name in ("_versions", "data", "_deletions", "_transactions"):
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)

    def _replace(self, table: pa.Table) -> None:
        """Make these rows all that there are."""
        try:
            there = self._dataset() is not None
        except ERRORS:  # it cannot be read, so that nothing of it is kept
            self._remove()
            there = False
        self._lance.write_dataset(table, os.fspath(self.path), mode="overwrite" if there else "create")

    def _check_files(self) -> None:
        if self._go_back():
            raise OSError(errno.ENOSPC, "a file is shorter than it should be: the disk may be full")

    def _hashes(self) -> dict[str, bytes]:
        if not self._identities:
            return {}
        rows = read(self.path, ["path", "file_sha256"]).to_pydict()
        return dict(zip(rows["path"], rows["file_sha256"], strict=True))

    def add(self, results: Sequence[Result], dimension: int, identity: Identity) -> str:
        """Commit rows, in place of those that there are of the same paths; the dataset's path."""
        table = table_of(results, dimension, described(self.model, identity), identity.output_dtype)
        paths = table["path"].to_pylist()
        known = any(path in self._rows for path in paths)
        self._version = None  # whatever becomes of this, the rows are to be read again
        for number, (path, result) in enumerate(zip(paths, results, strict=True)):
            # Before they are there: an interruption may come between the commit and here, and then they come again.
            self._rows[path] = Row(result.status == OK, self.path, number, None, None)
        try:
            dataset = None if self._overwrite else self._dataset()
            if dataset is None:
                self._replace(table)
            elif known:
                merge = dataset.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(_fitted(table, dataset))
            else:
                self._lance.write_dataset(_fitted(table, dataset), os.fspath(self.path), mode="append")
            self._check_files()
            self._overwrite = False  # only now: else what comes again would be added to what was to be replaced
        except ERRORS as error:
            raise self._failure(error) from error
        return path_text(self.path)

    def _note(self, identity: Identity) -> None:
        try:
            dataset = self._dataset()
            if dataset is None:
                return
            dataset.optimize.compact_files(materialize_deletions_threshold=0.0)
            self._check_files()
            dataset = self._dataset()
            # The lock is ours: what no version refers to is no other run's work.
            dataset.cleanup_old_versions(timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False)
            rows: dict[Path, int | None] = dict.fromkeys(files_of(self.path))
            for fragment in dataset.get_fragments():
                for file in fragment.data_files():
                    rows[self.path / "data" / file.path] = fragment.count_rows()
            manifest.write(self.path, rows, dataset.count_rows(), dataset.schema, self.model, identity)
        except OSError:
            raise
        except ERRORS as error:
            raise self._failure(error) from error


def _fitted(table: pa.Table, dataset: Any) -> pa.Table:
    """Rows with the columns that a dataset has; those that it has not are added to it, and empty in its other rows."""
    there = set(dataset.schema.names)
    if new := [field for field in table.schema if field.name not in there]:
        dataset.add_columns(new)
    for field in dataset.schema:
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(dataset.schema.names)
