"""Models that norm or rotate q and k: without gradient, on the kernels' route, the kernel does it; else they do."""

import pytest
import torch
from helpers import peers
from torch import nn

import vitfast
from vitfast.attention import sdpa
from vitfast.ops.accuracy import PEER_TOLERANCE, TOLERANCES
from vitfast.testing import device, make


@pytest.fixture
def routes(monkeypatch):
    """How each attention was computed: "fused", or "plain" by scaled_dot_product_attention."""
    made, fused, plain = [], sdpa.fused, sdpa.scaled_dot_product_attention

    def counted_fused(*args, **kwargs):
        out = fused(*args, **kwargs)
        made.extend(["fused"] * (out is not None))
        return out

    def counted_plain(*args, **kwargs):
        made.append("plain")
        return plain(*args, **kwargs)

    monkeypatch.setattr(sdpa, "fused", counted_fused)
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", counted_plain)
    return made


def close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= PEER_TOLERANCE * expected.abs().max()


def layers():
    """timm's layers in their variants, with the arguments of forward beyond x [2, 9, 48]."""
    peers.import_timm()
    from timm.layers import Attention, AttentionRope, LayerNorm, RmsNorm
    from timm.models.eva import EvaAttention

    seen, rope = make(2, 1, 9, 9) > -0.5, make(8, 32)
    ropes = ({"rope": rope}, {"rope": rope, "attn_mask": seen}, {"rope": rope, "is_causal": True})
    grouped = {"num_kv_heads": 2, "qkv_fused": False, "attn_head_dim": 16, "gated": True}
    return {
        "normed": (Attention(48, 3, qk_norm=True, norm_layer=nn.LayerNorm), ({}, {"attn_mask": seen})),
        "rms normed": (Attention(48, 3, qk_norm=True, norm_layer=RmsNorm), ({"is_causal": True},)),
        "rope": (AttentionRope(48, 3, qk_norm=True, norm_layer=LayerNorm), ropes),
        "rope half": (AttentionRope(48, 3, rotate_half=True, num_prefix_tokens=1), ropes),
        "rope grouped": (AttentionRope(48, 4, **grouped), ropes[:1]),
        "rope for each head": (AttentionRope(48, 3, num_prefix_tokens=0), ({"rope": make(3, 9, 32)},)),
        "rope for each image": (AttentionRope(48, 3), ({"rope": make(2, 1, 8, 32)},)),
        "eva": (EvaAttention(48, 3, scale_norm=False), ropes[:2]),
        "eva projections": (EvaAttention(48, 3, qkv_fused=False, norm_layer=RmsNorm, qk_norm=True), ropes[:1]),
    }


LAYERS = ("normed", "rms normed", "rope", "rope half", "rope grouped", "rope for each head", "rope for each image",
          "eva", "eva projections")  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_timm(name, routes):
    layer, variants = layers()[name]
    layer, x = peers.randomised(layer).to(device()), make(2, 9, 48)
    for arguments in variants:
        expected = layer(x, **arguments)
        if "rope" in arguments:  # it matters
            assert (layer(x, **arguments | {"rope": None}) - expected).abs().max() > 0.01
        with vitfast.replace_attention(layer, strict=True):
            with torch.no_grad():
                torch_route = layer(x, **arguments)
                assert routes == ["plain"]
                with sdpa.attention_backend("triton"):
                    close(layer(x, **arguments), expected)
                assert routes == ["plain", "fused"]
            close(torch_route, expected)
        routes.clear()


def test_a_gradient_is_not_lost(routes):
    layer, x = peers.randomised(layers()["rope"][0]).to(device()), make(2, 9, 48)
    rope = make(8, 32).requires_grad_()
    parameters = [rope, *layer.parameters()]
    wanted = torch.autograd.grad(layer(x, rope=rope).sin().sum(), parameters)
    with vitfast.replace_attention(layer), sdpa.attention_backend("triton"):
        actual = torch.autograd.grad(layer(x, rope=rope).sin().sum(), parameters)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        (alone,) = torch.autograd.grad(layer(x, rope=rope).sin().sum(), rope)  # which the kernel does not have
    assert routes == ["plain", "plain"]
    for gradient, want in zip((*actual, alone), (*wanted, wanted[0]), strict=True):
        close(gradient, want)


class OtherNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


