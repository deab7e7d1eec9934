"""vitfast.pipeline.stages: the stage that is made slow is the one that is named."""

import io
import json
import re
import sys
import time

import numpy as np
import pytest
from helpers.photos import FakeEngine, make_photos
from typer.testing import CliRunner

from vitfast.cli.app import app
from vitfast.cli.embed import _progress
from vitfast.pipeline import embed, stages
from vitfast.pipeline.parquet import EmbeddingFolder
from vitfast.pipeline.stages import Stages
from vitfast.pipeline.timeline import Timeline, _ticks


class SlowEngine(FakeEngine):
    def __call__(self, *arguments, **options):
        time.sleep(0.3)
        return super().__call__(*arguments, **options)


def slowed(function, seconds):
    def slow(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)

    return slow


@pytest.mark.parametrize("slow", ["decode", "model", "write"])
def test_the_slow_stage_is_named(slow, tmp_path, monkeypatch):
    engine = SlowEngine() if slow == "model" else FakeEngine()
    monkeypatch.setattr("vitfast.engine.load.load", lambda *_, **__: engine)
    monkeypatch.setattr(stages, "usable_cores", lambda: 3)
    if slow == "decode":
        monkeypatch.setattr(embed, "resize_and_crop", slowed(embed.resize_and_crop, 0.1))
    if slow == "write":
        monkeypatch.setattr(EmbeddingFolder, "write_part", slowed(EmbeddingFolder.write_part, 0.6))
    photos = make_photos(tmp_path / "photos")

    def run(out, *options):
        command = ["embed", photos, "-m", "m", "-o", tmp_path / out, "--workers", 2, "--batch-size", 2, *options]
        return CliRunner().invoke(app, [str(part) for part in command]).stdout

    answer = json.loads(run("one", "--json"))
    assert answer["bound"] == slow
    seconds = answer["stage_seconds"]
    assert max(seconds, key=seconds.get) == slow
    assert sum(seconds.values()) == pytest.approx(answer["seconds"], abs=0.2)
    advice = {
        "decode": r"decode-bound: model \d+% busy; try --workers 3", "model": r"model-bound: model \d+% busy$",
        "write": "write-bound: .* the output folder is slow",
    }  # fmt: skip
    text = run("two")
    assert re.search(advice[slow], text, re.MULTILINE), text


def test_nothing_done_says_nothing():
    assert Stages().advice() == ""


@pytest.mark.parametrize(("width", "shown"), [(140, "decode-bound: model 25% busy"), (80, "decode-")])
def test_a_terminal_shows_the_stage_that_binds_in_one_line(width, shown, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "__stderr__", terminal)
    for name, value in {"COLUMNS": str(width), "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with _progress("embedding", 3, Stages(decode=3.0, total=4.0, workers=2).advice) as advance:
        for _ in range(3):
            advance()
    last = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).strip())[-1]
    assert re.search(rf"^embedding \S+ +3/3 \d+\.\d img/s [-:\d]+ {shown}", last), last


def test_no_more_workers_than_cores_are_advised(monkeypatch):
    monkeypatch.setattr(stages, "usable_cores", lambda: 2)
    done = Stages(decode=3.0, total=4.0, workers=2)
    assert done.advice() == "decode-bound: model 25% busy; all 2 cores decode already"


def test_timeline_counts_where_time_was_spent():
    """Against sums over fine steps, with bins that have grown twice and threads side by side."""
    timeline, random = Timeline(), np.random.default_rng(0)
    stretches = [(0.0, 0.5), *((begin, begin + random.uniform(0, 3)) for begin in random.uniform(0, 40, 50))]
    for begin, end in stretches:
        timeline.add("decode", 100 + begin, 100 + end)
    assert timeline.seconds == pytest.approx(max(end for _, end in stretches))
    assert timeline.busy["decode"].sum() == pytest.approx(sum(end - begin for begin, end in stretches))
    shares = timeline.shares({"decode": 8})["decode"]
    for number in (0, 7, len(shares) // 2):
        low, high = number * timeline.width, (number + 1) * timeline.width
        spent = sum(max(min(end, high) - max(begin, low), 0) for begin, end in stretches)
        assert shares[number] == pytest.approx(spent / timeline.width / 8)


@pytest.mark.parametrize(
    ("end", "ticks"),
    [(29.99, [0, 5, 10, 15, 20, 25]), (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.05, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
     (7200, [0, 1000, 2000, 3000, 4000, 5000, 6000, 7000])],
)  # fmt: skip
def test_ticks_are_round(end, ticks):
    assert _ticks(end) == ticks


def test_profile(tmp_path, monkeypatch):
    monkeypatch.setattr("vitfast.engine.load.load", lambda *_, **__: SlowEngine())
    command = ["embed", make_photos(tmp_path / "photos"), "-m", "m", "-o", tmp_path / "out", "--batch-size", 4]
    command += ["--profile", tmp_path / "p.html"]
    assert CliRunner().invoke(app, [str(part) for part in command]).exit_code == 1
    page = (tmp_path / "p.html").read_text()
    assert "10 images" in page and "model-bound" in page
    busy = {
        stage: int(share) for stage, share in re.findall(r">(\w+)</text><text[^>]*>\d+ threads?, (\d+)% busy", page)
    }
    assert set(busy) == {"read", "decode", "resize", "model", "write"}
    assert max(busy, key=busy.get) == "model" and busy["model"] > 50
    assert page.count("<polygon") == 5 and not re.search(r"https?://|src=", page)
