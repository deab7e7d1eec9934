"""examples/detr.py and examples/image_gpt.py: they run without a network, and notice a wrong attention."""

import importlib.util
from pathlib import Path

import pytest
from helpers import peers

from vitfast.attention import sdpa


def load(name):
    path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["detr", pytest.param("image_gpt", marks=pytest.mark.full)])
def example(request):
    peers.import_transformers()
    return load(request.param)


def test_small_model(example, capsys):
    assert example.main([]) == 0
    shown = capsys.readouterr().out
    assert "0 left" in shown
    if example.__name__ == "example_detr":
        assert "Swap(3 replaced" in shown
        boxes, same = shown.split("with it:")[1].split("without it:")
        assert boxes.split() == same.split()
        assert len({line.partition(" at ")[2] for line in boxes.strip().splitlines()}) > 1
    else:
        assert "0 of 48 pixels differ" in shown
        assert len(set("".join(shown.splitlines()[:4]).replace(" ", ""))) > 3


def test_a_wrong_attention_is_noticed(example, monkeypatch, capsys):
    original = sdpa.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa, "scaled_dot_product_attention", lambda q, k, v, **kwargs: original(q * 1.5, k, v, **kwargs)
    )
    assert example.main(["--backend", "torch"]) == 1


def test_a_real_model_from_a_directory(example, tmp_path, capsys):
    """A saved model stands for one of the hub."""
    if example.__name__ == "example_detr":
        with pytest.raises(SystemExit):
            example.main(["--model", str(tmp_path)])
        assert "go together" in capsys.readouterr().err
        from PIL import Image
        from transformers.models.detr import DetrImageProcessorPil

        model, _ = example.small_model(peers.import_transformers())
        DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        files = [tmp_path / f"{width}.png" for width in (60, 90)]
        for file in files:
            Image.effect_noise((int(file.stem), 64), 80).save(file)
        arguments = ["--images", *map(str, files)]
    else:
        example.small_model(peers.import_transformers()).save_pretrained(tmp_path)
        with pytest.raises(SystemExit):
            example.main(["--model", str(tmp_path), "--side", "5"])
        assert "needs 25 positions, the model has 16" in capsys.readouterr().err
        arguments = ["--count", "2"]
    assert example.main(["--model", str(tmp_path), "--backend", "torch", *arguments]) == 0
