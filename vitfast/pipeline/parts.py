"""One part of an embedding folder: results as a table, and a table as a file that appears as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitfast.images.files import path_text
from vitfast.pipeline.embed import Result


def table_of(
    results: Sequence[Result], dimension: int, metadata: dict[bytes, bytes | str], output_dtype: str = "float32"
) -> pa.Table:
    """Results as the columns of an embedding folder, vectors in `output_dtype`; what sources carry along is text.

    Raises:
        ValueError: if a source's column has the name of one of the folder's own.
    """
    good = np.array([r.embedding is not None for r in results])
    values = np.zeros((len(results), dimension), output_dtype)
    for row, result in zip(values, results, strict=True):
        if result.embedding is not None:
            row[:] = result.embedding
    stamps = [r.stamp for r in results]
    columns = {
        "path": pa.array([path_text(r.path) for r in results], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dimension, mask=pa.array(~good)),
        "status": pa.array([r.status for r in results], pa.string()),
        "note": pa.array([r.note or None for r in results], pa.string()),
        "width": pa.array([r.size and r.size[1] for r in results], pa.int32()),
        "height": pa.array([r.size and r.size[0] for r in results], pa.int32()),
        "file_size": pa.array([s and s.size for s in stamps], pa.int64()),
        "file_mtime_ns": pa.array([s and s.mtime_ns for s in stamps], pa.int64()),
        "file_sha256": pa.array([s and s.sha256 for s in stamps], pa.binary()),
    }
    for name in dict.fromkeys(name for result in results for name in result.columns):
        if name in OWN_COLUMNS:
            raise ValueError(f"a column of the source is called {name!r}, as one of an embedding folder is")
        columns[name] = pa.array([_text(result.columns.get(name)) for result in results], pa.string())
    return pa.table(columns).replace_schema_metadata(metadata)


def _text(value: Any) -> str | None:
    """A carried value: text as it is, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


OWN_COLUMNS = (
    "path", "embedding", "status", "note", "width", "height", "file_size", "file_mtime_ns", "file_sha256",
)  # fmt: skip
"""Names that columns of sources cannot have."""


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
