"""Layouts of weights on disk: bare files with an architecture by name, folders of other tools, and our own."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
from helpers import engines, peers
from helpers.clip_names import openai_names
from helpers.transformers_models import CLIP_TEXT
from safetensors.torch import load_file, save_file

import vitfast
from vitfast.engine import plan_cache, planner
from vitfast.images.preprocess import Preprocess
from vitfast.models import checkpoints
from vitfast.models.checkpoints import CheckpointError, named, open_clip
from vitfast.testing import make

TINY = "vit_tiny_patch16_224"
CLIP = {
    "vision_config": peers.VIT | {"layer_norm_eps": 1e-5, "hidden_size": 128, "num_attention_heads": 2},
    "text_config": CLIP_TEXT,
    "projection_dim": 24,
}


@pytest.fixture(scope="module")
def tiny():
    """timm's ViT-Ti, for 64 pixels, with 3 classes."""
    return peers.timm_model(TINY, num_classes=3, img_size=64)


def same(loaded, model, x):
    """Compare a checkpoint's engine with the model that it was made of."""
    engine = vitfast.Engine(loaded, backend="torch", device="cpu")
    with torch.no_grad():
        peers.close(engine(x).logits, model(x))


@pytest.mark.parametrize("form", ["bare", "model", "lightning", "wrapped"])
def test_a_timm_file_by_name(tiny, tmp_path, form):
    state = tiny.state_dict()
    content = {
        "bare": state,
        "model": {"model": state, "epoch": 3},
        "lightning": {
            "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
            "pytorch-lightning_version": "2.4.0",
            "hyper_parameters": {"lr": 1e-3},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        },
        "wrapped": {f"module.{name}": tensor for name, tensor in state.items()},
    }[form]
    path = tmp_path / ("last.ckpt" if form == "lightning" else "last.pth")
    torch.save(content, path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = checkpoints.load(path, model=TINY, allow_pickle=True)
    assert sum("has been taken off" in str(w.message) for w in told) == (form in ("lightning", "wrapped"))
    assert loaded.config.num_classes == 3
    assert loaded.preprocess == Preprocess.from_timm(tiny.pretrained_cfg | {"input_size": (3, 64, 64)})
    same(loaded, tiny, make(1, 3, 64, 64))
    with pytest.raises(CheckpointError, match=r"is a pickle.*--allow-pickle"):
        checkpoints.load(path, model=TINY)


def test_a_file_of_another_size_keeps_it(tmp_path):
    model = peers.timm_model(TINY, img_size=64, num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = checkpoints.load(tmp_path / "model.safetensors", model=TINY)
    assert loaded.config.image_size == (64, 64)
    assert torch.equal(loaded.weights["position"], model.pos_embed[0, 1:])


def test_shards_by_name(tiny, tmp_path):
    state = tiny.state_dict()
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for i, (name, tensor) in enumerate(state.items()):
        parts[list(parts)[i % 2]][name] = tensor
    for file, part in parts.items():
        save_file(part, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = checkpoints.load(tmp_path, model=TINY)
    assert torch.equal(loaded.weights["norm.weight"], tiny.norm.weight)


def test_a_torchvision_file_by_name(tmp_path, monkeypatch):
    library = peers.import_torchvision()
    model = peers.torchvision_model()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    asked = []

    def get_model(name, **options):
        """The sizes of vit_b_16 are 340 MB of weights."""
        asked.append((name, options))
        small = {"patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}
        return library.models.VisionTransformer(**small, **{k: v for k, v in options.items() if k != "weights"})

    monkeypatch.setattr(library.models, "get_model", get_model)
    loaded = checkpoints.load(tmp_path / "vit.pth", model="vit_b_16", allow_pickle=True)
    assert asked == [("vit_b_16", {"weights": None, "num_classes": 7, "image_size": 32})]
    same(loaded, model, make(2, 3, 32, 32))
    torch.save(model.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"does not fit 'vit_b_16': (.|\n)*extra"):
        checkpoints.load(tmp_path / "vit.pth", model="vit_b_16", allow_pickle=True)


@pytest.mark.full
@pytest.mark.parametrize("name", named.TORCHVISION[:2])
def test_torchvisions_own_names(tmp_path, name):
    model = peers.import_torchvision().models.get_model(name, weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    same(checkpoints.load(tmp_path / "vit.pth", model=name, allow_pickle=True), model, make(1, 3, 224, 224))


@pytest.mark.parametrize("registers", [pytest.param(0, marks=pytest.mark.full), 4])
def test_the_dinov2_repositorys_files(tmp_path, registers):
    """Against transformers' own conversion: the same architecture, its names, the repository's position rule."""
    name = "dinov2_vits14" + ("_reg" if registers else "")
    own = peers.timm_model(named.DINOV2[name])
    state = dict(own.state_dict())
    position = own.pos_embed.detach()
    state |= {"mask_token": torch.zeros(1, 384)}
    if registers:  # the repository keeps positions for the class token and the patches, and adds the registers later
        state["register_tokens"] = state.pop("reg_token")
        zero = torch.zeros(1, 1, 384)
        state["pos_embed"] = torch.cat([zero, position], dim=1)
    torch.save(state, tmp_path / "dinov2.pth")
    loaded = checkpoints.load(tmp_path / "dinov2.pth", model=name, allow_pickle=True)
    config = loaded.config
    assert (config.name, config.prefix_tokens, config.image_size) == (name, 1 + registers, (518, 518))
    assert (config.position_antialias, config.position_offset) == ((True, 0.0) if registers else (False, 0.1))
    assert torch.equal(loaded.weights["blocks.11.qkv.weight"], own.blocks[11].attn.qkv.weight)
    assert torch.equal(loaded.weights["position"], position[0, -37 * 37 :])
    first = own.cls_token[0, 0] + (0 if registers else position[0, 0])
    torch.testing.assert_close(loaded.weights["prefix"][0], first)


@pytest.fixture(scope="module")
def clip():
    """A small CLIP of transformers, and its weights by OpenAI's names."""
    model = peers.transformers_model("CLIPModel", CLIP)
    return model, openai_names(model)


def check_clip(loaded, model):
    engine = vitfast.Engine(loaded, backend="torch", device="cpu")
    x = make(2, 3, 32, 32)
    with torch.no_grad():
        want = model.get_image_features(pixel_values=x)
    peers.close(engine(x).embedding, getattr(want, "pooler_output", want))


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B-32-quickgelu"])
def test_openais_state_dict(clip, tmp_path, name):
    model, state = clip
    scalars = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(9), "vocab_size": torch.tensor(99)}
    torch.save(state | scalars, tmp_path / "clip.pt")
    loaded = checkpoints.load(tmp_path / "clip.pt", model=name, allow_pickle=True)
    assert loaded.preprocess == Preprocess(
        size=(32, 32), resize=32, mean=open_clip.OPENAI_MEAN, std=open_clip.OPENAI_STD, rounding="even"
    )
    check_clip(loaded, model)
    wrong = checkpoints.load(tmp_path / "clip.pt", model="ViT-B-32", allow_pickle=True)
    assert wrong.config.activation == "gelu"
    with pytest.raises(CheckpointError, match=r"clip.pt says nothing.*a CLIP: model=\"ViT-B/32\" for OpenAI's"):
        checkpoints.load(tmp_path / "clip.pt", allow_pickle=True)


OPEN_CLIP = {
    "model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": {"image_size": 32, "layers": 2, "width": 128}},
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3], "interpolation": "bilinear"},
}


def open_clip_folder(folder, state, pickled=False, **vision):
    settings = json.loads(json.dumps(OPEN_CLIP))
    settings["model_cfg"]["vision_cfg"] |= vision
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    if pickled:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("pickled", [False, True])
def test_an_open_clip_folder(clip, tmp_path, pickled):
    model, state = clip
    folder = open_clip_folder(tmp_path, state, pickled)
    (tmp_path / "model-2.safetensors").touch()  # another library's weights in the same folder
    loaded = checkpoints.load(folder, allow_pickle=pickled)
    assert (loaded.preprocess.mean, loaded.preprocess.interpolation) == ((0.5, 0.4, 0.3), "bilinear")
    check_clip(loaded, model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attentional_pool": "parallel"}, "attentional pooling of the kind 'parallel'"),
        ({"qk_norm": True}, "qk_norm in custom blocks"),
        ({"norm_kwargs": {"elementwise_affine": False}}, r"norm_kwargs \['elementwise_affine'\]"),
        ({"head_width": -1}, "vision_cfg.head_width must be a whole number from 1"),
        ({"pool_type": "none"}, "pool_type='none'"),
    ],
)
def test_open_clip_towers_that_are_refused(clip, tmp_path, changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.load(open_clip_folder(tmp_path, clip[1], **changes))


def test_open_clip_states_that_do_not_fit(clip, tmp_path):
    _, state = clip
    for changes, reason in (
        ({"visual.conv1.weight": None}, "without visual.conv1.weight"),
        ({"visual.layer1.0.conv1.weight": torch.zeros(1)}, "a ResNet as vision tower"),
        ({"visual.positional_embedding": torch.zeros(12, 128)}, "a grid of 11 patches"),
        ({"visual.something": torch.zeros(1)}, "unexpected: visual.something"),
        ({"visual.ln_post.bias": None}, "missing: visual.ln_post.bias"),
    ):
        changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        torch.save(changed, tmp_path / "clip.pt")
        with pytest.raises(CheckpointError, match=reason):
            checkpoints.load(tmp_path / "clip.pt", model="ViT-B/32", allow_pickle=True)


def test_names_that_nobody_has(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no architecture is called 'vit_tiny_patch16_223'.*vit_tiny_patch16_22"):
        checkpoints.load(tmp_path / "model.safetensors", model="vit_tiny_patch16_223")
    with pytest.raises(CheckpointError, match="does not fit 'vit_small_patch16_224'"):
        checkpoints.load(tmp_path / "model.safetensors", model="vit_small_patch16_224")
    with pytest.raises(CheckpointError, match=r"model='vit' is the architecture of a file, and VisionTransformer is"):
        checkpoints.load(tiny, model="vit")
    with pytest.raises(CheckpointError, match=r"its architecture by name: model=\"vit_base_patch16_224\""):
        checkpoints.load(tmp_path / "model.safetensors")


# Folders of other tools.


def save_vit(folder, seed=0):
    model = peers.transformers_model("ViTModel", peers.VIT)
    model.layernorm.bias.data += seed
    model.save_pretrained(folder)
    return model


def test_a_trainers_folder(tmp_path):
    for step in (500, 1500, 1000):
        save_vit(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-2000").mkdir()  # broken off before its model was written
    with pytest.warns(UserWarning, match="a Trainer's folder: the model taken is its last, checkpoint-1500$"):
        loaded = checkpoints.load(tmp_path)
    assert loaded.weights["norm.bias"].mean() > 1400
    state = {"best_model_checkpoint": "out/checkpoint-500"}
    (tmp_path / "checkpoint-1500" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="checkpoint-1500; the best is checkpoint-500, by its trainer_state.json"):
        checkpoints.load(tmp_path)
    save_vit(tmp_path, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 6 < checkpoints.load(tmp_path).weights["norm.bias"].mean() < 8


def test_a_folder_of_sentence_transformers(tmp_path):
    model = peers.transformers_model("CLIPModel", CLIP)
    model.save_pretrained(tmp_path / "0_CLIPModel")
    modules = [
        {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    path = tmp_path / "modules.json"
    path.write_text(json.dumps(modules))
    with pytest.warns(
        UserWarning, match=r"the model taken is 0_CLIPModel/, without what follows it there \(Normalize\)"
    ):
        check_clip(checkpoints.load(tmp_path), model)
    for wrong, reason in (
        ([modules[1]], "its first module is .*Normalize.*, which holds no model"),
        ([modules[0] | {"path": "../elsewhere"}], "names a folder outside its own: '../elsewhere'"),
        ({}, "must be a list of modules"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=reason):
            checkpoints.load(tmp_path)


def test_an_adapter_is_explained(tmp_path):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "google/vit-base-patch16-224"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"a PEFT adapter \('LORA'\) of 'google/vit.*merge_and_unload"):
        checkpoints.load(tmp_path)


# Our own.


@pytest.mark.parametrize("family", engines.FAMILIES)
def test_saved_engines_are_what_they_were(family, tmp_path):
    engine = engines.engine(dataclasses.replace(engines.SMALL, **engines.FAMILIES[family]), backend="torch")
    engine.save(tmp_path / "saved")
    again = vitfast.load(tmp_path / "saved", backend="torch", device=engine.device)
    assert (again.config, again.preprocess, again.labels) == (engine.config, engine.preprocess, engine.labels)
    assert again.fingerprint == engine.fingerprint
    pixels = torch.randint(0, 256, (2, 50, 60, 3), dtype=torch.uint8)
    for want, got in zip(engine(pixels).tensors(), again(pixels).tensors(), strict=True):
        assert torch.equal(want, got)


def test_what_is_saved_of_a_library_needs_it_no_more(tmp_path, monkeypatch):
    model = peers.timm_model(**peers.TIMM)
    checkpoint = dataclasses.replace(
        checkpoints.load(model), labels=tuple("abcdefg"), problem_type="multi_label_classification"
    )
    vitfast.Engine(checkpoint, backend="torch").save(tmp_path)
    monkeypatch.setattr("vitfast.models.libraries.import_library", None)
    loaded = checkpoints.load(tmp_path)
    assert (loaded.labels, loaded.problem_type) == (tuple("abcdefg"), "multi_label_classification")
    assert loaded.preprocess == checkpoint.preprocess
    assert set(load_file(tmp_path / "model.safetensors")) == set(loaded.config.weight_shapes()) - {
        "patch_embed.bias"
    } | {"patch_embed.bias"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "vitfast_config.json"]


def test_the_plan_comes_with_the_model(tmp_path, monkeypatch):
    folder = tmp_path / "plans"
    monkeypatch.setattr(plan_cache, "plans_dir", lambda: folder)
    engine = engines.engine(deterministic=False)
    engine.save(tmp_path / "saved")
    again = engines.engine()
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.setattr(planner, "measure", None)  # nothing is measured
    loaded = vitfast.load(tmp_path / "saved", device=again.device)
    assert loaded.plan.backends == engine.plan.backends
    path = tmp_path / "saved" / "vitfast_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"plan": {"key": 3}}))
    vitfast.load(tmp_path / "saved", device=again.device)  # a damaged plan is none; that of before is in the cache


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, r"vitfast_config.json: format must be 1, got 2 \(written by vitfast"),
        ({"config": None}, "vitfast_config.json: config must be an object, got None"),
        ({"config.depth": 10**9}, "config: ViTConfig.depth must be a whole number from 1 to 1,024, got 1000000000"),
        ({"config.flux": 1}, "config has 'flux', which this version does not know"),
        ({"config.depth": 3}, "missing: blocks.2.norm1.weight"),
        ({"preprocess.std": [0, 0, 0]}, "preprocess: Preprocess needs as many positive std"),
        ({"labels": ["one"]}, "labels must be null or a text for each of 10 classes, got .'one'"),
        ({"problem_type": 3}, "problem_type must be null or a text, got 3"),
    ],
)
def test_damaged_descriptions(tmp_path, change, reason):
    engines.engine(backend="torch").save(tmp_path)
    path = tmp_path / "vitfast_config.json"
    description = json.loads(path.read_text())
    for name, value in change.items():
        *outer, last = name.split(".")
        inner = description
        for key in outer:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.load(tmp_path)


# Preprocessing by argument.


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"mean": 0.5, "std": [0.1, 0.2, 0.3]}, {"mean": (0.5,) * 3, "std": (0.1, 0.2, 0.3)}),
        ({"size": 40}, {"resize": 40, "size": (32, 32), "center_crop": True}),
        ({"size": 40, "crop": 48}, {"resize": 40, "size": (48, 48), "center_crop": True}),
        ({"size": (48, 64)}, {"resize": (48, 64), "size": (48, 64), "center_crop": False}),
        ({"crop": [40, 48]}, {"size": (40, 48), "center_crop": True}),
        ({"interpolation": "bilinear", "mean": None}, {"interpolation": "bilinear"}),
        ({"draft": True}, {"draft": True}),
    ],
    ids=str,
)
def test_preprocessing_by_argument(tmp_path, given, want):
    save_vit(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = checkpoints.load(tmp_path).preprocess
    assert checkpoints.load(tmp_path, preprocess=given).preprocess == dataclasses.replace(found, **want)
    whole = dataclasses.replace(found, **want)
    assert checkpoints.load(tmp_path, preprocess=whole).preprocess == whole


def test_preprocessing_by_argument_that_does_not_fit(tmp_path):
    save_vit(tmp_path)  # without a processor's settings
    for given, reason in (
        ({"size": 32}, "the model's source does not say how images are normalised: give mean and std"),
        ({"mean": 0.5, "std": 0}, "Preprocess needs as many positive std as mean"),
        ({"mean": [0.5, 0.5], "std": [1, 1]}, "mean (0.5, 0.5) for a model of 3 input channel(s)"),
        ({"mean": 0.5, "std": 1, "draft": "yes"}, "Preprocess.draft must be True or False, got 'yes'"),
        ({"means": 0.5}, "expected a Preprocess or a mapping with size, crop, mean, std, interpolation, draft, got"),
        ({"mean": 0.5, "std": 1, "size": "large"}, "Preprocess.resize must be positive whole pixels, got 'large'"),
        ({"mean": 0.5, "std": 1, "crop": 4}, "image size 4x4 is less than one patch"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"preprocess: {reason}")):
            checkpoints.load(tmp_path, preprocess=given)
    made = checkpoints.load(tmp_path, preprocess={"mean": 0.5, "std": 0.5}).preprocess
    assert made == Preprocess(size=(32, 32), resize=32)
    model = peers.torchvision_model()
    with pytest.raises(CheckpointError, match=r"images of \(64, 64\), and the model takes \(32, 32\) only"):
        checkpoints.load(model, preprocess={"size": (64, 64)})
