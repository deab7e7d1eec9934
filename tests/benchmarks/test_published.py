"""Figures that others have published: where they are from, and the model's error over them."""

import io
import json
import shutil

import pytest
from helpers.scripts import compiling
from rich.console import Console

from vitfast.benchmarks import published_figures as published
from vitfast.diagnostics.predict import predict
from vitfast.models.config import NAMED


def test_tables_say_where_they_are_from():
    table = published.tables("h100")
    assert "aiconfigurator-core 0.12.0" in table["source"] and table["license"].startswith("Apache-2.0")
    assert table["device"] == "NVIDIA H100 80GB HBM3"
    products = {(row["dtype"], row["M"], row["K"], row["N"]): row["us"] for row in table["gemm"]}
    assert len(products) == len(table["gemm"]) == 168
    assert products["bfloat16", 16384, 768, 3072] == pytest.approx(114.3, abs=0.1)
    assert products["fp8", 16384, 3072, 768] == pytest.approx(144.8, abs=0.1)
    attention = {tuple(row.values())[:4]: row["us"] for row in table["attention"]}
    assert attention[64, 192, 12, 64] == pytest.approx(42.2, abs=0.1) and len(attention) == 48


def test_no_figure_is_faster_than_the_chip():
    table = published.tables("h100")
    for row in table["gemm"]:
        peak = {"bfloat16": 989, "fp8": 1979}[row["dtype"]]
        assert 2 * row["M"] * row["N"] * row["K"] / row["us"] / 1e6 < peak, row


def test_an_unknown_chip():
    with pytest.raises(ValueError, match=r"no published figures of 'v100'; there are some of h100"):
        published.tables("v100")


def rows(ratios, m):
    return [{"dtype": "bfloat16", "M": m, "us": 10.0, "flat_us": 10 * ratio, "code_us": None} for ratio in ratios]


def test_errors_by_hand():
    products = rows([0.8, 1.0, 1.2], 8192) + rows([0.5, 0.7], 64) + [{**rows([9], 64)[0], "dtype": "fp8"}]
    found = published.errors(products)
    assert list(found) == ["flat"]  # none has a prediction by code
    large, small = found["flat"]["M >= 8192"], found["flat"]["M < 1024"]
    assert (large["count"], large["median"]) == (3, pytest.approx(1.0))
    assert (large["p10"], large["p90"]) == (pytest.approx(0.84), pytest.approx(1.16))
    assert (small["count"], small["median"]) == (2, pytest.approx(0.6))
    assert "1024 <= M < 8192" not in found["flat"]


def test_a_forward_as_far_off_as_products_are_by_hand():
    """Of each model that predicted it: its images a second times predicted over measured."""
    prediction = predict(NAMED["vit_base_patch16_224"], batch=256, chip="h100")
    prediction["by_code"] = {"images_per_s": 10_000.0}
    published.add_errors(prediction)
    kept, found = published.tables("h100")["errors"], prediction["errors"]
    assert set(found) == {"band", "flat", "code"} and found["band"] == "M >= 8192"  # nobody asked for the CUDA linear
    assert found["code"]["images_per_s"]["p10"] == pytest.approx(10_000 * kept["code"]["M >= 8192"]["p10"])
    median = prediction["images_per_s"] * kept["flat"]["M >= 8192"]["median"]
    assert found["flat"]["images_per_s"]["median"] == pytest.approx(median)
    prediction["by_native"] = {"images_per_s": 20_000.0}
    published.add_errors(prediction)
    assert prediction["errors"]["native"]["images_per_s"]["p90"] == pytest.approx(
        20_000 * kept["native"]["M >= 8192"]["p90"]
    )
    small = predict(NAMED["vit_base_patch16_224"], batch=1, chip="h100") | {"by_native": {"images_per_s": 1.0}}
    published.add_errors(small)
    assert set(small["errors"]) == {"band", "flat"}  # no tile of its kernel fills the chip, no error is known


def test_rendering():
    result = {**published.tables("h100"), "errors": published.errors(rows([0.8, 1.0, 1.2], 8192))}
    for row in [*result["gemm"], *result["attention"]]:
        row |= {"flat_us": 12.3, "code_us": None}
    console = Console(width=120, record=True, file=io.StringIO())
    for part in published.render(result):
        console.print(part)
    text = console.export_text()
    assert "measured by others on NVIDIA H100" in text and "ours are predictions" in text
    assert "114.3" in text and "12.3" in text and "0.84" in text


@pytest.mark.full
def test_command_prints_predictions_beside_the_tables():
    nvcc = shutil.which("nvcc") is not None
    found = json.loads(compiling("-m", "vitfast", "bench", "published", "--json", *["--native"] * nvcc))
    assert set(found["errors"]) == {"flat", "code"} | ({"native"} if nvcc else set())
    flat, code = (found["errors"][model]["M >= 8192"] for model in ("flat", "code"))
    assert flat["count"] == code["count"] == 21
    assert 0.85 < flat["median"] < 1.05 and flat["median"] < code["median"] < 1.3  # ours have epilogues, no multicast
    assert all(row["flat_us"] > 0 for row in [*found["gemm"], *found["attention"]])
    kept = published.tables("h100")["errors"]  # what `vitfast inspect --model` prints
    for model, bands in found["errors"].items():
        assert kept[model].keys() == bands.keys()
        for band, found_error in bands.items():
            assert kept[model][band] == pytest.approx(found_error, abs=0.03), (model, band)
