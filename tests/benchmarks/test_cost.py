"""vitfast.benchmarks.cost: arithmetic on rates that result files have, said to be that."""

import json

import pytest
from typer.testing import CliRunner

from vitfast.benchmarks import cost
from vitfast.cli.app import app

MODEL = {
    "schema": 3, "kind": "model", "environment": {"gpu": "A GPU"},
    "rows": [
        {"case": "vit batch 8", "provider": "vitfast", "correct": True, "images_per_s": 1000.0},
        {"case": "vit batch 8", "provider": "vitfast fp8", "correct": False},
        {"case": "vit batch 8", "provider": "vitfast int8", "correct": True, "error": "died", "died": True},
        {"case": "vit batch 8", "provider": "timm eager", "correct": True, "images_per_s": 500.0},
    ],
}  # fmt: skip
PIPELINE = {
    "schema": 3, "kind": "pipeline", "environment": {"cpu": "A CPU", "threads": 2},
    "rows": [{"case": "photographs", "images_per_second": {"decode": 9.0, "model": 50.0, "pipeline": 10.0}}],
}  # fmt: skip


def test_arithmetic():
    """A million at 1000 img/s on four devices: 250 s of each, 1000 s of all, at 3.60 an hour a dollar."""
    (row,) = cost.costs(MODEL, 3.6, 4)
    assert row["images_per_hour"] == 1000 * 3600 * 4
    assert row["hours_per_million"] == pytest.approx(250 / 3600)
    assert row["dollars_per_million"] == pytest.approx(1.0)
    assert row["measured"] == "the model alone" and row["machine"] == "A GPU"
    whole, alone = cost.costs(PIPELINE, 0.36)
    assert (whole["measured"], alone["measured"]) == ("decoded, embedded and written", "the model alone")
    assert whole["dollars_per_million"] == pytest.approx(10.0) == 5 * alone["dollars_per_million"]


def test_refusals():
    for price, devices in ((0, 1), (-1, 1), (float("inf"), 1), (float("nan"), 1), (1, 0)):
        with pytest.raises(ValueError, match="price must be positive and devices at least 1"):
            cost.costs(MODEL, price, devices)
    with pytest.raises(ValueError, match="kind 'kernels' with no rate of ours"):
        cost.costs({"kind": "kernels", "rows": []}, 1)


def test_command(tmp_path):
    for name, content in (("model", MODEL), ("pipeline", PIPELINE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [str(tmp_path / "model.json"), str(tmp_path / "pipeline.json")]
    result = CliRunner().invoke(app, ["bench", "cost", *files, "--price", "3.6", "--devices", "4", "--json"])
    assert [row["case"] for row in json.loads(result.stdout)] == ["vit batch 8", "photographs", "photographs"]
    text = CliRunner().invoke(app, ["bench", "cost", *files, "--price", "3.6", "--devices", "4"]).stdout
    assert "calculated from measured img/s of one device" in text and "4 x 3.6 dollars an hour" in text
    assert CliRunner().invoke(app, ["bench", "cost", *files]).exit_code == 2  # there is no price to assume
