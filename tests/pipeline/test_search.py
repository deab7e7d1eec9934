"""vitfast.pipeline.search and the commands on it: exact answers, in order, and refusals of what cannot be compared."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.folders import folder_of
from helpers.photos import FakeEngine, make_photos, save
from typer.testing import CliRunner

from vitfast.cli.app import app
from vitfast.images.files import InputError, collect, path_text
from vitfast.pipeline import search
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, write_parquet
from vitfast.pipeline.search import Index


@pytest.fixture
def vectors():
    return np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)


@pytest.mark.parametrize("rows", [3, 16384], ids=["many blocks", "one block"])
@pytest.mark.parametrize("topk", [1, 7, 60])
def test_search_is_exact(vectors, rows, topk, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "BLOCK_ROWS", rows)
    index = Index(folder_of(vectors, tmp_path / "out"))
    query = np.random.default_rng(1).standard_normal(6) * 1e3
    cosines = (vectors @ query) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    best = np.argsort(-cosines)[:topk]
    matches = index.search(query, topk)
    assert [m.path for m in matches] == [f"/{row:04d}.png" for row in best]
    np.testing.assert_allclose([m.similarity for m in matches], cosines[best], atol=1e-6)


def test_equals_come_in_the_order_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "BLOCK_ROWS", 4)
    index = Index(folder_of([[1, 0], [0, 1]] * 9, tmp_path / "out"))
    assert [m.path for m in index.search([1, 0], 4)] == ["/0000.png", "/0002.png", "/0004.png", "/0006.png"]
    without = index.search([1, 0], 3, without="/0002.png")
    assert [m.path for m in without] == ["/0000.png", "/0004.png", "/0006.png"]
    everything = index.search([1, 0], 100, without="/0002.png")
    assert len(everything) == 17


def test_duplicates_are_groups_of_what_is_joined(tmp_path):
    def at(degrees):
        return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]

    index = Index(folder_of([at(d) for d in (0, 90, 8, 16, 91, 200)], tmp_path / "out"))
    groups = index.duplicates(np.cos(np.radians(10)))  # 0 and 16 are joined by 8
    assert [[m.path for m in g] for g in groups] == [
        ["/0000.png", "/0002.png", "/0003.png"],
        ["/0001.png", "/0004.png"],
    ]
    assert groups[0][2].similarity == pytest.approx(np.cos(np.radians(16)), abs=1e-6)
    assert index.duplicates(1) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: index.search(np.ones(5), 3), r"shape \[5\], the folder's vectors have \[6\]"),
        (lambda index: index.search(np.zeros(6), 3), "not zero"),
        (lambda index: index.search(np.full(6, np.nan), 3), "finite"),
        (lambda index: index.search(np.ones(6), 0), "at least 1, got 0"),
        (lambda index: index.duplicates(1.5), "got 1.5"),
    ],
)
def test_refusals(vectors, call, message, tmp_path):
    index = Index(folder_of(vectors, tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        call(index)


def test_an_engine_of_another_kind_is_refused(vectors, tmp_path):
    index = Index(folder_of(vectors, tmp_path / "out"))
    index.check(FakeEngine())
    with pytest.raises(InputError, match="weights 'weights of a fake', not 'others'"):
        index.check(FakeEngine(fingerprint="others"))


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """Photos, three of them bad, and their embedding folder by a fake engine, which the commands load."""
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    write_parquet(embed_images(FakeEngine(), collect([photos])), EmbeddingFolder(out, "m"), FakeEngine())
    loaded = []

    def load(source, **options):
        loaded.append((source, options["dtype"]))
        return FakeEngine(fingerprint="others" if source == "other" else "weights of a fake")

    monkeypatch.setattr("vitfast.engine.load.load", load)
    return photos, out, loaded


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})
    assert "Traceback" not in result.output
    return result


def test_similar_to_an_image_of_the_folder_needs_no_model(embedded):
    _, out, loaded = embedded
    index = Index(out)
    query = index.paths[0]
    answer = json.loads(run("similar", query, out, "--topk", 3, "--json").stdout)
    assert (answer["query"], answer["images"], answer["model"]) == (query, 10, "m")
    expected = index.search(index.vectors[0], 3, without=query)
    assert [m["path"] for m in answer["matches"]] == [m.path for m in expected]
    assert loaded == []
    lines = run("similar", query, out, "--topk", 3).stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines] == [m.path for m in expected]


def test_similar_to_another_image_embeds_it_as_the_folder_was(embedded, tmp_path):
    photos, out, loaded = embedded
    twin = tmp_path / "twin.png"
    original = save(photos / "new.png", 77)
    twin.write_bytes(original.read_bytes())
    write_parquet(embed_images(FakeEngine(), [original]), EmbeddingFolder(out, "m"), FakeEngine())
    answer = json.loads(run("similar", twin, out, "-k", 1, "--json").stdout)
    assert [m["path"] for m in answer["matches"]] == [path_text(original)]
    assert answer["matches"][0]["similarity"] == pytest.approx(1, abs=1e-6)
    assert loaded == [("m", "float32")]
    result = run("similar", twin, out, "-m", "other")
    assert result.exit_code == 2
    assert "weights" in result.output
    bad = tmp_path / "bad.png"
    bad.write_text("no")
    assert "cannot be embedded" in run("similar", bad, out).output
    result = run("similar", tmp_path / "nothing.png", out)
    assert result.exit_code == 2
    assert "(a sentence needs --text)" in " ".join(result.output.split())


def test_duplicates_command(embedded):
    photos, out, _ = embedded
    copy = photos / "copy.png"
    original = next(path for path in Index(out).paths if path.endswith(".png"))
    copy.write_bytes(Path(original).read_bytes())
    write_parquet(embed_images(FakeEngine(), [copy]), EmbeddingFolder(out, "m"), FakeEngine())
    answer = json.loads(run("duplicates", out, "--above", 0.999999, "--json").stdout)
    assert [sorted(m["path"] for m in group) for group in answer["groups"]] == [sorted([original, str(copy)])]
    assert "1 groups of images alike among 11" in run("duplicates", out, "--above", 0.999999).stdout
    assert run("duplicates", out, "--above", 2).exit_code == 2
    assert run("duplicates", photos).exit_code == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_as_one_array(vectors, dtype, tmp_path):
    """Of several parts, in the folder's own dtype and not normalised."""
    out = folder_of(vectors, tmp_path / "out", output_dtype=dtype)
    answer = json.loads(run("npy", out, tmp_path / "v.npy", "--json").stdout)
    assert answer == {"vectors": str(tmp_path / "v.npy"), "keys": str(tmp_path / "v.keys.json"), "rows": 50}
    written = np.load(tmp_path / "v.npy")
    assert written.dtype == dtype and np.array_equal(written, vectors.astype(dtype))
    assert json.loads(Path(answer["keys"]).read_text()) == [f"/{number:04d}.png" for number in range(50)]


def test_vectors_of_bad_images_are_left_out(embedded, tmp_path):
    _, out, _ = embedded
    assert "10 vectors" in run("npy", out, tmp_path / "v.npy").stdout.replace("\n", " ")
    keys = json.loads((tmp_path / "v.keys.json").read_text())
    index = Index(out)
    assert keys == index.paths and len(np.load(tmp_path / "v.npy")) == 10
    unit = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(unit / np.linalg.norm(unit, axis=1, keepdims=True), index.vectors, atol=1e-6)


def test_what_cannot_be_an_array_is_refused_and_nothing_left_behind(embedded, vectors, tmp_path):
    _, out, _ = embedded
    result = run("npy", out, tmp_path / "v.txt")
    assert result.exit_code == 2 and "must end in .npy, got" in result.output
    result = run("npy", tmp_path / "nothing", tmp_path / "v.npy")
    assert result.exit_code == 2 and "holds no embeddings" in result.output.replace("\n", " ")
    (tmp_path / "taken.npy").mkdir()
    assert run("npy", out, tmp_path / "taken.npy").exit_code == 1
    assert not list(tmp_path.glob(".*"))
