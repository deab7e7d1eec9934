"""open_clip's text towers, timm's image towers in open_clip, TorchScript archives, live modules of open_clip."""

import json
import pickle
import zipfile

import pytest
import torch
from helpers import peers
from helpers.clip_names import openai_names
from safetensors.torch import save_file
from torch import nn

import vitfast
from vitfast.benchmarks import zoo
from vitfast.models import checkpoints
from vitfast.models.checkpoints import CheckpointError
from vitfast.testing import make

TEXT = peers.TEXT | {"max_position_embeddings": 12, "eos_token_id": 98, "hidden_act": "gelu"}
VISION = peers.VIT | {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
DEVICE = {"device": "cpu", "dtype": "fp32", "backend": "torch"}


@pytest.fixture(scope="module")
def clip():
    """A small CLIP of transformers, and its weights by open_clip's names."""
    model = peers.transformers_model(
        "CLIPModel", {"vision_config": VISION, "text_config": TEXT | {"layer_norm_eps": 1e-5}, "projection_dim": 24}
    )
    return model, openai_names(model)


def folder(path, state, vision, text):
    settings = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (path / "open_clip_config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "open_clip_model.safetensors")
    return path


def ids():
    made = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    made[0, -1], made[1, 4], made[1, 5:] = 98, 98, 98
    return made


@pytest.mark.parametrize("prefix", ["", "text."])
def test_the_text_tower_of_a_folder(clip, tmp_path, prefix):
    model, state = clip
    texts = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection")
    state = {f"{prefix}{name}" if name.startswith(texts) else name: tensor for name, tensor in state.items()}
    engine = vitfast.load(folder(tmp_path, state, {}, {"heads": 2}), **DEVICE)
    with torch.no_grad():
        peers.close(engine.text(ids()), model.get_text_features(input_ids=ids()).pooler_output)
    assert engine._text.tower.scale == model.logit_scale.exp().item()
    engine.save(tmp_path / "saved")
    again = vitfast.load(tmp_path / "saved", **DEVICE)
    images = make(2, 3, 32, 32).cpu()
    assert torch.equal(again.text(ids()), engine.text(ids()))
    assert torch.equal(again(images).embedding, engine(images).embedding)


@pytest.mark.parametrize("settings", [{"hf_model_name": "roberta-base"}, {"text_arch": "modern"}])
def test_text_towers_that_are_left_out(clip, tmp_path, settings):
    loaded = checkpoints.load(folder(tmp_path, clip[1], {}, settings))
    assert loaded.text is None


@pytest.mark.parametrize("projection", ["timm's", "open_clip's", "none"])
def test_a_tower_of_timms(clip, tmp_path, projection):
    name = "test_vit"
    trunk = peers.timm_model(name, num_classes=24 if projection == "timm's" else 0, global_pool="avg")
    vision = {"timm_model_name": name, "timm_pool": "avg"}
    vision["timm_proj"] = {"timm's": None, "open_clip's": "linear", "none": "none"}[projection]
    state = {f"visual.trunk.{key}": tensor for key, tensor in trunk.state_dict().items()}
    head = nn.Linear(trunk.num_features, 24) if projection == "open_clip's" else nn.Identity()
    state |= {f"visual.head.proj.{key}": tensor for key, tensor in head.state_dict().items()}
    state |= {key: tensor for key, tensor in clip[1].items() if not key.startswith("visual.")}
    engine = vitfast.load(folder(tmp_path, state, vision, {"heads": 2}), **DEVICE)
    images = make(2, 3, *engine.config.image_size)
    with torch.no_grad():
        peers.close(engine(images).embedding, head(trunk(images)))
        peers.close(engine.text(ids()), clip[0].get_text_features(input_ids=ids()).pooler_output)


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"timm_model_name": "resnet18"}, "ResNet as image tower is not supported: not a Vision Transformer"),
        ({"timm_model_name": "vit_of_nobody"}, "timm cannot build the image tower.*vit_of_nobody"),
        ({"timm_model_name": "test_vit", "timm_proj": "two"}, "timm_proj must be one of"),
    ],
)
def test_towers_of_timms_that_are_refused(tmp_path, vision, reason):
    timm = peers.import_timm()
    known = vision["timm_model_name"] in timm.list_models()
    state = timm.create_model(vision["timm_model_name"], num_classes=0).state_dict() if known else {"x": torch.ones(1)}
    state = {f"visual.trunk.{key}": tensor for key, tensor in state.items()}
    vision = {"timm_pool": "avg", "timm_proj": "none", **vision}
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.load(folder(tmp_path, state, vision, {"heads": 2}))


class _Named(nn.Module):
    """Parameters under the names of a state dict."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            self.put(name.split("."), tensor)

    def put(self, names, tensor):
        if len(names) == 1:
            self.register_buffer(names[0], tensor)
            return
        if names[0] not in self._modules:
            self.add_module(names[0], _Named({}))
        self._modules[names[0]].put(names[1:], tensor)

    def forward(self, x):
        return x


def test_a_torchscript_archive(clip, tmp_path):
    _, state = clip
    path = tmp_path / "ViT-B-32.pt"
    sizes = {"input_resolution": torch.tensor(32)}
    torch.jit.script(_Named({name: t.half() for name, t in state.items()} | sizes)).save(path)
    with pytest.raises(CheckpointError, match="is a pickle"):
        checkpoints.load(path, model="ViT-B-32")
    loaded = checkpoints.load(path, model="ViT-B-32", allow_pickle=True)
    bare = tmp_path / "bare.pt"
    torch.save({name: t.half() for name, t in state.items()}, bare)
    expected = checkpoints.load(bare, model="ViT-B-32", allow_pickle=True)
    assert loaded.weights.keys() == expected.weights.keys() and loaded.text is not None
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in loaded.weights.items())


def test_a_torchscript_archive_runs_nothing(tmp_path):
    """What an archive names beside modules and tensors is not imported."""

    class Hostile:
        def __reduce__(self):
            return print, ("run",)

    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
        archive.writestr("clip/constants.pkl", b"")
        archive.writestr("clip/data.pkl", pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match=r"TorchScript archive: .* has no .*print"):
        checkpoints.load(tmp_path / "clip.pt", model="ViT-B-32", allow_pickle=True)


def cases(names=None):
    peers.import_open_clip()
    peers.import_timm()
    return [case for case in zoo.open_clip_cases() if names is None or case.name in names]


SAMPLE = ("coca_ViT-B-32", "ViT-B-16-SigLIP2-256", "ViT-H-14-CLIPA", "ViT-L-14-worldwide", "EVA02-B-16")


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_live_models():
    for case in cases(SAMPLE):
        result = zoo.tried(case)
        assert (result.status, result.reason) == ("equal", ""), case.name


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_all_live_models():
    results = [zoo.tried(case) for case in cases()]
    assert len(results) > 100
    assert not [(r.case.name, r.reason) for r in results if r.status != "equal"]


@pytest.mark.filterwarnings("ignore")
def test_live_models_that_are_refused():
    model = zoo.perturbed(cases(("coca_ViT-B-32",))[0].build())
    model.visual.transformer.resblocks[1].mlp.gelu = nn.ReLU()
    with pytest.raises(CheckpointError, match=r"resblocks.1.mlp.gelu: torch.nn.modules.activation.ReLU"):
        checkpoints.load(model)
    library = peers.import_open_clip()
    config = library.get_model_config("RN50")
    with pytest.raises(CheckpointError, match="a ResNet as vision tower"):
        checkpoints.load(library.CLIP(**config))
