"""timm's attention classes with vitfast's attention inside: same outputs, same training, everything put back."""

import copy
import pickle

import pytest
import torch
from helpers import peers
from helpers.peers import close
from torch import nn

import vitfast
from vitfast.attention import sdpa
from vitfast.integrations import known, torch_sdpa
from vitfast.integrations import timm as integration
from vitfast.testing import device, make

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32}
MODELS = {
    "vit": ("vit_tiny_patch16_224", peers.TIMM),
    "vit_qk_norm": ("vit_tiny_patch16_224", peers.TIMM | {"qk_norm": True}),
    "vit_registers": ("vit_small_patch14_reg4_dinov2", SIZES | {"img_size": 28}),
    "siglip": ("vit_base_patch16_siglip_224", SIZES),
    "naflex": ("naflexvit_base_patch16_gap", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "eva02": ("eva02_tiny_patch14_224", SIZES | {"img_size": 28}),
    "dinov3": ("vit_small_patch16_dinov3", SIZES),
    "beit": ("beit_base_patch16_224", SIZES),
    "relpos": ("vit_relpos_small_patch16_224", SIZES),
}
"""Name -> timm's name and settings."""


def build(key):
    name, settings = MODELS[key]
    return peers.timm_model(name, **settings).to(device()), make(
        2, 3, settings.get("img_size", 32), settings.get("img_size", 32)
    )


@pytest.mark.parametrize("key", MODELS)
def test_models(key, calls):
    model, images = build(key)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(images)
        swap = vitfast.replace_attention(model, strict=True)
        assert len(swap.replaced) == 2 + (key == "siglip")
        close(model(images), before)
        assert len(calls) == len(swap.replaced)
        assert list(model.state_dict()) == keys
        swap.restore()
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert torch.equal(model(images), before)
    assert len(calls) == len(swap.replaced)


@pytest.mark.parametrize("key", ["vit", "beit"])
def test_models_on_the_kernel(key, calls):
    model, images = build(key)
    with torch.no_grad():
        before = model(images)
        with vitfast.replace_attention(model), sdpa.attention_backend("triton"):
            close(model(images), before)
    assert len(calls) == 2
    assert all((call["attn_mask"] is None) == (key == "vit") for call in calls)


def layers():
    """Each class in its variants, with the arguments of its forward beyond x [2, 9, 48]."""
    peers.import_timm()
    from timm.layers import Attention, AttentionPoolLatent, AttentionRope, RelPosBias
    from timm.models.beit import Attention as BeitAttention
    from timm.models.eva import EvaAttention
    from timm.models.vision_transformer import ParallelScalingBlock
    from timm.models.vision_transformer_relpos import RelPosAttention

    norm = nn.LayerNorm
    seen = make(2, 1, 9, 9) > -0.5
    masks = ({}, {"attn_mask": seen}, {"attn_mask": make(2, 3, 9, 9)}, {"is_causal": True})
    pool_masks = ({}, {"attn_mask": seen[:, :, :1]}, {"attn_mask": make(2, 3, 1, 9)})
    rope, shared = make(8, 32), make(1, 3, 9, 9)
    ropes = ({"rope": rope}, {"rope": rope, "attn_mask": seen}, {"is_causal": True})
    return {
        "plain": (Attention(48, 3), masks),
        "normed": (Attention(48, 3, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=norm), masks),
        "gated": (Attention(48, 3, gated=True, attn_head_dim=24, dim_out=32, proj_bias=False), masks),
        "rope": (AttentionRope(48, 3, qk_norm=True, norm_layer=norm), ropes),
        "rope grouped": (
            AttentionRope(48, 4, attn_head_dim=16, qkv_fused=False, num_kv_heads=2, gated=True),
            ({"rope": make(8, 32)},),
        ),
        "rope half": (AttentionRope(48, 3, rotate_half=True, num_prefix_tokens=1), ropes),
        "eva": (EvaAttention(48, 3, scale_norm=False), ropes),
        "eva bias apart": (EvaAttention(48, 3, norm_layer=norm, qkv_bias_separate=True, gated=True), ropes),
        "eva projections": (EvaAttention(48, 3, qkv_fused=False, norm_layer=norm, qk_norm=True), ropes),
        "beit": (BeitAttention(48, 3, qkv_bias=True), ({}, {"shared_rel_pos_bias": shared})),
        "beit table": (
            BeitAttention(48, 3, window_size=(2, 4), qkv_bias_separate=True, qkv_bias=True),
            ({}, {"shared_rel_pos_bias": shared}),
        ),
        "relpos": (
            RelPosAttention(48, 3, rel_pos_cls=lambda **kw: RelPosBias((3, 3), **kw)),
            ({}, {"shared_rel_pos": shared}),
        ),
        "relpos shared": (RelPosAttention(48, 3, qk_norm=True), ({}, {"shared_rel_pos": shared})),
        "pool": (AttentionPoolLatent(48, num_heads=3, norm_layer=norm), pool_masks),
        "pool several": (
            AttentionPoolLatent(
                48, num_heads=3, latent_len=2, pos_embed="abs", feat_size=9, pool_type="avg", qk_norm=True
            ),
            ({},),
        ),
        "pool logits": (AttentionPoolLatent(48, out_features=0, num_heads=3, q_proj=False, pool_type=""), pool_masks),
        "parallel": (ParallelScalingBlock(48, 3, qk_norm=True), masks),
        "parallel fused": (ParallelScalingBlock(48, 3, qkv_bias=True, fuse_out_proj=True, init_values=0.5), masks),
    }


LAYERS = (
    *("plain", "normed", "gated", "rope", "rope grouped", "rope half", "eva", "eva bias apart", "eva projections"),
    *("beit", "beit table", "relpos", "relpos shared", "pool", "pool several", "pool logits"),
    *("parallel", "parallel fused"),
)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, calls):
    """Outputs and gradients of each class in each variant, with each kind of mask."""
    layer, variants = layers()[name]
    layer = peers.randomised(layer).to(device()).train()
    x = make(2, 9, 48).requires_grad_()
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for arguments in variants:
        expected = layer(x, **arguments)
        expected_gradients = torch.autograd.grad(expected.sin().sum(), parameters, allow_unused=True)
        with integration.replace(layer) as swap:
            assert swap.replaced == [""]
            actual = layer(x, **arguments)
            gradients = torch.autograd.grad(actual.sin().sum(), parameters, allow_unused=True)
        close(actual, expected)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            assert (gradient is None) == (wanted is None)
            if wanted is not None and wanted.abs().max() > 0:
                close(gradient, wanted)
    assert len(calls) == len(variants)


