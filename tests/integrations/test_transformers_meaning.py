"""A swap keeps the meaning of what transformers runs now, eager or not; what it cannot mean is left, by name."""

import pytest
import torch
from helpers import peers
from helpers.grids import thinned
from helpers.peers import close
from torch.nn import functional as F

import vitfast
from vitfast.attention import sdpa
from vitfast.integrations import transformers as integration
from vitfast.integrations.transformers_attention import EAGER_NAME, NAME
from vitfast.testing import device, make

PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def result(model, **inputs):
    with torch.no_grad():
        output = model(**{name: x.to(device()) for name, x in inputs.items()})
    parts = [value for value in output.values() if torch.is_tensor(value) and value.is_floating_point()]
    return torch.cat([part.flatten() for part in parts])


def bridge_tower(**settings):
    library = peers.import_transformers()
    tower = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    text = tower | {"vocab_size": 99, "max_position_embeddings": 40, "pad_token_id": 1}
    config = library.BridgeTowerConfig(
        text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8}, **tower | {"num_hidden_layers": 2}
    )
    torch.manual_seed(0)
    return peers.randomised(library.BridgeTowerModel._from_config(config, **settings)).to(device())


@pytest.mark.parametrize("mask", thinned([PADDED, torch.ones_like(PADDED)]), ids=["padded", "full"])
@pytest.mark.parametrize("backend", thinned(["triton", "auto"]))
def test_bridge_tower_is_not_made_causal(mask, backend, calls):
    """It has "eager" only, which does not look at is_causal; half of its layers say that they are causal."""
    model = bridge_tower()
    inputs = {"input_ids": torch.arange(3, 17).view(2, 7), "attention_mask": mask, "pixel_values": make(2, 3, 32, 32)}
    before = result(model, **inputs)
    assert model.config._attn_implementation == "eager"
    with vitfast.replace_attention(model, strict=True) as swap, sdpa.attention_backend(backend):
        assert model.config.text_config._attn_implementation == EAGER_NAME
        close(result(model, **inputs), before)
        assert len(calls) >= len(swap.replaced)
    assert model.config.text_config._attn_implementation == "eager"
    assert torch.equal(result(model, **inputs), before)
    if backend == "auto":
        integration.register()
        close(result(bridge_tower(attn_implementation=NAME), **inputs), before)


def video_prism(softcap=50.0):
    settings = peers.SMALL | {"num_spatial_layers": 1, "num_temporal_layers": 1, "intermediate_size": 64}
    model = peers.transformers_model("VideoPrismVisionModel", settings | {"num_frames": 2}).to(device())
    for layer in (m for m in model.modules() if hasattr(m, "attn_logit_softcapping")):
        layer.attn_logit_softcapping = softcap
    return model


def test_a_softcap_is_left_by_name_and_the_model_goes_on():
    model, inputs = video_prism(), {"pixel_values_videos": make(1, 2, 3, 32, 32)}
    before = result(model, **inputs)
    swap = vitfast.replace_attention(model)
    assert not swap.replaced
    assert set(swap.left.values()) == {"its attention takes softcap=50.0, which 'vitfast' does not implement"}
    assert torch.equal(result(model, **inputs), before)
    swap.restore()
    with pytest.raises(ValueError, match=r"softcap=50\.0"):
        vitfast.replace_attention(model, strict=True)


def test_the_same_layers_without_a_softcap_are_replaced(calls):
    model, inputs = video_prism(None), {"pixel_values_videos": make(1, 2, 3, 32, 32)}
    before = result(model, **inputs)
    with vitfast.replace_attention(model, strict=True) as swap:
        close(result(model, **inputs), before)
    assert len(calls) == len(swap.replaced) == 2


