"""Reading an embedding folder, whichever format its rows are stored in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitfast.images.files import InputError, path_text
from vitfast.pipeline import lance
from vitfast.pipeline.identity import IDENTITY
from vitfast.pipeline.layout import files_of, format_of


def read_embeddings(folder: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of an embedding folder, as columns (see `vitfast.pipeline.parquet`), or some columns of them.

    Raises:
        InputError: if it holds none, something that cannot be read, two rows of one path, or rows of two identities.
    """
    wanted = None if columns is None else [*columns]
    try:
        if format_of(folder) == "lance":
            tables = [lance.read(folder, wanted)]
        else:
            tables = [pq.read_table(part, columns=wanted, memory_map=True) for part in files_of(folder)]
    except (pa.ArrowException, *lance.ERRORS) as error:
        raise InputError(f"{path_text(folder)!r} is not a readable embedding folder: {error}") from error
    if not tables:
        raise InputError(f"{path_text(folder)!r} holds no embeddings")
    if len({(table.schema.metadata or {}).get(IDENTITY) for table in tables}) > 1:
        raise InputError(f"{path_text(folder)!r} mixes embeddings of different models or settings")
    table = pa.concat_tables(tables, promote_options="default")  # parts may differ in what sources carried along
    doubled = len(table) - len(pc.unique(table["path"])) if "path" in table.column_names else 0
    if doubled:
        raise InputError(
            f"{path_text(folder)!r} has more than one row for {doubled} paths; the next run that writes it repairs that"
        )
    return table
