"""Hugging Face's datasets and Lance as sources: the libraries' own files, and what is said where they are absent."""

import json
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from helpers.photos import FakeEngine, make_photos
from helpers.scripts import ROOT

from vitfast.images.files import InputError, collect
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet
from vitfast.pipeline.sources import container_items, find_sources
from vitfast.pipeline.sources.datasets import dataset_items, saved_files


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


def contents(photos):
    return [path.read_bytes() for path in collect([photos])]


def embedded(items, out):
    """Statuses, embeddings and a carried column, in the order of the items' contents."""
    engine, folder = FakeEngine(), EmbeddingFolder(out, "m")
    write_parquet(embed_images(engine, folder.todo(items)), folder, engine)
    rows = read_embeddings(out).to_pylist()
    return sorted(((row["file_sha256"], row["embedding"], row.get("label")) for row in rows), key=repr)


def expected(photos, out):
    """The same of the files themselves, each with its number as the column."""
    numbers = {path: str(number) for number, path in enumerate(collect([photos]))}
    engine, folder = FakeEngine(), EmbeddingFolder(out, "m")
    write_parquet(embed_images(engine, collect([photos])), folder, engine)
    rows = read_embeddings(out).to_pylist()
    named = {str(path): number for path, number in numbers.items()}
    return sorted(((row["file_sha256"], row["embedding"], named[row["path"]]) for row in rows), key=repr)


def test_a_dictionary_of_datasets(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "dataset_info.json").write_text("{}")
        (tmp_path / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    assert saved_files(str(tmp_path)) is None
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert saved_files(str(tmp_path)) == [f"{tmp_path}/train/a.arrow", f"{tmp_path}/test/a.arrow"]
    for damaged in ("{", "{}", '{"splits": 3}'):
        (tmp_path / "dataset_dict.json").write_text(damaged)
        with pytest.raises(InputError, match="is a damaged dataset: "):
            find_sources([tmp_path])


def test_a_folder_with_a_state_of_its_own_is_a_folder(photos):
    (photos / "state.json").write_text('{"mine": 1}')
    assert len(list(find_sources([photos]))) == 13


def test_lance_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a.lance").mkdir()
    monkeypatch.setitem(sys.modules, "lance", None)  # then an import of it fails
    images = find_sources([tmp_path / "a.lance"])
    assert list(images) == []
    assert images.listing.unreadable == {
        str(tmp_path / "a.lance"): "Lance datasets need pylance: pip install 'vitfast[lance]'"
    }


def test_lance(photos, tmp_path):
    lance = pytest.importorskip("lance", reason="pylance is not installed: no Lance dataset to read")
    images = contents(photos)
    lance.write_dataset(
        pa.table({"label": [str(i) for i in range(len(images))], "image": images}), tmp_path / "a.lance"
    )
    source = tmp_path / "a.lance"
    assert embedded(find_sources([source], columns=["label"]), tmp_path / "out") == expected(photos, tmp_path / "one")
    keys = [item.key for item in container_items(str(source))]
    assert keys == [f"{source}::{number}" for number in range(13)]
    again = FakeEngine()
    folder = EmbeddingFolder(tmp_path / "out", "m")
    assert len(list(embed_images(again, folder.todo(find_sources([source]))))) == 3  # the bad ones
    with pytest.raises(InputError, match="the columns 'label', 'image', not 'caption'"):
        list(find_sources([source], columns=["caption"]).containers[str(source)]())


STREAMED = """
import os, signal, sys
from datasets import load_from_disk
from helpers.photos import FakeEngine
import vitfast.pipeline.writing
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, write_parquet
from vitfast.pipeline.sources.datasets import dataset_items

vitfast.pipeline.writing.PART_SECONDS = 0.0
saved, out, end = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = []

def kill(result):
    if len(seen) == end:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(result)

folder, engine = EmbeddingFolder(out, "m"), FakeEngine()
items = dataset_items(load_from_disk(saved).to_iterable_dataset(), name="mine", columns=["label"])
write_parquet(embed_images(engine, folder.todo(items), batch_size=2), folder, engine, on_result=kill)
"""
"""A run over a streamed dataset that kills itself."""


def environment():
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_hugging_face_datasets(photos, tmp_path):
    """One in memory, the same saved and streamed, with images as the library writes them; and plain bytes."""
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    images = contents(photos)
    labels = [str(number) for number in range(len(images))]
    features = datasets.Features({"label": datasets.Value("string"), "picture": datasets.Image()})
    rows = {"label": labels, "picture": [{"bytes": image, "path": None} for image in images]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    want = expected(photos, tmp_path / "one")
    for number, one in enumerate((dataset, dataset.to_iterable_dataset())):
        items = dataset_items(one, name="mine", columns=["label"])
        assert embedded(items, tmp_path / f"out{number}") == want
    assert [item.key for item in dataset_items(dataset, name="mine")][:2] == ["mine::0", "mine::1"]
    dataset.save_to_disk(tmp_path / "saved")
    assert embedded(find_sources([tmp_path / "saved"], columns=["label"]), tmp_path / "out2") == want
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    assert embedded(find_sources([tmp_path / "splits"], columns=["label"]), tmp_path / "out3") == want
    for least in (4, 5):  # a streamed one, killed: three of the images are bad and tried again
        script = [sys.executable, "-c", STREAMED, str(tmp_path / "saved"), str(tmp_path / "killed")]
        assert subprocess.run([*script, "4"], env=environment()).returncode == -signal.SIGKILL
        assert least <= len(read_embeddings(tmp_path / "killed")) < 13
    assert subprocess.run([*script, "-1"], env=environment()).returncode == 0
    got = embedded([], tmp_path / "killed")
    assert got == want
    plain = datasets.Dataset.from_dict({"label": labels, "bytes": images})
    assert embedded(dataset_items(plain, name="mine", columns=["label"]), tmp_path / "out4") == want
    with pytest.raises(InputError, match="'mine' has the columns 'label', 'picture', not 'text'"):
        next(dataset_items(dataset, name="mine", columns=["text"]))
