"""transformers ViT and DeiT; ViT-MSN, ViT-MAE's encoder (of whole images: nothing is masked), I-JEPA and DPT's encoder.

`embedding` is the normalised CLS token; the tanh pooler of ViTModel and DeiTModel is not part of
it and its weights are ignored. For DeiTForImageClassificationWithTeacher, which averages two
classifiers, it is the mean of the normalised CLS and distillation tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, read_settings, require
from vitfast.models.config import Flag, Hidden, ViTConfig

ARCHITECTURES = (
    "ViTModel",
    "ViTForImageClassification",
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    *("ViTMSNModel", "ViTMSNForImageClassification", "ViTMAEModel", "IJepaModel", "IJepaForImageClassification"),
    *("DPTModel", "FlavaImageModel"),
)
BY_MODEL_TYPE = {
    "vit_msn": lambda state: "ViTMSNForImageClassification" if "classifier.weight" in state else "ViTMSNModel",
    "vit_mae": lambda state: "ViTMAEModel",
    "ijepa": lambda state: "IJepaForImageClassification" if "classifier.weight" in state else "IJepaModel",
    "dpt": lambda state: "DPTModel",
    "flava_image_model": lambda state: "FlavaImageModel",
    "vit": lambda state: "ViTForImageClassification" if "classifier.weight" in state else "ViTModel",
    "deit": lambda state: (
        "DeiTForImageClassificationWithTeacher"
        if "cls_classifier.weight" in state
        else "DeiTForImageClassification"
        if "classifier.weight" in state
        else "DeiTModel"
    ),
}
MARKER = "embeddings.patch_embeddings.projection.weight"
IGNORABLE = (r".*pooler\.dense\.(weight|bias)", r".*embeddings\.mask_token")


@dataclass(frozen=True)
class Settings(common.Settings):
    """config.json of both."""

    intermediate_size: Hidden = 3072
    qkv_bias: Flag = True
    is_hybrid: Flag = False
    """Of DPT."""


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


def read(config: Mapping[str, Any], architecture: str, where: str) -> Settings:
    """The settings in a config.json.

    Raises:
        CheckpointError: with each field that is out of its domain.
    """
    defaults: dict[str, dict[str, Any]] = {"ViTMSN": {"layer_norm_eps": 1e-6}, "DPT": {"image_size": 384}}
    given = next((values for start, values in defaults.items() if architecture.startswith(start)), dict[str, Any]())
    facts = read_settings(Settings, {**given, **{k: v for k, v in config.items() if v is not None}}, where)
    require(not facts.is_hybrid, "a ResNet before the blocks (is_hybrid)", where)
    return facts


def prefixes(architecture: str) -> tuple[str, str]:
    """What may stand before the encoder's names: in the class's own files, and in others that hold the encoder."""
    bases = {"DeiT": "deit.", "IJepa": "ijepa.", "DPT": "dpt.", "Flava": "image_model."}
    base = next((base for start, base in bases.items() if architecture.startswith(start)), "vit.")
    return ("", base) if architecture.endswith("Model") else (base, "")


def translate(
    facts: Settings, classes: int, state: Mapping[str, Tensor], architecture: str, name: str
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Settings and state dict, of files or of a module, to ours; `classes` is how many a classifier has.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    deit, with_teacher = architecture.startswith("DeiT"), architecture.endswith("WithTeacher")
    classes = classes if "ForImageClassification" in architecture else 0
    jepa = architecture.startswith("IJepa")
    ours = ViTConfig(
        **facts.common(name),
        mlp_dim=facts.intermediate_size,
        prefix_tokens=0 if jepa else 2 if deit else 1,
        class_token=not jepa,
        pool="avg" if jepa else "cls_dist" if with_teacher else "cls",
        distilled=with_teacher and classes > 0,
        num_classes=classes,
        position_antialias=False,
        position_interpolation="bilinear" if architecture.startswith("DPT") else "bicubic",
        name=name,
    )
    prefix = common.find_prefix(state, prefixes(architecture), MARKER)
    source = Source(state, name)
    source.dense("patch_embed", f"{prefix}embeddings.patch_embeddings.projection.")
    tokens = [] if jepa else [f"{prefix}embeddings.cls_token"]
    tokens += [f"{prefix}embeddings.distillation_token"] if deit else []
    source.tokens(ours, tokens, f"{prefix}embeddings.position_embeddings", covered=len(tokens))
    names = common.layout(state, prefix, _FILE, _MEMORY)
    names.read(source, ours, prefix, qkv_bias=facts.qkv_bias)
    source.norm("norm", f"{prefix}layernorm.")
    if classes:
        source.dense("head", "cls_classifier." if with_teacher else "classifier.")
        if with_teacher:
            source.dense("head_dist", "distillation_classifier.")
    return ours, source.finish(ours, IGNORABLE)
