"""vitfast.pipeline.parquet: a Parquet folder that survives interruptions."""

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
from vitfast.pipeline.embed import classify_images, embed_images
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.parquet import EmbeddingFolder, OutputError, Summary, read_embeddings, write_parquet


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
    assert table.schema.names == [
        "path", "embedding", "status", "note", "width", "height", "file_size", "file_mtime_ns", "file_sha256",
    ]  # fmt: skip
    assert table.schema.field("path").type == pa.string()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 4)
    assert table.schema.metadata[b"vitfast.model"] == b"m"
    assert read_embeddings(tmp_path / "deep" / "out").equals(table)
    for row in table.to_pylist():
        content = Path(row["path"]).read_bytes()
        assert row["file_size"] == len(content)
        assert row["file_mtime_ns"] == Path(row["path"]).stat().st_mtime_ns
        assert row["file_sha256"] == hashlib.sha256(content).digest()
        if row["status"] == "ok":
            np.testing.assert_allclose(row["embedding"], expected(row["path"]), rtol=1e-5)
            assert (row["width"], row["height"]) == Image.open(row["path"]).size
        else:
            assert row["embedding"] is row["width"] is row["height"] is None
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


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (FakeEngine(fingerprint="others"), "weights 'weights of a fake', not 'others'"),
        (FakeEngine(precision="int8"), "dtype 'float32', not 'int8'"),
        (
            FakeEngine(plan=SimpleNamespace(skip_quantize=frozenset({"fc2"}))),
            "dtype 'float32', not 'float32 with fc2 in bf16'",
        ),
        (FakeEngine(preprocess=Preprocess((8, 8), 8)), "'m' with resize 9, not 8:"),
    ],
)
def test_what_another_model_or_setting_made_is_refused(engine, message, photos, tmp_path):
    run(photos, tmp_path / "out")
    before = pq.read_table(tmp_path / "out")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run(photos, tmp_path / "out", engine)
    assert "--overwrite" in str(caught.value)
    assert read_embeddings(tmp_path / "out").equals(before)
    with pytest.raises(InputError, match="exif_orientation True, not False"):
        run(photos, tmp_path / "out", exif_orientation=False)
    with EmbeddingFolder(tmp_path / "out", "m", overwrite=True) as folder:
        paths = folder.remaining(collect([photos]))
        assert len(paths) == 13
        write_parquet(embed_images(engine, paths), folder, engine)
    assert len(read_embeddings(tmp_path / "out")) == 13


def test_another_version_is_refused(photos, tmp_path, monkeypatch):
    run(photos, tmp_path / "out")
    later = replace(Identity.of(FakeEngine()), version="9.9")
    monkeypatch.setattr(Identity, "of", lambda *_: later)
    with pytest.raises(InputError, match=r"version '0.1.0', not '9.9'"):
        run(photos, tmp_path / "out")


def test_a_model_that_moved_is_the_same_model(photos, tmp_path):
    run(photos, tmp_path / "out", model="here")
    save(photos / "q.png", 51)
    assert run(photos, tmp_path / "out", model="there").done == 1


def test_overwriting_takes_nothing_away_before_there_is_something_new(photos, tmp_path):
    run(photos, tmp_path / "out")
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), EmbeddingFolder(tmp_path / "out", "m", overwrite=True) as folder:
            write_parquet((_ for _ in ()).throw(error), folder, FakeEngine(fingerprint="others"))
    assert len(read_embeddings(tmp_path / "out")) == 13
    (tmp_path / "out" / "part-9.parquet").write_bytes(b"damaged")
    with EmbeddingFolder(tmp_path / "out", "m", overwrite=True) as folder:
        write_parquet(embed_images(FakeEngine(), [photos / "p0.png"]), folder, FakeEngine())
    assert len(read_embeddings(tmp_path / "out")) == 1


