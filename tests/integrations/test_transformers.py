"""transformers with attn_implementation="vitfast": the same outputs, no mask lost, everything put back."""

import copy
import pickle

import pytest
import torch
from helpers import peers
from helpers.peers import close
from helpers.transformers_models import (
    CLIP_TEXT,
    FAMILIES,
    SIGLIP2,
    build,
    detr,
    detr_config,
    images,
    naflex,
    run,
    text,
)

import vitfast
from vitfast.attention import sdpa
from vitfast.integrations import transformers as integration
from vitfast.testing import make


@pytest.mark.parametrize("name", FAMILIES)
def test_same_outputs_and_back(name, calls):
    settings, inputs, count = FAMILIES[name]
    model, inputs = build(name, settings), inputs()
    before, keys = run(model, inputs), list(model.state_dict())
    settings_before = [config._attn_implementation for config in integration._configs(model)]
    assert not calls
    swap = vitfast.replace_attention(model, strict=True)
    assert len(swap.replaced) >= count
    close(run(model, inputs), before)
    assert len(calls) == count
    assert list(model.state_dict()) == keys
    swap.restore()
    assert [config._attn_implementation for config in integration._configs(model)] == settings_before
    assert torch.equal(run(model, inputs), before)
    assert len(calls) == count


@pytest.mark.parametrize(
    ("name", "key"), [("CLIPTextModel", "attention_mask"), ("Siglip2VisionModel", "pixel_attention_mask")]
)
def test_masks_reach_the_kernel(name, key, calls):
    settings, inputs, _ = FAMILIES[name]
    model, inputs = build(name, settings), inputs()
    expected = run(model, inputs)
    unmasked = run(model, inputs | {key: torch.ones_like(inputs[key])})
    assert (unmasked - expected).abs().max() > 0.01 * expected.abs().max()  # the mask matters
    with vitfast.replace_attention(model), sdpa.attention_backend("triton"):
        close(run(model, inputs), expected)
    assert all(call["attn_mask"] is not None for call in calls)


@pytest.mark.parametrize("name", ["DetrForObjectDetection", "Siglip2VisionModel", "BeitModel", "SwinModel"])
def test_a_dropped_mask_would_show(name, monkeypatch):
    settings, inputs, _ = FAMILIES[name]
    model, inputs, original = build(name, settings), inputs(), sdpa.scaled_dot_product_attention
    expected = run(model, inputs)
    monkeypatch.setattr(
        sdpa, "scaled_dot_product_attention", lambda *args, attn_mask, **kwargs: original(*args, **kwargs)
    )
    with vitfast.replace_attention(model):
        assert (run(model, inputs) - expected).abs().max() > 0.001 * expected.abs().max()


def test_detr_on_the_kernel(calls):
    """The encoder's attention and the decoder's to the encoder are masked, that among the queries is not."""
    model, inputs = build("DetrForObjectDetection", detr_config), detr()
    expected = run(model, inputs)
    with vitfast.replace_attention(model), sdpa.attention_backend("triton"):
        close(run(model, inputs), expected)
    assert [call["attn_mask"] is None for call in calls] == [False, True, False]


def test_vit_on_the_kernel(calls):
    model, inputs = build("ViTModel", peers.VIT), images()
    expected = run(model, inputs)
    with vitfast.replace_attention(model), sdpa.attention_backend("triton"):
        close(run(model, inputs), expected)
    assert len(calls) == 2


def test_built_with_the_name(calls):
    """After register, the name works from the start, as in from_pretrained(attn_implementation=...)."""
    library = peers.import_transformers()
    integration.register()
    integration.register()
    expected = run(build("CLIPTextModel", CLIP_TEXT), text())
    named = build("CLIPTextModel", library.CLIPTextConfig(**CLIP_TEXT, attn_implementation="vitfast"))
    assert not calls
    close(run(named, text()), expected)
    assert len(calls) == 1


@pytest.mark.parametrize(("name", "settings"), [("SiglipVisionModel", peers.VIT), ("Siglip2VisionModel", SIGLIP2)])
def test_siglip_head(name, settings, calls):
    """Its nn.MultiheadAttention is asked for weights that nobody looks at."""
    model, inputs = build(name, settings), naflex() if "2" in name else images()
    before = run(model, inputs)
    with vitfast.replace_attention(model, strict=True), sdpa.attention_backend("triton"):
        close(run(model, inputs), before)
    assert len(calls) == 3
    assert (calls[2]["attn_mask"] is None) == ("2" not in name)
    assert torch.equal(run(model, inputs), before)


def test_weights_that_are_looked_at():
    """OWLv2-like parents keep what the layer returns: it stays torch's, and is named."""

    class Parent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(32, 2)

        def forward(self, x):
            out, weights = self.attention(x, x, x)
            return self.attention(x, x, x)[0] + out, weights

    Parent.__module__ = "transformers.models.made_up"
    assert "attention weights" in vitfast.replace_attention(Parent()).left["attention"]


