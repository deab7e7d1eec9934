"""timm's other attention: classes that spell it out, and classes whose calls of torch's function are redirected."""

import functools

import pytest
import torch
from helpers import peers
from helpers.grids import thinned
from helpers.peers import close
from torch import nn

import vitfast
from vitfast.attention import sdpa
from vitfast.integrations import timm as integration
from vitfast.integrations import torch_sdpa
from vitfast.testing import device, make


def layers():
    """Each class in its variants: the layer and the arguments of its calls."""
    peers.import_timm()
    from timm.layers import RelPosBias
    from timm.models import (
        cait,
        convit,
        crossvit,
        davit,
        gcvit,
        hiera,
        levit,
        maxxvit,
        mvitv2,
        nest,
        pvt_v2,
        swin_transformer,
        swin_transformer_v2,
        swin_transformer_v2_cr,
        tiny_vit,
        tnt,
        twins,
        visformer,
        vision_transformer_sam,
        volo,
    )

    windows, tokens, image = make(8, 16, 48), make(2, 16, 48), make(2, 48, 4, 4)
    shifted = torch.where(make(4, 16, 16, seed=1) > 0.5, -100.0, 0.0)
    masks = ((windows,), (windows, shifted))
    swin2 = functools.partial(swin_transformer_v2.WindowAttention, 48, (4, 4), 3)
    mvit = functools.partial(mvitv2.MultiScaleAttention, feat_size=(4, 4), num_heads=3)
    pooled = {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (2, 2), "stride_kv": (2, 2)}
    sam = functools.partial(vision_transformer_sam.Attention, 48, 3, input_size=(4, 4))
    bias = functools.partial(RelPosBias, (4, 4))
    return {
        "swin": (swin_transformer.WindowAttention(48, 3, window_size=4), masks),
        "swin v2": (swin2(), masks),
        "swin v2 bias": (swin2(qkv_bias_separate=True), masks),
        "swin v2 no bias": (swin2(qkv_bias=False), masks),
        "swin v2 cr": (swin_transformer_v2_cr.WindowMultiHeadAttention(48, 3, (4, 4)), masks),
        "gcvit": (gcvit.WindowAttentionGlobal(48, 3, (4, 4), use_global=False), ((windows,),)),
        "gcvit global": (gcvit.WindowAttentionGlobal(48, 3, (4, 4)), ((windows, make(2, 4, 4, 48, seed=2)),)),
        "mvitv2": (mvit(48, 48), ((make(2, 17, 48), (4, 4)),)),
        "mvitv2 pooled": (mvit(48, 96, **pooled), ((make(2, 17, 48), (4, 4)),)),
        "mvitv2 plain": (
            mvit(48, 48, has_cls_token=False, rel_pos_type="", residual_pooling=False, mode="max", **pooled),
            ((tokens, (4, 4)),),
        ),
        "crossvit": (crossvit.CrossAttention(48, 3, qkv_bias=True), ((tokens,),)),
        "volo class": (volo.ClassAttention(48, 3, head_dim=8), ((tokens,),)),
        "convit": (convit.MHSA(48, 3), ((tokens,),)),
        "tnt": (tnt.Attention(48, 48, 3), ((tokens,),)),
        "visformer": (visformer.Attention(48, 3, head_dim_ratio=0.5), ((make(2, 48, 4, 5),),)),
        "levit": (levit.Attention(48, 8, 3, attn_ratio=2.0, resolution=4), ((tokens,),)),
        "levit conv": (levit.Attention(48, 8, 3, attn_ratio=2.0, resolution=4, use_conv=True), ((image,),)),
        "levit narrow": (levit.Attention(48, 16, 3, attn_ratio=0.5, resolution=4), ((tokens,),)),
        "levit down": (levit.AttentionDownsample(48, 40, 8, 3, resolution=4), ((tokens,),)),
        "levit down conv": (levit.AttentionDownsample(48, 40, 8, 3, resolution=4, use_conv=True), ((image,),)),
        # From here on redirected.
        "sam": (sam(use_rel_pos=True), ((make(2, 4, 4, 48),),)),
        "sam normed": (sam(qk_norm=True), ((make(2, 4, 4, 48),),)),
        "pvt v2": (pvt_v2.Attention(48, 3, sr_ratio=2), ((tokens, (4, 4)),)),
        "pvt v2 linear": (pvt_v2.Attention(48, 3, linear_attn=True), ((tokens, (4, 4)),)),
        "cait class": (cait.ClassAttn(48, 3), ((tokens,),)),
        "twins local": (twins.LocallyGroupedAttn(48, 3, ws=2), ((make(2, 12, 48), (4, 3)),)),
        "twins global": (twins.GlobalSubSampleAttn(48, 3, sr_ratio=2), ((tokens, (4, 4)),)),
        "nest": (nest.Attention(48, 3), ((make(2, 4, 9, 48),),)),
        "tiny vit": (tiny_vit.Attention(48, 16, 3, attn_ratio=1, resolution=(4, 4)), ((tokens,),)),
        "hiera": (hiera.MaskUnitAttention(48, 48, 3, q_stride=2), ((tokens,),)),
        "hiera windows": (hiera.MaskUnitAttention(48, 48, 3, 2, 4, use_mask_unit_attn=True), ((tokens,),)),
        "maxvit": (maxxvit.AttentionCl(48, dim_head=16, rel_pos_cls=bias), ((tokens,),)),
        "davit": (davit.WindowAttention(48, (4, 4), 3), ((windows,),)),
        "volo": (volo.Attention(48, 3), ((make(2, 4, 4, 48),),)),
    }


