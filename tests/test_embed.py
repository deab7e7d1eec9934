"""vitfast.embed: finding images, the pipeline, and a Parquet folder that survives interruptions."""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peers import VIT, import_transformers, transformers_model
from PIL import Image

import vitfast.embed
from vitfast import testing
from vitfast.embed import (
    EmbeddingFolder,
    InputError,
    Summary,
    classify_images,
    collect,
    embed_images,
    path_text,
    write_parquet,
)
from vitfast.images import Preprocess, open_image, resize_and_crop

PREPROCESS = Preprocess((8, 8), 9)


@dataclass
class FakeEngine:
    """Embeds an image as (mean colour, its first pixel's red); logits are the mean colour."""

    preprocess: Preprocess | None = PREPROCESS
    labels: list[str] | None = None
    classes: int = 3
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batches: list[int] = field(default_factory=list)

    @property
    def config(self):
        return SimpleNamespace(projection_dim=4, width=99, num_classes=self.classes)

    def __call__(self, images, *, preprocessed):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (*self.preprocess.size, 3)
        self.batches.append(len(images))
        colour = images.float().mean((1, 2))
        embedding = torch.cat([colour, images[:, 0, 0, :1]], 1)
        return SimpleNamespace(embedding=embedding, logits=colour if self.classes else None, tokens=None)

    def stream(self, batches, *, preprocessed):
        for images in batches:
            yield self(torch.from_numpy(np.stack(images)), preprocessed=preprocessed)


def expected(path):
    image = resize_and_crop(open_image(path), PREPROCESS)
    return np.append(image.reshape(-1, 3).mean(0, dtype=np.float64), image[0, 0, 0]).astype(np.float32)


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def make_photos(folder: Path) -> Path:
    """Ten good images, p0.png to p9.png, and three bad ones: b00.jpg, b99.jpg, p45.jpg."""
    for i in range(10):
        save(folder / f"p{i}.png", i)
    (folder / "b00.jpg").write_text("not an image")
    truncate(save(folder / "b99.jpg"))
    (folder / "p45.jpg").write_bytes(b"")
    return folder


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
    original = vitfast.embed.open_image

    def counting(path, **kwargs):
        started.append(path)
        return original(path, **kwargs)

    monkeypatch.setattr(vitfast.embed, "open_image", counting)
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


# --- the folder ---


def run(photos, out, engine=None, model="m", **kwargs):
    engine = engine or FakeEngine()
    folder = EmbeddingFolder(out, model)
    results = embed_images(engine, folder.remaining(collect([photos])), batch_size=4)
    return write_parquet(results, folder, engine, **kwargs)


def test_parquet_columns_types_and_values(photos, tmp_path):
    summary = run(photos, tmp_path / "deep" / "out")
    assert (summary.done, len(summary.failed), len(summary.parts)) == (10, 3, 1)
    assert summary.images_per_second == pytest.approx(13 / summary.seconds)
    table = pq.read_table(tmp_path / "deep" / "out")
    assert table.schema.names == ["path", "embedding", "status"]
    assert table.schema.field("path").type == pa.string()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 4)
    assert table.schema.metadata[b"vitfast.model"] == b"m"
    for row in table.to_pylist():
        if row["status"] == "ok":
            np.testing.assert_allclose(row["embedding"], expected(row["path"]), rtol=1e-5)
        else:
            assert row["embedding"] is None
            assert summary.failed[row["path"]] == row["status"]


def test_resume_skips_what_is_done_and_retries_what_failed(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out)
    save(photos / "b00.jpg", 50)
    new = save(photos / "q.png", 51)
    engine = FakeEngine()
    summary = run(photos, out, engine)
    assert sum(engine.batches) == 2
    assert summary.done == 2
    assert len(summary.failed) == 2
    rows = pq.read_table(out).to_pylist()
    assert len({row["path"] for row in rows}) == len(rows) == 14  # one row per image: old failures are gone
    assert {row["path"] for row in rows if row["status"] == "ok"} >= {str(new), str(photos / "b00.jpg")}
    again = run(photos, out, engine)
    assert again.done == 0
    assert len(pq.read_table(out)) == 14


def test_other_model_or_preprocessing_is_refused(photos, tmp_path):
    run(photos, tmp_path / "out")
    with pytest.raises(InputError, match=r"'m'.*'other'"):
        run(photos, tmp_path / "out", model="other")
    with pytest.raises(InputError, match="preprocessing"):
        run(photos, tmp_path / "out", FakeEngine(preprocess=Preprocess((8, 8), 8)))
    with pytest.raises(InputError, match="preprocessing"):
        run(photos, tmp_path / "out", exif_orientation=False)


def test_model_path_is_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    assert EmbeddingFolder("out", "weights").model == str(tmp_path / "weights")
    assert EmbeddingFolder("out", "facebook/dinov2-small").model == "facebook/dinov2-small"