def test_off_the_interface_is_left():
    """What is neither known nor calls torch's attention: here, hard assignments of GroupViT."""
    groups = {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}
    model = build("GroupViTVisionModel", peers.VIT | groups)
    swap = integration.replace(model)
    assert {type(model.get_submodule(name)).__name__ for name in swap.left} == {"GroupViTAssignAttention"}
    assert all("off transformers' attention interface" in why for why in swap.left.values())
    swap.restore()
    with pytest.raises(ValueError, match="cannot be replaced"):
        vitfast.replace_attention(model, strict=True)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_attention_weights_wanted():
    model = build("ViTModel", peers.VIT | {"attn_implementation": "eager", "output_attentions": True})
    swap = vitfast.replace_attention(model)
    assert not swap.replaced
    assert all("output_attentions" in why for why in swap.left.values())
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("implementation", ["vitfast", "vitfast_flash"])
@pytest.mark.parametrize("name", ["ViTModel", "SiglipVisionModel", "DetrForObjectDetection"])
def test_attention_weights_wanted_at_the_call(name, implementation):
    """SigLIP's layers are not told; without a word its weights would be an empty tuple, as with "sdpa"."""
    settings, inputs, _ = FAMILIES[name]
    model, inputs = build(name, settings), inputs()
    integration.register()
    for config in integration._configs(model):
        config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=f"{implementation!r} does not implement output_attentions=True"):
        model(**inputs, output_attentions=True)


def test_sub_configs_are_restored_one_by_one():
    library = peers.import_transformers()
    config = library.CLIPConfig(text_config=CLIP_TEXT, vision_config=peers.VIT, projection_dim=8)
    model = build("CLIPModel", config)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    swap = vitfast.replace_attention(model)
    assert model.config.text_config._attn_implementation == "vitfast_eager"
    assert model.config.vision_config._attn_implementation == "vitfast"
    swap.restore()
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_restore_tells_of_a_change_since():
    model = build("ViTModel", peers.VIT)
    swap = vitfast.replace_attention(model)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="'eager' by now"):
        swap.restore()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_swapped_too(duplicate, calls):
    model, inputs = build("ViTModel", peers.VIT), images()
    swap = vitfast.replace_attention(model)
    twin = duplicate(model)
    swap.restore()
    close(run(twin, inputs), run(model, inputs))
    assert len(calls) == 2


def transformers_sdpa(*args, **kwargs):
    return peers.import_transformers().AttentionInterface()["sdpa"](*args, **kwargs)[0]


@pytest.mark.parametrize("causal", [None, True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_function_equals_sdpa(causal, kind, biased, heads):
    layer = torch.nn.Identity()  # without is_causal: a causal layer
    layer.num_key_value_groups = 4 // heads
    q, k, v = make(2, 5, 4, 8).transpose(1, 2), make(2, heads, 7, 8, seed=1), make(2, heads, 7, 8, seed=2)
    mask = {"none": None, "bool": make(2, 1, 5, 7) > -0.5, "float": make(2, 1, 5, 7)}[kind]
    bias = make(1, 4, 5, 7, seed=3) if biased else None
    arguments = {"scaling": 0.3, "is_causal": causal, "position_bias": bias}
    if causal is not False and kind == "none" and biased:
        arguments["position_bias"] = bias[..., :5]  # "sdpa" cuts the keys that causal attention hides
        k, v = k[:, :, :5], v[:, :, :5]
    actual, weights = integration.attention_forward(layer, q, k, v, mask, **arguments)
    close(actual, transformers_sdpa(layer, q, k, v, mask, **arguments))
    assert weights is None
    assert actual.shape == (2, 5, 4, 8)
    assert actual.is_contiguous()


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_shared_key_heads_are_not_copied_for_the_kernels(kind, monkeypatch):
    q, k, v = make(2, 5, 4, 8).transpose(1, 2), make(2, 2, 7, 8, seed=1), make(2, 2, 7, 8, seed=2)
    mask = {"none": None, "bool": make(2, 1, 5, 7) > -0.5, "float": make(2, 1, 5, 7)}[kind]
    seen, original = [], sdpa.ops.attention

    def watched(*tensors, **kwargs):
        seen.append(tensors)
        return original(*tensors, **kwargs)

    monkeypatch.setattr(sdpa.ops, "attention", watched)
    weight = make(2, 5, 4, 8, seed=3)
    with sdpa.attention_backend("triton"):
        results = []
        for share in (lambda t: t, lambda t: t.repeat_interleave(2, 1)):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            keys, values = (share(t) for t in leaves[1:])
            out, _ = integration.attention_forward(torch.nn.Identity(), leaves[0], keys, values, mask)
            results.append([out, *torch.autograd.grad(out, leaves, weight)])
    assert [tensors[1].shape[2] for tensors in seen] == [2, 4]
    assert [t.data_ptr() for t in seen[0]] == [t.data_ptr() for t in (q, k, v)]
    assert torch.equal(results[0][0], results[1][0])
    for shared, copied in zip(*results, strict=True):
        close(shared, copied)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("softcap", 30.0), ("sliding_window", 3), ("output_attentions", True), ("cache", {})),
        *((name, torch.ones(2)) for name in ("s_aux", "cu_seq_lens_q", "head_mask")),
    ],
)
def test_unknown_arguments_are_refused(name, argument):
    layer, q = torch.nn.Identity(), make(1, 2, 5, 8)
    with pytest.raises(ValueError, match=name):
        integration.attention_forward(layer, q, q, q, None, **{name: argument})
    integration.attention_forward(layer, q, q, q, None, **{name: None})
