"""Sources of every kind, made of one folder of pictures, and what embedding them gives."""

import csv
import functools
import io
import json
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.photos import FakeEngine

from vitfast.images.files import collect
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet
from vitfast.pipeline.sources import find_sources


def relative(photos):
    return [str(path.relative_to(photos)) for path in collect([photos])]


def make_tar(photos, path, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name in relative(photos):
            archive.add(photos / name, name)
    return [path]


def make_samples(photos, path):
    """A WebDataset shard: each image with the fields of its sample beside it."""
    with tarfile.open(path, "w") as archive:
        for name in relative(photos):
            archive.add(photos / name, name)
            fields = json.dumps({"label": f"of {name}"}).encode()
            info = tarfile.TarInfo(f"{name.partition('.')[0]}.json")
            info.size = len(fields)
            archive.addfile(info, io.BytesIO(fields))
    return [path]


def make_zip(photos, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in relative(photos):
            archive.write(photos / name, name)
    return [path]


def make_list(photos, path):
    path.write_text("# comment\n\n" + "\n".join(str(photos / name) for name in relative(photos)) + "\n")
    return [path]


def make_csv(photos, path, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["label", "path"])
        writer.writerows([f"of {name}", photos / name] for name in relative(photos))
    return [path]


def make_bytes(photos, path):
    contents = [(photos / name).read_bytes() for name in relative(photos)]
    pq.write_table(pa.table({"id": range(len(contents)), "jpg": contents}), path, row_group_size=4)
    return [path]


def make_struct(photos, path):
    rows = [{"bytes": (photos / name).read_bytes(), "path": name} for name in relative(photos)]
    pq.write_table(pa.table({"image": rows}), path)
    return [path]


def make_paths(photos, path):
    names = relative(photos)
    columns = {"label": [f"of {name}" for name in names], "path": [str(photos / name) for name in names]}
    pq.write_table(pa.table(columns), path)
    return [path]


def make_lance(photos, path):
    lance = pytest.importorskip("lance", reason="pylance is not installed: no Lance dataset to read")
    images = [(photos / name).read_bytes() for name in relative(photos)]
    lance.write_dataset(pa.table({"image": images}), str(path), max_rows_per_file=4)
    return [path]


def make_shards(photos, path):
    names = relative(photos)
    for number in (0, 1):
        shard = path.with_name(f"{number}-{path.name}")
        with tarfile.open(shard, "w") as archive:
            for name in names[number::2]:
                archive.add(photos / name, name)
    return [path.with_name(f"*-{path.name}")]


def make_arrow(photos, path):
    """Both forms of a file: the stream is how Hugging Face's datasets keep theirs."""
    rows = [{"bytes": (photos / name).read_bytes(), "path": name} for name in relative(photos)]
    table = pa.table({"image": rows})
    new = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return [path]


def make_saved(photos, path):
    """A folder as `save_to_disk` of Hugging Face's datasets writes it, in two files."""
    path.mkdir()
    rows = [{"bytes": (photos / name).read_bytes(), "path": name} for name in relative(photos)]
    files = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for number, name in enumerate(files):
        table = pa.table({"image": rows[7 * number : 7 * number + 7]})
        with pa.ipc.new_stream(path / name, table.schema) as writer:
            writer.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    (path / "dataset_info.json").write_text("{}")
    return [path]


KINDS = {
    "folder": ("", lambda photos, path: [photos]),
    "files": ("", lambda photos, path: [photos / name for name in relative(photos)]),
    "pattern": ("", lambda photos, path: [f"{photos}/*"]),
    "tar": ("all.tar", make_tar),
    "tar.gz": ("all.tar.gz", functools.partial(make_tar, mode="w:gz")),
    "tar.xz": ("all.tar.xz", functools.partial(make_tar, mode="w:xz")),
    "shards": ("shard.tar", make_shards),
    "samples": ("all.tar", make_samples),
    "zip": ("all.zip", make_zip),
    "list": ("all.txt", make_list),
    "csv": ("all.csv", make_csv),
    "tsv": ("all.tsv", functools.partial(make_csv, delimiter="\t")),
    "parquet of bytes": ("all.parquet", make_bytes),
    "parquet of structs": ("all.parquet", make_struct),
    "parquet of paths": ("all.parquet", make_paths),
    "arrow stream": ("stream.arrow", make_arrow),
    "arrow file": ("file.arrow", make_arrow),
    "saved dataset": ("saved", make_saved),
    "lance": ("all.lance", make_lance),
    "files by URL": ("all.txt", None),
    "shard by URL": ("all.tar.gz", functools.partial(make_tar, mode="w:gz")),
    "table by URL": ("all.parquet", make_bytes),
    "folder of a file system": ("", lambda photos, path: [f"file://{photos}"]),
}
CARRIED = {"samples", "csv", "tsv", "parquet of paths"}
"""Kinds whose images have a label."""


def embedded(sources, out, engine=None, limit=None, **options):
    """Embed sources as the command does, stopping after `limit` results."""
    engine = engine or FakeEngine()
    folder = EmbeddingFolder(out, "m")
    images = find_sources(sources, **options)

    def stop(_, seen=[]):  # noqa: B006
        seen.append(1)
        if limit is not None and len(seen) == limit:
            raise KeyboardInterrupt

    try:
        write_parquet(embed_images(engine, folder.todo(images), batch_size=3), folder, engine, on_result=stop)
    except KeyboardInterrupt:
        assert limit is not None
    return images.listing


def rows(out):
    """What does not depend on where an image came from, in one order."""
    table = read_embeddings(out)
    assert len(set(table["path"].to_pylist())) == len(table)
    found = []
    for row in table.to_pylist():
        status = row["status"].replace(row["path"], "PATH")
        found.append((row["file_sha256"] or b"", row["file_size"] or 0, status, row["embedding"]))
    return sorted(found, key=repr)
