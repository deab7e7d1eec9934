"""The benchmarks: wrong contestants get no time, rows are complete, README shows committed results."""

import json
import re

import pytest
import torch

from benchmarks import harness, kernels, model, report
from vitfast import testing
from vitfast.config import NAMED
from vitfast.ops import registry


def test_readme_tables_come_from_their_result_files():
    text = (harness.ROOT / "README.md").read_text()
    assert report.MARKED.search(text), "README.md has no marked table"
    assert report.redraw(text) == text, "run: python -m benchmarks.report --update README.md"


def test_committed_results_name_their_commit_and_environment():
    paths = sorted((harness.ROOT / "benchmarks" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"]), path
        assert result["environment"]["torch"] and result["rows"], path


def test_model_comparison_gives_complete_rows():
    try:
        testing.import_peer("timm")
    except ImportError as error:
        pytest.skip(str(error))
    rows = model.compare("test_vit", 2, torch.device("cpu"), torch.float32, rounds=3)
    assert [row["peer"] for row in rows] == ["vitfast", "timm eager"]
    for row in rows:
        assert row["correct"]
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert rows[1]["ratio"] == 1


def test_wrong_kernel_gets_no_time(monkeypatch):
    right = registry.backend("layer_norm", "torch")
    wrong = registry.Backend("triton", "layer_norm", lambda *a, **k: right.call(*a, **k) * 1.01)
    absent = registry.Backend("native", "layer_norm", None, missing="not built")
    entries = {"torch": right, "triton": wrong, "native": absent}
    monkeypatch.setattr(kernels, "backend", lambda op, name: entries[name])
    config = NAMED["vit_tiny_patch16_224"]
    rows = kernels.site_rows("tiny", config, "layer_norm", 1, torch.device("cpu"), torch.float32, rounds=3)
    by_peer = {row["peer"]: row for row in rows}
    assert "median_ms" in by_peer["torch"] and by_peer["torch"]["ratio"] == 1
    assert "median_ms" not in by_peer["triton"] and by_peer["triton"]["error"].startswith("incorrect")
    assert by_peer["native"]["error"] == "not built"


def test_results_are_written_whole(tmp_path):
    path = harness.save("model", torch.device("cpu"), [{"case": "a"}], tmp_path / "deep" / "r.json")
    result = json.loads(path.read_text())
    assert result["schema"] == 1 and result["rows"] == [{"case": "a"}]
    assert {"commit", "dirty", "cpu", "threads", "torch", "python"} <= set(result["environment"])
    assert list(path.parent.iterdir()) == [path]


def test_interleaving_runs_every_call_in_turn():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = harness.time_interleaved(calls, torch.device("cpu"), rounds=3)
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert len(times["a"]) == len(times["b"]) == 3
