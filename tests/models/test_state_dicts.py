"""Which of a training checkpoint's weights are taken, and what comes off their names."""

import argparse
import json
import re
import warnings

import pytest
import torch
from helpers import peers
from helpers.peers import TIMM, VIT, timm_model, transformers_model
from safetensors.torch import load_file, save_file
from torch import nn

from vitfast.models import checkpoints
from vitfast.models.checkpoints import CheckpointError


def scaled(model, factor):
    return {name: tensor * factor for name, tensor in model.state_dict().items()}


def equal(loaded, state, factor=1.0) -> bool:
    return torch.equal(loaded.weights["norm.weight"], state["norm.weight"] * factor)


@pytest.fixture
def trained(tmp_path):
    """A timm model, its folder, and a function that saves a training checkpoint there."""
    peers.import_timm()
    from timm.models import save_for_hf

    model = timm_model(**TIMM)
    save_for_hf(model, tmp_path, model_args=TIMM, safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()

    def save(content, name="last.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return model, save


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "state_dict")])
def test_timms_choice_is_taken_and_said(trained, names):
    """Against timm's own loader."""
    model, save = trained
    content = {name: scaled(model, factor) for name, factor in zip(names, (1, 2), strict=True)}
    path = save({"epoch": 3, **content, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}})
    from timm.models import load_checkpoint

    own = timm_model(**TIMM)
    load_checkpoint(own, str(path))
    with pytest.warns(UserWarning, match=f"weights taken are those under '{names[1]}', not '{names[0]}'"):
        loaded = checkpoints.load(path, allow_pickle=True)
    assert torch.equal(loaded.weights["norm.weight"], own.norm.weight)
    for name in names:
        named = checkpoints.load(path, allow_pickle=True, weights_key=name)
        assert equal(named, content[name])


def test_dinos_teacher_is_taken_and_said(trained):
    model, save = trained
    path = save({"student": scaled(model, 1), "teacher": scaled(model, 2), "epoch": 3})
    with pytest.warns(UserWarning, match="weights taken are those under 'teacher', not 'student'"):
        assert equal(checkpoints.load(path, allow_pickle=True), model.state_dict(), 2)


def test_one_state_dict_needs_no_word(trained):
    model, save = trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in (
            model.state_dict(),
            {"state_dict": model.state_dict(), "epoch": 1},
            {"a": {"b": scaled(model, 1)}},
        ):
            assert equal(checkpoints.load(save(content), allow_pickle=True), model.state_dict())


@pytest.mark.parametrize("name", ["last.pth", "last.pt", "last.bin", "last.ckpt", "last.pth.tar"])
def test_endings(trained, name):
    model, save = trained
    content = {"state_dict": model.state_dict(), "args": argparse.Namespace(lr=0.1)}  # as trainers save it
    assert equal(checkpoints.load(save(content, name), allow_pickle=True), model.state_dict())
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is a pickle") + ".*--allow-pickle"):
        checkpoints.load(save(content, name))


def test_what_there_is_is_listed(trained):
    model, save = trained
    content = {"epoch": 3, "student": scaled(model, 1), "net": {"ema": scaled(model, 2)}}
    with pytest.raises(CheckpointError, match=r"not clear. weights_key may be 'student' \(\d+ tensors\), 'net\.ema'"):
        checkpoints.load(save(content), allow_pickle=True)
    assert equal(checkpoints.load(save(content), allow_pickle=True, weights_key="net.ema"), model.state_dict(), 2)
    with pytest.raises(CheckpointError, match=r"no weights called 'teacher'\. weights_key may be 'student'"):
        checkpoints.load(save(content), allow_pickle=True, weights_key="teacher")
    with pytest.raises(CheckpointError, match=r"no state dict of tensors, only 'epoch' \(int\), 'config' \(dict\)"):
        checkpoints.load(save({"epoch": 3, "config": {"lr": 0.1}}), allow_pickle=True)
    with pytest.raises(CheckpointError, match="holds a list"):
        checkpoints.load(save([1, 2]), allow_pickle=True)
    with pytest.raises(CheckpointError, match="applies to files only"):
        checkpoints.load(model, weights_key="state_dict")


