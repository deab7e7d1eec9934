"""Checkpoint files, hub ids and names: what is read, how it is checked, and every way it can be wrong."""

import copy
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import peers
from helpers.peers import DINO, TIMM, VIT, timm_model, torchvision_model, transformers_model
from safetensors.torch import load_file, save_file
from torch import nn

import vitfast
from vitfast.models import checkpoints
from vitfast.models.checkpoints import CheckpointError


@pytest.fixture
def directory(tmp_path):
    """A ViT classifier's files, and a function that rewrites its weights."""
    model = transformers_model("ViTForImageClassification", VIT | {"num_labels": 5})
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(directory, **changes) -> None:
    """Replace, add or (None) remove tensors of model.safetensors."""
    state = load_file(directory / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, directory / "model.safetensors")


QUERY = "vit.encoder.layer.1.attention.attention.query.weight"


def test_sharded(directory, tmp_path):
    whole = checkpoints.load(directory)
    model = peers.import_transformers().ViTForImageClassification.from_pretrained(directory)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    loaded = checkpoints.load(sharded)
    assert loaded.weights.keys() == whole.weights.keys()
    assert all(torch.equal(loaded.weights[name], whole.weights[name]) for name in whole.weights)
    (sharded / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"not there: {re.escape(shards[1])}"):
        checkpoints.load(sharded)


