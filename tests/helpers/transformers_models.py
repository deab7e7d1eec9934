"""Small models of transformers with inputs, family by family."""

import torch
from helpers import peers

from vitfast.testing import device, make

CLIP_TEXT = peers.TEXT | {"max_position_embeddings": 9, "eos_token_id": 2}
DINOV3 = peers.VIT | {"num_register_tokens": 2}
SIGLIP2 = peers.VIT | {"num_patches": 16}
BEIT = peers.VIT | {"use_relative_position_bias": True, "use_shared_relative_position_bias": False}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [2], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}


def images(size=32):
    """Pixels of two images."""
    return {"pixel_values": make(2, 3, size, size)}


def text():
    """Token ids of two texts, the second one padded."""
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids.to(device()), "attention_mask": mask.to(device())}


def naflex():
    """Two images of 16 patches, of which the second has 6 real ones."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 6:] = 0
    shapes = torch.tensor([[4, 4], [2, 3]])
    pixels = make(2, 16, 3 * 8 * 8)
    return {"pixel_values": pixels, "pixel_attention_mask": mask.to(device()), "spatial_shapes": shapes.to(device())}


def detr():
    """Two images, of which the second is padded to the right."""
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 40:] = 0
    return {"pixel_values": make(2, 3, 64, 64), "pixel_mask": mask.to(device())}


def detr_config():
    """A config of DETR with a small ResNet in place of timm's."""
    library = peers.import_transformers()
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32, "num_queries": 5}
    backbone = library.ResNetConfig(**RESNET)
    return library.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes, **heads)


FAMILIES = {
    "ViTModel": (peers.VIT, images, 2),
    "DeiTModel": (peers.VIT, images, 2),
    "ViTMAEModel": (peers.VIT | {"mask_ratio": 0.0}, images, 2),
    "Dinov2Model": (peers.DINO, lambda: images(42), 2),
    "DINOv3ViTModel": (DINOV3, images, 2),
    "CLIPVisionModel": (peers.VIT, images, 2),
    "CLIPTextModel": (CLIP_TEXT, text, 1),
    "SiglipVisionModel": (peers.VIT | {"vision_use_head": False}, images, 2),
    "Siglip2VisionModel": (SIGLIP2 | {"vision_use_head": False}, naflex, 2),
    "BeitModel": (BEIT, images, 2),
    "SwinModel": (SWIN, images, 2),
    "DetrForObjectDetection": (detr_config, detr, 3),
}
"""Model class -> (settings, inputs, calls of attention in one forward)."""


def build(name, settings):
    """A model of transformers with random weights, from settings or from a function that makes its config."""
    config = settings() if callable(settings) else settings
    return peers.transformers_model(name, config).to(device())


def run(model, inputs):
    """The results of a forward without gradients, as one flat tensor."""
    torch.manual_seed(0)  # ViTMAE shuffles
    with torch.no_grad():
        output = model(**inputs)
    names = ("last_hidden_state", "pooler_output", "logits", "pred_boxes")
    return torch.cat([output[n].flatten() for n in names if output.get(n) is not None])
