"""The recipes of docs/inference.md: each snippet finds what the exact search finds."""

import importlib.util
import re

import numpy as np
import pytest
from helpers import postgres
from helpers.folders import folder_of
from helpers.scripts import ROOT

from vitfast.pipeline.embed import Result
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.parquet import EmbeddingFolder
from vitfast.pipeline.search import Index

PACKAGES = {"DuckDB": "duckdb", "LanceDB": "lancedb", "Hugging Face datasets": "datasets", "pgvector": "psycopg"}
SNIPPETS = dict(
    re.findall(r"^#### ([^\n]+)\n.*?```python\n(.*?)```", (ROOT / "docs/inference.md").read_text(), re.M | re.S)
)


def test_every_recipe_is_run():
    assert set(SNIPPETS) == set(PACKAGES)


@pytest.fixture(scope="module")
def server():
    with postgres.running() as environment:
        yield environment


@pytest.mark.parametrize("output_dtype", ["float32", "float16"])
@pytest.mark.parametrize("recipe", PACKAGES)
def test_recipe(recipe, output_dtype, request, tmp_path, monkeypatch):
    if importlib.util.find_spec(PACKAGES[recipe]) is None:
        pytest.skip(f"{PACKAGES[recipe]} is not installed: its recipe is not run")
    vectors = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    out = folder_of(vectors, tmp_path / "embeddings", output_dtype=output_dtype)
    with EmbeddingFolder(out, "m") as folder:
        failed = [Result("/bad.png", "not an image")]
        folder.write_part(folder.new_part(), failed, 16, identity_of_parts(out))
    if recipe == "pgvector":
        for name, value in request.getfixturevalue("server").items():
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(SNIPPETS[recipe], recipe, "exec"), names)
    expected = Index(out).search(vectors[7], 5)
    assert [path for path, _ in names["answer"]] == [match.path for match in expected]
    got = [similarity for _, similarity in names["answer"]]
    np.testing.assert_allclose(got, [match.similarity for match in expected], rtol=0, atol=2e-3)


def identity_of_parts(out) -> Identity:
    identity = Index(out).identity
    assert identity is not None
    return identity
