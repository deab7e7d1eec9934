"""Approximate search in an embedding folder, by a graph of neighbours that usearch makes and the folder keeps.

    index = Index("embeddings/")
    graph = Graph.of(index)  # made the first time, and when the folder has changed
    graph.recall  # share of the ten true neighbours that are found, measured; Graph.of(index, 0.99) takes longer
    graph.search(vector, topk=10)

Vectors are kept in half precision. The file is mapped into memory, so that only a few pages of it are read for a query.

Source: HNSW (Malkov and Yashunin 2016).
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitfast.images.files import InputError, path_text
from vitfast.pipeline.search import Index, Match, exact_rows

CONNECTIVITY, EXPANSION_ADD = 32, 128
"""Neighbours of a vector in the graph, and how many are looked at to find them: what memory and building time go by."""
EXPANSIONS = (64, 128, 256, 512, 1024)
"""How many vectors a query looks at: the first of these with which the recall is what is asked for, else the last."""
RECALL, NEIGHBOURS, QUERIES = 0.97, 10, 256
"""The share of so many nearest neighbours that is to be found by default, measured on so many of the folder's own
vectors."""

_FILE = ".hnsw-{}.usearch"  # hidden: whoever reads the folder as a data set passes over it


@dataclass(frozen=True)
class _Made:
    """What is noted beside a graph: of which parts it is (see `Index.stamp`), and the recall of each of EXPANSIONS."""

    stamp: str
    recalls: dict[str, float]

    def enough(self, recall: float) -> tuple[int, float]:
        """How many vectors a query looks at for a recall, and what that gives: less where none is enough."""
        known = [(int(expansion), measured) for expansion, measured in self.recalls.items()]
        return next((pair for pair in known if pair[1] >= recall), known[-1])


@dataclass
class Graph:
    """A graph over the vectors of an `Index`. Make one with `Graph.of`.

    Attributes:
        index: the folder. recall: the share of the true NEIGHBOURS nearest that are found. expansion: how many vectors
            a query looks at. built: whether this made it anew.
    """

    index: Index
    recall: float
    expansion: int
    built: bool
    _graph: Any

    @classmethod
    def of(cls, index: Index, recall: float = RECALL) -> Graph:
        """The graph that is kept in the folder, or a new one where there is none or the folder has changed.

        Args:
            recall: the share of the true neighbours that is to be found, above 0 up to 1: what a query takes grows with
                it.

        Raises:
            ValueError: if recall is another.
            InputError: if usearch is not installed, or the folder cannot be written.
        """
        if not 0 < recall <= 1:
            raise ValueError(f"recall must be above 0, up to 1, got {recall}")
        usearch = _usearch()
        note = index.folder / ".hnsw.json"
        try:
            made = _Made(**json.loads(note.read_text()))
            graph = usearch.Index.restore(os.fspath(index.folder / _FILE.format(made.stamp[:16])), view=True)
        except (OSError, ValueError, TypeError, RuntimeError):  # none, or not readable any more
            made, graph = None, None
        if made is not None and graph is not None and made.stamp == index.stamp and len(graph) == len(index):
            built = False
        else:
            (graph, made), built = cls._build(index, usearch, note), True
        expansion, measured = made.enough(recall)
        graph.expansion_search = expansion
        return cls(index, measured, expansion, built, graph)

    @classmethod
    def _build(cls, index: Index, usearch: Any, note: Path) -> tuple[Any, _Made]:
        vectors = index.vectors
        graph = usearch.Index(
            ndim=vectors.shape[1], metric="cos", dtype="f16", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD
        )
        graph.add(np.arange(len(vectors)), vectors)
        made = _Made(index.stamp, _recalls(graph, vectors))
        hidden = index.folder / f".{uuid.uuid4().hex[:8]}.tmp"
        try:
            graph.save(os.fspath(hidden))
            file = index.folder / _FILE.format(made.stamp[:16])
            os.replace(hidden, file)
            hidden.write_text(json.dumps(asdict(made)))
            os.replace(hidden, note)
        except (OSError, RuntimeError) as error:
            raise InputError(f"the index cannot be kept in {path_text(index.folder)!r}: {error}") from error
        finally:
            hidden.unlink(missing_ok=True)
        for old in index.folder.glob(_FILE.format("*")):
            if old != file:
                old.unlink(missing_ok=True)
        return graph, made

    def vector_of(self, path: str | Path) -> np.ndarray | None:
        """As `Index.vector_of`, in half precision; the folder's own vectors are not read."""
        row = self.index.row_of(path)
        return None if row is None else np.asarray(self._graph.get(row), np.float32).reshape(-1)

    def search(self, query: np.ndarray, topk: int = 10, *, without: str | None = None) -> list[Match]:
        """As `Index.search`, but a neighbour may be missed: one in 1 / (1 - recall).

        Raises:
            ValueError: as there.
        """
        query = self.index.checked(query, topk, self._graph.ndim)
        found = self._graph.search(query, min(topk + (without is not None), len(self.index)))
        best = [
            Match(self.index.paths[int(row)], float(1 - distance))
            for row, distance in zip(found.keys, found.distances, strict=True)
        ]
        return [match for match in best if match.path != without][:topk]


def _recalls(graph: Any, vectors: np.ndarray) -> dict[str, float]:
    """How many vectors a query looks at -> the recall that this gives."""
    count = min(NEIGHBOURS, len(vectors) - 1)
    if count < 1:
        return {str(EXPANSIONS[0]): 1.0}
    chosen = np.random.default_rng(0).choice(len(vectors), min(QUERIES, len(vectors)), replace=False)
    true = exact_rows(vectors, vectors[chosen], count + 1)
    recalls = {}
    for expansion in EXPANSIONS:
        graph.expansion_search = expansion
        found = np.asarray(graph.search(vectors[chosen], count + 1).keys).reshape(len(chosen), -1)
        hits = [
            len(np.intersect1d(ours[ours != row][:count], best[best != row][:count]))
            for ours, best, row in zip(found.astype(np.int64), true, chosen, strict=True)
        ]
        recalls[str(expansion)] = sum(hits) / (count * len(chosen))
    return recalls


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as error:
        raise InputError("an HNSW index needs usearch: pip install 'vitfast[search]'") from error
    return usearch.index