def test_refresh_embeds_what_has_changed(photos, tmp_path):
    run(photos, tmp_path / "out")
    p1 = (photos / "p1.png").stat()
    save(photos / "p1.png", 77)  # other content
    with open(photos / "p1.png", "ab") as file:
        file.write(bytes(1))
    os.utime(photos / "p1.png", ns=(p1.st_mtime_ns, p1.st_mtime_ns))  # and size, at the same time
    assert (photos / "p1.png").stat().st_size != p1.st_size
    os.utime(photos / "p2.png", ns=(1, 1))  # other time only
    (photos / "p3.png").unlink()
    bad = ["b00.jpg", "b99.jpg", "p45.jpg"]
    paths = [photos / name for name in [*bad, *(f"p{i}.png" for i in range(10))]]

    with EmbeddingFolder(tmp_path / "out", "m") as folder:
        assert [p.name for p in folder.remaining(paths)] == bad
        assert folder.changed == [str(photos / "p1.png"), str(photos / "p2.png")]
        assert [p.name for p in folder.remaining(paths, refresh=True)] == [*bad, "p1.png", "p2.png"]
        assert folder.changed == []
        assert [p.name for p in folder.remaining(paths, refresh=True, content=True)] == [*bad, "p1.png"]
        todo = folder.remaining(paths, refresh=True)
        write_parquet(embed_images(FakeEngine(), todo), folder, FakeEngine())
    rows = {row["path"]: row for row in read_embeddings(tmp_path / "out").to_pylist()}
    assert len(rows) == 13
    np.testing.assert_allclose(rows[str(photos / "p1.png")]["embedding"], expected(photos / "p1.png"), rtol=1e-5)
    assert rows[str(photos / "p2.png")]["file_mtime_ns"] == 1
    assert EmbeddingFolder(tmp_path / "out", "m").remaining(paths[3:], refresh=True) == []


def test_a_picture_that_is_bad_now_loses_its_embedding(photos, tmp_path):
    run(photos, tmp_path / "out")
    (photos / "p1.png").write_bytes(b"no longer")
    with EmbeddingFolder(tmp_path / "out", "m") as folder:
        write_parquet(
            embed_images(FakeEngine(), folder.remaining(collect([photos]), refresh=True)), folder, FakeEngine()
        )
    rows = {Path(row["path"]).name: row for row in read_embeddings(tmp_path / "out").to_pylist()}
    assert rows["p1.png"]["embedding"] is None
    assert len(rows) == 13


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
    monkeypatch.setattr("vitfast.pipeline.folder.PART_ROWS", 4)
    seen = []
    out = tmp_path / "out"
    summary = run(photos, out, on_result=lambda _: seen.append(len(list(out.glob("part-*.parquet")))))
    assert seen == sorted(seen)
    assert max(seen) == 3
    assert len(summary.parts) == 4
    assert sorted(map(str, out.iterdir())) == [str(out / "_manifest.json"), *sorted(summary.parts)]
    assert len(pq.read_table(out)) == 13


def test_a_part_grows_by_the_clock(photos, tmp_path, monkeypatch):
    """It is one file, written anew: a run that is killed loses seconds, and one of days leaves few files."""
    monkeypatch.setattr("vitfast.pipeline.writing.PART_SECONDS", 0.0)
    seen = []
    out = tmp_path / "out"

    def look(_):
        seen.append(sum(pq.read_metadata(part).num_rows for part in out.glob("part-*.parquet")))

    assert len(run(photos, out, on_result=look).parts) == 1
    assert seen == list(range(13))
    assert len(read_embeddings(out)) == 13


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_keeps_what_was_done(photos, tmp_path, error, monkeypatch):
    monkeypatch.setattr("vitfast.pipeline.folder.PART_ROWS", 4)
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


def test_what_a_killed_run_left_is_taken_away(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".part-1.parquet-abc.tmp").write_bytes(b"half")
    (out / ".probe-1").write_bytes(b"")
    (out / ".lock").write_text("{")
    (out / "notes.txt").write_text("the user's own")
    assert run(photos, out).done == 10
    assert sorted(path.name[:5] for path in out.iterdir()) == ["_mani", "notes", "part-"]


