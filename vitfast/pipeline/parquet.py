"""Embeddings as a folder of Parquet files that survives interruptions.

    paths = collect(["photos/"])
    folder = EmbeddingFolder("embeddings", model="facebook/dinov2-small")
    engine = vitfast.load("facebook/dinov2-small")
    summary = write_parquet(embed_images(engine, folder.remaining(paths)), folder, engine)

The folder is a Parquet data set: read it with `pyarrow.parquet.read_table("embeddings")`, pandas,
DuckDB or Ray Data. It has one row per image: `path` (absolute), `embedding` (fixed-size list of
float32, null for a bad image) and `status` ("ok", or why not). It is written in parts, each of which
appears complete or not at all; the same call on the same folder goes on where the last one stopped.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitfast.images.files import InputError, path_text
from vitfast.pipeline.embed import OK, Result

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

PART_ROWS, PART_SECONDS = 4096, 60.0
"""A part is written when it has this many rows, or is this old: what a killed run can lose."""

_MODEL, _PREPROCESS = b"vitfast.model", b"vitfast.preprocess"


@dataclass
class Summary:
    """What a run did. `failed` maps path to reason; `skipped` were done before; seconds is wall-clock
    time from the first image to the last part; parts are the files written."""

    done: int = 0
    skipped: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


class EmbeddingFolder:
    """A folder of Parquet parts with the embeddings of one model. Opening it needs no model.

    Args:
        folder: created if missing.
        model: hub id or path of the model; a path is made absolute, so that it means the same everywhere.

    Attributes:
        done: paths, as text, that have an embedding already.

    Raises:
        InputError: if the folder cannot be created or written, holds a part that cannot be read, or
            holds embeddings of another model.
    """

    def __init__(self, folder: str | Path, model: str | Path) -> None:
        self.path = Path(folder)
        self.model = os.path.abspath(model) if os.path.exists(model) else os.fspath(model)
        self.done: set[str] = set()
        self._failed: dict[Path, set[str]] = {}
        self._preprocess: dict[Path, str] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"output folder {path_text(folder)!r} cannot be written: {reason}") from error
        for part in sorted(self.path.glob("part-*.parquet")):
            self._read(part)

    def _read(self, part: Path) -> None:
        try:
            table = pq.read_table(part, columns=["path", "status"])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path_text(part)!r} is not a readable part of an embedding folder: {error}") from error
        metadata = table.schema.metadata or {}
        model = metadata.get(_MODEL, b"").decode()
        if model != self.model:
            raise InputError(
                f"output folder {path_text(self.path)!r} holds embeddings of {model or 'an unknown model'!r}, "
                f"not of {self.model!r}: choose another folder"
            )
        self._preprocess[part] = metadata.get(_PREPROCESS, b"").decode()
        ok = pc.equal(table["status"], OK)
        self.done.update(table["path"].filter(ok).to_pylist())
        if failed := set(table["path"].filter(pc.invert(ok)).to_pylist()):
            self._failed[part] = failed

    def remaining(self, paths: Iterable[Path]) -> list[Path]:
        """The paths that have no embedding yet; images that failed before are tried again."""
        return [path for path in paths if path_text(path) not in self.done]

    def check_preprocess(self, preprocess: str) -> None:
        """Raise InputError if the folder's embeddings were made with other preprocessing."""
        for part, other in self._preprocess.items():
            if other != preprocess:
                raise InputError(f"{path_text(part)!r} was made with preprocessing {other}, not {preprocess}")

    def write_part(self, results: Sequence[Result], dimension: int, preprocess: str) -> Path:
        """Write one part: under a hidden name first, then renamed, so that it appears complete."""
        schema = pa.schema(
            [("path", pa.string()), ("embedding", pa.list_(pa.float32(), dimension)), ("status", pa.string())],
            metadata={_MODEL: self.model, _PREPROCESS: preprocess},
        )
        good = np.array([r.embedding is not None for r in results])
        rows = np.zeros((len(results), dimension), np.float32)
        for row, result in zip(rows, results, strict=True):
            if result.embedding is not None:
                row[:] = result.embedding
        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), dimension, mask=pa.array(~good))
        texts = [path_text(r.path) for r in results]
        table = pa.table([pa.array(texts), embeddings, pa.array([r.status for r in results])], schema=schema)
        part = self.path / f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
        _write_whole(table, part)
        self.done.update(text for text, ok in zip(texts, good, strict=True) if ok)
        return part

    def drop_retried(self, retried: set[str]) -> None:
        """Take rows of earlier failures out of old parts, for paths that have a newer row."""
        for part, failed in self._failed.items():
            if gone := {path for path in failed if path in retried or path in self.done}:
                table = pq.read_table(part)
                stale = pc.and_(pc.is_in(table["path"], pa.array(sorted(gone))), pc.not_equal(table["status"], OK))
                kept = table.filter(pc.invert(stale))
                if kept.num_rows:
                    _write_whole(kept, part)
                else:
                    part.unlink()


def _write_whole(table: pa.Table, part: Path) -> None:
    hidden = part.with_name(f".{part.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        pq.write_table(table, hidden)
        os.replace(hidden, part)
    finally:
        hidden.unlink(missing_ok=True)


def write_parquet(
    results: Iterable[Result],
    folder: EmbeddingFolder,
    engine: Engine,
    *,
    exif_orientation: bool = True,
    on_result: Callable[[Result], None] | None = None,
    summary: Summary | None = None,
) -> Summary:
    """Write results as they come; what was done is kept even if the iteration breaks off.

    Args:
        results: from `embed_images`.
        folder: where to.
        engine: the model, for the width of the embedding and the preprocessing noted in the parts.
        exif_orientation: as given to `embed_images`.
        on_result: called after each result, for a progress bar.
        summary: filled in as the run goes, so that it can be read after an interruption.

    Raises:
        InputError: if the folder's older parts were made with other preprocessing.
        ValueError: if the engine knows no preprocessing.
    """
    if engine.preprocess is None:
        raise ValueError("the engine knows no preprocessing, and the parts say with which they were made")
    summary = Summary() if summary is None else summary
    dimension = engine.config.projection_dim or engine.config.width
    described = json.dumps({**asdict(engine.preprocess), "exif_orientation": exif_orientation}, sort_keys=True)
    folder.check_preprocess(described)
    started = part_started = time.perf_counter()
    rows: list[Result] = []
    written: set[str] = set()

    def flush() -> None:
        nonlocal rows, part_started
        if rows:
            summary.parts.append(path_text(folder.write_part(rows, dimension, described)))
            written.update(path_text(row.path) for row in rows)
        rows, part_started = [], time.perf_counter()

    try:
        for result in results:
            rows.append(Result(result.path, result.status, result.embedding))
            if result.status == OK:
                summary.done += 1
            else:
                summary.failed[path_text(result.path)] = result.status
            if on_result is not None:
                on_result(result)
            if len(rows) >= PART_ROWS or time.perf_counter() - part_started >= PART_SECONDS:
                flush()
    finally:
        flush()
        folder.drop_retried(written)
        summary.seconds = time.perf_counter() - started
        summary.images_per_second = (summary.done + len(summary.failed)) / max(summary.seconds, 1e-9)
    return summary
