"""Every family of checkpoints against its own library's forward in fp32, and what must be refused by name."""

import functools
import json
import re

import pytest
import torch
from helpers import peers
from helpers.peers import DINO, TEXT, TIMM, VIT, timm_model, torchvision_model, transformers_model
from safetensors.torch import save_file
from torch import nn

from vitfast import testing
from vitfast.engine.engine import Engine
from vitfast.models import checkpoints
from vitfast.models.checkpoints import CheckpointError
from vitfast.ops import accuracy


def engine(checkpoint) -> Engine:
    return Engine(checkpoint, device=testing.device(), dtype="fp32", backend="torch")


def images(*size: int, batch: int = 2) -> torch.Tensor:
    return testing.make(batch, 3, *size)


def assert_same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    bound = accuracy.PEER_TOLERANCE * want.abs().max().item()
    error = (got.cpu() - want.detach().cpu()).abs().max().item()
    assert error <= bound, f"{what}: error {error:.2e} exceeds {bound:.2e}"


def transformers_truth(model: nn.Module, pixels: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    """tokens, embedding and logits as the model's own users get them; what it does not give is left out."""
    name = type(model).__name__
    with torch.no_grad():
        if name == "CLIPModel":
            tower = model.vision_model(pixels, **kwargs)
            embedding = model.visual_projection(tower.pooler_output)
            return {"tokens": model.vision_model.post_layernorm(tower.last_hidden_state), "embedding": embedding}
        output = model(pixels, **kwargs)
        if name.startswith("CLIP"):
            tower = getattr(model, "vision_model", model)
            tokens = tower.post_layernorm(output.last_hidden_state)
            pooled = output.image_embeds if name.endswith("WithProjection") else output.pooler_output
            return {"tokens": tokens, "embedding": pooled}
        if "logits" in output:
            return {"logits": output.logits}
        return {"tokens": output.last_hidden_state, "embedding": output.last_hidden_state[:, 0]}


TRANSFORMERS = {
    "ViTModel": ("ViTModel", VIT),
    "ViT without qkv bias, tanh gelu": ("ViTModel", VIT | {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}),
    "ViTForImageClassification": ("ViTForImageClassification", VIT | {"num_labels": 5}),
    "ViT, not square": ("ViTForImageClassification", VIT | {"image_size": [32, 48], "num_labels": 5}),
    "DeiTModel": ("DeiTModel", VIT),
    "DeiTForImageClassification": ("DeiTForImageClassification", VIT | {"num_labels": 5}),
    "DeiT with teacher": ("DeiTForImageClassificationWithTeacher", VIT | {"num_labels": 5}),
    "Dinov2Model": ("Dinov2Model", DINO),
    "Dinov2 SwiGLU": ("Dinov2Model", DINO | {"use_swiglu_ffn": True, "mlp_ratio": 4}),
    "Dinov2ForImageClassification": ("Dinov2ForImageClassification", DINO | {"num_labels": 5}),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersModel", DINO | {"num_register_tokens": 3}),
    "Dinov2WithRegisters SwiGLU classifier": (
        "Dinov2WithRegistersForImageClassification",
        DINO | {"use_swiglu_ffn": True, "num_labels": 5},
    ),
    "CLIPVisionModel": ("CLIPVisionModel", VIT),
    "CLIPVisionModelWithProjection": ("CLIPVisionModelWithProjection", VIT | {"projection_dim": 20}),
    "CLIPModel": (
        "CLIPModel",
        {"vision_config": VIT | {"hidden_act": "gelu"}, "text_config": TEXT, "projection_dim": 20},
    ),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers(case, tmp_path):
    name, config = TRANSFORMERS[case]
    model = transformers_model(name, config)
    model.save_pretrained(tmp_path)
    live, stored = checkpoints.load(model), checkpoints.load(tmp_path)
    size = live.config.image_size
    pixels = images(*size)
    truth = transformers_truth(model, pixels.cpu())
    for kind, checkpoint in {"live": live, "directory": stored}.items():
        output = engine(checkpoint)(pixels)
        for field, want in truth.items():
            assert_same(getattr(output, field), want, f"{case}, {kind}, {field}")
        assert (output.logits is None) == ("logits" not in truth)


@pytest.mark.parametrize(
    ("name", "config", "size"),
    [
        ("ViTModel", VIT, (48, 32)),
        ("DeiTModel", VIT, (24, 40)),
        ("Dinov2Model", DINO, (56, 28)),
        ("Dinov2WithRegistersModel", DINO, (28, 56)),
        ("CLIPVisionModelWithProjection", VIT, (48, 40)),
    ],
)
def test_transformers_at_another_size(name, config, size):
    model = transformers_model(name, config)
    pixels = images(*size)
    kwargs = {} if "Dinov2" in name else {"interpolate_pos_encoding": True}
    output = engine(checkpoints.load(model))(pixels)
    for field, want in transformers_truth(model, pixels.cpu(), **kwargs).items():
        assert_same(getattr(output, field), want, field)


def test_transformers_compiled_module_is_unwrapped():
    model = transformers_model("ViTModel", VIT)
    assert checkpoints.load(torch.compile(model)).config == checkpoints.load(model).config


def test_transformers_old_memory_names_and_no_architectures(tmp_path):
    """Files without 'architectures' are understood by their keys, in either naming."""
    model = transformers_model("ViTForImageClassification", VIT | {"num_labels": 5})
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    pixels = images(32, 32)
    want = transformers_truth(model, pixels.cpu())["logits"]
    assert_same(engine(checkpoints.load(tmp_path))(pixels).logits, want, "logits")


def test_transformers_stored_dtype_is_kept(tmp_path):
    model = transformers_model("Dinov2Model", DINO).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    weights = checkpoints.load(tmp_path).weights
    assert weights["prefix"].dtype == torch.float32  # a sum of two weights, which is rounded once, to the model's dtype
    assert {t.dtype for name, t in weights.items() if name != "prefix"} == {torch.bfloat16}


# timm


def timm_layers(name: str):
    peers.import_timm()
    from timm import layers

    return getattr(layers, name)


def gated_model() -> nn.Module:
    model = timm_model(**TIMM)
    for block in model.blocks:
        block.attn = peers.randomised(timm_layers("Attention")(48, 3, qkv_bias=True, gated=True))
    return model


SMALL_EVA = TIMM | {"embed_dim": 64, "num_heads": 4, "img_size": (24, 32)}
SMALL_NAFLEX = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32, "num_classes": 7}
TIMM_CASES = {
    "vit_tiny_patch16_224, whole": lambda: timm_model(depth=3),
    "deit_tiny_distilled_patch16_224": lambda: timm_model("deit_tiny_distilled_patch16_224", **TIMM),
    "distilled, no head": lambda: timm_model("deit_tiny_distilled_patch16_224", **(TIMM | {"num_classes": 0})),
    "vit_small_patch14_reg4_dinov2": lambda: timm_model(
        "vit_small_patch14_reg4_dinov2", **(TIMM | {"patch_size": 14, "img_size": 42, "num_classes": 0})
    ),
    "SwiGLU packed": lambda: timm_model(
        "vit_giant_patch14_reg4_dinov2", **(TIMM | {"patch_size": 14, "img_size": 42, "init_values": 0.5})
    ),
    "SwiGLU split": lambda: timm_model(**TIMM, mlp_layer=timm_layers("SwiGLU"), act_layer=nn.SiLU),
    "SwiGLU, gate last": lambda: timm_model(**TIMM, mlp_layer=timm_layers("GluMlp"), act_layer=nn.SiLU),
    "vit_base_patch16_clip_quickgelu_224": lambda: timm_model("vit_base_patch16_clip_quickgelu_224", **TIMM),
    "average pool with fc_norm": lambda: timm_model("vit_base_patch16_224", **TIMM, global_pool="avg"),
    "average of all tokens": lambda: timm_model(**TIMM, global_pool="avg", pool_include_prefix=True),
    "no class token": lambda: timm_model(**TIMM, global_pool="avg", class_token=False),
    "registers with positions": lambda: timm_model(**TIMM, reg_tokens=2),
    "class token without position": lambda: timm_model(**TIMM, no_embed_class=True, init_values=1e-5),
    "no positions": lambda: timm_model(**TIMM, pos_embed="none"),
    "no biases, tanh gelu": lambda: timm_model(
        **TIMM, qkv_bias=False, proj_bias=False, act_layer=timm_layers("GELUTanh")
    ),
    "another eps": lambda: timm_model(**TIMM, norm_layer=functools.partial(nn.LayerNorm, eps=0.02)),
    "no final norm": lambda: timm_model(**TIMM, final_norm=False),
    "no pooling": lambda: timm_model(**(TIMM | {"num_classes": 0}), global_pool=""),
    "one channel, not square": lambda: timm_model(**(TIMM | {"img_size": (32, 48), "patch_size": (8, 16)}), in_chans=1),
    "qk_norm": lambda: timm_model(**TIMM, qk_norm=True),
    "norms inside attention and MLP": lambda: timm_model(**TIMM, scale_attn_norm=True, scale_mlp_norm=True),
    "attention pooling": lambda: timm_model(**TIMM, global_pool="map", class_token=False),
    "maximum and mean": lambda: timm_model(**TIMM, global_pool="avgmax"),
    "maximum": lambda: timm_model(**TIMM, global_pool="max"),
    "halves in parallel": lambda: timm_model("vit_base_patch16_xp_224", **TIMM),
    "norms at the end": lambda: timm_model("vit_base_patch16_rpn_224", **TIMM),
    "branches in parallel": lambda: timm_model("vit_small_patch16_18x2_224", **TIMM, init_values=0.5),
    "RMSNorm": lambda: timm_model(**TIMM, norm_layer=timm_layers("RmsNorm"), qk_norm=True),
    "a norm of the patch embeddings": lambda: timm_model(**TIMM, embed_norm_layer=timm_layers("LayerNorm")),
    "a gate": gated_model,
    "EVA-02": lambda: timm_model("eva02_base_patch14_224", **SMALL_EVA),
    "EVA-02, scale norms": lambda: timm_model("eva02_large_patch14_224", **SMALL_EVA, scale_attn_inner=True),
    "EVA, post-norm": lambda: timm_model("eva02_large_patch14_224", **SMALL_EVA, use_post_norm=True),
    "rotary, by axis": lambda: timm_model("vit_small_patch16_rope_224", **SMALL_EVA),
    "rotary, learned": lambda: timm_model("vit_small_patch16_rope_mixed_ape_224", **SMALL_EVA),
    "DINOv3": lambda: timm_model("vit_small_plus_patch16_dinov3", **SMALL_EVA),
    "PE": lambda: timm_model("vit_pe_core_base_patch16_224", **SMALL_EVA, attn_pool_num_heads=4),
    "grouped key heads": lambda: timm_model("vit_base_patch16_sapiens2", **SMALL_EVA, num_kv_heads=(4, 2)),
    "BEiT": lambda: timm_model("beit_base_patch16_224", **TIMM),
    "BEiT, shared": lambda: timm_model(
        "beit_base_patch16_224", **TIMM, use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    "relative position by an MLP": lambda: timm_model("vit_relpos_base_patch16_cls_224", **TIMM),
    "shared relative position": lambda: timm_model("vit_srelpos_small_patch16_224", **TIMM),
    "relative position, not square": lambda: timm_model(
        "vit_relpos_base_patch32_plus_rpn_256", **(TIMM | {"img_size": (32, 48)}), rel_pos_type="bias"
    ),
    "NaFlex": lambda: timm_model("naflexvit_base_patch16_par_gap", **SMALL_NAFLEX),
    "NaFlex, SigLIP": lambda: timm_model("naflexvit_base_patch16_siglip", **SMALL_NAFLEX),
    "a hybrid stem": lambda: timm_model("vit_tiny_r_s16_p8_224", depth=2, num_classes=7),
    "ViTamin": lambda: timm_model("vitamin_small_224", depth=2, num_classes=7),
    "patch dropout (training only)": lambda: timm_model(**TIMM, patch_drop_rate=0.5, drop_path_rate=0.1),
}


@pytest.mark.parametrize("case", TIMM_CASES)
@pytest.mark.filterwarnings("ignore:.*preprocessing unknown")
def test_timm(case):
    model = TIMM_CASES[case]()
    checkpoint = checkpoints.load(model)
    pixels = testing.make(2, checkpoint.config.in_channels, *checkpoint.config.image_size)
    output = engine(checkpoint)(pixels)
    with torch.no_grad():
        features = model.forward_features(pixels.cpu())
        assert_same(output.tokens, features, "tokens")
        if model.global_pool:
            assert_same(output.embedding, model.forward_head(features, pre_logits=True), "embedding")
        if model.num_classes:
            assert_same(output.logits, model(pixels.cpu()), "logits")
        else:
            assert output.logits is None


@pytest.mark.parametrize(
    "name",
    [
        *("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_base_patch14_224"),
        *("vit_small_patch16_rope_mixed_224", "vit_small_plus_patch16_dinov3"),
    ],
)
def test_timm_at_another_size(name):
    patch = 14 if "14" in name else 8
    arguments = TIMM | {"patch_size": patch, "img_size": 3 * patch, "embed_dim": 64, "num_heads": 4}
    model = timm_model(name, **arguments, dynamic_img_size=True)
    pixels = images(5 * patch, 4 * patch)
    with torch.no_grad():
        assert_same(engine(checkpoints.load(model))(pixels).logits, model(pixels.cpu()), "logits")


TIMM_REFUSED = {
    "a norm of the halves of q and k": lambda: timm_model(
        **(TIMM | {"embed_dim": 64, "num_heads": 2}), attn_layer="diff", qk_norm=True
    ),
    "LeakyReLU": lambda: timm_model(**TIMM, act_layer=nn.LeakyReLU),
    "SimpleNorm": lambda: timm_model(**TIMM, norm_layer=timm_layers("SimpleNorm")),
    "AttentionPoolPrr": lambda: timm_model(**TIMM, global_pool="prr"),
    "pooling of queries between stages": lambda: timm_model("hiera_tiny_224", stages=(1, 1, 1, 1)),
    "resnet.ResNet": lambda: timm_model("resnet10t"),
}


@pytest.mark.parametrize("feature", TIMM_REFUSED)
def test_timm_refused_by_name(feature):
    model = TIMM_REFUSED[feature]()
    with pytest.raises(CheckpointError, match=re.escape(feature)) as caught:
        checkpoints.load(model)
    assert "not supported" in str(caught.value)


def test_subclass_is_refused():
    """What a subclass changes cannot be seen."""
    timm = peers.import_timm()

    class Mine(timm.models.vision_transformer.VisionTransformer):
        pass

    with pytest.raises(CheckpointError, match="Mine is not supported"):
        checkpoints.load(Mine(**TIMM))


# torchvision


def headless() -> nn.Module:
    model = torchvision_model()
    model.heads = nn.Identity()
    return model


@pytest.mark.parametrize("make", [torchvision_model, headless])
def test_torchvision(make):
    model = make()
    pixels = images(32, 32)
    output = engine(checkpoints.load(model))(pixels)
    with torch.no_grad():
        want = model(pixels.cpu())
    assert_same(output.embedding if make is headless else output.logits, want, "output")
    with pytest.raises(ValueError, match="32x32 only"):
        engine(checkpoints.load(model))(images(40, 40))


def test_torchvision_refused_by_name():
    torchvision = peers.import_torchvision()
    stem = torchvision.models.vision_transformer.ConvStemConfig
    configs = [stem(out_channels=8, kernel_size=3, stride=2), stem(out_channels=8, kernel_size=3, stride=4)]
    with pytest.raises(CheckpointError, match=r"conv_proj: .*conv_stem_configs"):
        checkpoints.load(torchvision_model(conv_stem_configs=configs))
    with pytest.raises(CheckpointError, match="representation_size"):
        checkpoints.load(torchvision_model(representation_size=20))
    with pytest.raises(CheckpointError, match=r"resnet\.ResNet is not supported"):
        checkpoints.load(torchvision.models.resnet18())
