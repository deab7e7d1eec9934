"""Embedding folders by the name of their format."""

from __future__ import annotations

from pathlib import Path

from vitfast.pipeline.folder import Folder
from vitfast.pipeline.lance import LanceFolder
from vitfast.pipeline.layout import format_of
from vitfast.pipeline.parquet import EmbeddingFolder

FORMATS: dict[str, type[Folder]] = {kind.format: kind for kind in (EmbeddingFolder, LanceFolder)}


def open_folder(folder: str | Path, model: str | Path, *, overwrite: bool = False, format: str | None = None) -> Folder:
    """An embedding folder; arguments but `format` as of `vitfast.pipeline.folder.Folder`.

    Args:
        format: "parquet" or "lance"; by default what the folder is, and Parquet for a new one.

    Raises:
        ValueError: if format is another.
        InputError: as there, or if the package that the format needs is not installed.
    """
    format = format or format_of(folder) or "parquet"
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format](folder, model, overwrite=overwrite)
