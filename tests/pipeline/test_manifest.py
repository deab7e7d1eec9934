"""vitfast.pipeline.manifest: what a run notes of the folder, and what shows when the folder is not like that."""

import json

import pyarrow.parquet as pq
import pytest
from helpers.photos import FakeEngine, make_photos, save

from vitfast.images.files import InputError, collect
from vitfast.pipeline import manifest
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet


def embed(photos, out, **options):
    engine, folder = FakeEngine(), EmbeddingFolder(out, "m", **options)
    return write_parquet(embed_images(engine, folder.remaining(collect([photos]))), folder, engine)


def test_what_is_noted(tmp_path):
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    embed(photos, out)
    first = manifest.read(out)
    assert (first["model"], first["weights_sha256"], first["dtype"]) == ("m", "weights of a fake", "float32")
    assert first["rows"] == len(read_embeddings(out)) == 13
    assert first["columns"]["embedding"] == "fixed_size_list<element: float>[4]"
    assert manifest.differences(out) == []
    assert pq.read_table(out).num_rows == 13  # for other readers there are the parts alone
    save(photos / "later.png", 50)
    embed(photos, out)
    second = manifest.read(out)
    assert second["rows"] == 14 and len(second["parts"]) == 2
    assert second["preprocess_sha256"] == first["preprocess_sha256"]
    assert manifest.differences(out) == []
    embed(photos, out, overwrite=True)
    assert manifest.read(out)["rows"] == 14 and len(manifest.read(out)["parts"]) == 1
    assert sorted(p.name for p in out.iterdir() if p.name[0] in "._") == ["_manifest.json"]


def test_what_differs_is_named(tmp_path):
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    embed(photos, out)
    save(photos / "later.png", 50)
    embed(photos, out)
    one, two = sorted(out.glob("part-*"))
    content = bytearray(one.read_bytes())
    content[40] ^= 1
    one.write_bytes(content)
    new = two.rename(two.with_name("part-9.parquet"))
    assert manifest.differences(out) == [
        f"{two.name} is missing", f"{one.name} has another content", f"{new.name} is not in the manifest",
    ]  # fmt: skip
    (out / manifest.NAME).write_text("{")
    with pytest.raises(InputError, match="no readable _manifest"):
        manifest.read(out)


def test_an_interrupted_run_notes_what_it_did(tmp_path):
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    engine, folder = FakeEngine(), EmbeddingFolder(out, "m")

    def stop(_, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parquet(embed_images(engine, collect([photos])), folder, engine, on_result=stop)
    assert json.loads((out / manifest.NAME).read_text())["rows"] == len(read_embeddings(out)) == 5
    assert manifest.differences(out) == []


def test_unchanged_parts_are_not_read_again(tmp_path, monkeypatch):
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    embed(photos, out)
    hashed = []
    original = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda file: hashed.append(file.name) or original(file))
    save(photos / "later.png", 50)
    (photos / "b00.jpg").unlink()
    (photos / "b99.jpg").unlink()
    (photos / "p45.jpg").unlink()  # else their rows move to the new part
    embed(photos, out)
    assert len(hashed) == 1 and len(manifest.read(out)["parts"]) == 2