NAMES = (
    *("swin", "swin v2", "swin v2 bias", "swin v2 no bias", "swin v2 cr", "gcvit", "gcvit global"),
    *("mvitv2", "mvitv2 pooled", "mvitv2 plain", "crossvit", "volo class", "convit", "tnt", "visformer"),
    *("levit", "levit conv", "levit narrow", "levit down", "levit down conv"),
    *("sam", "sam normed", "pvt v2", "pvt v2 linear", "cait class", "twins local", "twins global", "nest"),
    *("tiny vit", "hiera", "hiera windows", "maxvit", "davit", "volo"),
)
BIASED = ("swin", "swin v2", "swin v2 cr", "gcvit", "mvitv2", "levit", "sam", "tiny vit", "maxvit")


def build(name):
    layer, variants = layers()[name]
    peers.randomised(layer)  # not chained: the eval() of timm's LeViT gives None
    return layer.to(device()), variants


def output(layer, arguments):
    torch.manual_seed(0)  # Swin V2 CR drops in its bias
    out = layer(*arguments)
    return out[0] if isinstance(out, tuple) else out  # mvitv2 gives the size as well


@pytest.mark.parametrize("name", thinned(NAMES))
def test_layers(name, calls):
    """Outputs and gradients in training, the output on the kernels in eval mode, and everything put back."""
    layer, variants = build(name)
    layer.train()
    for x, *rest in variants:
        inputs = x.clone().requires_grad_()
        parameters = [inputs, *(p for p in layer.parameters() if p.requires_grad)]
        expected = output(layer, (inputs, *rest))
        wanted = torch.autograd.grad(expected.sin().sum(), parameters, allow_unused=True)
        with integration.replace(layer) as swap:
            assert swap.replaced == [""]
            assert (type(layer)._vitfast_function is torch_sdpa.redirected) == (NAMES.index(name) >= NAMES.index("sam"))
            actual = output(layer, (inputs, *rest))
            gradients = torch.autograd.grad(actual.sin().sum(), parameters, allow_unused=True)
        close(actual, expected)
        for gradient, want in zip(gradients, wanted, strict=True):
            assert (gradient is None) == (want is None)
            if want is not None and want.abs().max() > 1e-4:  # a bias of keys or before a norm moves nothing
                close(gradient, want)
    assert len(calls) == len(variants)
    layer.eval()
    with torch.no_grad():
        for variant in variants:
            expected = output(layer, variant)
            with vitfast.replace_attention(layer, strict=True), sdpa.attention_backend("triton"):
                close(output(layer, variant), expected)
            assert torch.equal(output(layer, variant), expected)
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("name", BIASED)
def test_a_dropped_bias_or_mask_would_show(name, monkeypatch):
    (layer, variants), original = build(name), sdpa.scaled_dot_product_attention

    def forgetful(*args, attn_mask, **kwargs):
        return original(*args, **kwargs)

    with torch.no_grad():
        expected = [output(layer, variant) for variant in variants]
        monkeypatch.setattr(sdpa, "scaled_dot_product_attention", forgetful)
        with vitfast.replace_attention(layer):
            for variant, want in zip(variants, expected, strict=True):
                assert (output(layer, variant) - want).abs().max() > 0.001 * want.abs().max()
    if len(variants) == 2:  # the mask of shifted windows, the bias apart
        assert (expected[0] - expected[1]).abs().max() > 0.01 * expected[0].abs().max()


