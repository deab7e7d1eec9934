"""Search in an embedding folder: the most similar images, and those that are there twice.

    index = Index("embeddings/")
    for match in index.search(vector, topk=10):
        print(match.path, match.similarity)

The search is exact: a product of the query with every row, block by block, so that memory is read once and nothing of
the size of all similarities is kept. Similarity is the cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from vitfast.images.files import InputError, path_text
from vitfast.pipeline.embed import OK
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.parquet import identity_of, read_embeddings

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

BLOCK_ROWS = 16384
"""Rows of one product: their similarities to a query fit a core's cache."""


@dataclass(frozen=True)
class Match:
    """An image that was found: its key in the folder, and its cosine to the query (-1..1)."""

    path: str
    similarity: float


class Index:
    """The embeddings of a folder, in memory at unit length, 4 bytes a number.

    Args:
        folder: as `vitfast embed` writes it. Rows without an embedding are left out.

    Attributes:
        model: hub id or path of the model, as noted in the folder. identity: what its embeddings were made with, or
            None for a folder of 0.1.0. paths: keys of the rows, in order. vectors: float32 [N, E], of unit length.

    Raises:
        InputError: if the folder cannot be read (see `read_embeddings`), or has no row with an embedding.
    """

    def __init__(self, folder: str | Path) -> None:
        table = read_embeddings(folder)
        self.folder = Path(folder)
        self.model, self.identity = identity_of(table.schema)
        table = table.select(["path", "status", "embedding"]).filter(pc.equal(table["status"], OK))
        if not len(table):
            raise InputError(f"{path_text(folder)!r} holds no image with an embedding")
        self.paths: list[str] = table["path"].to_pylist()
        self._rows = {path: row for row, path in enumerate(self.paths)}
        width = table["embedding"].type.list_size
        self.vectors = np.empty((len(table), width), np.float32)
        done = 0
        for chunk in table["embedding"].chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
            self.vectors[done : done + len(values)] = values
            done += len(values)
        for block in _blocks(self.vectors):
            block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-30)

    def __len__(self) -> int:
        return len(self.paths)

    def vector_of(self, path: str | Path) -> np.ndarray | None:
        """The vector [E] of an image that is in the folder, else None."""
        row = self._rows.get(path_text(path))
        return None if row is None else self.vectors[row]

    def search(self, query: np.ndarray, topk: int = 10, *, without: str | None = None) -> list[Match]:
        """The images most similar to a query, best first; of equals the one that was written first.

        Args:
            query: a vector [E] of any length but zero.
            topk: how many, fewer if the folder holds fewer.
            without: the key of an image that is not to be found: the query itself.

        Raises:
            ValueError: if topk is below 1, or the query is of another width, zero or not finite.
        """
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        query = _unit(query, self.vectors.shape[1])
        left_out = self._rows.get(without, -1) if without is not None else -1
        rows, values = np.empty(0, np.int64), np.empty(0, np.float32)
        for start, block in zip(range(0, len(self), BLOCK_ROWS), _blocks(self.vectors), strict=True):
            similarity = block @ query
            if start <= left_out < start + len(block):
                similarity[left_out - start] = -np.inf
            rows = np.concatenate([rows, np.arange(start, start + len(block))])
            values = np.concatenate([values, similarity])
            best = _largest(values, topk)
            rows, values = rows[best], values[best]
        return [Match(self.paths[r], float(v)) for r, v in zip(rows, values, strict=True) if np.isfinite(v)]

    def duplicates(self, above: float) -> list[list[Match]]:
        """Groups of images that are alike: each is joined to another of its group by a similarity of `above` or more.

        Each group begins with the image that was written first; `similarity` of the others is that to it. The largest
        groups come first. All pairs are compared, which takes time with the square of their number.

        Raises:
            ValueError: if above is not within -1..1.
        """
        if not -1 <= above <= 1:
            raise ValueError(f"above must be a cosine, -1 to 1, got {above}")
        parents = np.arange(len(self))
        size = 2048
        for start in range(0, len(self), size):
            ours = self.vectors[start : start + size]
            for other in range(start, len(self), size):
                for i, j in np.argwhere(ours @ self.vectors[other : other + size].T >= above):
                    if start + i < other + j:
                        first, second = sorted((_root(parents, start + i), _root(parents, other + j)))
                        parents[second] = first
        groups: dict[int, list[int]] = {}
        for row in range(len(self)):
            groups.setdefault(_root(parents, row), []).append(row)
        alike = sorted((rows for rows in groups.values() if len(rows) > 1), key=len, reverse=True)
        return [[Match(self.paths[r], float(self.vectors[r] @ self.vectors[rows[0]])) for r in rows] for rows in alike]

    def check(self, engine: Engine, *, exif_orientation: bool = True) -> None:
        """Refuse an engine whose vectors cannot be compared with those of the folder.

        Raises:
            InputError: with what differs, and both values.
        """
        if self.identity is None:
            raise InputError(f"{path_text(self.folder)!r} does not say what its embeddings were made with")
        if differences := self.identity.differences(Identity.of(engine, exif_orientation)):
            raise InputError(
                f"{path_text(self.folder)!r} holds embeddings of {self.model!r} with {'; '.join(differences)}"
            )


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    return (vectors[start : start + BLOCK_ROWS] for start in range(0, len(vectors), BLOCK_ROWS))


def _unit(query: np.ndarray, width: int) -> np.ndarray:
    query = np.asarray(query, np.float32)
    if query.shape != (width,):
        raise ValueError(f"the query has shape {list(query.shape)}, the folder's vectors have [{width}]")
    length = float(np.linalg.norm(query.astype(np.float64)))
    if not 0 < length < np.inf:
        raise ValueError(f"the query must be finite and not zero, its length is {length}")
    return (query / length).astype(np.float32)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest values, largest first, of equals the first first."""
    if len(values) > count:
        least = np.partition(values, -count)[-count]
        places = np.flatnonzero(values >= least)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:count]


def _root(parents: np.ndarray, row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return int(row)
