"""vitfast.pipeline.sources: every kind of source gives the rows that a folder of the same images gives."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.photos import FakeEngine, save
from helpers.sources import KINDS, embedded, make_csv, make_list, make_tar, relative, rows
from PIL import Image
from typer.testing import CliRunner

from vitfast.cli.app import app
from vitfast.images.files import InputError
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.parquet import read_embeddings
from vitfast.pipeline.sources import find_sources


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_a_folder(kind, made, of_folder, tmp_path):
    sources = made(kind)
    embedded(sources, tmp_path / "out")
    assert len(of_folder) == 13
    assert rows(tmp_path / "out") == of_folder
    engine = FakeEngine()
    embedded(sources, tmp_path / "out", engine)
    assert engine.batches == []  # keys are the same in the next run: the good ones are there
    assert rows(tmp_path / "out") == of_folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_run_goes_on(kind, made, of_folder, tmp_path):
    sources, engine = made(kind), FakeEngine()
    for limit in (1, 4, 5, None):
        embedded(sources, tmp_path / "out", engine, limit)
    assert rows(tmp_path / "out") == of_folder


def test_keys_say_where_an_image_is(photos, tmp_path):
    name = relative(photos)[0]
    for kind, key in {
        "tar": f"{tmp_path}/all.tar::{name}", "zip": f"{tmp_path}/all.zip::{name}", "list": str(photos / name),
        "parquet of bytes": f"{tmp_path}/all.parquet::0",
    }.items():  # fmt: skip
        file, make = KINDS[kind]
        assert next(iter(find_sources(make(photos, tmp_path / file)))).key == key


def test_an_image_that_several_sources_name_comes_once(photos, tmp_path):
    sources = [photos, *make_list(photos, tmp_path / "a.txt"), *make_csv(photos, tmp_path / "a.csv")]
    keys = [item.key for item in find_sources(sources)]
    assert len(keys) == len(set(keys)) == 13


def test_fields_of_a_sample_are_carried_along(tmp_path):
    """As WebDataset writes them: an image, then its .json, or before it; and one without."""
    pictures = {name: save(tmp_path / f"{name}.png", seed).read_bytes() for seed, name in enumerate("abc")}
    fields = {"a": {"caption": "a cat", "score": 0.5, "tags": ["x"]}, "b": {"caption": None}}
    for path, mode in ((tmp_path / "s.tar", "w"), (tmp_path / "s.tar.gz", "w:gz")):
        with tarfile.open(path, mode) as archive:
            for name, sidecar_first in (("a", True), ("b", False), ("c", False)):
                parts = [(f"in/{name}.png", pictures[name])]
                if name in fields:
                    parts.insert(0 if sidecar_first else 1, (f"in/{name}.json", json.dumps(fields[name]).encode()))
                for member, content in parts:
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        out = tmp_path / f"out-{mode[2:]}"
        embedded([path], out, columns=["caption", "score", "tags"])
        table = read_embeddings(out)
        carried = {row["path"][-5]: (row["caption"], row["score"], row["tags"]) for row in table.to_pylist()}
        assert carried == {"a": ("a cat", "0.5", '["x"]'), "b": (None, None, None), "c": (None, None, None)}
        assert set(table["status"].to_pylist()) == {"ok"}


def test_columns_of_tables_are_carried_along(photos, tmp_path):
    out = tmp_path / "out"
    embedded(make_csv(photos, tmp_path / "a.csv"), out, columns=["label"])
    table = read_embeddings(out)
    assert {row["label"] for row in table.to_pylist()} == {f"of {name}" for name in relative(photos)}
    save(photos.parent / "later.png", 8)
    embedded([photos.parent / "later.png"], out)  # parts with and without the column are one table
    assert read_embeddings(out)["label"].null_count == 1


def test_what_a_container_cannot_give(photos, tmp_path):
    """A damaged archive gives what comes before the damage; the others are read; each says why."""
    good = make_tar(photos, tmp_path / "all.tar")[0]
    content = good.read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(content)[:-500])
    (tmp_path / "no.zip").write_bytes(b"no zip")
    (tmp_path / "no.parquet").write_bytes(b"no parquet")
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "latin.txt").write_bytes("b\xe4r.png\n".encode("latin1"))
    names = ["cut.tar", "cut.tar.gz", "no.zip", "no.parquet", "numbers.parquet", "latin.txt", "all.tar"]
    listing = embedded([tmp_path / name for name in names], tmp_path / "out")
    told = {Path(name).name for name in listing.unreadable}
    assert told | {"cut.tar"} == set(names) - {"all.tar"}  # the cut may leave a member that is too short, which says so
    assert "the columns 'number'" in listing.unreadable[str(tmp_path / "numbers.parquet")]
    good_rows = [row for row in read_embeddings(tmp_path / "out").to_pylist() if row["status"] == "ok"]
    assert sum("/all.tar::" in row["path"] for row in good_rows) == 10
    assert any("/cut.tar::" in row["path"] for row in good_rows)


def test_members_that_are_left_out(tmp_path):
    picture = save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        archive.add(picture, "a.png")
        archive.add(picture, "a.png")
        archive.add(picture, "notes.doc")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    listing = embedded([tmp_path / "odd.tar"], tmp_path / "out")
    assert {key.rpartition("::")[2]: reason for key, reason in listing.left_out.items()} == {
        "a.png": "the archive has another of this name before it",
        "notes.doc": "no known ending of an image",
        "link.png": "no regular file",
    }
    assert len(read_embeddings(tmp_path / "out")) == 1


def test_cells_that_hold_no_image(tmp_path):
    picture = str(save(tmp_path / "good.png"))
    table = pa.table({"url": [picture, None, "", "no/such.png"]})
    pq.write_table(table, tmp_path / "paths.parquet")
    embedded([tmp_path / "paths.parquet"], tmp_path / "out")
    statuses = {row["path"]: row["status"] for row in read_embeddings(tmp_path / "out").to_pylist()}
    assert statuses[picture] == "ok"
    assert statuses[f"{tmp_path}/paths.parquet::1"] == "the cell holds NoneType, expected bytes, a path or a URL"
    assert statuses[f"{tmp_path}/no/such.png"] == "no such file"


def test_a_list_behind_a_url_and_a_url_of_nothing(photos, of_folder, server, tmp_path):
    """Names in a list are relative to where it is."""
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "list.txt").write_text("\n".join(f"photos/{name}" for name in relative(photos)))
    embedded([server(tmp_path / "list.txt")], tmp_path / "out")
    assert rows(tmp_path / "out") == of_folder
    (tmp_path / "gone.txt").write_text(server(tmp_path / "gone.png"))
    embedded([tmp_path / "gone.txt"], tmp_path / "gone")
    assert "FileNotFoundError" in read_embeddings(tmp_path / "gone")["status"][0].as_py()


def test_file_systems_by_url(photos, of_folder, tmp_path):
    """fsspec's own local one stands for buckets: a folder, a pattern, a shard and a list."""
    embedded([f"file://{photos}"], tmp_path / "folder")
    assert rows(tmp_path / "folder") == of_folder
    make_tar(photos, tmp_path / "a.tar")
    embedded([f"file://{tmp_path}/*.tar"], tmp_path / "shards")
    assert rows(tmp_path / "shards") == of_folder
    assert read_embeddings(tmp_path / "shards")["path"][0].as_py().startswith(f"file://{tmp_path}/a.tar::")
    memory = fsspec.filesystem("memory")
    for name in relative(photos):
        memory.pipe(f"/{tmp_path.name}/{name}", (photos / name).read_bytes())
    for _ in range(2):
        embedded([f"memory://{tmp_path.name}"], tmp_path / "memory", limit=7)
    embedded([f"memory://{tmp_path.name}"], tmp_path / "memory")
    assert rows(tmp_path / "memory") == of_folder
    with pytest.raises(InputError, match="matches no files"):
        find_sources([f"file://{tmp_path}/*.zip"])
    with pytest.raises(InputError, match=r"cannot be listed: ValueError: Protocol not known: nothing"):
        find_sources(["nothing://bucket/a.tar"])


