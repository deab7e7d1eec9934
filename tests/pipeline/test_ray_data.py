"""vitfast.pipeline.ray_data: what tasks and actors do, without a cluster; and a local one, with workers that die."""

import os
import pickle
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.engines import engine
from helpers.photos import make_photos, save
from helpers.scripts import ROOT

import vitfast
from vitfast.images.files import InputError, collect
from vitfast.pipeline import manifest, ray_data
from vitfast.pipeline.embed import Result, embed_images
from vitfast.pipeline.folder import Known, Row
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet
from vitfast.pipeline.ray_data import Embedder, Listing, Model, _parts, _read, _results
from vitfast.pipeline.sources import find_sources


@pytest.fixture
def sources(tmp_path):
    """A folder with bad pictures in it, and an archive."""
    photos = make_photos(tmp_path / "photos")
    with tarfile.open(tmp_path / "more.tar", "w") as archive:
        for seed in range(5):
            archive.add(save(tmp_path / "inside" / f"{seed}.png", 100 + seed), f"{seed}.png")
        archive.add(photos / "b00.jpg", "notes.doc")
    return [photos, tmp_path / "more.tar"]


@pytest.fixture
def model(tmp_path):
    engine().save(tmp_path / "model")
    return str(tmp_path / "model")


def check_rows(out, sources, model, whole):
    """Those of one process; every key once."""
    one, folder = vitfast.load(model, device="cpu"), EmbeddingFolder(whole, model)
    write_parquet(embed_images(one, folder.todo(find_sources(sources))), folder, one)
    expected, got = (read_embeddings(place).sort_by("path") for place in (whole, out))
    same = [name for name in expected.column_names if name != "embedding"]
    assert got.select(same).equals(expected.select(same))
    ours, theirs = (np.stack(table["embedding"].drop_null().to_numpy()) for table in (got, expected))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)  # batches are other ones
    assert manifest.differences(out) == []


def test_parts():
    sizes = [[len(part) for part in _parts(["x"] * count)] for count in (0, 1, 64, 200, 1_000_000)]
    assert sizes[:4] == [[], [1], [64], [64, 64, 64, 8]]
    assert sum(sizes[4]) == 1_000_000 and len(sizes[4]) <= 4200


def test_a_task_and_an_actor_after_it(sources, model, tmp_path, monkeypatch):
    """The two stages by hand: rows as of one process, what was done before and what was left out are said."""
    how = Model(model, {"device": "cpu"}, True, "float32")
    preprocess, dimension, identity = ray_data._described(how)
    photos, archive = sources
    monkeypatch.setattr(ray_data, "_fetched", lambda known: known)
    units = pa.table({"item": [pickle.dumps([*collect([photos])]), pickle.dumps(str(archive))]})
    reading = {"decoding": (preprocess, None, True, None), "find": {}, "rows": 4}
    tables = [*_read(units, known=Known({f"{archive}::0.png": Row(True, Path(), 0, None, None)}), **reading)]
    assert all(len(table) <= 5 for table in tables)
    actor = Embedder(how, identity)
    images, summary = find_sources(sources), ray_data.Summary()
    results = [*_results(map(actor, tables), images.listing, summary)]
    assert summary.skipped == 1 and images.listing.left_out == {f"{archive}::notes.doc": "no known ending of an image"}
    expected = {str(r.path): r for r in embed_images(actor.engine, find_sources(sources))}
    assert sorted(str(result.path) for result in results) == sorted(set(expected) - {f"{archive}::0.png"})
    for result in results:
        same = expected[str(result.path)]
        assert (result.status, result.note, result.stamp) == (same.status, same.note, same.stamp)
        if same.embedding is not None:
            assert result.embedding.shape == (dimension,) and result.logits is None
            np.testing.assert_allclose(result.embedding, same.embedding, rtol=0, atol=2e-5)


def test_batches_of_one_size(sources, model, monkeypatch):
    """With batch_invariant an actor fills up every batch, and an image has the same bits in any company."""
    how = Model(model, {"device": "cpu"}, True, "float32", images=8)
    preprocess, _, identity = ray_data._described(how)
    actor, sizes = Embedder(how, identity), []
    original = actor.engine.stream

    def counted(batches, **options):
        batches = [*batches]
        sizes.extend(map(len, batches))
        return original(batches, **options)

    monkeypatch.setattr(actor.engine, "stream", counted)
    results = []
    for rows in (8, 3):
        units = pa.table({"item": [pickle.dumps([*collect([sources[0]])])]})
        tables = _read(units, known=None, decoding=(preprocess, None, True, None), find={}, rows=rows)
        results.append([*_results(map(actor, tables), find_sources(sources).listing, ray_data.Summary())])
    assert set(sizes) == {8} and len(sizes) > 3
    assert [len(r) for r in results] == [13, 13]
    for one, other in zip(*results, strict=True):
        assert one.path == other.path
        assert one.embedding is other.embedding is None or np.array_equal(one.embedding, other.embedding)


