"""A map of an embedding folder: its vectors on a plane, as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from vitfast.images.files import InputError, path_text
from vitfast.pipeline.by_key import thumbnails
from vitfast.pipeline.embed import OK
from vitfast.pipeline.pages import map_page, principal_axes
from vitfast.pipeline.reading import read_embeddings
from vitfast.pipeline.search import Index


@dataclass(frozen=True)
class Map:
    """A page, one line on what it shows, and how many images and pictures it has."""

    page: str
    remark: str
    counts: dict[str, int]


def make(
    folder: str | Path, method: str = "pca", *, color: str | None = None, most: int = 5000, pictures: int = 1000
) -> Map:
    """Map an embedding folder.

    Args:
        folder: as `vitfast embed` writes it. method: "pca", the axes of all vectors along which they differ most, or
            "umap", by the package umap-learn. color: a column to colour points by.
        most: images on the page, chosen at random where there are more. pictures: of these so many with a thumbnail.

    Raises:
        InputError: if the folder cannot be read or has no such column, or umap-learn is not installed.
    """
    index = Index(folder)
    vectors = index.vectors
    if method == "umap":
        points, how = _umap(vectors), "UMAP"
    else:
        points, shares = principal_axes(vectors)
        how = f"principal axes, {sum(shares):.0%} of the variance"
    random = np.random.default_rng(0)
    chosen = np.sort(random.choice(len(index), min(most, len(index)), replace=False))
    keys = [index.paths[row] for row in chosen]
    groups = _column(folder, color, index) if color is not None else None
    shown = thumbnails(random.permutation(np.array(keys, object))[:pictures].tolist(), side=96)
    remark = f"{len(keys)} of {len(index)} images by {how}" + (f"; coloured by {color}" if color else "")
    title = f"Map of {path_text(Path(folder).name or folder)}"
    page = map_page(title, remark, keys, points[chosen], shown, groups and [groups[row] for row in chosen])
    return Map(page, remark, {"images": len(keys), "of": len(index), "pictures": len(shown)})


def _column(folder: str | Path, name: str, index: Index) -> list[object]:
    table = read_embeddings(folder)
    if name not in table.column_names:
        raise InputError(f"{path_text(folder)!r} has the columns {', '.join(table.column_names)}, not {name!r}")
    values = table.filter(pc.equal(table["status"], OK))[name].to_pylist()
    if len(values) != len(index):
        raise InputError(f"{path_text(folder)!r} has changed since it was opened: another run writes it")
    return values


def _umap(vectors: np.ndarray) -> np.ndarray:
    try:
        import umap
    except ImportError as error:
        raise InputError("--method umap needs umap-learn: pip install umap-learn") from error
    return np.asarray(umap.UMAP(metric="cosine", random_state=0).fit_transform(vectors), np.float32)
