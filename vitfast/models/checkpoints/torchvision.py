"""torchvision's VisionTransformer (vit_b_16 and its siblings), as a live module.

A module does not say which weights it holds, so the preprocessing is that of IMAGENET1K_V1 at the
module's size: shortest side size * 256 / 224, bilinear, centre crop, ImageNet mean and std. The
SWAG and vit_h_14 weights were trained with others; give those explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vitfast.images.preprocess import Preprocess
from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import ViTConfig

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def matches(module: nn.Module) -> bool:
    """Whether this is exactly torchvision's class."""
    kind = type(module)
    return kind.__module__ == "torchvision.models.vision_transformer" and kind.__name__ == "VisionTransformer"


def from_module(module: Any) -> tuple[ViTConfig, Mapping[str, Any], Preprocess]:
    """Translate a live module, of any dtype and device.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    name = "torchvision VisionTransformer"
    stem, layers = module.conv_proj, list(module.encoder.layers)
    require(isinstance(stem, nn.Conv2d), "a convolutional stem (conv_stem_configs)", f"{name}: conv_proj")
    require(stem.in_channels == 3, f"{stem.in_channels} input channels", f"{name}: conv_proj")
    head = _head(module.heads, name)
    norms = [module.encoder.ln, *(norm for layer in layers for norm in (layer.ln_1, layer.ln_2))]
    for norm in norms:
        require(isinstance(norm, nn.LayerNorm), f"{type(norm).__name__} as norm", name)
    eps = {norm.eps for norm in norms}
    require(len(eps) == 1, f"LayerNorm eps that differ ({sorted(eps)})", name)
    for i, layer in enumerate(layers):
        attention, act = layer.self_attention, layer.mlp[1]
        where = f"{name}: encoder.layers.encoder_layer_{i}"
        require(type(attention) is nn.MultiheadAttention, f"{type(attention).__name__}", where)
        require(attention.in_proj_weight is not None, "separate q, k and v weights", where)
        require(attention.bias_k is None and not attention.add_zero_attn, "bias_k or add_zero_attn", where)
        require(type(act) is nn.GELU and act.approximate == "none", f"the activation {act}", where)
        require(attention.num_heads == layers[0].self_attention.num_heads, "differing head counts", where)
    config = ViTConfig(
        image_size=(module.image_size, module.image_size),
        patch_size=tuple(stem.kernel_size),
        width=module.hidden_dim,
        depth=len(layers),
        heads=layers[0].self_attention.num_heads,
        mlp_dim=layers[0].mlp[0].out_features,
        norm_eps=eps.pop(),
        num_classes=head.out_features if head else 0,
        name=name,
    )
    source = Source(module.state_dict(), name)
    source.dense("patch_embed", "conv_proj.", bias=stem.bias is not None)
    source.tokens(config, ["class_token"], "encoder.pos_embedding", covered=1)
    for i, layer in enumerate(layers):
        ours, theirs = f"blocks.{i}.", f"encoder.layers.encoder_layer_{i}."
        source.norm(f"{ours}norm1", f"{theirs}ln_1.")
        biased = layer.self_attention.in_proj_bias is not None
        source.dense(f"{ours}qkv", f"{theirs}self_attention.in_proj_", bias=biased)
        source.dense(f"{ours}proj", f"{theirs}self_attention.out_proj.", bias=biased)
        source.norm(f"{ours}norm2", f"{theirs}ln_2.")
        source.dense(f"{ours}fc1", f"{theirs}mlp.0.")
        source.dense(f"{ours}fc2", f"{theirs}mlp.3.")
    source.norm("norm", "encoder.ln.")
    if head:
        theirs = "heads.head." if isinstance(module.heads, nn.Sequential) else "heads."
        source.dense("head", theirs, bias=head.bias is not None)
    preprocess = Preprocess(
        size=config.image_size,
        resize=config.image_size[0] * 256 // 224,
        interpolation="bilinear",
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        rounding="even",
    )
    return config, source.finish(config), preprocess


def _head(heads: nn.Module, name: str) -> nn.Linear | None:
    """The classifier, or None where it has been replaced by Identity."""
    if isinstance(heads, nn.Sequential):
        parts = dict(heads.named_children())
        require("pre_logits" not in parts, "a hidden layer in the head (representation_size)", f"{name}: heads")
        require(set(parts) <= {"head"}, f"the head {sorted(parts)}", f"{name}: heads")
        heads = parts.get("head", nn.Identity())
    require(isinstance(heads, (nn.Linear, nn.Identity)), f"{type(heads).__name__} as head", f"{name}: heads")
    return heads if isinstance(heads, nn.Linear) else None
