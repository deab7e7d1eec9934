"""transformers DINOv2, without and with register tokens.

`embedding` is the normalised CLS token. The classifiers read it together with the mean of the
patch tokens. Position embeddings are resized without antialiasing in the models without registers
and with it in those with registers, as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source
from vitfast.models.config import ViTConfig

ARCHITECTURES = (
    "Dinov2Model",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification",
)
BY_MODEL_TYPE = {
    "dinov2": lambda state: "Dinov2ForImageClassification" if "classifier.weight" in state else "Dinov2Model",
    "dinov2_with_registers": lambda state: (
        "Dinov2WithRegistersForImageClassification" if "classifier.weight" in state else "Dinov2WithRegistersModel"
    ),
}
IGNORABLE = (r".*embeddings\.mask_token",)

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "num_register_tokens": 4,
}
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


def translate(
    config: Mapping[str, Any], state: Mapping[str, Tensor], architecture: str, name: str
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Config dict and state dict, of files or of a module, to ours.

    Raises:
        CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
    """
    facts = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    registers = facts["num_register_tokens"] if "WithRegisters" in architecture else 0
    classifies = architecture.endswith("ForImageClassification")
    hidden = int(facts["hidden_size"] * facts["mlp_ratio"])
    if facts["use_swiglu_ffn"]:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # two thirds, rounded up to a multiple of 8
    ours = ViTConfig(
        image_size=common.pair(facts["image_size"]),
        patch_size=common.pair(facts["patch_size"]),
        width=facts["hidden_size"],
        depth=facts["num_hidden_layers"],
        heads=facts["num_attention_heads"],
        head_dim=facts.get("head_dim", 0),
        mlp_dim=hidden,
        in_channels=facts["num_channels"],
        activation="swiglu" if facts["use_swiglu_ffn"] else common.activation(facts["hidden_act"], name),
        norm_eps=facts["layer_norm_eps"],
        prefix_tokens=1 + registers,
        layer_scale=True,
        num_classes=common.num_labels(config) if classifies else 0,
        head_concat_mean=classifies,
        dynamic_size=True,
        position_antialias="WithRegisters" in architecture,
        name=name,
    )
    base = "dinov2_with_registers." if "WithRegisters" in architecture else "dinov2."
    prefix = common.find_prefix(
        state, (base, "") if classifies else ("", base), "embeddings.patch_embeddings.projection.weight"
    )
    source = Source(state, name)
    source.dense("patch_embed", f"{prefix}embeddings.patch_embeddings.projection.")
    tokens = [f"{prefix}embeddings.cls_token", *([f"{prefix}embeddings.register_tokens"] if registers else [])]
    source.tokens(ours, tokens, f"{prefix}embeddings.position_embeddings", covered=1)
    candidates = (_FILE_SWIGLU, _MEMORY_SWIGLU) if facts["use_swiglu_ffn"] else (_FILE, _MEMORY)
    names = common.layout(state, prefix, *candidates)
    names.read(source, ours, prefix, qkv_bias=facts["qkv_bias"])
    source.norm("norm", f"{prefix}layernorm.")
    if ours.num_classes:
        source.dense("head", "classifier.")
    return ours, source.finish(ours, IGNORABLE)