def hooked(layer):
    layer.q_norm.register_forward_hook(lambda module, inputs, output: output * 2)


def renormed(layer):
    layer.k_norm = OtherNorm(16)


def unweighted(layer):
    layer.q_norm = nn.LayerNorm(16, elementwise_affine=False)


def mixed(layer):
    layer.q_norm.eps = 0.5


@pytest.mark.parametrize("change", [hooked, renormed, unweighted, mixed])
def test_norms_that_are_not_known_run(change, routes):
    layer, x, rope = layers()["rope"][0], make(2, 9, 48), make(8, 32)
    change(layer)
    layer = peers.randomised(layer).to(device())
    with torch.no_grad():
        expected = layer(x, rope=rope)
        with vitfast.replace_attention(layer), sdpa.attention_backend("triton"):
            close(layer(x, rope=rope), expected)
    assert routes == ["plain"]


def test_tables_that_do_not_fit_are_timms_to_refuse(routes):
    layer, x = layers()["rope"][0].to(device()).requires_grad_(False), make(2, 9, 48)
    for rope in (make(7, 32), make(9, 32)):  # one token of nine is a prefix
        swapped = vitfast.replace_attention(layer)
        with swapped, sdpa.attention_backend("triton"), pytest.raises(RuntimeError, match="must match the size"):
            layer(x, rope=rope)
    assert not routes


def test_autocast_rounds_where_the_model_does(routes):
    layer, x, rope = peers.randomised(layers()["rope"][0]).to(device()), make(2, 9, 48), make(8, 32)
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
        expected = layer(x, rope=rope)
        with vitfast.replace_attention(layer), sdpa.attention_backend("triton"):
            actual = layer(x, rope=rope)
    assert routes == ["fused"]
    assert (actual - expected).abs().max() <= 2 * TOLERANCES[torch.bfloat16].ulp * expected.abs().max()


SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS = {
    "eva02": ("eva02_tiny_patch14_224", SIZES | {"img_size": 28}),
    "dinov3": ("vit_small_patch16_dinov3", SIZES | {"img_size": 32}),
    "mixed": ("vit_small_patch16_rope_mixed_224", SIZES | {"img_size": 32}),
}


@pytest.mark.parametrize("key", MODELS)
def test_models_of_timm(key, routes):
    name, settings = MODELS[key]
    model, images = peers.timm_model(name, **settings).to(device()), make(2, 3, *[settings["img_size"]] * 2)
    with torch.no_grad():
        expected = model(images)
        with vitfast.replace_attention(model, strict=True), sdpa.attention_backend("triton"):
            close(model(images), expected)
        assert routes == ["fused"] * 2
        assert torch.equal(model(images), expected)


DINOV3 = peers.VIT | {"num_register_tokens": 2}


def test_dinov3_of_transformers(routes):
    model = peers.transformers_model("DINOv3ViTModel", DINOV3).to(device())
    images = make(2, 3, 32, 32)
    layer = next(module for module in model.modules() if type(module).__name__ == "DINOv3ViTAttention")
    with torch.no_grad():
        expected = model(images).last_hidden_state
        with vitfast.replace_attention(model, strict=True):
            close(model(images).last_hidden_state, expected)
            assert routes == ["plain"] * 2
            with sdpa.attention_backend("triton"):
                close(model(images).last_hidden_state, expected)
                assert routes == ["plain"] * 2 + ["fused"] * 2
                with pytest.raises(ValueError, match="output_attentions"):
                    model(images, output_attentions=True)
        assert "forward" not in layer.__dict__
        assert torch.equal(model(images).last_hidden_state, expected)
    with vitfast.replace_attention(model), sdpa.attention_backend("triton"):
        close(model(images).last_hidden_state, expected)  # with a gradient
    assert routes == ["plain"] * 2 + ["fused"] * 2 + ["plain"] * 2


@pytest.mark.full
def test_dinov3_of_transformers_compiles_whole(routes):
    model = peers.transformers_model("DINOv3ViTModel", DINOV3).to(device())
    images = make(2, 3, 32, 32)
    with torch.no_grad(), vitfast.replace_attention(model), sdpa.attention_backend("triton"):
        expected = model(images).last_hidden_state
        torch._dynamo.reset()
        close(torch.compile(model, backend="eager", fullgraph=True)(images).last_hidden_state, expected)
