"""Reading an embedding folder, whichever format its rows are stored in."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitfast.images.files import InputError, path_text
from vitfast.pipeline import lance
from vitfast.pipeline.embed import OK
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


def write_npy(folder: str | Path, out: str | Path) -> tuple[Path, int]:
    """Write the vectors of an embedding folder as one .npy file, and their keys beside it as a JSON list of text.

    Rows without an embedding are left out. The two are written under hidden names first and appear as a whole, the keys
    before the vectors.

    Args:
        out: the file, which ends in ".npy": [N, E] of the folder's own dtype. The keys' name ends in ".keys.json".

    Returns:
        The keys' file, and how many rows there are.

    Raises:
        ValueError: if `out` ends otherwise.
        InputError: as `read_embeddings`, and if no row has an embedding.
        OSError: if it cannot be written.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"the vectors' file must end in .npy, got {path_text(out)!r}")
    table = read_embeddings(folder, ["path", "status", "embedding"])
    good = pc.equal(table["status"], OK)
    names = table["path"].filter(good).to_pylist()
    if not names:
        raise InputError(f"{path_text(folder)!r} holds no image with an embedding")
    keys = out.with_suffix(".keys.json")
    hidden = {path: path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.tmp") for path in (keys, out)}
    try:
        hidden[keys].write_text(json.dumps(names), encoding="utf-8")
        kind = table["embedding"].type
        shape = len(names), kind.list_size
        vectors = np.lib.format.open_memmap(hidden[out], "w+", kind.value_type.to_pandas_dtype(), shape)
        done = 0
        for chunk in table["embedding"].chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, kind.list_size)  # of rows that have any
            vectors[done : done + len(values)] = values
            done += len(values)
        vectors.flush()
        for path, written in hidden.items():
            os.replace(written, path)
    finally:
        for written in hidden.values():
            written.unlink(missing_ok=True)
    return keys, len(names)
