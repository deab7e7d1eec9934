"""Other engines in int8: right where they are installed, a reason where they are not."""

import json
import sys

import pytest
import torch
from helpers.benching import bench

from vitfast.benchmarks import model, model_providers
from vitfast.benchmarks.device import CpuDevice

INT8_PROVIDERS = {
    "ONNX Runtime int8": "onnxruntime",
    "ONNX Runtime int8 static": "onnxruntime",
    "OpenVINO int8": "nncf",
}


@pytest.mark.parametrize("provider", INT8_PROVIDERS)
def test_int8_of_others(provider, timm):
    """In batches that the calibration images do not fill, as well."""
    for package in (INT8_PROVIDERS[provider], "onnxscript", "openvino"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -e '.[bench]')")
    for batch in (2, 3):
        row, _ = model.compare("test_vit", batch, CpuDevice(), torch.float32, providers=(provider,), rounds=2)
        assert row["correct"] and row["dtype"] == "int8" and row["eight_bit"], row
        assert model.EIGHT_BIT_COSINE < row["cosine"] < 1 - 1e-7


@pytest.mark.parametrize("provider", INT8_PROVIDERS)
def test_a_package_that_is_not_there_is_the_reason(provider, timm, monkeypatch):
    monkeypatch.setitem(sys.modules, INT8_PROVIDERS[provider], None)
    row, baseline = model.compare("test_vit", 2, CpuDevice(), torch.float32, providers=(provider,), rounds=2)
    assert baseline["correct"] and not row["correct"]
    assert row["error"].startswith("ModuleNotFoundError: ") and INT8_PROVIDERS[provider] in row["error"]


def test_calibration_images_are_others_and_the_same_for_all():
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    first, second = (model_providers._calibration_images(images.expand(n, -1, -1, -1)) for n in (1, 5))
    assert torch.equal(first, second) and first.shape == (32, 3, 8, 8) and not (first == images).all(-1).any()


def test_int8_takes_those_that_multiply_in_int8(timm, tmp_path):
    wanted = ["vitfast int8", *INT8_PROVIDERS]
    assert model_providers.defaults("cpu", torch.int8) == wanted
    assert model_providers.defaults("cuda", torch.float8_e4m3fn) == ["vitfast fp8"]
    assert model_providers.defaults("cpu", None) == list(model_providers.DEFAULTS["cpu"])
    done = bench(
        "model", "-m", "test_vit", "--batch", 2, "--device", "cpu", "--dtype", "int8", "--rounds", 2, "--no-roofs",
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    rows = {row["provider"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows.keys() == {*wanted, "timm eager"}, done.output
    assert rows["timm eager"]["dtype"] == "bfloat16" and rows["timm eager"]["correct"]
    assert {rows[name]["dtype"] for name in wanted} == {"int8"}