def test_dropout_in_training_is_timms(calls):
    """The same random numbers are drawn; in eval mode vitfast runs."""
    from timm.layers import Attention

    layer, x = Attention(48, 3, attn_drop=0.5).to(device()).train(), make(2, 9, 48)
    torch.manual_seed(0)
    expected = layer(x)
    with vitfast.replace_attention(layer):
        torch.manual_seed(0)
        assert torch.equal(layer(x), expected)
        assert not calls
        layer.eval()(x)
    assert len(calls) == 1


def test_training_steps(calls):
    model, images = build("vit")
    labels = torch.tensor([1, 5], device=device())

    def train(model):
        optimiser = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
        return model.state_dict()

    expected = train(copy.deepcopy(model))
    vitfast.replace_attention(model, strict=True)
    actual = train(model)
    assert len(calls) == 4
    for name in expected:
        close(actual[name], expected[name])


def test_padding_of_naflex(calls):
    model, _ = build("naflex")
    seen = torch.ones(2, 4, dtype=torch.bool, device=device())
    seen[1, 2:] = False
    coordinates = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=device()).expand(2, -1, -1)
    inputs = {"patches": make(2, 4, 768), "patch_coord": coordinates, "patch_valid": seen}
    with torch.no_grad():
        expected = model(inputs)
        with vitfast.replace_attention(model), sdpa.attention_backend("triton"):
            close(model(inputs), expected)
    assert all(call["attn_mask"] is not None for call in calls)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_swapped_too(duplicate, calls):
    model, images = build("vit")
    swap = vitfast.replace_attention(model)
    twin = duplicate(model)
    swap.restore()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the copy runs on its own weights
        assert twin(images).abs().max() > 0
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("name", "kind"), [("coat_tiny", "FactorAttnConvRelPosEnc"), ("efficientformer_l1", "Attention")]
)
def test_unknown_attention_is_left(name, kind):
    timm = peers.import_timm()
    model = timm.create_model(name)
    for swap in (vitfast.replace_attention(model), integration.replace(model)):
        assert not swap.replaced
        assert any(why.endswith(f".{kind}") for why in swap.left.values())
    with pytest.raises(ValueError, match=f"attention module.*cannot be replaced(.|\n)*{kind}"):
        vitfast.replace_attention(model, strict=True)


