"""vitfast.pipeline.lock, and two runs on one embedding folder."""

import fcntl
import os

import pytest
from helpers.photos import FakeEngine, make_photos

from vitfast.images.files import InputError, collect
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.lock import FolderLock
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


def test_a_locked_folder_names_its_owner(photos, tmp_path):
    out = tmp_path / "out"
    with EmbeddingFolder(out, "m") as folder:
        with pytest.raises(InputError, match=rf"is being written by process {os.getpid()} on .* since 20\d\d-"):
            write_parquet([], EmbeddingFolder(out, "m"), FakeEngine())
        write_parquet(embed_images(FakeEngine(), folder.remaining(collect([photos]))), folder, FakeEngine())
        assert (out / ".lock").exists()
    assert not (out / ".lock").exists()
    assert len(read_embeddings(out)) == 13


def test_rows_that_another_run_wrote_meanwhile_are_replaced(photos, tmp_path):
    """Both asked what remains before either wrote."""
    folders = [EmbeddingFolder(tmp_path / "out", "m") for _ in range(2)]
    todo = [folder.remaining(collect([photos])) for folder in folders]
    for folder, paths in zip(folders, todo, strict=True):
        write_parquet(embed_images(FakeEngine(), paths), folder, FakeEngine())
    assert len(read_embeddings(tmp_path / "out")) == 13


def test_a_path_given_twice_has_one_row(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("vitfast.pipeline.folder.PART_ROWS", 2)
    paths = [photos / "p0.png", photos / "p0.png", photos / "p1.png", photos / "p2.png", photos / "p0.png"]
    folder = EmbeddingFolder(tmp_path / "out", "m")
    write_parquet(embed_images(FakeEngine(), paths), folder, FakeEngine())
    assert len(read_embeddings(tmp_path / "out")) == 3


def test_a_lock_file_that_was_given_up_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Its owner takes it away between another's opening and locking it: the other must not hold a file that is gone."""
    lock, original, once = FolderLock(tmp_path), os.open, []

    def late(path, *rest):
        descriptor = original(path, *rest)
        if not once:
            once.append(os.unlink(path))
        return descriptor

    monkeypatch.setattr(os, "open", late)
    lock.acquire()
    assert (tmp_path / ".lock").exists()
    with pytest.raises(InputError, match="is being written"):
        FolderLock(tmp_path).acquire()
    lock.release()
    FolderLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks .No locks available."), EmbeddingFolder(tmp_path, "m"):
        pass
