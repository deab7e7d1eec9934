"""vitfast.pipeline.embed: finding images, the pipeline and classes."""

import threading

import numpy as np
import pytest
import torch
from helpers.photos import FakeEngine, expected, make_photos, save
from PIL import Image

import vitfast.pipeline.embed
from vitfast.images.files import InputError, collect
from vitfast.images.preprocess import Preprocess
from vitfast.pipeline.embed import classify_images, embed_images


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


# --- collect ---


def test_collect_folders_files_and_patterns(tmp_path):
    a, b = save(tmp_path / "x" / "a.png"), save(tmp_path / "x" / "deep" / "b.JPG")
    odd = tmp_path / "odd.bin"
    odd.write_bytes(a.read_bytes())
    save(tmp_path / "x" / ".hidden" / "c.png")
    save(tmp_path / "x" / "._a.png")
    (tmp_path / "x" / "notes.txt").write_text("no image")
    assert collect([str(tmp_path / "x")]) == [a, b]
    assert collect([tmp_path / "x", str(a), str(tmp_path / "x" / "." / "a.png")]) == [a, b]
    assert collect([str(odd)]) == [odd]
    assert collect([str(tmp_path / "**" / "*.JPG")]) == [b]
    assert collect([str(tmp_path / "x" / "*")]) == [a, tmp_path / "x" / "notes.txt"]


def test_collect_gives_absolute_paths_and_knows_brackets(tmp_path, monkeypatch):
    strange = save(tmp_path / "a[1].png")
    monkeypatch.chdir(tmp_path)
    assert collect(["a[1].png"]) == [strange]


@pytest.mark.parametrize("source", ["empty", "missing", "empty/*.png", "missing.png"])
def test_collect_names_what_it_cannot_find(source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("")
    with pytest.raises(InputError, match="no ") as caught:
        collect([str(tmp_path / source)])
    assert str(tmp_path / source) in str(caught.value)


# --- the pipeline ---


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2), (4, 4), (64, 3)])
def test_every_image_has_its_own_status_in_order(photos, batch_size, workers):
    engine = FakeEngine()
    paths = collect([photos])
    results = list(embed_images(engine, paths, batch_size=batch_size, workers=workers))
    assert [r.path for r in results] == paths
    bad = {r.path.name: r.status for r in results if r.status != "ok"}
    assert bad.keys() == {"b00.jpg", "b99.jpg", "p45.jpg"}
    assert "known format" in bad["b00.jpg"]
    assert "truncated" in bad["b99.jpg"].lower()
    assert "empty" in bad["p45.jpg"]
    for result in results:
        if result.status == "ok":
            np.testing.assert_allclose(result.embedding, expected(result.path), rtol=1e-5)
        else:
            assert result.embedding is None
    assert sum(engine.batches) == 10
    assert max(engine.batches) <= batch_size


def test_only_bad_images_and_no_images(photos):
    engine = FakeEngine()
    results = list(embed_images(engine, [photos / "b00.jpg", photos / "missing.png"] * 20, batch_size=4))
    assert len(results) == 40
    assert all(r.status != "ok" for r in results)
    assert list(embed_images(engine, [])) == []
    assert engine.batches == []


def test_an_image_that_cannot_be_resized_is_only_its_own_problem(photos):
    engine = FakeEngine(preprocess=Preprocess((8, 8), None, center_crop=False))
    save(photos / "a.png")
    Image.new("RGB", (8, 8)).save(photos / "fits.png")
    results = {r.path.name: r.status for r in embed_images(engine, [photos / "a.png", photos / "fits.png"])}
    assert results["fits.png"] == "ok"
    assert "12x16" in results["a.png"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_only_its_own_problem(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    Image.new("RGB", (100, 100)).save(photos / "bomb.png")
    results = {r.path.name: r.status for r in embed_images(FakeEngine(), collect([photos]))}
    assert "too many pixels" in results["bomb.png"]
    assert results["p0.png"] == "ok"


def test_output_that_is_not_finite_is_said(photos):
    class Overflowing(FakeEngine):
        def __call__(self, images, *, preprocessed):
            output = super().__call__(images, preprocessed=preprocessed)
            output.embedding[0] = float("inf")
            return output

    statuses = [r.status for r in embed_images(Overflowing(), [photos / "p0.png", photos / "p1.png"])]
    assert "not finite" in statuses[0]
    assert statuses[1] == "ok"


def test_decoding_stays_a_bounded_way_ahead(photos, monkeypatch):
    """A folder of millions must not be decoded into memory while the model is busy."""
    started = []
    original = vitfast.pipeline.embed.open_image

    def counting(path, **kwargs):
        started.append(path)
        return original(path, **kwargs)

    monkeypatch.setattr(vitfast.pipeline.embed, "open_image", counting)
    results = embed_images(FakeEngine(), [photos / "p0.png"] * 500, batch_size=4, workers=2)
    next(results)
    assert len(started) < 40
    before = threading.active_count()
    results.close()
    assert threading.active_count() < before


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"workers": 0}])
def test_pipeline_refuses_bad_sizes(kwargs):
    with pytest.raises(ValueError, match="at least 1"):
        embed_images(FakeEngine(), [], **kwargs)


def test_pipeline_needs_the_models_preprocessing():
    with pytest.raises(ValueError, match="preprocessed"):
        embed_images(FakeEngine(preprocess=None), [])


# --- classes ---


def test_classify(photos):
    rows = list(classify_images(FakeEngine(labels=["red", "green", "blue"]), collect([photos]), k=2, batch_size=4))
    assert len(rows) == 13
    for row in rows:
        if row.status != "ok":
            assert row.classes == []
            continue
        colour = torch.from_numpy(expected(row.path)[:3]).double()
        probabilities = colour.softmax(0)
        best = int(colour.argmax())
        assert row.classes[0]["label"] == ["red", "green", "blue"][best]
        assert row.classes[0]["index"] == best
        assert row.classes[0]["probability"] == pytest.approx(float(probabilities[best]), rel=1e-3)
        assert row.classes[0]["probability"] >= row.classes[1]["probability"]
        assert len(row.classes) == 2


def test_classify_without_labels_or_with_fewer_classes(photos):
    row = next(classify_images(FakeEngine(), [photos / "p0.png"], k=50))
    assert [c["label"] for c in row.classes] == [str(c["index"]) for c in row.classes]
    assert len(row.classes) == 3
    assert sum(c["probability"] for c in row.classes) == pytest.approx(1)


def test_classify_refuses(photos):
    with pytest.raises(ValueError, match="no classification head"):
        classify_images(FakeEngine(classes=0), [photos / "p0.png"])
    with pytest.raises(ValueError, match="at least 1"):
        classify_images(FakeEngine(), [photos / "p0.png"], k=0)
