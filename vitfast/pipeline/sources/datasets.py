"""Datasets of Hugging Face's library: a folder that `save_to_disk` wrote, and what is open or streamed in Python.

    embed_images(engine, dataset_items(load_dataset("org/name", split="train", streaming=True), name="org/name"))

The folder is read without the library; Parquet files of the hub are URLs, hf://datasets/org/name/data/*.parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vitfast.images.files import InputError, path_text
from vitfast.pipeline.sources.item import Item
from vitfast.pipeline.sources.tables import IMAGE_COLUMNS, cell_item, choose_column

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def saved_files(folder: str) -> list[str] | None:
    """The Arrow files of a dataset, or of a dictionary of them, that `save_to_disk` wrote; None for another folder.

    Raises:
        InputError: if what describes it is damaged.
    """
    path = Path(folder)
    several = (path / _SPLITS).is_file()
    if not (several or ((path / _STATE).is_file() and (path / _INFO).is_file())):
        return None
    try:
        if several:
            splits = json.loads((path / _SPLITS).read_text())["splits"]
            return [file for split in splits for file in saved_files(str(path / split)) or []]
        return [str(path / part["filename"]) for part in json.loads((path / _STATE).read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path_text(folder)!r} is a damaged dataset: {type(error).__name__}: {error}") from error


def dataset_items(
    dataset: Any, *, name: str, columns: Sequence[str] = (), image_column: str | None = None
) -> Iterator[Item]:
    """The images of a dataset, read as they are taken; none is decoded by the library.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`.
        name: of the dataset: keys are it and the number of the row, so that its order must not change between runs.
        columns: what to carry along. image_column: by default the one that is of images, or has a usual name.

    Raises:
        InputError: if there is no column of images, or a carried one is missing.
    """
    from datasets import Image

    features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    column = choose_column(name, list(features), [*images, *IMAGE_COLUMNS], image_column, columns)
    if column in images:
        dataset = dataset.cast_column(column, Image(decode=False))
    for number, row in enumerate(dataset):
        yield cell_item(row[column], f"{name}::{number}", "", {carried: row[carried] for carried in columns})
