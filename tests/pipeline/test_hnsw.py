"""vitfast.pipeline.hnsw: neighbours by a graph, how many of the true ones, and when the graph is made anew."""

import itertools
import json
import os
import time

import numpy as np
import pytest
from helpers.folders import folder_of
from typer.testing import CliRunner

from vitfast.cli.app import app
from vitfast.images.files import InputError
from vitfast.pipeline import hnsw
from vitfast.pipeline.hnsw import Graph
from vitfast.pipeline.search import Index, exact_rows

usearch = pytest.importorskip("usearch", reason="usearch is not installed (the extra `search`)")


def clustered(count, width, seed=0):
    """Vectors around a few hundred centres, as embeddings of photographs lie."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(count // 100, 2), width), np.float32)
    return centres[random.integers(0, len(centres), count)] + 0.5 * random.standard_normal((count, width), np.float32)


def recall_of(graph, queries, count=10):
    """Measured apart from what the graph says of itself."""
    vectors = graph.index.vectors
    hits = 0
    for row in queries:
        cosines = vectors @ vectors[row]
        cosines[row] = -2
        best = {graph.index.paths[i] for i in np.argsort(-cosines)[:count]}
        found = graph.search(vectors[row], count, without=graph.index.paths[row])
        hits += len(best & {match.path for match in found})
    return hits / count / len(queries)


def test_neighbours_are_found(tmp_path):
    index = Index(folder_of(clustered(2000, 24), tmp_path / "out", rows=700))
    graph = Graph.of(index)
    assert graph.built and graph.recall >= 0.97
    assert recall_of(graph, range(0, 2000, 40)) >= 0.95
    query = index.vectors[7]
    exact, ours = index.search(query, 5), graph.search(query, 5)
    assert ours[0].path == exact[0].path
    # Which neighbours it misses depends on the threads that built it; those that it has are as near as it says.
    similarity = dict(zip(index.paths, (index.vectors @ query).tolist(), strict=True))
    assert [m.similarity for m in ours] == pytest.approx([similarity[m.path] for m in ours], abs=2e-3)
    assert all(a.similarity >= b.similarity for a, b in itertools.pairwise(ours))
    np.testing.assert_allclose(graph.vector_of(index.paths[7]), query, atol=1e-3)
    assert graph.vector_of("/other.png") is None
    with pytest.raises(ValueError, match=r"shape \[5\], the folder's vectors have \[24\]"):
        graph.search(np.ones(5))


def test_a_graph_that_finds_little_is_noticed(tmp_path, monkeypatch):
    """What is printed is measured: with few connections and little effort the recall is bad, and said to be."""
    monkeypatch.setattr(hnsw, "CONNECTIVITY", 2)
    monkeypatch.setattr(hnsw, "EXPANSION_ADD", 2)
    monkeypatch.setattr(hnsw, "EXPANSIONS", (1,))
    index = Index(folder_of(clustered(2000, 24), tmp_path / "out", rows=2000))
    graph = Graph.of(index)
    assert graph.recall < 0.9
    assert abs(graph.recall - recall_of(graph, range(0, 2000, 20))) < 0.15


def test_more_is_found_where_more_is_asked_for(tmp_path, monkeypatch):
    """Of vectors without any order, which are hard to find: what is printed grows with what is looked at."""
    monkeypatch.setattr(hnsw, "EXPANSIONS", (1, 512))
    monkeypatch.setattr(hnsw, "CONNECTIVITY", 8)
    vectors = np.random.default_rng(0).standard_normal((4000, 128), np.float32)
    index = Index(folder_of(vectors, tmp_path / "out", rows=1000))
    some, most = Graph.of(index, 0.3), Graph.of(index, 0.97)
    assert some.built and not most.built
    assert some.expansion < most.expansion and some.recall < most.recall
    assert most.recall >= 0.97 and recall_of(most, range(0, 4000, 80)) >= 0.95
    for wrong in (0, 1.01):
        with pytest.raises(ValueError, match=f"recall must be above 0, up to 1, got {wrong}"):
            Graph.of(index, wrong)


def test_a_graph_is_kept_until_the_folder_changes(tmp_path):
    out = folder_of(clustered(60, 8), tmp_path / "out")
    assert Graph.of(Index(out)).built
    kept = Graph.of(Index(out))
    assert not kept.built
    assert "vectors" not in vars(kept.index)  # the folder's own are not read
    assert kept.search(kept.vector_of("/0003.png"), 1)[0].path == "/0003.png"
    folder_of(clustered(3, 8, 1), out, [f"/new{i}.png" for i in range(3)])
    changed = Graph.of(Index(out))
    assert changed.built and len(changed.index) == 63
    (file,) = out.glob(".hnsw-*.usearch")
    file.write_bytes(b"damaged")
    assert Graph.of(Index(out)).built


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_vectors(count, tmp_path):
    graph = Graph.of(Index(folder_of(clustered(count, 8), tmp_path / "out")))
    assert len(graph.search(np.ones(8), 10)) == count
    assert graph.recall == 1


def test_exact_rows():
    vectors = clustered(300, 16)
    queries = vectors[:9] + 0.1
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :7]
    assert np.array_equal(exact_rows(vectors, queries, 7), expected)


def test_command(tmp_path):
    out = folder_of(clustered(80, 8), tmp_path / "out")
    command = ["similar", "/0003.png", str(out), "-k", "3", "--index", "hnsw"]
    result = CliRunner().invoke(app, [*command, "--json"])
    answer = json.loads(result.stdout)
    exact = Index(out).search(Index(out).vectors[3], 3, without="/0003.png")
    assert [m["path"] for m in answer["matches"]] == [m.path for m in exact]
    assert answer["built"] and answer["recall"] >= 0.97
    result = CliRunner().invoke(app, command)
    assert "by HNSW: recall@10 1.000 against exact search" in result.stderr
    result = CliRunner().invoke(app, [*command[:-2], "--recall", "0.9"])
    assert result.exit_code == 2 and "--recall goes with --index hnsw" in result.stderr
    assert CliRunner().invoke(app, [*command, "--recall", "0.9"]).exit_code == 0


def test_without_usearch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(InputError, match=r"pip install 'vitfast\[search\]'"):
        Graph.of(Index(folder_of(clustered(4, 8), tmp_path / "out")))


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_a_hundred_thousand(tmp_path):
    """As wide as CLIP's. VITFAST_HNSW_VECTORS=1000000 takes as many: 45 minutes of a core."""
    count = int(os.environ.get("VITFAST_HNSW_VECTORS", "100000"))
    index = Index(folder_of(clustered(count, 512), tmp_path / "out", rows=20_000))
    started = time.perf_counter()
    graph = Graph.of(index)
    built = time.perf_counter() - started
    print(f"built in {built:.0f} s; recall@10 {graph.recall:.4f} with {graph.expansion} vectors looked at")
    assert graph.recall >= 0.97
    assert recall_of(graph, range(5, count, count // 100)) >= 0.97
