"""Images that a table names or holds: lists of paths, CSV and TSV, Parquet with bytes or paths in a column."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitfast.images.files import InputError, path_text
from vitfast.pipeline.sources.archives import Opener
from vitfast.pipeline.sources.item import Item, bytes_item, file_item, inside, refused_item
from vitfast.pipeline.sources.remote import is_url, url_item

LISTS = (".txt", ".lst")
SEPARATED = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet",)
ARROW = (".arrow", ".feather")
LANCE = (".lance",)
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "image_bytes")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image", "url")
"""Names of columns that are taken for images and for where images are, the first that there is."""
ROWS_AT_ONCE = 64


def is_table(name: str) -> bool:
    """Whether a name's ending says list, CSV, Parquet, Arrow or Lance."""
    return os.fspath(name).lower().endswith((*LISTS, *SEPARATED, *PARQUET, *ARROW, *LANCE))


def list_items(name: str, opener: Opener, columns: Sequence[str], image_column: str | None) -> Iterator[Item]:
    """The images that a text file names: one path or URL a line, or a column of a CSV or TSV file with a header.

    Relative paths begin at the file's folder. Empty lines, and in a list those that begin with #, are passed over.

    Raises:
        InputError: if the file has no such column, or is not UTF-8.
    """
    ending = os.path.splitext(name)[1].lower()
    base = name.rpartition("/")[0] if is_url(name) else os.path.dirname(os.path.abspath(name))
    with opener() as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            if ending in LISTS:
                for line in text:
                    if (entry := line.strip()) and not entry.startswith("#"):
                        yield _named(entry, base, dict.fromkeys(columns))
                return
            reader = csv.DictReader(text, delimiter=SEPARATED[ending])
            header = list(reader.fieldnames or ())
            column = choose_column(name, header, PATH_COLUMNS, image_column, columns)
            for row in reader:
                if entry := (row[column] or "").strip():
                    yield _named(entry, base, {carried: row[carried] for carried in columns})
        except UnicodeDecodeError as error:
            raise InputError(f"{path_text(name)!r} is not UTF-8 text: {error}") from error


def _named(entry: str, base: str, columns: Mapping[str, Any]) -> Item:
    if is_url(entry):
        return url_item(entry, columns)
    if is_url(base):
        return url_item(f"{base}/{entry}", columns)
    return file_item(os.path.normpath(os.path.join(base, entry)), columns)


def choose_column(
    name: str, header: Sequence[str], known: Sequence[str], asked: str | None, carried: Sequence[str]
) -> str:
    """The column that has the images; the carried ones are looked for as well.

    Raises:
        InputError: with the columns there are.
    """
    there = f"{path_text(name)!r} has the columns {', '.join(map(repr, header)) or 'none'}"
    if missing := [column for column in carried if column not in header]:
        raise InputError(f"{there}, not {', '.join(map(repr, missing))}")
    if asked is not None:
        if asked not in header:
            raise InputError(f"{there}, not {asked!r}")
        return asked
    column = next((column for column in known if column in header), None)
    if column is None:
        raise InputError(f"{there}: say which has the images (--image-column, image_column=)")
    return column


def parquet_items(name: str, opener: Opener, columns: Sequence[str], image_column: str | None) -> Iterator[Item]:
    """The images of a Parquet file: bytes, Hugging Face's struct of bytes and path, or text that says where each is.

    Keys are the file and the number of the row, but for paths and URLs, which are keys themselves.

    Raises:
        InputError: if there is no column of images, or a carried one is missing.
        pyarrow.ArrowException, OSError: if the file is damaged, after the images before.
    """
    with opener() as file:
        table = pq.ParquetFile(file)
        column = _image_column(name, table.schema_arrow, image_column, columns)
        batches = table.iter_batches(ROWS_AT_ONCE, columns=list(dict.fromkeys((column, *columns))))
        yield from _rows(name, batches, column, columns)


def arrow_items(name: str, opener: Opener, columns: Sequence[str], image_column: str | None) -> Iterator[Item]:
    """The images of an Arrow file or stream, as `parquet_items` has them: what Hugging Face's datasets keep on a disk.

    Raises:
        InputError: as there.
        pyarrow.ArrowException, OSError: if the file is damaged, after the images before.
    """
    with opener() as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(file)
        column = _image_column(name, reader.schema, image_column, columns)
        some = (batch.slice(start, ROWS_AT_ONCE) for batch in batches for start in range(0, len(batch), ROWS_AT_ONCE))
        yield from _rows(name, some, column, columns)


def lance_items(name: str, columns: Sequence[str], image_column: str | None) -> Iterator[Item]:
    """The images of a Lance dataset, as `parquet_items` has them.

    Raises:
        InputError: as there, or if the package pylance is not installed.
        Exception: what Lance raises of a dataset that is damaged or not there.
    """
    dataset = lance_library().dataset(name)
    column = _image_column(name, dataset.schema, image_column, columns)
    wanted = list(dict.fromkeys((column, *columns)))
    yield from _rows(name, dataset.to_batches(columns=wanted, batch_size=ROWS_AT_ONCE), column, columns)


def lance_library() -> Any:
    """The package `lance`.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import lance
    except ImportError as error:
        raise InputError("Lance datasets need pylance: pip install 'vitfast[lance]'") from error
    return lance


def _image_column(name: str, schema: pa.Schema, asked: str | None, carried: Sequence[str]) -> str:
    fit = [c for c in schema.names if _holds_bytes(schema.field(c).type)]
    known = [*(c for c in IMAGE_COLUMNS if c in fit), *fit] or PATH_COLUMNS
    return choose_column(name, schema.names, known, asked, carried)


def _rows(name: str, batches: Iterable[pa.RecordBatch], column: str, columns: Sequence[str]) -> Iterator[Item]:
    base, number = name.rpartition("/")[0] if is_url(name) else os.path.dirname(os.path.abspath(name)), 0
    for batch in batches:
        for row in batch.select(list(dict.fromkeys((column, *columns)))).to_pylist():
            yield cell_item(row[column], inside(name, str(number)), base, {c: row[c] for c in columns})
            number += 1


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def cell_item(value: Any, key: str, base: str, columns: Mapping[str, Any]) -> Item:
    """The image in a cell: bytes, a struct of bytes and path, or text that says where it is, relative to `base`."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return bytes_item(key, value, columns=columns)
    if isinstance(value, str) and value:
        return _named(value, base, columns)
    return refused_item(key, f"the cell holds {type(value).__name__}, expected bytes, a path or a URL", columns)
