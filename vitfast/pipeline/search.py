"""Search in an embedding folder: the most similar images, and those that are there twice.

    index = Index("embeddings/")
    for match in index.search(vector, topk=10):
        print(match.path, match.similarity)

The search is exact: a product of the query with every row, block by block, so that memory is read once and nothing of
the size of all similarities is kept. Similarity is the cosine.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from vitfast.images.files import InputError, path_text
from vitfast.pipeline.embed import OK
from vitfast.pipeline.identity import Identity, identity_of
from vitfast.pipeline.layout import files_of
from vitfast.pipeline.reading import read_embeddings

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
    """The embeddings of a folder, read when they are first needed and kept at unit length, 4 bytes a number.

    Args:
        folder: as `vitfast embed` writes it. Rows without an embedding are left out.

    Attributes:
        model: hub id or path of the model, as noted in the folder. identity: what its embeddings were made with, or
            None for a folder of 0.1.0. paths: keys of the rows, in order. stamp: a hash of which parts there are.

    Raises:
        InputError: if the folder cannot be read (see `read_embeddings`), or has no row with an embedding.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.stamp = _stamp(self.folder)
        table = read_embeddings(folder, ["path", "status"])
        self.model, self.identity = identity_of(table.schema.metadata)
        table = table.filter(pc.equal(table["status"], OK))
        if not len(table):
            raise InputError(f"{path_text(folder)!r} holds no image with an embedding")
        self.paths: list[str] = table["path"].to_pylist()

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """float32 [N, E], of unit length."""
        table = read_embeddings(self.folder, ["status", "embedding"])
        vectors = np.empty((len(self), table["embedding"].type.list_size), np.float32)
        if pc.sum(pc.equal(table["status"], OK)).as_py() != len(self) or _stamp(self.folder) != self.stamp:
            raise InputError(f"{path_text(self.folder)!r} has changed since it was opened: another run writes it")
        done = 0
        for chunk in table["embedding"].chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False)  # of the rows that have any
            values = values.reshape(-1, vectors.shape[1])
            vectors[done : done + len(values)] = values
            done += len(values)
        for block in _blocks(vectors):
            block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-30)
        return vectors

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.paths)}

    def __len__(self) -> int:
        return len(self.paths)

    def row_of(self, path: str | Path) -> int | None:
        """The row of an image that is in the folder, else None."""
        return self._rows.get(path_text(path))

    def vector_of(self, path: str | Path) -> np.ndarray | None:
        """The vector [E] of an image that is in the folder, else None."""
        row = self.row_of(path)
        return None if row is None else self.vectors[row]

    def checked(self, query: np.ndarray, topk: int, width: int) -> np.ndarray:
        """The query at unit length.

        Raises:
            ValueError: as `search`.
        """
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        return _unit(query, width)

    def search(self, query: np.ndarray, topk: int = 10, *, without: str | None = None) -> list[Match]:
        """The images most similar to a query, best first; of equals the one that was written first.

        Args:
            query: a vector [E] of any length but zero.
            topk: how many, fewer if the folder holds fewer.
            without: the key of an image that is not to be found: the query itself.

        Raises:
            ValueError: if topk is below 1, or the query is of another width, zero or not finite.
        """
        query = self.checked(query, topk, self.vectors.shape[1])
        similarity = np.empty(len(self), np.float32)
        for start, block in zip(range(0, len(self), BLOCK_ROWS), _blocks(self.vectors), strict=True):
            np.matmul(block, query, out=similarity[start : start + len(block)])
        left_out = self.row_of(without) if without is not None else None
        if left_out is not None:
            similarity[left_out] = -np.inf
        return [Match(self.paths[r], float(similarity[r])) for r in _largest(similarity, topk) if r != left_out]

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
        theirs = Identity.of(engine, exif_orientation, self.identity.output_dtype)
        if differences := self.identity.differences(theirs):
            raise InputError(
                f"{path_text(self.folder)!r} holds embeddings of {self.model!r} with {'; '.join(differences)}"
            )


def _stamp(folder: Path) -> str:
    """A hash that is another one once a part of the folder is."""
    parts = sorted((part.name, stat.st_size, stat.st_mtime_ns) for part in files_of(folder) for stat in [part.stat()])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def exact_rows(vectors: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Rows of the `count` largest products of unit vectors [N, E] with each query [Q, E], largest first: [Q, count]."""
    rows, values = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    for start, block in zip(range(0, len(vectors), BLOCK_ROWS), _blocks(vectors), strict=True):
        here = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
        rows, values = np.concatenate([rows, here], 1), np.concatenate([values, queries @ block.T], 1)
        best = np.argpartition(-values, min(count, values.shape[1]) - 1, axis=1)[:, :count]
        rows, values = np.take_along_axis(rows, best, 1), np.take_along_axis(values, best, 1)
    return np.take_along_axis(rows, np.argsort(-values, axis=1, kind="stable"), 1)


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
