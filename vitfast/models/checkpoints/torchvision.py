"""torchvision's VisionTransformer (vit_b_16 and its siblings), as a live module.

A module does not say which weights it holds, so the preprocessing is that of torchvision's own weights for the
module's sizes. Only vit_b_16 and vit_l_16 at 224 pixels have two: those of IMAGENET1K_V1 are taken (shortest side 256,
or 242 for vit_l_16, bilinear, centre crop, ImageNet mean and std); IMAGENET1K_SWAG_LINEAR_V1 wants 224 and bicubic.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vitfast.images.preprocess import Preprocess
from vitfast.models.checkpoints import live
from vitfast.models.checkpoints.source import Checkpoint, Source, require
from vitfast.models.config import ViTConfig

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_RESIZE = {
    (16, 1024, 224): (242, "bilinear"),
    (14, 1280, 224): (224, "bicubic"),
    (16, 768, 384): (384, "bicubic"),
    (16, 1024, 512): (512, "bicubic"),
    (14, 1280, 518): (518, "bicubic"),
}
"""(patch, width, image) -> (shortest side, filter) of torchvision's weights that do not take 256 for 224, bilinear."""

_DROP = ("Dropout", "Identity")
_ANATOMY: live.Anatomy = {
    "VisionTransformer": {"conv_proj": ("Conv2d",), "encoder": ("Encoder",)},
    "Encoder.layers": {"*": ("EncoderBlock",)},
    "Encoder": {"dropout": _DROP, "layers": ("Sequential",), "ln": ("LayerNorm",)},
    "EncoderBlock": {
        **dict.fromkeys(("ln_1", "ln_2"), ("LayerNorm",)),
        "self_attention": ("MultiheadAttention",),
        "dropout": _DROP,
        "mlp": ("MLPBlock",),
    },
    "MultiheadAttention": {"out_proj": ("NonDynamicallyQuantizableLinear", "Linear")},
    "MLPBlock": {
        **dict.fromkeys("03", ("Linear",)),
        **dict.fromkeys("24", _DROP),
        "1": ("GELU",),
    },
}
"""What torchvision's modules are made of."""


def matches(module: nn.Module) -> bool:
    """Whether this is exactly torchvision's class."""
    kind = type(module)
    return kind.__module__ == "torchvision.models.vision_transformer" and kind.__name__ == "VisionTransformer"


def from_module(module: Any) -> Checkpoint:
    """Translate a live module, of any dtype and device.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    name = "torchvision VisionTransformer"
    own = live.unchanged(module, name, blocks=module.encoder.layers)
    stem = module.conv_proj
    require(type(stem) is not nn.Sequential, "a convolutional stem (conv_stem_configs)", f"{name}: conv_proj")
    live.patches(stem, f"{name}: conv_proj")
    head, inner = _head(module.heads, name)
    live.composed(module, _ANATOMY, ("torch.nn.", "torchvision."), name, skip=("heads",))
    layers = list(module.encoder.layers)
    require(stem.in_channels == 3, f"{stem.in_channels} input channels", f"{name}: conv_proj")
    norms = [module.encoder.ln, *(norm for layer in layers for norm in (layer.ln_1, layer.ln_2))]
    for norm in norms:
        require(isinstance(norm, nn.LayerNorm), f"{type(norm).__name__} as norm", name)
    eps = {norm.eps for norm in norms}
    require(len(eps) == 1, f"LayerNorm eps that differ ({sorted(eps)})", name)
    for i, layer in enumerate(layers):
        attention, act = layer.self_attention, layer.mlp[1]
        where = f"{name}: encoder.layers.encoder_layer_{i}"
        require(live.kind_of(attention) is nn.MultiheadAttention, f"{type(attention).__name__}", where)
        require(attention.in_proj_weight is not None, "separate q, k and v weights", where)
        require(attention.batch_first, "an attention with batch_first=False", where)
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
        source.dense("head", f"heads.{inner}", bias=head.bias is not None)
    side = config.image_size[0]
    resize, interpolation = _RESIZE.get((stem.kernel_size[0], config.width, side), (side * 256 // 224, "bilinear"))
    preprocess = Preprocess(
        size=config.image_size,
        resize=resize,
        interpolation=interpolation,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        rounding="even",
    )
    return Checkpoint(config, source.finish(config), preprocess, own_blocks=own)


def _head(heads: nn.Module, name: str) -> tuple[nn.Linear | None, str]:
    """The classifier, or None where it has been replaced by Identity, and where in `heads` it is."""
    hidden = isinstance(heads, nn.Sequential) and "pre_logits" in dict(heads.named_children())
    require(not hidden, "a hidden layer in the head (representation_size)", f"{name}: heads")
    return live.linear_head(heads, f"{name}: heads")
