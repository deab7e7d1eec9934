"""vitfast.pipeline.sources: a run over any kind of source goes on where SIGKILL ended it, and gives a folder's rows.

Hugging Face's datasets and videos are killed where their own tests are. Buckets are HTTP and file:// here: what
memory:// holds dies with the process, so that `test_file_systems_by_url` only interrupts that one.
"""

import signal
from pathlib import Path

import pytest
from helpers.folder_runs import Runs
from helpers.grids import thinned
from helpers.sources import CARRIED, KINDS, rows

from vitfast.pipeline.parquet import read_embeddings


@pytest.fixture(scope="module")
def runs():
    with Runs() as started:
        yield started


@pytest.mark.parametrize("kind", thinned(KINDS, 5))
def test_a_killed_run_goes_on(kind, runs, made, of_folder, tmp_path):
    """SIGKILL when four rows are on the disk, and again: two of them are of bad pictures, which are tried once more."""
    carried = ["--columns", "label"] if kind in CARRIED else []
    command = ("embed", *made(kind), "-m", "m", "-o", tmp_path / "out", "--batch-size", 2, *carried)
    for least in (4, 5):
        job = {"fault": ["result", 4, "before", "SIGKILL"], "rows": 1, "seconds": 0.0}
        assert runs.run(*command, log=tmp_path / "log", **job) == -signal.SIGKILL
        there = len(read_embeddings(tmp_path / "out"))
        assert least <= there < 13
    assert runs.run(*command, log=tmp_path / "log") == 1  # three of the photographs are bad
    assert rows(tmp_path / "out") == of_folder
    if carried:
        table = read_embeddings(tmp_path / "out")
        names = [Path(key.rpartition("::")[2]).name for key in table["path"].to_pylist()]
        assert table["label"].to_pylist() == [f"of {name}" for name in names]
