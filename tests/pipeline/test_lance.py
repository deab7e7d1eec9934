"""vitfast.pipeline.lance: a Lance dataset of embeddings keeps what a folder of Parquet files keeps."""

import json
import re
import signal
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from helpers.folder_runs import Runs
from helpers.photos import FakeEngine, make_photos, save
from typer.testing import CliRunner

from vitfast.cli.app import app
from vitfast.images.files import InputError, collect
from vitfast.pipeline import manifest
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.folder import OutputError
from vitfast.pipeline.formats import open_folder
from vitfast.pipeline.hnsw import Graph
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet
from vitfast.pipeline.search import Index
from vitfast.pipeline.sources import find_sources


def test_without_pylance(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)  # then an import of it fails
    command = ["embed", str(save(tmp_path / "a.png")), "-m", "m", "-o", str(tmp_path / "out"), "--format", "lance"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "Lance datasets need pylance: pip install 'vitfast[lance]'" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
    (tmp_path / "set" / "_versions").mkdir(parents=True)
    (tmp_path / "set" / "_versions" / "1.manifest").write_bytes(b"")
    with pytest.raises(InputError, match="need pylance"):
        read_embeddings(tmp_path / "set")


def test_formats(tmp_path):
    with pytest.raises(ValueError, match="format must be one of parquet, lance, got 'csv'"):
        open_folder(tmp_path, "m", format="csv")
    assert isinstance(open_folder(tmp_path / "new", "m"), EmbeddingFolder)


@pytest.fixture
def lance():
    return pytest.importorskip("lance", reason="pylance is not installed: no Lance dataset to write")


@pytest.fixture
def photos(tmp_path, lance):
    return make_photos(tmp_path / "photos")


def run(photos, out, engine=None, format="lance", refresh=False, **options):
    engine = engine or FakeEngine()
    folder = open_folder(out, "m", format=format, **options)
    items = folder.todo(find_sources([photos]), refresh=refresh)
    return write_parquet(embed_images(engine, items, batch_size=4), folder, engine)


def rows(out):
    return read_embeddings(out).sort_by("path")


def test_rows_are_those_of_parquet(photos, tmp_path, lance):
    for kind in ("parquet", "lance"):
        summary = run(photos, tmp_path / kind, format=kind)
        assert (summary.done, len(summary.failed)) == (10, 3)
    ours, theirs = rows(tmp_path / "lance"), rows(tmp_path / "parquet")
    assert ours.schema.metadata == theirs.schema.metadata
    assert ours.cast(theirs.schema).schema == theirs.schema  # but for the name of a list's inner field
    assert ours.to_pylist() == theirs.to_pylist()
    dataset = lance.dataset(str(tmp_path / "lance"))
    assert dataset.count_rows() == 13 and len(dataset.versions()) == 1
    engine = FakeEngine()
    assert run(photos, tmp_path / "lance", engine, format=None).done == 0  # it goes on as what it is
    assert engine.batches == []
    assert rows(tmp_path / "lance").to_pylist() == theirs.to_pylist()
    query = Index(tmp_path / "parquet").vectors[3]
    found = [m.path for m in Index(tmp_path / "lance").search(query, 5)]
    assert found == [m.path for m in Index(tmp_path / "parquet").search(query, 5)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_types(dtype, photos, tmp_path):
    folder = open_folder(tmp_path / "out", "m", format="lance")
    write_parquet(embed_images(FakeEngine(), collect([photos])), folder, FakeEngine(), output_dtype=dtype)
    field = read_embeddings(tmp_path / "out").schema.field("embedding")
    assert field.type == pa.list_(getattr(pa, dtype)(), 4)
    assert read_embeddings(tmp_path / "out")["embedding"].null_count == 3


def test_rows_are_replaced(photos, tmp_path):
    """What failed is good now, what was good has changed, and something is new."""
    out = tmp_path / "out"
    run(photos, out)
    save(photos / "b00.jpg", 50)
    save(photos / "p1.png", 51)
    save(photos / "q.png", 52)
    engine = FakeEngine()
    summary = run(photos, out, engine)
    assert (sum(engine.batches), summary.done, len(summary.failed)) == (2, 2, 2)
    folder = open_folder(out, "m")
    list(folder.todo(find_sources([photos])))
    assert folder.changed == [str(photos / "p1.png")]
    assert run(photos, out, engine, refresh=True).done == 1
    run(photos, tmp_path / "fresh", format="parquet")
    assert rows(out).to_pylist() == rows(tmp_path / "fresh").to_pylist()
    assert len(open_folder(out, "m").done) == 12
    assert [item.key for item in open_folder(out, "m").todo(find_sources([photos]), refresh=True, content=True)] == [
        str(photos / "b99.jpg"), str(photos / "p45.jpg"),
    ]  # fmt: skip


def test_two_identities_do_not_meet(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out)
    other = FakeEngine(fingerprint="others")
    with pytest.raises(InputError, match="weights 'weights of a fake', not 'others'"):
        run(photos, out, other)
    run(photos, out, other, overwrite=True)
    assert Index(out).identity == Identity.of(other)
    assert len(read_embeddings(out)) == 13
    assert manifest.differences(out) == []


def test_what_is_noted(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out)
    first = manifest.read(out)
    assert (first["rows"], first["weights_sha256"]) == (13, "weights of a fake")
    assert first["columns"]["embedding"] == "fixed_size_list<item: float>[4]"
    assert manifest.differences(out) == []
    save(photos / "b00.jpg", 50)
    run(photos, out)
    assert manifest.read(out)["rows"] == 13 and manifest.differences(out) == []
    file = next((out / "data").iterdir())
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    assert manifest.differences(out) == [f"data/{file.name} has another content"]


def test_columns_come_and_go(photos, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "a.csv").write_text(f"path,label\n{photos}/p0.png,cat\n")
    (tmp_path / "b.csv").write_text(f"path,caption\n{photos}/p1.png,a dog\n")
    for name, columns in (("a", ["label"]), ("b", ["caption"])):
        folder = open_folder(out, "m", format="lance")
        items = folder.todo(find_sources([tmp_path / f"{name}.csv"], columns=columns))
        write_parquet(embed_images(FakeEngine(), items), folder, FakeEngine())
    assert [(row["label"], row["caption"]) for row in rows(out).to_pylist()] == [("cat", None), (None, "a dog")]


def test_many_commits_become_one_file(photos, tmp_path, monkeypatch, lance):
    monkeypatch.setattr("vitfast.pipeline.folder.PART_ROWS", 2)
    run(photos, tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 13
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1
    assert len(lance.dataset(str(tmp_path / "out")).versions()) == 1


def test_a_commit_that_was_interrupted_comes_once(photos, tmp_path, monkeypatch, lance):
    """Ctrl-C when the rows are there, and nobody knows yet."""
    original, calls = lance.write_dataset, []

    def interrupted(*arguments, **options):
        original(*arguments, **options)
        calls.append(options["mode"])
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lance, "write_dataset", interrupted)
    monkeypatch.setattr("vitfast.pipeline.folder.PART_ROWS", 4)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "out")
    assert calls == ["create", "append"]
    assert len(read_embeddings(tmp_path / "out")) == 8
    assert run(photos, tmp_path / "out").done > 0
    assert len(read_embeddings(tmp_path / "out")) == 13


def test_doubled_rows_are_repaired(photos, tmp_path, lance):
    run(photos, tmp_path / "out")
    dataset = lance.dataset(str(tmp_path / "out"))
    some = dataset.to_table().slice(0, 3)
    lance.write_dataset(some, dataset, mode="append")
    with pytest.raises(InputError, match="more than one row for 3 paths"):
        read_embeddings(tmp_path / "out")
    assert run(photos, tmp_path / "out").repaired == 3
    assert len(read_embeddings(tmp_path / "out")) == 13


def test_what_cannot_be_written_or_read(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(photos, out)
    before = rows(out)

    def full(*_, **__):
        raise OSError("No space left on device")

    save(photos / "q.png", 52)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lance.write_dataset", full)
        patch.setattr("lance.LanceDataset.merge_insert", full)
        folder = open_folder(out, "m")
        with pytest.raises(OutputError, match=r"out' cannot be written: No space left on device"):
            write_parquet(embed_images(FakeEngine(), [photos / "q.png"]), folder, FakeEngine())
    with folder:
        assert str(photos / "q.png") not in folder.done
    assert rows(out).equals(before)
    assert run(photos, out).done == 1
    run(photos, tmp_path / "parquet", format="parquet")
    for place, kind, other in ((out, "parquet", "lance"), (tmp_path / "parquet", "lance", "parquet")):
        with pytest.raises(InputError, match=f"it holds a {other} data set, asked for is {kind}"):
            run(photos, place, format=kind)
    for file in (out / "_versions").iterdir():
        file.write_bytes(b"damaged")
    for use in (read_embeddings, lambda place: open_folder(place, "m")):
        with pytest.raises(InputError, match=f"{re.escape(str(out))}' is not a readable"):
            use(out)
    assert run(photos, out, overwrite=True).done == 11
    assert len(read_embeddings(out)) == 14


@pytest.mark.parametrize("limit", [1500, 2500])
def test_files_that_are_cut_short(limit, photos, tmp_path):
    """As a full disk leaves them, with Lance none the wiser: the version before is what there is."""
    out, log = tmp_path / "out", tmp_path / "log"
    command = ("embed", photos, "-m", "m", "-o", out, "--format", "lance", "--json")
    with Runs() as runs:
        assert runs.run(*command[:1], photos / "p0.png", *command[2:], log=log) == 0
        before = rows(out)
        assert runs.run(*command, log=log, limit=limit, stdout="/dev/null") == 1
        assert "cannot be written" in (tmp_path / "log.err").read_text()
        assert rows(out).equals(before)
        assert runs.run(*command, "--overwrite", weights=1, log=log, limit=limit, stdout="/dev/null") == 1
        assert rows(out).equals(before)
        assert runs.run(*command, log=log) == 1  # three of the photographs are bad
    assert len(read_embeddings(out)) == 13 and manifest.differences(out) == []


def test_a_version_with_a_file_that_is_cut_short(photos, tmp_path):
    """A run that was killed before it could see to it; and the only version there is."""
    out = tmp_path / "out"
    for damaged, left in (("q", 13), ("all", 0)):
        run(photos, out)
        before = set((out / "data").iterdir())
        if damaged == "q":
            save(photos / "q.png", 52)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("vitfast.pipeline.lance.LanceFolder._note", lambda *_: None)
                run(photos, out)
        for file in set((out / "data").iterdir()) - before or before:
            file.write_bytes(file.read_bytes()[:-7])
        if left:
            assert len(read_embeddings(out)) == left
        else:
            with pytest.raises(InputError, match="none of its versions is whole"):
                read_embeddings(out)
        assert run(photos, out).done == {"q": 1, "all": 11}[damaged]
        assert len(read_embeddings(out)) == 14


def test_a_graph_of_neighbours(photos, tmp_path):
    pytest.importorskip("usearch", reason="usearch is not installed (the extra `search`)")
    run(photos, tmp_path / "out")
    graph = Graph.of(Index(tmp_path / "out"))
    assert graph.built and not Graph.of(Index(tmp_path / "out")).built
    save(photos / "q.png", 52)
    run(photos, tmp_path / "out")
    assert Graph.of(Index(tmp_path / "out")).built


def test_a_run_that_is_killed_again_and_again(photos, tmp_path):
    run(photos, tmp_path / "parquet", format="parquet")
    command = ("embed", photos, "-m", "m", "-o", tmp_path / "out", "--format", "lance", "--batch-size", 2, "--json")
    with Runs() as runs:
        for number in (1, 3, 4):
            job = {"fault": ["result", number, "before", "SIGKILL"], "rows": 1, "seconds": 0.0}
            assert runs.run(*command, log=tmp_path / "log", **job) == -signal.SIGKILL
            assert 0 < len(read_embeddings(tmp_path / "out")) < 13
        assert runs.run(*command, log=tmp_path / "log", rows=1, seconds=0.0) == 1  # three of the photographs are bad
        answer = json.loads((tmp_path / "log.out").read_text())
        assert answer["skipped"] >= 1 and answer["parts"] == [str(tmp_path / "out")]
    ours, theirs = rows(tmp_path / "out"), rows(tmp_path / "parquet")
    same = [name for name in theirs.column_names if name != "embedding"]
    assert ours.select(same).equals(theirs.select(same))
    np.testing.assert_array_equal(*(np.stack(t["embedding"].drop_null().to_numpy()) for t in (ours, theirs)))
    assert manifest.differences(tmp_path / "out") == []


def test_another_identity_in_half_precision(photos, tmp_path):
    run(photos, tmp_path / "out")
    half = replace(Identity.of(FakeEngine()), output_dtype="float16")
    with pytest.raises(InputError, match="output_dtype 'float32', not 'float16'"):
        open_folder(tmp_path / "out", "m").check(half)
