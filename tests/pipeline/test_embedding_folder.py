"""vitfast.pipeline.parquet: a Parquet folder that survives interruptions."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.peers import VIT, import_transformers, transformers_model
from helpers.photos import FakeEngine, expected, make_photos, save
from PIL import Image

from vitfast import testing
from vitfast.images.files import InputError, collect, path_text
from vitfast.images.preprocess import Preprocess
from vitfast.ops import accuracy
from vitfast.pipeline import parquet
from vitfast.pipeline.embed import classify_images, embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, Summary, write_parquet


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


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


def test_an_engine_without_preprocessing_is_refused(tmp_path):
    folder = EmbeddingFolder(tmp_path / "out", "a/model")
    with pytest.raises(ValueError, match="knows no preprocessing"):
        write_parquet([], folder, FakeEngine(preprocess=None))


def test_model_path_is_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    assert EmbeddingFolder("out", "weights").model == str(tmp_path / "weights")
    assert EmbeddingFolder("out", "facebook/dinov2-small").model == "facebook/dinov2-small"


def test_parts_are_written_as_the_run_goes(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "PART_ROWS", 4)
    seen = []
    out = tmp_path / "out"
    summary = run(photos, out, on_result=lambda _: seen.append(len(list(out.glob("part-*.parquet")))))
    assert seen == sorted(seen)
    assert max(seen) == 3
    assert len(summary.parts) == 4
    assert sorted(map(str, out.iterdir())) == sorted(summary.parts)
    assert len(pq.read_table(out)) == 13


def test_parts_are_written_by_the_clock(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "PART_SECONDS", 0.0)
    assert len(run(photos, tmp_path / "out").parts) == 13


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_keeps_what_was_done(photos, tmp_path, error, monkeypatch):
    monkeypatch.setattr(parquet, "PART_ROWS", 4)
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
    monkeypatch.setattr(parquet.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    monkeypatch.setattr(parquet.Path, "unlink", lambda *_, **__: None)
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

    monkeypatch.setattr(parquet.Path, "touch", refuse)
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


# --- with a real model ---


def test_with_a_real_model(photos, tmp_path):
    """A small transformers ViT from its directory: the same embeddings and classes as transformers gives."""
    import_transformers()
    from transformers.models.vit import ViTImageProcessorPil

    from vitfast.engine.load import load

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
    assert (ours - cls).norm() / cls.norm() < accuracy.TOLERANCES[torch.float32].rms * 10

    for path, wanted in zip(good, probabilities, strict=True):
        classes = next(classify_images(engine, [path], k=5)).classes
        got = {c["label"]: c["probability"] for c in classes}
        assert got == pytest.approx({f"class {i}": float(p) for i, p in enumerate(wanted)}, abs=1e-5)
