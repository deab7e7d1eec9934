"""transformers ViT and DeiT.

`embedding` is the normalised CLS token; the tanh pooler of ViTModel and DeiTModel is not part of
it and its weights are ignored. For DeiTForImageClassificationWithTeacher, which averages two
classifiers, it is the mean of the normalised CLS and distillation tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source
from vitfast.models.config import ViTConfig

ARCHITECTURES = (
    "ViTModel",
    "ViTForImageClassification",
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)
BY_MODEL_TYPE = {
    "vit": lambda state: "ViTForImageClassification" if "classifier.weight" in state else "ViTModel",
    "deit": lambda state: (
        "DeiTForImageClassificationWithTeacher"
        if "cls_classifier.weight" in state
        else "DeiTForImageClassification"
        if "classifier.weight" in state
        else "DeiTModel"
    ),
}
IGNORABLE = (r".*pooler\.dense\.(weight|bias)", r".*embeddings\.mask_token")

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
_FILE = common.BlockNames(
    block="encoder.layer.{}.",
    norm1="layernorm_before.",
    qkv=common.FILE_ATTENTION,
    proj="attention.output.dense.",
    norm2="layernorm_after.",
    fc1=("intermediate.dense.",),
    fc2="output.dense.",
)
_MEMORY = common.BlockNames(
    block="layers.{}.",
    norm1="layernorm_before.",
    qkv=common.MEMORY_ATTENTION,
    proj="attention.o_proj.",
    norm2="layernorm_after.",
    fc1=("mlp.fc1.",),
    fc2="mlp.fc2.",
)


def matches(architecture: str) -> bool:
    """Whether this family has the class."""
    return architecture in ARCHITECTURES


def translate(
    config: Mapping[str, Any], state: Mapping[str, Tensor], architecture: str, name: str
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Config dict and state dict, of files or of a module, to ours.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    facts = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    deit, with_teacher = architecture.startswith("DeiT"), architecture.endswith("WithTeacher")
    classes = common.num_labels(config) if "ForImageClassification" in architecture else 0
    ours = ViTConfig(
        image_size=common.pair(facts["image_size"]),
        patch_size=common.pair(facts["patch_size"]),
        width=facts["hidden_size"],
        depth=facts["num_hidden_layers"],
        heads=facts["num_attention_heads"],
        head_dim=facts.get("head_dim", 0),
        mlp_dim=facts["intermediate_size"],
        in_channels=facts["num_channels"],
        activation=common.activation(facts["hidden_act"], name),
        norm_eps=facts["layer_norm_eps"],
        prefix_tokens=2 if deit else 1,
        pool="cls_dist" if with_teacher else "cls",
        distilled=with_teacher and classes > 0,
        num_classes=classes,
        dynamic_size=True,
        position_antialias=False,
        name=name,
    )
    prefix = common.find_prefix(
        state,
        ("", "deit." if deit else "vit.") if architecture.endswith("Model") else ("deit." if deit else "vit.", ""),
        "embeddings.patch_embeddings.projection.weight",
    )
    source = Source(state, name)
    source.dense("patch_embed", f"{prefix}embeddings.patch_embeddings.projection.")
    tokens = [f"{prefix}embeddings.cls_token", *([f"{prefix}embeddings.distillation_token"] if deit else [])]
    source.tokens(ours, tokens, f"{prefix}embeddings.position_embeddings", covered=len(tokens))
    names = common.layout(state, prefix, _FILE, _MEMORY)
    names.read(source, ours, prefix, qkv_bias=facts["qkv_bias"])
    source.norm("norm", f"{prefix}layernorm.")
    if classes:
        source.dense("head", "cls_classifier." if with_teacher else "classifier.")
        if with_teacher:
            source.dense("head_dist", "distillation_classifier.")
    return ours, source.finish(ours, IGNORABLE)