def test_parts_are_written_as_the_run_goes(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(vitfast.embed, "PART_ROWS", 4)
    seen = []
    out = tmp_path / "out"
    summary = run(photos, out, on_result=lambda _: seen.append(len(list(out.glob("part-*.parquet")))))
    assert seen == sorted(seen)
    assert max(seen) == 3
    assert len(summary.parts) == 4
    assert sorted(map(str, out.iterdir())) == sorted(summary.parts)
    assert len(pq.read_table(out)) == 13


def test_parts_are_written_by_the_clock(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(vitfast.embed, "PART_SECONDS", 0.0)
    assert len(run(photos, tmp_path / "out").parts) == 13


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_keeps_what_was_done(photos, tmp_path, error, monkeypatch):
    monkeypatch.setattr(vitfast.embed, "PART_ROWS", 4)
    out, summary = tmp_path / "out", Summary()

    def interrupt(result):
        if result.path.name == "p3.png":
            raise error

    with pytest.raises(error):
        run(photos, out, on_result=interrupt, summary=summary)
    assert (summary.done, len(summary.failed)) == (4, 2)
    assert summary.seconds > 0
    rows = pq.read_table(out).to_pylist()
    assert [Path(row["path"]).name for row in rows] == ["b00.jpg", "b99.jpg", "p0.png", "p1.png", "p2.png", "p3.png"]
    assert run(photos, out).done == 6
    rows = pq.read_table(out).to_pylist()
    assert len({row["path"] for row in rows}) == len(rows) == 13


def test_a_killed_run_leaves_nothing_half_written(photos, tmp_path, monkeypatch):
    """Killed inside the write itself: the hidden file stays, readers and the next run pass over it."""
    out = tmp_path / "out"
    monkeypatch.setattr(vitfast.embed.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    monkeypatch.setattr(vitfast.embed.Path, "unlink", lambda *_, **__: None)
    with pytest.raises(OSError, match="killed"):
        run(photos, out)
    monkeypatch.undo()
    assert any(path.suffix == ".tmp" for path in out.iterdir())
    assert list(out.glob("*.parquet")) == []
    assert run(photos, out).done == 10
    assert len(pq.read_table(out)) == 13


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_output_that_cannot_be_written_is_said_at_once(where, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written") as caught:
        EmbeddingFolder(tmp_path / where, "m")
    assert str(tmp_path / where) in str(caught.value)


def test_output_on_a_read_only_place_is_said_at_once(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(vitfast.embed.Path, "touch", refuse)
    with pytest.raises(InputError, match="Read-only"):
        EmbeddingFolder(tmp_path / "out", "m")


def test_a_foreign_or_damaged_part_is_said(tmp_path):
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match=r"part-1\.parquet"):
        EmbeddingFolder(tmp_path, "m")
    pq.write_table(pa.table({"path": ["a"], "status": ["ok"]}), tmp_path / "part-1.parquet")
    with pytest.raises(InputError, match="an unknown model"):
        EmbeddingFolder(tmp_path, "m")


def test_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / "photos"
    good = save(folder / "a.png")
    os.rename(good, os.fsencode(folder) + b"/\xff.png")
    assert path_text(collect([folder])[0]) == f"{folder}/\\xff.png"
    assert run(folder, tmp_path / "out").done == 1
    assert pq.read_table(tmp_path / "out")["path"].to_pylist() == [f"{folder}/\\xff.png"]
    assert run(folder, tmp_path / "out").done == 0


def test_no_rows_no_part(tmp_path):
    folder = EmbeddingFolder(tmp_path / "out", "m")
    assert write_parquet([], folder, FakeEngine()).parts == []
    assert list((tmp_path / "out").iterdir()) == []


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


# --- with a real model ---


def test_with_a_real_model(photos, tmp_path):
    """A small transformers ViT from its directory: the same embeddings and classes as transformers gives."""
    import_transformers()
    from transformers.models.vit import ViTImageProcessorPil

    from vitfast.engine import load

    labels = {i: f"class {i}" for i in range(5)}
    model = transformers_model("ViTForImageClassification", VIT | {"id2label": labels})
    model.save_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "model")

    engine = load(tmp_path / "model", device=testing.device(), dtype="fp32")
    folder = EmbeddingFolder(tmp_path / "out", tmp_path / "model")
    paths = collect([photos])
    summary = write_parquet(embed_images(engine, paths, batch_size=4), folder, engine)
    assert (summary.done, len(summary.failed)) == (10, 3)

    good = [path for path in paths if path.suffix == ".png"]
    pixels = processor([Image.open(path) for path in good], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        cls = model.vit(pixels).last_hidden_state[:, 0]
        probabilities = model(pixels).logits.softmax(-1)
    rows = {row["path"]: row["embedding"] for row in pq.read_table(tmp_path / "out").to_pylist()}
    ours = torch.tensor([rows[str(path)] for path in good])
    assert (ours - cls).norm() / cls.norm() < testing.TOLERANCES[torch.float32].rms * 10

    for path, wanted in zip(good, probabilities, strict=True):
        classes = next(classify_images(engine, [path], k=5)).classes
        got = {c["label"]: c["probability"] for c in classes}
        assert got == pytest.approx({f"class {i}": float(p) for i, p in enumerate(wanted)}, abs=1e-5)
