"""A folder of generated images through a small model, killed again and again: equal to a run that nothing stopped."""

import contextlib
import json
import os
import random
import signal
import time

import numpy as np
import pyarrow.compute as pc
import pytest
from helpers.engines import engine
from helpers.folder_runs import Runs
from helpers.generated import BAD_EVERY, write_images

from vitfast.images.files import InputError
from vitfast.pipeline.reading import read_embeddings


@pytest.mark.full
@pytest.mark.parametrize(("count", "kills"), [(400, 3), (20_000, 20)], ids=["few", "many"])
def test_a_run_that_is_killed_again_and_again(count, kills, tmp_path):
    bad = write_images(tmp_path / "photos", count)
    assert len(bad) == count // BAD_EVERY
    engine().save(tmp_path / "model")
    chance, survived, seen = random.Random(count), 0, [0]
    with Runs() as runs:

        def start(out):
            arguments = ("embed", tmp_path / "photos", "-m", tmp_path / "model", "-o", tmp_path / out, "--json")
            return runs.start(*arguments, log=tmp_path / out, real=True, rows=512, seconds=0.2)

        started = time.perf_counter()
        assert runs.wait(start("whole")) == 1  # some images failed
        took = time.perf_counter() - started
        embedding = json.loads((tmp_path / "whole.out").read_text())["seconds"]  # the rest is spent on beginning
        for number in range(kills):
            pid, started = start("killed"), time.perf_counter()
            if number % 3 == 2:  # before anything is written, or soon after
                time.sleep(chance.uniform(0.2, 1.2) * (took - embedding))
            else:
                while rows_in(tmp_path / "killed") <= seen[-1] and time.perf_counter() - started < 2 * took:
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 1) * embedding / kills)
            os.kill(pid, signal.SIGKILL)
            code = runs.wait(pid)
            survived += code != -signal.SIGKILL
            seen.append(rows_in(tmp_path / "killed"))
            print(f"kill {number + 1}: exit code {code}, {seen[-1]} rows")
        assert survived < kills / 2  # else the kills came too late to show anything
        assert len(set(seen)) > kills / 2
        assert runs.wait(start("killed")) == 1
        assert runs.wait(start("killed")) == 1  # once more: only the bad ones are tried

    whole, killed = (read_embeddings(tmp_path / out).sort_by("path") for out in ("whole", "killed"))
    failed = whole.filter(pc.not_equal(whole["status"], "ok"))
    assert set(failed["path"].to_pylist()) == bad
    assert len(whole) == count
    same = [name for name in whole.column_names if name != "embedding"]
    assert killed.select(same).equals(whole.select(same))
    ours, theirs = (np.stack(table["embedding"].drop_null().to_numpy()) for table in (killed, whole))
    assert ours.shape == (count - len(bad), 64)
    print(f"{(ours != theirs).any(1).sum()} embeddings differ in a bit, by at most {np.abs(ours - theirs).max()}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)  # batches are other ones


def rows_in(folder):
    """How many there are while a run may be writing."""
    for _ in range(100):
        with contextlib.suppress(InputError, FileNotFoundError):  # a part was taken away meanwhile
            return len(read_embeddings(folder, ["path"])) if any(folder.glob("part-*.parquet")) else 0
    raise AssertionError(f"{folder} is changed all the time")