class Killed(BaseException):
    """Nothing is done after it."""


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_between_two_files_doubles_no_row(when, number, photos, tmp_path, monkeypatch):
    """A picture that failed is good now: its row moves from one part to another."""
    out, original, calls = tmp_path / "out", os.replace, []
    run(photos, out)
    save(photos / "b00.jpg", 50)

    def dying(*paths):
        calls.append(paths)
        if len(calls) <= number or (len(calls) == number + 1 and when == "after"):
            original(*paths)
        if len(calls) > number:
            raise Killed

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        run(photos, out)
    monkeypatch.undo()
    rows = read_embeddings(out).to_pylist()  # which refuses doubled ones
    assert sum(row["status"] == "ok" for row in rows) >= 10
    run(photos, out)
    assert len(read_embeddings(out)) == 13
    assert len(EmbeddingFolder(out, "m").done) == 11


def test_a_full_disk_is_said_and_loses_nothing(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(photos, out)
    save(photos / "b00.jpg", 50)
    before = {path: path.read_bytes() for path in out.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"out' cannot be written: No space left on device"):
        run(photos, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.undo()
    assert run(photos, out).done == 1


def double(out):
    """What two runs at once made of a folder, before there was a lock."""
    part = next(out.glob("part-*.parquet"))
    later = part.with_name("part-99999999999999999999-x.parquet")
    table = pq.read_table(part)
    names = pa.array([Path(path).name for path in table["path"].to_pylist()])
    statuses = [
        "worse" if name == "p1.png" else s
        for name, s in zip(names.to_pylist(), table["status"].to_pylist(), strict=True)
    ]
    table = table.set_column(table.schema.get_field_index("status"), "status", pa.array(statuses))
    pq.write_table(table.filter(pc.is_in(names, pa.array(["p1.png", "p2.png", "b00.jpg"]))), later)
    return later


def test_doubled_rows_are_noticed_and_repaired(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out)
    later = double(out)
    with pytest.raises(InputError, match="more than one row for 3 paths"):
        read_embeddings(out)
    summary = run(photos, out)
    assert summary.repaired == 3
    rows = {Path(row["path"]).name: row["status"] for row in read_embeddings(out).to_pylist()}
    assert len(rows) == 13
    assert rows["p1.png"] == "ok"  # the good one stays
    assert [Path(path).name for path in pq.read_table(later)["path"].to_pylist()] == ["p2.png"]  # of two the newer
    assert run(photos, out).repaired == 0


def test_rows_that_must_not_meet_are_noticed(photos, tmp_path):
    run(photos, tmp_path / "a")
    run(photos, tmp_path / "b", FakeEngine(fingerprint="others"))
    part = next((tmp_path / "b").glob("part-*"))
    os.rename(part, tmp_path / "a" / part.name)
    with pytest.raises(InputError, match="mixes"):
        read_embeddings(tmp_path / "a")
    with pytest.raises(InputError, match="holds no embeddings"):
        read_embeddings(tmp_path / "b")


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_output_that_cannot_be_written_is_said_at_once(where, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written") as caught:
        EmbeddingFolder(tmp_path / where, "m")
    assert str(tmp_path / where) in str(caught.value)


def test_output_on_a_read_only_place_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="read-only"):
        EmbeddingFolder(tmp_path / "out", "m")


def test_a_foreign_or_damaged_part_is_said(tmp_path):
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match=r"part-1\.parquet"):
        EmbeddingFolder(tmp_path, "m")
    pq.write_table(pa.table({"path": ["a"], "status": ["ok"]}), tmp_path / "part-1.parquet")
    with pytest.raises(InputError, match=r"an unknown model.*does not state"):
        write_parquet([], EmbeddingFolder(tmp_path, "m"), FakeEngine())


def test_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / "photos"
    good = save(folder / "a.png")
    os.rename(good, os.fsencode(folder) + b"/\xff.png")
    assert path_text(collect([folder])[0]) == f"{folder}/\\xff.png"
    assert run(folder, tmp_path / "out").done == 1
    assert pq.read_table(tmp_path / "out")["path"].to_pylist() == [f"{folder}/\\xff.png"]
    assert run(folder, tmp_path / "out").done == 0


def test_no_rows_no_part_and_no_folder(tmp_path):
    folder = EmbeddingFolder(tmp_path / "deep" / "out", "m")
    assert write_parquet([], folder, FakeEngine()).parts == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    write_parquet([], EmbeddingFolder(tmp_path / "mine", "m"), FakeEngine())
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


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
