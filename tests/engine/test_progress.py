"""What takes long says so, and what does not stays silent; engines and plans print."""

import logging

import pytest
from helpers import peers

import vitfast
from vitfast.engine import progress


@pytest.fixture(autouse=True)
def heard(caplog):
    """Warnings of the logger arrive, whatever level a library has given the root logger meanwhile."""
    caplog.set_level(logging.WARNING, logger="vitfast")


class Clock:
    """Stands for time.perf_counter."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (0.1, []),
        (0.9, ["2 of 4 done", "done in 3.6 s"]),
        (5.0, ["1 of 4 done", "2 of 4 done", "3 of 4 done", "done in 20.0 s"]),
    ],
)
def test_what_lasts_is_said_with_how_far_it_is(seconds, lines, clock, caplog):
    for item in progress.said(range(4), 4, "measuring"):
        assert item < 4
        clock.now += seconds
    assert [record.getMessage() for record in caplog.records] == [f"vitfast: measuring: {line}" for line in lines]
    assert all(record.name == "vitfast" and record.levelno == logging.WARNING for record in caplog.records)


def test_a_measurement_says_what_it_is(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("VITFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(progress, "FIRST", 0.0)
    model = peers.timm_model(**peers.TIMM)
    vitfast.load(model, device="cpu")
    assert "measuring which backend is fastest for" in caplog.records[0].getMessage()
    caplog.clear()
    engine = vitfast.load(model, device="cpu")
    assert not caplog.records  # once measured, it is known

    shown = repr(engine.plan).splitlines()
    assert shown[0].startswith("Plan(")
    assert len(shown) == 1 + len(engine.plan.backends)
    assert any(line.startswith("  qkv: ") for line in shown)
    html = engine._repr_html_()
    assert html.count("<tr>") == 1 + len(engine.plan.backends)
    assert "Engine(" in html
    assert "<td>qkv</td>" in html
