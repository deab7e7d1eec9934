"""What engines give besides tokens, embedding and logits: layers, attention maps, unit embeddings."""

import dataclasses

import pytest
import torch
from helpers import engines, peers

import vitfast
from vitfast.testing import make

DEVICE = {"device": "cpu", "backend": "torch"}


@pytest.mark.parametrize("changes", [{}, {"class_token": False, "global_pool": "avg", "final_norm": True}], ids=str)
def test_layers_are_timms(changes):
    model = peers.timm_model(**peers.TIMM | {"depth": 3} | changes)
    engine, x = vitfast.load(model, **DEVICE), make(2, 3, 32, 32)
    with torch.no_grad():
        for norm in (True, False):
            want = model.forward_intermediates(x, indices=[0, 2], norm=norm, intermediates_only=True)
            got = engine(x, layers=[0, -1], norm=norm, reshape=True).layers
            for theirs, ours in zip(want, got, strict=True):
                peers.close(ours, theirs)
        whole = engine(x, layers=[2, 0])
    peers.close(whole.layers[0], whole.tokens)
    assert whole.layers[1].shape == whole.tokens.shape
    plain = engine(x)
    assert torch.equal(plain.tokens, whole.tokens)
    assert torch.equal(plain.logits, whole.logits)
    assert plain.layers is None
    assert plain.attention_maps is None


def test_layers_of_another_size():
    engine = engines.engine(dataclasses.replace(engines.SMALL, dynamic_size=True), backend="torch")
    layers = engine(make(1, 3, 48, 80), layers=range(2), reshape=True).layers
    assert [list(layer.shape) for layer in layers] == [[1, 64, 3, 5]] * 2


@pytest.mark.parametrize("name", ["ViTModel", "DINOv3ViTModel"])
def test_attention_maps_are_transformers(name):
    settings = peers.VIT | ({"num_register_tokens": 2} if "DINO" in name else {})
    model = peers.transformers_model(name, settings)
    model.set_attn_implementation("eager")
    engine, x = vitfast.load(model, **DEVICE), make(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x, output_attentions=True).attentions
    output = engine(x, attention_maps=[1, 0], layers=[1])
    for theirs, ours in zip(want, reversed(output.attention_maps), strict=True):
        peers.close(ours, theirs)
    assert torch.allclose(output.attention_maps[0].sum(-1), torch.ones(()))
    assert torch.equal(output.tokens, engine(x).tokens)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_attention_maps_in_other_precisions(dtype):
    engine, exact = engines.engine(dtype=dtype, backend="torch"), engines.engine(dtype="fp32", backend="torch")
    x = make(2, 3, 32, 48)
    got, want = (e(x, attention_maps=[1]).attention_maps[0] for e in (engine, exact))
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.1


def test_unit_embeddings():
    engine = engines.engine(backend="torch")
    x = make(2, 3, 32, 48)
    plain, unit = engine(x), engine(x, normalize=True)
    torch.testing.assert_close(unit.embedding, plain.embedding / plain.embedding.norm(dim=-1, keepdim=True))
    assert torch.equal(unit.logits, plain.logits)


def test_blocks_that_there_are_not():
    engine = engines.engine(backend="torch")
    x = make(1, 3, 32, 48)
    for kwargs, reason in (
        ({"layers": [2]}, r"layers must be block numbers from -2 to 1, got 2"),
        ({"attention_maps": [-3]}, r"attention_maps must be block numbers from -2 to 1, got -3"),
        ({"layers": [True]}, "got True"),
        ({"layers": 1}, "layers must be a list of block numbers, got 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            engine(x, **kwargs)
    with pytest.raises(ValueError, match="layers and attention_maps are of images of one size"):
        engine([x[0]], layers=[0])