def test_subclass_other_version_and_unfused(monkeypatch, calls):
    peers.import_timm()
    from timm.layers import Attention

    class Mine(Attention):  # its forward calls torch's function: kept, and the call redirected
        def forward(self, x, attn_mask=None, is_causal=False):
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=0.1)
            return self.proj(x.transpose(1, 2).flatten(2))

    class Other(Attention):
        def forward(self, x):
            return self.proj(self.qkv(x)[..., :48])

    unfused = Attention(48, 3)
    unfused.fused_attn = False
    model = nn.ModuleDict({"mine": Mine(48, 3), "other": Other(48, 3), "unfused": unfused, "known": Attention(48, 3)})
    model, x = model.to(device()), make(2, 9, 48)
    expected = model["mine"](x, is_causal=True)
    swap = integration.replace(model)
    assert swap.replaced == ["mine", "known"]
    close(model["mine"](x, is_causal=True), expected)
    assert calls[0]["scale"] == 0.1
    assert "subclass" in swap.left["other"]
    assert "fused_attn is off" in swap.left["unfused"]
    assert "replaced already" in vitfast.replace_attention(model).left["known"]
    swap.restore()

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.proj(self.softcap(self.qkv(x)))

    known._difference.cache_clear()
    monkeypatch.setattr(Attention, "forward", forward)
    assert "it reads softcap" in integration.replace(model).left["known"]
    monkeypatch.setattr(Attention, "forward", lambda self, x, rope: x)
    known._difference.cache_clear()
    assert "takes (x, rope)" in integration.replace(model).left["known"]
    known._difference.cache_clear()


def test_strict_failure_changes_nothing():
    peers.import_timm()
    from timm.layers import Attention
    from timm.models.cait import TalkingHeadAttn

    model = nn.ModuleList([Attention(48, 3), TalkingHeadAttn(48, 3)])
    with pytest.raises(ValueError, match="TalkingHeadAttn"):
        vitfast.replace_attention(model, strict=True)
    assert "forward" not in model[0].__dict__


def test_restore_tells_of_a_change_since():
    model, _ = build("vit")
    swap = vitfast.replace_attention(model)
    model.blocks[0].attn.forward = lambda x, **_: x
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn"):
        swap.restore()
    assert "forward" not in model.blocks[1].attn.__dict__  # the others are restored
    swap.restore()  # and nothing is tried twice


def test_compiles_whole():
    model, images = build("vit")
    with torch.no_grad():
        expected = model(images)
        vitfast.replace_attention(model)
        torch._dynamo.reset()
        close(torch.compile(model, backend="eager", fullgraph=True)(images), expected)


def test_torch_wide(calls):
    """Any model's calls of torch's function, windows of Swin included; only within the context."""
    model = peers.timm_model(
        "swin_tiny_patch4_window7_224", img_size=28, window_size=7, depths=(2,), num_heads=(2,), embed_dim=32
    )
    model, images = model.to(device()), make(1, 3, 28, 28)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # timm spells Swin's windows out by default
    with torch.no_grad():
        expected = model(images)
        assert not calls
        with torch_sdpa.use():
            close(model(images), expected)
            assert len(calls) == 2
            with sdpa.attention_backend("triton"):
                close(model(images), expected)
        assert torch.equal(model(images), expected)
    assert len(calls) == 4
