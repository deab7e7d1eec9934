"""One part of an embedding folder: results as a table, and a table as a file that appears as a whole."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitfast.images.files import path_text
from vitfast.pipeline.embed import Result


def table_of(results: Sequence[Result], dimension: int, metadata: dict[bytes, bytes | str]) -> pa.Table:
    """Results as the columns of an embedding folder."""
    good = np.array([r.embedding is not None for r in results])
    values = np.zeros((len(results), dimension), np.float32)
    for row, result in zip(values, results, strict=True):
        if result.embedding is not None:
            row[:] = result.embedding
    stamps = [r.stamp for r in results]
    columns = {
        "path": pa.array([path_text(r.path) for r in results], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dimension, mask=pa.array(~good)),
        "status": pa.array([r.status for r in results], pa.string()),
        "note": pa.array([r.note or None for r in results], pa.string()),
        "file_size": pa.array([s and s.size for s in stamps], pa.int64()),
        "file_mtime_ns": pa.array([s and s.mtime_ns for s in stamps], pa.int64()),
        "file_sha256": pa.array([s and s.sha256 for s in stamps], pa.binary()),
    }
    return pa.table(columns).replace_schema_metadata(metadata)


@contextlib.contextmanager
def finished(table: pa.Table, part: Path) -> Iterator[Path]:
    """Write a table under a hidden name, down to the disk; the caller renames it, or it is taken away again."""
    hidden = part.with_name(f".{part.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(hidden, "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        yield hidden
    finally:
        hidden.unlink(missing_ok=True)