def test_single_file(directory, tmp_path):
    assert checkpoints.load(directory / "model.safetensors").config.num_classes == 5
    assert checkpoints.load(str(directory / "model.safetensors")).config.num_classes == 5
    lone = tmp_path / "elsewhere"
    lone.mkdir()
    (lone / "weights.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"weights\.safetensors says nothing.* config\.json beside it"):
        checkpoints.load(lone / "weights.safetensors")


def test_every_problem_is_listed(directory):
    changes = {
        QUERY: torch.zeros(48, 40),
        "vit.layernorm.bias": None,
        "vit.encoder.layer.0.attention.attention.value.bias": None,
        "vit.embeddings.position_embeddings": torch.zeros(1, 10, 48),
        "vit.encoder.layer.0.output.dense.weight": torch.zeros(48, 95),
        "stowaway": torch.zeros(3),
        "vit.pooler.dense.weight": torch.zeros(48, 48),  # ignorable
    }
    rewrite(directory, **changes)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(directory)
    message = str(caught.value)
    for name in changes:
        assert (name in message) == ("pooler" not in name), f"{name} in: {message}"
    for shape in ("[48, 40]", "[1, 10, 48]", "[48, 95]", "expected [48, 96]", "expected [16, 48]"):
        assert shape in message, f"{shape} in: {message}"
    assert "6 problem(s)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight(directory, value):
    weight = load_file(directory / "model.safetensors")[QUERY]
    weight[3, 5] = value
    rewrite(directory, **{QUERY: weight})
    with pytest.raises(CheckpointError, match=re.escape(f"{QUERY} holds 1 NaN or infinite")):
        checkpoints.load(directory)


def test_integer_weight(directory):
    rewrite(directory, **{QUERY: torch.zeros(48, 48, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"query\.weight .*torch\.int8"):
        checkpoints.load(directory)


def test_meta_module():
    peers.import_transformers()
    model = copy.deepcopy(transformers_model("ViTModel", VIT)).to("meta")
    with pytest.raises(CheckpointError, match=r"embeddings\.cls_token is on the meta device"):
        checkpoints.load(model)


def test_pickle(directory):
    state = load_file(directory / "model.safetensors")
    whole = checkpoints.load(directory)
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    for source in (directory, directory / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="allow_pickle=True"):
            checkpoints.load(source)
        loaded = checkpoints.load(source, allow_pickle=True)
        assert all(torch.equal(loaded.weights[name], whole.weights[name]) for name in whole.weights)
    torch.save({"weight": print}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be read with torch\.load\(weights_only=True\)"):
        checkpoints.load(directory, allow_pickle=True)


def test_damaged_files(directory):
    weights, settings = directory / "model.safetensors", directory / "config.json"
    original = weights.read_bytes()
    weights.write_bytes(original[: len(original) // 2])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        checkpoints.load(directory)
    weights.write_bytes(original)
    text = settings.read_text()
    settings.write_text(text[:-10])
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        checkpoints.load(directory)
    settings.write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither 'model_type'.* nor 'architecture'"):
        checkpoints.load(directory)
    settings.unlink()
    with pytest.raises(CheckpointError, match=r"needs a config\.json"):
        checkpoints.load(directory)
    settings.write_text(text)
    weights.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        checkpoints.load(directory)


def test_index_may_not_leave_its_directory(directory):
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    index = {"weight_map": {QUERY: "../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        checkpoints.load(directory)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["ViTForMaskedImageModeling"]}, r"ViTForMaskedImageModeling' is not supported: a decoder"),
        ({"architectures": ["VideoMAEModel"]}, r"VideoMAEModel.*patches of several frames"),
        ({"architectures": None, "model_type": "swin"}, r"'swin' is not supported\. Supported: ViTModel"),
        ({"hidden_act": "relu"}, r"hidden_act='relu'"),
        ({"image_size": 30}, r"(?s)gives position \[16, 48\], expected \[9, 48\].*image_size=30"),
        (
            {"image_size": 7},
            r"(?s)image_size must be at least one patch, got \(7, 7\).*config\.json says",
        ),
    ],
)
def test_transformers_refused_by_name(directory, change, reason):
    settings = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=reason):
        checkpoints.load(directory)


@pytest.mark.parametrize("source", ["nobody/no-such-model", "hf_hub:nobody/no-such-model"])
def test_unknown_hub_id(source, monkeypatch):
    """Whatever the client raises, the answer names id and reason. No request leaves the machine."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"'nobody/no-such-model'.*ConnectionError: no route to the hub"):
        checkpoints.load(source)


def test_hub_fetches_safe_files_only(monkeypatch, directory):
    import huggingface_hub

    asked = []

    def snapshot(hub_id, *, revision, allow_patterns):
        asked.append((hub_id, revision, tuple(allow_patterns)))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert checkpoints.load("org/name", revision="v2", allow_pickle=True).config.name == "org/name"
    assert [call[:2] for call in asked] == [("org/name", "v2")] * 2  # the settings, then all
    settings = (".json", "merges.txt", "spiece.model", "tokenizer.model")  # a tokenizer's are text and protobuf
    assert all(pattern.endswith(settings) for pattern in asked[0][2])
    assert all(pattern.endswith((*settings, ".safetensors")) for pattern in asked[1][2])
    peers.import_timm()
    asked.clear()
    checkpoints.load("vit_tiny_patch16_224")
    assert asked[0][0] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    # Pickles are asked for only with permission, and only after the hub had nothing else.
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    asked.clear()
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        checkpoints.load("org/name")
    assert len(asked) == 2
    assert checkpoints.load("org/name", allow_pickle=True).config.num_classes == 5
    assert "pytorch_model.bin" in asked[-1][2]


REFUSED_BY_SETTINGS = {
    "transformers' class": ({"model_type": "swin", "architectures": ["SwinModel"]}, "'SwinModel' is not supported"),
    "timm's class": ({"architecture": "swin_tiny_patch4_window7_224"}, "timm's SwinTransformer is not supported"),
    "timm's feature": (
        {"architecture": "vit_tiny_patch16_224", "model_args": {"global_pool": "median"}}, "global_pool|median",
    ),
    "nothing": (None, r"has no config\.json"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED_BY_SETTINGS.values(), ids=REFUSED_BY_SETTINGS)
def test_a_hub_model_is_refused_before_its_weights(settings, message, monkeypatch, tmp_path):
    import huggingface_hub

    if settings is not None:
        (tmp_path / "config.json").write_text(json.dumps(settings))
    asked = []

    def snapshot(hub_id, *, revision, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load("org/name")
    assert asked
    assert not any("safetensors" in pattern or ".bin" in pattern for pattern in asked)


def test_unknown_names(tmp_path):
    peers.import_timm()
    with pytest.raises(CheckpointError, match=r"'no_such_model'.*timm has no such model"):
        checkpoints.load("no_such_model")
    with pytest.raises(CheckpointError, match=r"did you mean .*'vit_base_patch16_224'"):
        checkpoints.load("vit_base_patch16_244")
    with pytest.raises(CheckpointError, match=r"no weights called 'vit_tiny_patch16_224\.no_such_tag'"):
        checkpoints.load("vit_tiny_patch16_224.no_such_tag")
    with pytest.raises(CheckpointError, match="no weights on the Hugging Face hub for 'vit_small_patch16_36x1_224'"):
        checkpoints.load("vit_small_patch16_36x1_224")
    for missing in (str(tmp_path / "absent"), "./a/b/c", "absent.safetensors"):
        with pytest.raises(CheckpointError, match=f"{re.escape(missing)}.* is no file or directory"):
            checkpoints.load(missing)
    with pytest.raises(CheckpointError, match="revision='main' applies to hub ids only"):
        checkpoints.load(tmp_path, revision="main")


def test_nothing_is_imported_for_files(directory):
    """A transformers directory loads where transformers is not installed."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'timm', 'torchvision'): sys.modules[name] = None\n"
        "from vitfast.models import checkpoints\n"
        f"assert checkpoints.load({str(directory)!r}).config.num_classes == 5\n"
        "try: checkpoints.load('vit_tiny_patch16_224')\n"
        "except checkpoints.CheckpointError as error: assert 'needs timm' in str(error), error\n"
        "else: raise SystemExit('loaded')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def timm_directory(model: nn.Module, directory, **kwargs) -> None:
    from timm.models import save_for_hf

    save_for_hf(model, directory, **{"safe_serialization": True, **kwargs})


def test_timm_directory(tmp_path):
    """save_for_hf's config.json names the architecture and its arguments; timm rebuilds it."""
    model = timm_model(**TIMM, reg_tokens=2, init_values=0.1)
    timm_directory(model, tmp_path, model_args=TIMM | {"reg_tokens": 2, "init_values": 0.1})
    stored, live = checkpoints.load(tmp_path), checkpoints.load(model)
    assert stored.config == live.config
    assert stored.preprocess == live.preprocess
    assert stored.weights.keys() == live.weights.keys()
    assert all(torch.equal(stored.weights[name], live.weights[name]) for name in live.weights)


def test_timm_directory_that_does_not_fit(tmp_path):
    model = timm_model(**TIMM)
    timm_directory(model, tmp_path, model_args=TIMM)
    state = load_file(tmp_path / "model.safetensors")
    state["blocks.0.attn.extra"] = state.pop("blocks.1.mlp.fc1.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)blocks\.1\.mlp\.fc1\.bias.*blocks\.0\.attn\.extra"):
        checkpoints.load(tmp_path)


def test_timm_pickle_needs_permission(tmp_path):
    model = timm_model(**TIMM)
    timm_directory(model, tmp_path, model_args=TIMM, safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*allow_pickle=True"):
        checkpoints.load(tmp_path)
    loaded, live = checkpoints.load(tmp_path, allow_pickle=True), checkpoints.load(model)
    assert all(torch.equal(loaded.weights[name], live.weights[name]) for name in live.weights)


def test_transformers_labels(tmp_path):
    names = {0: "cat", 1: "dog", 2: "cup"}
    config = VIT | {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    model = transformers_model("ViTForImageClassification", config)
    model.save_pretrained(tmp_path)
    assert checkpoints.load(model).labels == checkpoints.load(tmp_path).labels == ("cat", "dog", "cup")
    assert checkpoints.load(transformers_model("ViTForImageClassification", VIT | {"num_labels": 3})).labels is None


# preprocessing


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"size": {"shortest_edge": 32}}, "no fixed size"),
        ({"image_processor_type": "SamImageProcessor"}, "SamImageProcessor"),
        ({"image_mean": [0.5], "image_std": [0.5]}, r"3 input channel"),
    ],
)
def test_inexpressible_preprocess_warns(directory, change, reason):
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings | change))
    with pytest.warns(UserWarning, match=rf"preprocessor_config\.json: preprocessing unknown: .*{reason}"):
        assert checkpoints.load(directory).preprocess is None


@pytest.mark.parametrize(
    ("name", "config", "resize"),
    [
        ("ViTModel", VIT, (40, 40)),
        ("DeiTModel", VIT, (40, 40)),
        ("Dinov2Model", DINO, 40),
        ("CLIPVisionModel", VIT, 40),
    ],
)
def test_old_processor_settings(name, config, resize, tmp_path):
    """Files that name no processor take the family's: a bare number is a square or the shortest side."""
    transformers_model(name, config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": 40, "crop_size": 32, "do_center_crop": True})
    )
    found = checkpoints.load(tmp_path).preprocess
    assert (found.resize, found.size) == (resize, (32, 32))


def test_preprocess_is_found_beside_the_weights(directory):
    assert checkpoints.load(directory).preprocess is None
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert checkpoints.load(directory).preprocess.interpolation == "bilinear"
    (directory / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 3}))
    assert checkpoints.load(directory).preprocess.interpolation == "bicubic"
    model = peers.import_transformers().ViTForImageClassification.from_pretrained(directory)
    assert checkpoints.load(model).preprocess == checkpoints.load(directory).preprocess


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224.openai", "vit_small_patch14_reg4_dinov2"]
)
def test_timm_preprocess_is_timms_own(name):
    """Against the transform that timm itself builds."""
    model = timm_model(name, embed_dim=48, depth=1, num_heads=3)
    from timm.data import create_transform, resolve_model_data_config

    found = checkpoints.load(model).preprocess
    resize, crop, *_, normalise = create_transform(**resolve_model_data_config(model)).transforms
    assert found.resize == resize.size
    assert found.interpolation == resize.interpolation.value
    assert found.size == tuple(crop.size)
    assert torch.allclose(torch.tensor(found.mean), torch.as_tensor(normalise.mean))
    assert torch.allclose(torch.tensor(found.std), torch.as_tensor(normalise.std))
    assert found.rounding == "even"


def test_timm_preprocess_that_is_unknown_or_inexpressible():
    model = timm_model(**TIMM)
    model.pretrained_cfg["crop_mode"] = "border"
    with pytest.warns(UserWarning, match="preprocessing unknown: .*'border'"):
        assert checkpoints.load(model).preprocess is None
    assert checkpoints.load(timm_model(**TIMM)).preprocess.size == (32, 32)  # the model's, not pretrained_cfg's 224
    model.pretrained_cfg = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.load(model).preprocess is None


def test_torchvision_preprocess():
    """What torchvision's own IMAGENET1K_V1 weights ask for."""
    torchvision = peers.import_torchvision()
    found = checkpoints.load(torchvision_model(image_size=224, patch_size=32)).preprocess
    own = torchvision.models.ViT_B_32_Weights.IMAGENET1K_V1.transforms()
    assert [found.resize] == own.resize_size
    assert list(found.size) == own.crop_size * 2
    assert found.interpolation == own.interpolation.value
    assert (list(found.mean), list(found.std)) == (own.mean, own.std)


def test_public_names():
    assert vitfast.Checkpoint is checkpoints.Checkpoint
    assert issubclass(vitfast.CheckpointError, ValueError)
