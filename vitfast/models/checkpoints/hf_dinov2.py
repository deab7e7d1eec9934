"""transformers DINOv2, without and with register tokens, and TIPSv2's vision tower.

`embedding` is the normalised CLS token. The classifiers read it together with the mean of the
patch tokens. Position embeddings are resized without antialiasing in the models without registers
and with it in those with registers, as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from torch import Tensor

from vitfast.models import schema
from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, read_settings
from vitfast.models.config import Eps, Flag, Tokens, ViTConfig

ARCHITECTURES = (
    "Dinov2Model",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification",
    "Tipsv2VisionModel",
    *("Dinov2Backbone", "Dinov2WithRegistersBackbone", "Tipsv2VisionBackbone"),  # whose maps are tokens of the patches
)
BY_MODEL_TYPE = {
    "tipsv2_vision_model": lambda state: "Tipsv2VisionModel",
    "dinov2": lambda state: "Dinov2ForImageClassification" if "classifier.weight" in state else "Dinov2Model",
    "dinov2_with_registers": lambda state: (
        "Dinov2WithRegistersForImageClassification" if "classifier.weight" in state else "Dinov2WithRegistersModel"
    ),
}
MARKER = "embeddings.patch_embeddings.projection.weight"
IGNORABLE = (r".*embeddings\.mask_token",)


@dataclass(frozen=True)
class Settings(common.Settings):
    """config.json of both."""

    layer_norm_eps: Eps = 1e-6
    patch_size: common.SideOrSides = 14
    mlp_ratio: Annotated[float, schema.number(0, 64)] = 4
    qkv_bias: Flag = True
    use_swiglu_ffn: Flag = False
    num_register_tokens: Tokens = 4


_FILE = common.BlockNames(
    block="encoder.layer.{}.",
    norm1="norm1.",
    qkv=common.FILE_ATTENTION,
    proj="attention.output.dense.",
    norm2="norm2.",
    fc1=("mlp.fc1.",),
    fc2="mlp.fc2.",
    layer_scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
_MEMORY = replace(_FILE, qkv=common.MEMORY_ATTENTION, proj="attention.o_proj.")
_FILE_SWIGLU = replace(_FILE, fc1=("mlp.weights_in.",), fc2="mlp.weights_out.")  # gate rows first
_MEMORY_SWIGLU = replace(_MEMORY, fc1=("mlp.gate_proj.", "mlp.up_proj."), fc2="mlp.down_proj.")


def matches(architecture: str) -> bool:
    """Whether this family has the class."""
    return architecture in ARCHITECTURES


def read(config: Mapping[str, Any], architecture: str, where: str) -> Settings:
    """The settings in a config.json.

    Raises:
        CheckpointError: with each field that is out of its domain.
    """
    given = {"num_register_tokens": 1, "image_size": 448} if architecture.startswith("Tipsv2") else {}
    return read_settings(Settings, {**given, **{k: v for k, v in config.items() if v is not None}}, where)


def prefixes(architecture: str) -> tuple[str, str]:
    """What may stand before the encoder's names: in the class's own files, and in others that hold the encoder."""
    base = "dinov2_with_registers." if "WithRegisters" in architecture else "dinov2."
    return (base, "") if architecture.endswith("ForImageClassification") else ("", base)


def translate(
    facts: Settings, classes: int, state: Mapping[str, Tensor], architecture: str, name: str
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Settings and state dict, of files or of a module, to ours; `classes` is how many a classifier has.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    tips = architecture.startswith("Tipsv2")
    registered = tips or "WithRegisters" in architecture
    registers = facts.num_register_tokens if registered else 0
    classes = classes if architecture.endswith("ForImageClassification") else 0
    hidden = int(facts.hidden_size * facts.mlp_ratio)
    if facts.use_swiglu_ffn:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # two thirds, rounded up to a multiple of 8
    ours = ViTConfig(
        **facts.common(name) | ({"activation": "swiglu"} if facts.use_swiglu_ffn else {}),
        mlp_dim=hidden,
        prefix_tokens=1 + registers,
        layer_scale=True,
        num_classes=classes,
        head_concat_mean=architecture.endswith("ForImageClassification"),
        position_antialias=registered,
        position_interpolation="bilinear" if tips else "bicubic",
        name=name,
    )
    prefix = common.find_prefix(state, prefixes(architecture), MARKER)
    source = Source(state, name)
    source.dense("patch_embed", f"{prefix}embeddings.patch_embeddings.projection.")
    tokens = [f"{prefix}embeddings.cls_token", *([f"{prefix}embeddings.register_tokens"] if registers else [])]
    source.tokens(ours, tokens, f"{prefix}embeddings.position_embeddings", covered=1)
    candidates = (_FILE_SWIGLU, _MEMORY_SWIGLU) if facts.use_swiglu_ffn else (_FILE, _MEMORY)
    names = common.layout(state, prefix, *candidates)
    names.read(source, ours, prefix, qkv_bias=facts.qkv_bias)
    source.norm("norm", f"{prefix}layernorm.")
    if ours.num_classes:
        source.dense("head", "classifier.")
    return ours, source.finish(ours, IGNORABLE)