def plain(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    return (F.softmax(scores, dim=-1) @ value).transpose(1, 2).contiguous(), None


def with_sinks(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """One more score, for nothing, as some models learn it."""
    scores = query @ key.transpose(2, 3) * scaling
    scores = F.pad(scores if attention_mask is None else scores + attention_mask, (0, 1))
    return (F.softmax(scores, dim=-1)[..., :-1] @ value).transpose(1, 2).contiguous(), None


def without_masks(module, query, key, value, attention_mask, **kwargs):
    return plain(module, query, key, value, None, **kwargs)


def too_large(module, query, key, value, attention_mask, **kwargs):
    return plain(module, query, key, value, attention_mask, **kwargs)[0] * 1.01, None


def broken(module, *args, **kwargs):
    raise RuntimeError("of its own")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (plain, ""),
        (with_sinks, "its eager attention function computes something else than attention without a mask"),
        (without_masks, "its eager attention function computes something else than attention with a mask"),
        (too_large, "its eager attention function computes something else than attention without a mask"),
        (broken, "its eager attention function could not be compared: RuntimeError: of its own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_eager_function_is_compared_on_numbers(function, why, monkeypatch):
    peers.import_transformers()
    from transformers.models.vit import modeling_vit

    model = peers.transformers_model("ViTModel", peers.VIT)
    model.set_attn_implementation("eager")
    monkeypatch.setattr(modeling_vit, "eager_attention_forward", function)
    state = torch.get_rng_state()
    with vitfast.replace_attention(model) as swap:
        assert torch.equal(torch.get_rng_state(), state)
        assert set(swap.left.values()) == ({why} if why else set())
        assert len(swap.replaced) == (0 if why else 2)
        assert model.config._attn_implementation == ("eager" if why else EAGER_NAME)
    assert model.config._attn_implementation == "eager"


def test_an_unknown_implementation_is_left():
    peers.import_transformers()
    from transformers import AttentionInterface

    AttentionInterface.register("mine", plain)
    model = peers.transformers_model("ViTModel", peers.VIT)
    model.set_attn_implementation("mine")
    swap = vitfast.replace_attention(model)
    assert set(swap.left.values()) == {"it runs attn_implementation='mine', which vitfast does not know"}
    assert model.config._attn_implementation == "mine"


def test_layers_that_share_a_config_with_one_that_stays_stay_with_it():
    model = video_prism()
    layers = [m for m in model.modules() if hasattr(m, "attn_logit_softcapping")]
    layers[0].attn_logit_softcapping = None
    swap = vitfast.replace_attention(model)
    first, second = swap.left
    assert swap.left[first] == f"it shares its config with {second}, which cannot be switched"
    assert "softcap=50.0" in swap.left[second]


@pytest.mark.parametrize("setting", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["CLIPTextModel", "ViTModel", "DINOv3ViTModel"])
def test_masks_and_causality_of_both_paths(name, setting, calls):
    """A padded causal text, where eager takes a mask in full and sdpa a flag; and images."""
    settings = {"CLIPTextModel": peers.TEXT | {"max_position_embeddings": 9, "eos_token_id": 2}}
    model = peers.transformers_model(name, settings.get(name, peers.VIT)).to(device())
    model.set_attn_implementation(setting)
    inputs = {"pixel_values": make(2, 3, 32, 32)}
    if name == "CLIPTextModel":
        inputs = {"input_ids": torch.arange(3, 17).view(2, 7), "attention_mask": PADDED}
    before = result(model, **inputs)
    with vitfast.replace_attention(model, strict=True):
        assert model.config._attn_implementation == (EAGER_NAME if setting == "eager" else NAME)
        for backend in ("auto", "triton"):
            with sdpa.attention_backend(backend):
                close(result(model, **inputs), before)
    assert torch.equal(result(model, **inputs), before)
    assert calls


def test_a_query_that_sees_nothing_has_the_average_in_eager():
    """Its mask has the smallest number everywhere; sdpa's bool mask would give zeros."""
    model = peers.transformers_model("CLIPTextModel", peers.TEXT | {"max_position_embeddings": 9, "eos_token_id": 2})
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.arange(3, 17).view(2, 7), "attention_mask": PADDED.flip(1)}  # padded on the left
    before = result(model.to(device()), **inputs)
    with vitfast.replace_attention(model, strict=True):
        close(result(model, **inputs), before)