@pytest.mark.parametrize("name", ["swin", "swin v2", "crossvit", "visformer", "cait class"])
def test_dropout_in_training_is_timms(name):
    layer, ((*arguments,), *_) = layers()[name]
    layer = layer.to(device()).train()
    layer.attn_drop.p = 0.5
    torch.manual_seed(0)
    expected = output(layer, arguments)
    with vitfast.replace_attention(layer, strict=True):
        torch.manual_seed(0)
        assert torch.equal(output(layer, arguments), expected)


def test_flag_of_timm_decides():
    """A redirected class with fused_attn off never calls torch's function. Swin's is off by default."""
    every = layers()
    for name in ("nest", "sam"):
        every[name][0].fused_attn = False
        assert "fused_attn is off" in vitfast.replace_attention(every[name][0]).left[""]
    assert not every["swin"][0].fused_attn
    assert vitfast.replace_attention(every["swin"][0]).replaced == [""]


def test_swin_model(calls):
    """Shifted windows of a whole model, on the kernels."""
    model = peers.timm_model(
        "swin_tiny_patch4_window7_224", img_size=28, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=32
    ).to(device())
    images = make(2, 3, 28, 28)
    with torch.no_grad():
        expected = model(images)
        with vitfast.replace_attention(model, strict=True), sdpa.attention_backend("triton"):
            close(model(images), expected)
    assert any(call["attn_mask"].shape[0] > 1 for call in calls)


class Mine(nn.Module):
    """Attention of no library."""

    def forward(self, q, k, v, seen):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3)


def test_any_module_that_calls_torchs_function(calls):
    module, q, k, v = Mine(), *(make(2, 3, 9, 16, seed=seed) for seed in range(3))
    seen = make(2, 1, 9, 9) > -0.5
    expected = module(q, k, v, seen)
    with vitfast.replace_attention(module, strict=True), sdpa.attention_backend("triton"):
        close(module(q, k, v, seen), expected)
        torch._dynamo.reset()
        graphs = []

        def keep(graph, inputs):
            graphs.append(str(graph.code))
            return graph

        close(torch.compile(module, backend=keep, fullgraph=True)(q, k, v, seen), expected)
    assert "torch.ops.vitfast.attention" in graphs[0]
    assert calls[0] == {"attn_mask": seen, "scale": 0.3}


def test_five_axes(calls):
    """Windows go to the kernels as a batch; what torch alone can broadcast goes to torch as it is."""

    class Windows(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)

    module, q, k, v = Windows(), *(make(2, 3, 4, 9, 16, seed=seed) for seed in range(3))
    expected, shared = module(q, k, v), module(q, k[:, :1], v[:, :1])
    with vitfast.replace_attention(module, strict=True):
        close(module(q, k[:, :1], v[:, :1]), shared)
        with sdpa.attention_backend("triton"):
            close(module(q, k, v), expected)
    assert len(calls) == 2


def test_a_softmax_beside_the_call_is_left():
    """Nobody knows whether its forward comes to the call of torch."""

    class Talks(nn.Module):
        def forward(self, x):
            """Unlike scaled_dot_product_attention(x, x, x)."""
            return x  # F.scaled_dot_product_attention(x, x, x)

    class Either(nn.Module):
        def forward(self, q, k, v):
            if self.flash:
                return nn.functional.scaled_dot_product_attention(q, k, v)
            return (q @ k.mT).softmax(-1) @ v

    swap = vitfast.replace_attention(Either())
    assert "no exact replacement" in swap.left[""]
    assert not vitfast.replace_attention(Talks()).replaced
