"""Which models of other libraries `vitfast.replace_attention` reaches, measured: writes docs/compatibility.md.

Run from the repository root: `python examples/compatibility.py`. Each family is built at a small size
with random weights; its outputs are compared before, with and after the swap, in fp32, the swap on
the Triton kernels (without a GPU: in Triton's interpreter, which takes some minutes). Needs
transformers, timm and torchvision; no weights are downloaded. Exits with status 1 if a family's outputs
differ beyond `vitfast.testing.PEER_TOLERANCE`, are not bit-identical after restore, or would not show an
attention that is 1 % too large.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import vitfast
from vitfast import testing
from vitfast.attention import sdpa
from vitfast.models import libraries
from vitfast.ops import accuracy

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"

NOISE = 0.07
"""Standard deviation of what is added to every parameter. With 0.1 MaxViT is so ill-conditioned that one ulp of its
input moves its output by 1e-3; with 0.05 attention hardly moves DINOv3's."""

VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
VIT |= {"image_size": 32, "patch_size": 8}
DINO = VIT | {"mlp_ratio": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
TEXT |= {"max_position_embeddings": 9, "eos_token_id": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [2], "window_size": 4}
HIERA = {"image_size": [32, 32], "embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2], "patch_stride": [4, 4]}
HIERA |= {"query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4]}
IMAGE_GPT = {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
GROUP = VIT | {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}
SAM = VIT | {"window_size": 2, "output_channels": 8, "global_attn_indexes": [0], "num_pos_feats": 24}
PYRAMID = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
LEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "key_dim": [8, 8, 8]}
PVT = {"image_size": 64, "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2]}
DETR = {"d_model": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
DETR |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
TIMM = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32}


def images(size: int = 32) -> dict[str, Any]:
    """Two images."""
    return {"pixel_values": testing.make(2, 3, size, size)}


def text() -> dict[str, Any]:
    """Two texts of 7 tokens, the second padded from the fifth on."""
    mask = (torch.arange(7) < torch.tensor([[7], [4]])).long()
    return {"input_ids": torch.arange(3, 17).view(2, 7), "attention_mask": mask}


def naflex() -> dict[str, Any]:
    """Two images of at most 16 patches, the second with 6 real ones."""
    mask = (torch.arange(16) < torch.tensor([[16], [6]])).long()
    shapes = torch.tensor([[4, 4], [2, 3]])
    return {"pixel_values": testing.make(2, 16, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def padded() -> dict[str, Any]:
    """Two images, the second padded on the right."""
    mask = (torch.arange(64) < torch.tensor([[64], [40]])).long()[:, None].repeat(1, 64, 1)
    return images(64) | {"pixel_mask": mask}


TRANSFORMERS: dict[str, tuple[Mapping[str, Any], Callable[[], dict[str, Any]]]] = {
    "ViTModel": (VIT, images),
    "DeiTModel": (VIT, images),
    "ViTMAEModel": (VIT, images),
    "ViTMSNModel": (VIT, images),
    "IJepaModel": (VIT, images),
    "YolosModel": (VIT | {"image_size": [32, 32]}, images),
    "Dinov2Model": (DINO, images),
    "Dinov2WithRegistersModel": (DINO, images),
    "DINOv3ViTModel": (VIT | {"num_register_tokens": 2}, images),
    "CLIPVisionModel": (VIT, images),
    "CLIPTextModel": (TEXT, text),
    "SiglipVisionModel": (VIT, images),
    "SiglipTextModel": (TEXT, text),
    "Siglip2VisionModel": (VIT | {"num_patches": 16}, naflex),
    "BeitModel": (VIT | {"use_relative_position_bias": True}, images),
    "Data2VecVisionModel": (VIT | {"use_relative_position_bias": True}, images),
    "SwinModel": (SWIN, images),
    "SegformerModel": (PYRAMID, lambda: images(64)),
    "DetrForObjectDetection": (DETR, padded),
    "TableTransformerForObjectDetection": (DETR, padded),
    "DonutSwinModel": (SWIN, images),
    "Swinv2Model": (SWIN, images),
    "Swin2SRModel": (SWIN | {"image_size": 8, "patch_size": 1}, lambda: images(8)),
    "HieraModel": (HIERA, images),
    "ImageGPTModel": (IMAGE_GPT, lambda: {"input_ids": torch.arange(14).view(2, 7)}),
    "BlipVisionModel": (VIT, images),
    "GroupViTVisionModel": (GROUP, images),
    "GroupViTTextModel": (TEXT, text),
    "LevitModel": (LEVIT, lambda: images(64)),
    "PvtModel": (PVT, lambda: images(64)),
    "PvtV2Model": (PYRAMID | {"image_size": 64}, lambda: images(64)),
    "GLPNModel": (PYRAMID, lambda: images(64)),
    "TimesformerModel": (VIT | {"num_frames": 2}, lambda: {"pixel_values": testing.make(1, 2, 3, 32, 32)}),
    "SamVisionModel": (SAM, images),
}
"""Model class -> settings and inputs."""

TIMM_MODELS: dict[str, Mapping[str, Any]] = {
    "vit_tiny_patch16_224": TIMM,
    "deit3_small_patch16_224": TIMM,
    "vit_base_patch16_siglip_224": TIMM,
    "vit_small_patch14_reg4_dinov2": TIMM | {"img_size": 28},
    "vit_small_patch16_dinov3": TIMM,
    "eva02_tiny_patch14_224": TIMM | {"img_size": 28},
    "beit_base_patch16_224": TIMM,
    "vit_relpos_small_patch16_224": TIMM,
    "naflexvit_base_patch16_gap": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "pit_ti_224": {"img_size": 64},
    "vitamin_small_224": {"img_size": 64},
    "mobilevit_xs": {},
    "samvit_base_patch16": TIMM | {"img_size": 64},
    "swin_tiny_patch4_window7_224": {},
    "swinv2_tiny_window8_256": {},
    "swinv2_cr_tiny_224": {},
    "maxvit_rmlp_pico_rw_256": {},
    "hiera_tiny_224": {},
    "mvitv2_tiny": {},
    "xcit_nano_12_p8_224": {},
    "cait_xxs24_224": {},
    "crossvit_9_240": {},
    "convit_tiny": {},
    "coat_tiny": {},
    "levit_128s": {},
    "pvt_v2_b0": {},
    "twins_svt_small": {},
    "volo_d1_224": {},
    "davit_tiny": {},
    "gcvit_xxtiny": {},
    "tiny_vit_5m_224": {},
    "nest_tiny": {},
    "tnt_s_patch16_224": {},
}


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter moved away from its initial value, so that no branch is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    return model.eval().to(testing.device())


def result(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The tensors of a model's output, in one row."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**inputs) if "x" not in inputs else model(inputs["x"])
    tensors = [output] if isinstance(output, torch.Tensor) else [v for v in output.values() if torch.is_tensor(v)]
    return torch.cat([tensor.flatten() for tensor in tensors if tensor.is_floating_point()])


def too_large(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention with an error that must show."""
    return 1.01 * RIGHT(*args, **kwargs)


RIGHT = sdpa.scaled_dot_product_attention


def row(name: str, model: nn.Module, inputs: dict[str, Any]) -> tuple[str, bool]:
    """The family's line of the table, and whether it is as it should be."""
    inputs = {key: value.to(testing.device()) for key, value in inputs.items()}
    before = result(model, inputs)

    def difference() -> float:
        return ((result(model, inputs) - before).abs().max() / before.abs().max()).item()

    swap = vitfast.replace_attention(model)
    with sdpa.attention_backend("triton"):
        error = difference()
    with sdpa.attention_backend("torch"), mock.patch.object(sdpa, RIGHT.__name__, too_large):
        felt = difference()
    swap.restore()
    good = error <= accuracy.PEER_TOLERANCE and torch.equal(result(model, inputs), before)
    good &= felt > accuracy.PEER_TOLERANCE or not swap.replaced
    reasons = Counter(swap.left.values())
    left = "; ".join(f"{count} × {why}" for why, count in reasons.items()) or "none"
    shown = "" if not swap.replaced else "0" if error == 0 else f"{error:.0e}"
    return f"| {name} | {len(swap.replaced)} | {left} | {shown} |", good


def main() -> int:
    """Build every family, write the page; 1 if one is wrong."""
    torchvision = libraries.import_library("torchvision")
    transformers, timm = libraries.import_library("transformers"), libraries.import_library("timm")
    cases: list[tuple[str, Callable[[], nn.Module], dict[str, Any]]] = []
    for name, (settings, inputs) in TRANSFORMERS.items():
        extra = {}
        if settings is DETR:
            backbone = transformers.ResNetConfig(**RESNET)
            extra = {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone}
        kind = getattr(transformers, name)
        config = kind.config_class(**settings, **extra)
        cases.append((f"transformers {name}", lambda kind=kind, config=config: kind(config), inputs()))
    for name, settings in TIMM_MODELS.items():
        size = settings.get("img_size", timm.get_pretrained_cfg(name).input_size[-1])
        make = testing.make(1, 3, size, size)
        cases.append(
            (f"timm {name}", lambda name=name, settings=settings: timm.create_model(name, **settings), {"x": make})
        )
    small = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
    build = torchvision.models.VisionTransformer
    cases.append(("torchvision VisionTransformer", lambda: build(**small), {"x": testing.make(2, 3, 32, 32)}))
    lines, wrong = [], []
    for name, make_model, model_inputs in cases:
        torch.manual_seed(0)
        line, good = row(name, randomised(make_model()), model_inputs)
        print(line, flush=True)
        lines.append(line)
        wrong += [] if good else [name]
    versions = ", ".join(f"{peer.__name__} {peer.__version__}" for peer in (torch, transformers, timm, torchvision))
    PAGE.write_text(HEAD.format(versions=versions, tolerance=accuracy.PEER_TOLERANCE) + "\n".join(lines) + "\n")
    print(f"wrote {PAGE.name}; wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


HEAD = """# What `vitfast.replace_attention` reaches

Written by `python examples/compatibility.py` with {versions}; do not edit. Every family is built at a
small size with random weights. "Replaced" counts the attention modules that go through
`vitfast.attention`; "left" says how many stay as they were, and why.
"Difference" is the largest one in fp32 between the outputs without the swap and with it, on the Triton
kernels, relative to the largest output. The script fails above {tolerance:g}, if an attention that is 1 %
too large would not make more than that, or if the outputs after `restore()` are not bit-identical to those
before. The texts, the NaFlex images and DETR's images are padded, with masks. How each is reached, and what
that costs, says [swaps.md](swaps.md).

The repositories dinov2 and dinov3 are recognised too and are not in the table, since neither can be
installed as a package in its present form; stand-ins of the same names, arguments and attributes are
tested in tests/integrations/test_dino.py. transformers' MobileViT and timm's Visformer are tested layer by
layer only: with random weights, attention does not move their outputs.

| family | replaced | left | difference |
|---|---|---|---|
"""


if __name__ == "__main__":
    sys.exit(main())