def test_bytes_in_memory_are_bounded(tmp_path):
    """Images that a compressed archive holds in memory come no further ahead of the model than decoding may take."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (180, 180, 3), np.uint8)).save(buffer, "PNG")
    picture = buffer.getvalue()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for number in range(100):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(picture)
            archive.addfile(info, io.BytesIO(picture))
    read = []

    def counted(items):
        for item in items:
            assert item.held == len(picture)
            read.append(item)
            yield item

    items = counted(find_sources([tmp_path / "a.tar.gz"]))
    results = embed_images(FakeEngine(), items, batch_size=64, workers=2, decode_memory=1_000_000)
    next(results)
    assert len(read) <= 8 + 1_000_000 // len(picture) + 1  # a batch, and what may be held
    assert 1 + sum(1 for _ in results) == 100


def test_command(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("vitfast.engine.load.load", lambda *_, **__: FakeEngine())
    make_csv(photos, tmp_path / "a.csv")
    (tmp_path / "no.tar").write_bytes(b"no")

    def run(*arguments):
        return CliRunner().invoke(
            app, ["embed", *map(str, arguments), "-m", "m", "-o", str(tmp_path / "out"), "--json"]
        )

    result = run(tmp_path / "a.csv", tmp_path / "no.tar", "--columns", "label")
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["done"], len(answer["failed"])) == (1, 10, 4)
    assert any(entry["path"] == str(tmp_path / "no.tar") for entry in answer["failed"])
    assert "label" in read_embeddings(tmp_path / "out").column_names
    answer = json.loads(run(photos, "--columns", "label").stdout)
    assert (answer["done"], answer["skipped"]) == (0, 10)  # the same files by another way: the same keys
    result = run(tmp_path / "a.csv", "--columns", "status")
    assert result.exit_code == 2
    assert "status is a column of the folder itself" in result.output
