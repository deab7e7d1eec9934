"""transformers' attention off its interface: other forwards, the same outputs, and weights for those who want them."""

import copy
import importlib

import pytest
import torch
from helpers import peers
from helpers import transformers_models as plain
from helpers.grids import thinned
from helpers.peers import close
from torch import nn

import vitfast
from vitfast.attention import sdpa
from vitfast.diagnostics.differences import flatten
from vitfast.integrations import known, transformers_modules
from vitfast.integrations import transformers as integration
from vitfast.testing import device, make

IMAGE_GPT = {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
UPCAST = {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}
GROUPS = {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}
HIERA = {"image_size": [32, 32], "embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2], "patch_stride": [4, 4]}
HIERA |= {"query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4]}
SAM = peers.VIT | {"window_size": 2, "output_channels": 8, "global_attn_indexes": [0], "num_pos_feats": 24}
PVT = {"image_size": 64, "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2]}
LEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1]}
LEVIT |= {"key_dim": [8, 8, 8]}
PYRAMID = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
PVT2 = PYRAMID | {"image_size": 64}
VIDEO = peers.VIT | {"num_frames": 2}
SUPER = {"embed_dim": 24, "depths": [2], "num_heads": [2], "window_size": 4, "image_size": 8}
TABLE = {"use_timm_backbone": False, "backbone": None, "num_queries": 5, "d_model": 32}
TABLE |= {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
TABLE |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
DATA2VEC = peers.VIT | {"use_relative_position_bias": True}


def pixels():
    """Two texts of pixels, the second padded."""
    mask = torch.ones(2, 7, dtype=torch.long, device=device())
    mask[1, 4:] = 0
    return {"input_ids": torch.arange(14, device=device()).view(2, 7), "attention_mask": mask}


def table():
    library = peers.import_transformers()
    return library.TableTransformerConfig(**TABLE, backbone_config=library.ResNetConfig(**plain.RESNET))


FAMILIES = {
    "DonutSwinModel": (plain.SWIN, plain.images, 2),
    "Swin2SRModel": (SUPER, lambda: plain.images(8), 2),
    "GLPNModel": (PYRAMID, lambda: plain.images(64), 4),
    "PvtV2Model": (PVT2, lambda: plain.images(64), 4),
    "TimesformerModel": (VIDEO, lambda: {"pixel_values": make(1, 2, 3, 32, 32)}, 4),
    "TableTransformerForObjectDetection": (table, plain.detr, 3),
    "Swinv2Model": (plain.SWIN, plain.images, 2),
    "HieraModel": (HIERA, plain.images, 2),
    "ImageGPTModel": (IMAGE_GPT, pixels, 2),
    "BlipVisionModel": (peers.VIT, plain.images, 2),
    "GroupViTVisionModel": (peers.VIT | GROUPS, plain.images, 5),
    "GroupViTTextModel": (plain.CLIP_TEXT, plain.text, 1),
    "LevitModel": (LEVIT, lambda: plain.images(64), 5),
    "PvtModel": (PVT, lambda: plain.images(64), 8),
    "SamVisionModel": (SAM, plain.images, 2),
    "Data2VecVisionModel": (DATA2VEC, plain.images, 2),
}
"""Model class -> (settings, inputs, calls of attention in one forward)."""


@pytest.mark.parametrize("name", thinned(FAMILIES, 3))
def test_same_outputs_and_back(name, calls):
    settings, inputs, count = FAMILIES[name]
    model, inputs = plain.build(name, settings), inputs()
    before = plain.run(model, inputs)
    swap = vitfast.replace_attention(model, strict=not name.startswith("GroupViTV"))
    assert len(swap.replaced) == count
    with sdpa.attention_backend("triton"):
        close(plain.run(model, inputs), before)
    assert len(calls) == count
    swap.restore()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(plain.run(model, inputs), before)
    assert len(calls) == count


@pytest.mark.parametrize("name", FAMILIES)
def test_another_attention_would_show(name, monkeypatch):
    settings, inputs, _ = FAMILIES[name]
    model, inputs, original = plain.build(name, settings), inputs(), sdpa.scaled_dot_product_attention
    before = plain.run(model, inputs)
    monkeypatch.setattr(
        sdpa, "scaled_dot_product_attention", lambda q, k, v, **kwargs: original(q * 1.5, k, v, **kwargs)
    )
    with vitfast.replace_attention(model):
        assert (plain.run(model, inputs) - before).abs().max() > 0.001 * before.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "DonutSwinModel",
        "Swinv2Model",
        "Swin2SRModel",
        "TableTransformerForObjectDetection",
        "ImageGPTModel",
        "GroupViTTextModel",
        "LevitModel",
        "SamVisionModel",
        "Data2VecVisionModel",
    ],
)
def test_a_dropped_mask_or_bias_would_show(name, monkeypatch):
    settings, inputs, _ = FAMILIES[name]
    model, inputs, original = plain.build(name, settings), inputs(), sdpa.scaled_dot_product_attention
    before = plain.run(model, inputs)
    monkeypatch.setattr(
        sdpa, "scaled_dot_product_attention", lambda *args, attn_mask, **kwargs: original(*args, **kwargs)
    )
    with vitfast.replace_attention(model):
        assert (plain.run(model, inputs) - before).abs().max() > 0.001 * before.abs().max()


def test_swinv2_adds_its_mask_as_often_as_transformers(calls):
    """Twice in the versions seen, which shows where the mask is soft."""
    model = plain.build("Swinv2Model", plain.SWIN)
    layer = next(module for module in model.modules() if type(module).__name__ == "Swinv2SelfAttention")
    x, mask = make(8, 16, 24), make(4, 16, 16)
    expected = layer(x, mask)
    with vitfast.replace_attention(layer, strict=True):
        close(layer(x, mask)[0], expected[0])
    assert len(calls) == 1


@pytest.mark.parametrize("name", [name for name in FAMILIES if name[:5] not in ("Levit", "Data2")])
def test_weights_for_those_who_want_them(name):
    """Asked for at the call, by argument or transformers' hooks, they are the same as without the swap."""
    settings, inputs, _ = FAMILIES[name]
    model, inputs = plain.build(name, settings), inputs()

    def weights():
        with torch.no_grad():
            output = model(**inputs, output_attentions=True)
        return flatten({key: value for key, value in output.items() if "attentions" in key})

    expected = weights()
    assert expected or name == "SamVisionModel"  # whose class for torch's function has none either
    with vitfast.replace_attention(model) as swap:
        assert swap.replaced
        actual = weights()
    assert actual.keys() == expected.keys()
    for key in expected:
        close(actual[key], expected[key])


@pytest.mark.full
@pytest.mark.parametrize(
    "extra", thinned([{}, UPCAST, {"scale_attn_weights": False}], 3), ids=["plain", "upcast", "unscaled"]
)
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.full), True])
def test_image_gpt_generates_the_same(extra, padded, calls):
    """Greedy, with a cache: causal at first, then one query against all keys so far."""
    model = plain.build("ImageGPTForCausalImageModeling", IMAGE_GPT | extra)
    prompt = {"input_ids": torch.arange(8, device=device()).view(2, 4)}
    if padded:
        prompt["attention_mask"] = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=device())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    expected = model.generate(**prompt, **options)
    with vitfast.replace_attention(model, strict=True), sdpa.attention_backend("triton"):
        actual = model.generate(**prompt, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for got, want in zip(actual.logits, expected.logits, strict=True):
        close(got, want)
    assert len(calls) == 2 * 8


def test_image_gpt_without_a_mask(calls):
    """Called alone, the layer is causal by itself, aligned at the bottom right of its cache."""
    library = peers.import_transformers()
    layer = plain.build("ImageGPTModel", IMAGE_GPT | UPCAST).h[1].attn
    x = make(2, 7, 32)

    def steps():
        cache = library.DynamicCache()
        parts = (x[:, :4], x[:, 4:6], x[:, 6:])
        return torch.cat([layer(part.contiguous(), layer_past=cache)[0] for part in parts], 1)

    with torch.no_grad():
        expected, whole = steps(), layer(x)[0]
        close(expected, whole)
        with vitfast.replace_attention(layer, strict=True), sdpa.attention_backend("triton"):
            close(steps(), expected)
            close(layer(x)[0], whole)
    assert [call["is_causal"] for call in calls] == [True, False, False, True]


def test_image_gpt_cross_attention_stays(calls):
    settings = IMAGE_GPT | {"add_cross_attention": True, "n_layer": 1}
    model = plain.build("ImageGPTModel", settings)
    inputs = pixels() | {"encoder_hidden_states": make(2, 7, 32), "use_cache": False}
    before = plain.run(model, inputs)
    with vitfast.replace_attention(model):
        close(plain.run(model, inputs), before)
    assert len(calls) == 1


@pytest.mark.parametrize("linear", [False, True])
def test_pvt_v2_attention(linear, calls):
    peers.import_transformers()
    from transformers.models.pvt_v2 import PvtV2Config, modeling_pvt_v2

    layer = modeling_pvt_v2.PvtV2SelfAttention(PvtV2Config(linear_attention=linear), 16, 2, 2)
    layer, x = peers.randomised(layer).to(device()), make(2, 64, 16)
    expected = layer(x, 8, 8)[0]
    with torch.no_grad(), vitfast.replace_attention(layer, strict=True), sdpa.attention_backend("triton"):
        close(layer(x, 8, 8)[0], expected)
    assert len(calls) == 1


def test_mobile_vit_attention(calls):
    peers.import_transformers()
    from transformers.models.mobilevit import MobileViTConfig, modeling_mobilevit

    layer = modeling_mobilevit.MobileViTSelfAttention(MobileViTConfig(num_attention_heads=2), 32)
    layer, x = peers.randomised(layer).to(device()), make(4, 9, 32)
    expected = layer(x)
    with torch.no_grad(), vitfast.replace_attention(layer, strict=True), sdpa.attention_backend("triton"):
        close(layer(x), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_table_transformer_attention(kind, calls):
    """A bool mask hides here where it is True."""
    peers.import_transformers()
    from transformers.models.table_transformer.modeling_table_transformer import TableTransformerAttention

    layer = peers.randomised(TableTransformerAttention(32, 2)).to(device())
    x, keys, places = make(2, 5, 32), make(2, 7, 32, seed=2), make(2, 7, 32, seed=3)
    mask = {"bool": make(2, 1, 5, 7) > 0.8, "float": make(2, 1, 5, 7), "none": None}[kind]
    across = {"key_value_states": keys, "spatial_position_embeddings": places, "attention_mask": mask}
    within = {"attention_mask": None if mask is None else mask[..., :5]}
    for arguments in ({**across, "object_queries": make(2, 5, 32, seed=1)}, {**within, "object_queries": x}):
        expected = layer(x, **arguments)[0]
        with torch.no_grad(), vitfast.replace_attention(layer, strict=True), sdpa.attention_backend("triton"):
            close(layer(x, **arguments)[0], expected)
            assert layer(x, **arguments, output_attentions=True)[1].shape[1] == 2
    assert len(calls) == 2


@pytest.mark.parametrize("masked", [False, True])
def test_mask2former_self_attention(masked, calls):
    """Sequence first, with position embeddings; as cross-attention its own forward runs."""
    peers.import_transformers()
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerAttention

    layer = peers.randomised(Mask2FormerAttention(32, 2)).to(device())
    x, places, keys = make(5, 3, 32), make(5, 3, 32, seed=1), make(7, 3, 32, seed=2)
    mask = make(6, 5, 5, seed=3) if masked else None
    arguments = {"attention_mask": mask, "position_embeddings": places}
    across = {"position_embeddings": places, "key_value_states": keys, "key_value_position_embeddings": keys}
    expected, other = layer(x, **arguments)[0], layer(x, **across)[0]
    with torch.no_grad(), vitfast.replace_attention(layer, strict=True), sdpa.attention_backend("triton"):
        close(layer(x, **arguments)[0], expected)
        assert len(calls) == 1
        assert torch.equal(layer(x, **across)[0], other)
        assert torch.equal(layer(x, **arguments, output_attentions=True)[0], expected)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Swinv2ForImageClassification"])
def test_training_steps(name, calls):
    """Two steps of an optimiser, on the interface and off it, end at the same weights."""
    settings = (plain.SWIN if "Swin" in name else peers.VIT) | {"num_labels": 7}
    model, images = plain.build(name, settings), plain.images()
    labels = torch.tensor([1, 5], device=device())

    def train(model):
        torch.manual_seed(0)  # stochastic depth
        optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            model(**images, labels=labels).loss.backward()
            optimiser.step()
        return model.state_dict()

    expected = train(copy.deepcopy(model))
    vitfast.replace_attention(model, strict=True)
    actual = train(model)
    assert len(calls) == 4
    for key in expected:
        close(actual[key], expected[key])


@pytest.mark.parametrize("name", ["BlipVisionModel", "GroupViTTextModel", "PvtModel", "ImageGPTModel"])
def test_dropout_in_training_is_transformers(name, calls):
    settings, inputs, _ = FAMILIES[name]
    model, inputs = plain.build(name, settings).train(), inputs()
    for module in model.modules():
        if isinstance(dropout := getattr(module, "dropout", None), float):
            module.dropout = 0.5
        elif isinstance(dropout, nn.Dropout):
            dropout.p = 0.5
    before = plain.run(model, inputs)
    with vitfast.replace_attention(model, strict=True):
        assert torch.equal(plain.run(model, inputs), before)
    assert not calls


@pytest.mark.full
@pytest.mark.parametrize("name", ["Swinv2Model", "BlipVisionModel", "SamVisionModel"])
def test_compiles_whole(name, calls):
    """Without transformers' hooks, with them, and redirected."""
    settings, inputs, _ = FAMILIES[name]
    model, inputs = plain.build(name, settings), inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
        vitfast.replace_attention(model, strict=True)
        torch._dynamo.reset()
        close(torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0], expected)


def test_weights_collected_otherwise(monkeypatch):
    """A transformers without the hooks that are asked."""
    model = plain.build("BlipVisionModel", peers.VIT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    swap = integration.replace(model)
    assert not swap.replaced
    assert all("collects attention weights" in why for why in swap.left.values())


def test_another_version_is_left(monkeypatch):
    model = plain.build("BlipVisionModel", peers.VIT)
    kind = type(model.encoder.layers[0].self_attn)
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, mask: self.projection(hidden_states))
    known._difference.cache_clear()
    swap = integration.replace(model)
    known._difference.cache_clear()
    assert not swap.replaced
    assert all("takes (hidden_states, mask)" in why for why in swap.left.values())


def test_every_known_class_is_there():
    """A class that no installed version has, or has otherwise, would never be noticed."""
    peers.import_transformers()
    for path, entry in transformers_modules.CLASSES.items():
        module, _, name = path.rpartition(".")
        assert known._difference(getattr(importlib.import_module(module), name), entry) == "", path