def test_one_of_several_models_by_its_prefix(trained):
    """A momentum encoder beside an encoder, as MoCo saves them."""
    model, save = trained
    content = {
        f"module.{part}.{name}": tensor * (1 + (part == "momentum"))
        for part in ("base", "momentum")
        for name, tensor in model.state_dict().items()
    }
    path = save({"state_dict": content})
    with pytest.raises(CheckpointError, match=r"several models, 'module\.base', 'module\.momentum'"):
        checkpoints.load(path, allow_pickle=True)
    loaded = checkpoints.load(path, allow_pickle=True, weights_key="state_dict.module.momentum")
    assert equal(loaded, model.state_dict(), 2)


PREFIXES = ("module.", "_orig_mod.", "model.", "module._orig_mod.", "net.backbone.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_come_off_with_a_note(trained, tmp_path_factory, prefix):
    model, save = trained
    path = save({"state_dict": {prefix + name: tensor for name, tensor in model.state_dict().items()}})
    with pytest.warns(UserWarning, match=re.escape(f"the prefix {prefix!r} has been taken off")):
        assert equal(checkpoints.load(path, allow_pickle=True), model.state_dict())
    directory = tmp_path_factory.mktemp("transformers")
    for name in ("ViTForImageClassification", "ViTModel"):
        transformers_model(name, VIT).save_pretrained(directory)
        whole = checkpoints.load(directory)
        state = load_file(directory / "model.safetensors")
        save_file({prefix + key: tensor for key, tensor in state.items()}, directory / "model.safetensors")
        with pytest.warns(UserWarning, match=re.escape(repr(prefix))):
            loaded = checkpoints.load(directory)
        assert all(torch.equal(loaded.weights[key], whole.weights[key]) for key in whole.weights)


def test_an_averaged_models_state_dict(trained):
    """Its counter goes with the wrapper."""
    model, save = trained
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with pytest.warns(UserWarning, match=r"'module\.'"):
        assert equal(checkpoints.load(save(averaged.state_dict()), allow_pickle=True), model.state_dict())


def test_what_is_no_wrappers_stays(trained):
    model, save = trained
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"loss\.weight"):
        checkpoints.load(save(state | {"loss.weight": torch.zeros(3)}), allow_pickle=True)


def test_a_head_of_another_size_is_no_random_head(trained):
    """timm leaves such a head out and goes on with one of random weights."""
    model, save = trained
    path = save(model.state_dict())
    settings = json.loads((path.parent / "config.json").read_text())
    settings["model_args"]["num_classes"] = 3
    (path.parent / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        checkpoints.load(path, allow_pickle=True)


BOMBS = {
    "stride 0": lambda: torch.zeros(1).expand(48, 2**50),
    "overlapping": lambda: torch.zeros(100).as_strided((48, 48), (1, 1)),
    "wrong shape, stride 0": lambda: torch.zeros(1, 1).expand(2**25, 2**25),
    "sparse": lambda: torch.zeros(48, 48).to_sparse(),
    "fp8": lambda: torch.zeros(48, 48).to(torch.float8_e4m3fn),
    "complex": lambda: torch.zeros(48, 48, dtype=torch.complex64),
}
REASONS = {"overlapping": "repeats its memory", "sparse": "layout", "fp8": "float8", "complex": "complex64"}


@pytest.mark.parametrize("bomb", BOMBS)
def test_weights_that_are_refused_before_their_values_are_read(tmp_path, bomb):
    """A few bytes may say that they are a petabyte."""
    model = transformers_model("ViTModel", VIT)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    name = "encoder.layer.1.attention.output.dense.weight"
    torch.save(state | {name: BOMBS[bomb]()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*{REASONS.get(bomb, 'expected')}"):
        checkpoints.load(tmp_path, allow_pickle=True)


def test_a_tied_or_expanded_live_weight():
    model = timm_model(**TIMM)
    model.norm.weight = nn.Parameter(torch.ones(1).expand(48))
    with pytest.raises(CheckpointError, match=r"norm\.weight repeats its memory"):
        checkpoints.load(model)