def test_what_has_changed_in_a_container(sources, model, monkeypatch):
    monkeypatch.setattr(ray_data, "_fetched", lambda known: known)
    how = Model(model, {"device": "cpu"}, True, "float32")
    archive = str(sources[1])
    items = {item.key: item.stat() for item in find_sources([archive])}
    rows = {key: Row(True, Path(), 0, *stat) for key, stat in items.items()}
    changed = f"{archive}::2.png"
    rows[changed] = Row(True, Path(), 0, 1, 1)
    decoding = (ray_data._described(how)[0], None, True, None)
    for refresh in (False, True):
        units = pa.table({"item": [pickle.dumps(archive)]})
        tables = _read(units, known=Known(rows, refresh), decoding=decoding, find={}, rows=4)
        messages = [pickle.loads(message) for table in tables for message in table["message"].to_pylist()]
        listing = messages[-1]
        assert [m.path for m in messages[:-1]] == [changed] * refresh
        assert (listing.skipped, listing.changed) == ((4, []) if refresh else (5, [changed]))


def test_a_container_that_is_not_on_a_worker(tmp_path):
    units = pa.table({"item": [pickle.dumps(str(tmp_path / "gone.tar"))]})
    reading = {"decoding": (engine().preprocess, None, True, None), "find": {}, "rows": 4, "known": None}
    (table,) = _read(units, **reading)
    (message,) = (pickle.loads(message) for message in table["message"].to_pylist())
    assert isinstance(message, Listing) and "no such file" in message.unreadable[str(tmp_path / "gone.tar")]


def test_an_actor_of_another_model_is_refused(model):
    with pytest.raises(InputError, match="a worker does not make the embeddings of the others: weights "):
        Embedder(Model(model, {"device": "cpu"}, True, "float32"), Identity("other", {}, "float32"))


def test_arguments(tmp_path):
    if ray_data_missing():
        with pytest.raises(ImportError, match=r"this needs Ray Data .*: pip install 'vitfast\[ray\]'"):
            ray_data.embed([tmp_path], "m", tmp_path / "out")
        return
    for wrong in ({"actors": 0}, {"actors": (3, 2)}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="actors and batch_size must be at least 1"):
            ray_data.embed([tmp_path], "m", tmp_path / "out", **wrong)


def ray_data_missing():
    try:
        import ray.data  # noqa: F401
    except ImportError:
        return True
    return False


def workers(name):
    """Process ids of Ray's workers of this name that descend from this process."""
    parents, found = {}, []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            command = (status.parent / "cmdline").read_bytes().decode()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(status.parent.name)] = int(lines["PPid"])
        if command.startswith(f"ray::{name}"):
            found.append(int(status.parent.name))

    def is_ours(pid):
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return [pid for pid in found if is_ours(pid)]


@pytest.fixture(scope="module")
def cluster():
    """Four CPUs on this machine, for two actors and what decodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or it leaves a token in the home folder
        pytest.importorskip("ray.data", reason="Ray Data is not installed: no cluster to test on")
        import ray

        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
        yield
        ray.shutdown()


ON_CPU = {"load": {"device": "cpu"}}


@pytest.mark.full
def test_rows_of_a_cluster_are_those_of_one_process(cluster, sources, model, tmp_path):
    summary = ray_data.embed(sources, model, tmp_path / "out", actors=2, **ON_CPU)
    assert (summary.done, len(summary.failed), summary.skipped) == (15, 3, 0)
    check_rows(tmp_path / "out", sources, model, tmp_path / "whole")
    summary = ray_data.embed(sources, model, tmp_path / "out", actors=(1, 2), **ON_CPU)
    assert (summary.done, len(summary.failed), summary.skipped) == (0, 3, 15)  # the bad ones are tried again
    check_rows(tmp_path / "out", sources, model, tmp_path / "whole")
    save(sources[0] / "p3.png", 77)
    summary = ray_data.embed(sources, model, tmp_path / "out", **ON_CPU)
    assert (summary.done, summary.changed) == (0, [str(sources[0] / "p3.png")])
    summary = ray_data.embed(sources, model, tmp_path / "out", refresh=True, batch_invariant=True, **ON_CPU)
    assert (summary.done, len(summary.failed), summary.skipped) == (1, 3, 14)
    shutil.rmtree(tmp_path / "whole")
    check_rows(tmp_path / "out", sources, model, tmp_path / "whole")


@pytest.mark.full
def test_workers_that_are_killed(cluster, model, tmp_path):
    """An actor at the beginning of a run, one in its middle: nothing is lost or doubled."""
    many, count = tmp_path / "many", 1500
    for number in range(count):
        save(many / f"{number:05d}.png", number)
    seen, killed = list[Result](), list[int]()

    def kill(result):
        seen.append(result)
        if len(seen) in (5, count // 2):
            killed.append(workers("MapWorker")[0])
            os.kill(killed[-1], signal.SIGKILL)

    summary = ray_data.embed([many], model, tmp_path / "killed", batch_size=16, on_result=kill, actors=2, **ON_CPU)
    assert len(killed) == 2 and summary.done == count
    assert len({result.path for result in seen}) == len(seen) == count
    check_rows(tmp_path / "killed", [many], model, tmp_path / "whole of many")
