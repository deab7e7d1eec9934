"""An embedding folder under random sequences of runs, kills, signals, second runs, changed pictures and weights, and
full disks: after each step one row an image, every row right, nothing mixed, nothing lost that was done."""

import hashlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.folder_runs import Runs
from helpers.photos import PREPROCESS
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from PIL import Image

from vitfast.images.preprocess import resize_and_crop
from vitfast.pipeline import lance
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.layout import format_of

NAMES = [f"{i}.png" for i in range(7)]
SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
BAD = b"no picture"


def picture(seed):
    """A PNG's bytes, and the embedding of the model with weights 0."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    small = resize_and_crop(pixels, PREPROCESS)
    return file.getvalue(), np.append(small.reshape(-1, 3).mean(0, dtype=np.float64), small[0, 0, 0])


faults = st.one_of(
    st.none(),
    st.tuples(
        st.sampled_from(["replace", "fsync", "unlink", "result"]),
        st.integers(0, 6),
        st.sampled_from(["before", "after"]),
        st.sampled_from([*SIGNALS, "SIGKILL", "SIGKILL", "full"]),
    ),
)
parts = st.fixed_dictionaries({"rows": st.sampled_from([1, 2, 3, 4096]), "seconds": st.sampled_from([0.0, 5.0])})


class FolderMachine(RuleBasedStateMachine):
    """The rows that there must be, beside those that there are."""

    runs: Runs
    format = "parquet"

    def __init__(self):
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.root = Path(self._folder.name)
        self.photos, self.out = self.root / "photos", self.root / "out"
        self.photos.mkdir()
        self.seeds = 0
        self.embeddings = {}  # SHA-256 of a picture -> its embedding under weights 0, None for a bad one
        self.weights = 0
        self.rows = {}

    def teardown(self):
        self._folder.cleanup()

    @initialize(bad=st.sets(st.sampled_from(NAMES), max_size=3))
    def begin(self, bad):
        for name in NAMES:
            self._save(name, name in bad)

    def _save(self, name, bad):
        self.seeds += 1
        content, embedding = (BAD + b"%d" % self.seeds, None) if bad else picture(self.seeds)
        self.embeddings[hashlib.sha256(content).digest()] = embedding
        (self.photos / name).write_bytes(content)
        os.utime(self.photos / name, ns=(self.seeds * 10**9, self.seeds * 10**9))

    def _start(self, *options, log="log", **job):
        arguments = ["embed", self.photos, "-m", "m", "-o", self.out, "-b", "2", "--json", *options]
        arguments += ["--format", self.format]
        return self.runs.start(*arguments, log=self.root / log, weights=self.weights, **job)

    @rule(name=st.sampled_from(NAMES), bad=st.booleans())
    def change_a_picture(self, name, bad):
        self._save(name, bad)

    @rule()
    def change_the_weights(self):
        self.weights += 1

    @rule(fault=faults, sizes=parts, refresh=st.booleans())
    def run(self, fault, sizes, refresh):
        code = self.runs.wait(self._start(*["--refresh"] * refresh, fault=fault, **sizes))
        self._after([code], fault, refresh=refresh)

    @rule(fault=faults, sizes=parts)
    def overwrite(self, fault, sizes):
        code = self.runs.wait(self._start("--overwrite", fault=fault, **sizes))
        self._after([code], fault, overwrite=True)

    @rule(limit=st.integers(500, 6000), sizes=parts, refresh=st.booleans())
    def run_where_files_stay_small(self, limit, sizes, refresh):
        # The message on stderr fits; stdout's answer would not.
        code = self.runs.wait(self._start(*["--refresh"] * refresh, limit=limit, stdout=os.devnull, **sizes))
        self._after([code], ("file", 0, "", "full"), refresh=refresh)

    @rule(fault=faults, sizes=parts, refresh=st.booleans(), pause=st.sampled_from([0, 0.01]))
    def two_runs_at_once(self, fault, sizes, refresh, pause):
        options = ["--refresh"] * refresh
        pids = [
            self._start(*options, log="one", fault=fault, pause=pause, **sizes),
            self._start(*options, log="two", pause=pause, **sizes),
        ]
        codes = [self.runs.wait(pid) for pid in pids]
        self._after(codes, fault, refresh=refresh, two=True)

    def _after(self, codes, fault, *, refresh=False, overwrite=False, two=False):
        """What the codes may be, and what rows follow from them."""
        before, self.rows = self.rows, self._read()
        allowed = {0, 1, 2} | ({SIGNALS.get(fault[3], 1)} if fault else set())
        log = "".join(path.read_text() for path in self.root.glob("*.err"))
        assert set(codes) <= allowed, (codes, log)
        assert "Traceback" not in log
        current = {str(self.photos / name): (self.photos / name).read_bytes() for name in NAMES}
        now = {path: hashlib.sha256(content).digest() for path, content in current.items()}
        foreign = any(row["weights"] != self.weights for row in before.values()) and not overwrite
        if foreign:
            assert set(codes) <= {2, *(allowed - {0, 1})}, log
            assert self.rows == before
            return
        if codes == [2]:
            assert "cannot be written" in log, log
        for path, row in before.items():  # what was done is kept
            if row["status"] == "ok" and not overwrite and not (refresh and row["sha"] != now[path]):
                assert self.rows[path] == row
        for path, row in self.rows.items():
            assert row["sha"] == now[path] or row == before.get(path)
        if {0, 1} & set(codes) and (fault is None or two or fault[3] not in ("full",)) and not (two and fault):
            assert self.rows.keys() == now.keys(), log  # a run that went through has done everything
            for path, row in self.rows.items():
                assert row["weights"] == self.weights
                if refresh or overwrite:
                    assert row["sha"] == now[path]
                if row["sha"] == now[path]:
                    assert (row["status"] == "ok") == (self.embeddings[now[path]] is not None)
            of_lance = {"_manifest.json", "_transactions", "_versions", "data"}
            names = {path.name if self.format == "lance" else path.name[:5] for path in self.out.iterdir()}
            assert names - {"_deletions"} == (of_lance if self.format == "lance" else {"part-", "_mani"})

    def _tables(self):
        if self.format == "lance":
            return [lance.read(self.out)] if format_of(self.out) else []
        return [pq.read_table(part) for part in sorted(self.out.glob("part-*.parquet"))]

    def _read(self):
        """The folder's rows as anybody reads them, each checked by itself."""
        rows = {}
        for table in self._tables():
            identity = Identity.from_json(table.schema.metadata[b"vitfast.identity"])
            weights = int(identity.weights.removeprefix("weights "))
            for row in table.to_pylist():
                path, sha = row["path"], row["file_sha256"]
                assert path not in rows, f"two rows of {path}"
                wanted = self.embeddings[sha]
                assert (row["status"] == "ok") == (wanted is not None)
                if wanted is None:
                    assert row["embedding"] is None
                else:
                    np.testing.assert_allclose(row["embedding"], wanted + 1000 * weights, rtol=1e-5)
                rows[path] = {"status": row["status"], "sha": sha, "weights": weights}
        return rows

    @invariant()
    def nothing_is_mixed(self):
        assert len({row["weights"] for row in self.rows.values()}) <= 1
        if tables := self._tables():
            assert len(pa.concat_tables(tables)) == len(self.rows)


@pytest.mark.parametrize("sequences", [5, pytest.param(200, marks=[pytest.mark.full, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("stored_as", ["parquet", "lance"])
def test_one_row_an_image_whatever_happens(stored_as, sequences):
    if stored_as == "lance":
        pytest.importorskip("lance", reason="pylance is not installed: no Lance dataset to write")
    with Runs() as runs:
        machine = type("Machine", (FolderMachine,), {"runs": runs, "format": stored_as})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=sequences,
                stateful_step_count=5 if sequences == 10 else 8,
                deadline=None,
                database=None,
                print_blob=False,
                phases=[Phase.generate, *([Phase.shrink] if sequences > 10 else [])],
                suppress_health_check=list(HealthCheck),
            ),
        )
