"""The command `vitfast verify` and verify_model behind it: exit codes, pure JSON, and wrong engines found."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.peers import VIT, import_transformers, transformers_model
from helpers.scripts import python
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from vitfast.cli.app import app
from vitfast.diagnostics.verify import Report, verify_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny transformers ViT with its processor, and the same with one weight changed."""
    import_transformers()
    from transformers.models.vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("models")
    model = transformers_model("ViTForImageClassification", VIT | {"num_labels": 5})
    size = model.config.image_size
    for name in ("one", "other"):
        model.save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder / name)
        with torch.no_grad():
            model.vit.layers[0].mlp.fc1.weight[0] += 1
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)], env={"COLUMNS": "80"})
    assert "Traceback" not in result.output
    return result


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_command(saved, dtype):
    result = run(saved / "one", "--dtype", dtype, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["against"] == "torch"
    assert [output["name"] for output in found["outputs"]] == ["tokens", "embedding", "logits"]
    assert found["outputs"][0]["shape"][0] == 4
    assert (found["outputs"][0]["allowed_rms"] is None) is (dtype != "fp32")
    assert found["notes"] == []


def test_command_with_another_model(saved):
    result = run(saved / "one", "--against", saved / "other", "--device", "cpu", "--dtype", "fp32")
    assert result.exit_code == 1
    assert "differs" in result.stdout
    assert run(saved / "one", "--against", saved / "one", "--device", "cpu").exit_code == 0


def test_command_with_one_of_several_weights(saved, tmp_path):
    """`verify` and `doctor --plan` take the weights that --weights-key names, as `embed` does."""
    shutil.copy(saved / "one" / "config.json", tmp_path)
    averaged, raw = (load_file(saved / name / "model.safetensors") for name in ("one", "other"))
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "checkpoint.pth.tar")
    several = [tmp_path / "checkpoint.pth.tar", "--allow-pickle", "--device", "cpu"]
    assert run(*several, "--weights-key", "state_dict", "--against", saved / "other").exit_code == 0
    assert run(*several, "--weights-key", "state_dict", "--against", saved / "one").exit_code == 1
    arguments = ["doctor", "--plan", *map(str, several), "--weights-key", "none"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "no weights called 'none'" in result.output


def test_command_with_images(saved, tmp_path):
    for index, size in enumerate([(40, 30), (64, 64), (33, 90)]):
        noise = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(noise.numpy()).save(tmp_path / f"{index}.png")
    found = json.loads(run(saved / "one", "--images", tmp_path, "--json").stdout)
    assert found["ok"]
    assert found["inputs"] == "3 image files"
    assert found["outputs"][0]["shape"][0] == 3
    (tmp_path / "bad.png").write_text("no")
    result = run(saved / "one", "--images", tmp_path, "--json")
    assert result.exit_code == 2
    assert "not an image" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing"),
        (["one", "--against", "missing"], "missing"),
        (["one", "--images", "missing.png"], "no such file"),
        (["one", "--device", "cpu", "--backend", "triton"], "cannot run"),
    ],
)
def test_command_with_bad_input(arguments, message, saved, monkeypatch):
    from vitfast.kernels._parts import launch
    from vitfast.ops import registry

    monkeypatch.chdir(saved)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    registry.backend.cache_clear()
    result = run(*arguments, "--json")
    registry.backend.cache_clear()
    assert result.exit_code == 2
    assert message in json.loads(result.stdout)["error"]


def test_a_backend_that_is_wrong_is_found(saved, monkeypatch):
    """The engine's own forward with a wrong op: the command says so and exits with 1."""
    from vitfast.ops import reference

    right = reference.attention
    plain = verify_model(str(saved / "one"), device="cpu", dtype="fp32")
    assert plain

    from vitfast.engine import planner

    assemble = planner.assemble

    def wrong(config, chosen, *, packed, **options):
        plan = assemble(config, chosen, packed=packed, **options)
        if packed:  # the engine under test is planned with "auto", the one it is compared with is not
            return dataclasses.replace(plan, attention=lambda *args, **kwargs: right(*args, **kwargs) * 1.5)
        return plan

    monkeypatch.setattr(planner, "assemble", wrong)
    for dtype in ("fp32", "bf16"):
        result = run(saved / "one", "--device", "cpu", "--dtype", dtype, "--json")
        assert result.exit_code == 1, dtype
        assert any(not output["ok"] for output in json.loads(result.stdout)["outputs"])


def test_tf32_is_off_meanwhile_and_back_afterwards(saved, monkeypatch):
    def state():
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    before, seen = state(), []
    source = importlib.import_module("vitfast.diagnostics.verify")
    monkeypatch.setattr(source, "verify", lambda *_, **__: seen.append(state()) or Report((), 1))
    verify_model(saved / "one", device="cpu", dtype="fp32")
    assert seen == [("ieee", "ieee")]
    assert state() == before


def test_a_live_model_and_a_path(saved):
    model = transformers_model("ViTForImageClassification", VIT | {"num_labels": 5})
    assert verify_model(model, device="cpu").about["against"] == "torch"
    assert verify_model(Path(saved / "one"), device="cpu")


def test_help_has_an_example_and_imports_nothing_heavy():
    assert "vitfast verify" in run("--help").stdout.split("Example:")[1]
    code = "import sys\nfrom vitfast.cli.app import app\ntry: app(['verify', '--help'])\nexcept SystemExit: pass\n"
    assert python(code + "assert not {'torch', 'triton', 'numpy'} & sys.modules.keys(), 'heavy'")
    assert run("model", "--backend", "cuda").exit_code == 2
