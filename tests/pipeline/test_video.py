"""vitfast.pipeline.sources.video: which frames are taken, their pixels and keys, and files that are no videos."""

import signal

import numpy as np
import pytest
from helpers.folder_runs import Runs
from helpers.photos import FakeEngine

from vitfast.pipeline.by_key import thumbnails
from vitfast.pipeline.embed import embed_images
from vitfast.pipeline.parquet import EmbeddingFolder, read_embeddings, write_parquet
from vitfast.pipeline.sources import find_sources

av = pytest.importorskip("av", reason="PyAV is not installed (the extra `video`)")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Four seconds at 10 frames a second; frame i is grey of value 5 i + 20."""
    path = tmp_path_factory.mktemp("video") / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)  # which loses nothing
        stream.width, stream.height, stream.pix_fmt = 32, 24, "bgr0"
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 5 * number + 20, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


AT_THREE = [0, 4, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37]


@pytest.mark.parametrize(
    ("fps", "frames"),
    [(1, range(0, 40, 10)), (2.5, range(0, 40, 4)), (3, AT_THREE), (10, range(40)), (1000, range(40)), (0.1, [0])],
)
def test_frames_at_a_rate(fps, frames, video):
    items = list(find_sources([video], fps=fps))
    assert [item.key for item in items] == [f"{video}::{number / 10:.3f}s" for number in frames]
    engine = FakeEngine()
    reds = [result.embedding[0] for result in embed_images(engine, items)]
    np.testing.assert_allclose(reds, [5 * number + 20 for number in frames], atol=0)


def test_a_run_goes_on_and_pictures_are_found_again(video, tmp_path):
    engine = FakeEngine()
    for fps in (1, 2):
        folder = EmbeddingFolder(tmp_path / "out", "m")
        write_parquet(embed_images(engine, folder.todo(find_sources([video], fps=fps))), folder, engine)
    assert sum(engine.batches) == len(read_embeddings(tmp_path / "out")) == 8
    assert list(thumbnails([f"{video}::1.500s"])) == [f"{video}::1.500s"]


@pytest.mark.full
def test_a_killed_run_goes_on(video, tmp_path):
    write_rows_of(video, tmp_path / "whole")
    command = ("embed", video, "-m", "m", "-o", tmp_path / "out", "--fps", 5, "--batch-size", 2)
    with Runs() as runs:
        for least in (6, 12):
            job = {"fault": ["result", 6, "before", "SIGKILL"], "rows": 1, "seconds": 0.0}
            assert runs.run(*command, log=tmp_path / "log", **job) == -signal.SIGKILL
            assert len(read_embeddings(tmp_path / "out")) == least
        assert runs.run(*command, log=tmp_path / "log") == 0
    ours, theirs = (read_embeddings(tmp_path / place).sort_by("path").to_pylist() for place in ("out", "whole"))
    assert ours == theirs and len(ours) == 20


def write_rows_of(video, out):
    engine, folder = FakeEngine(), EmbeddingFolder(out, "m")
    write_parquet(embed_images(engine, folder.todo(find_sources([video], fps=5))), folder, engine)


def test_what_is_no_video(tmp_path):
    (tmp_path / "no.mp4").write_bytes(b"no video at all")
    found = find_sources([tmp_path / "no.mp4"])
    assert list(found) == []
    assert "Invalid data" in found.listing.unreadable[str(tmp_path / "no.mp4")]
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        find_sources([tmp_path / "no.mp4"], fps=0)
