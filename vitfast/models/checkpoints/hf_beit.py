"""transformers BEiT, Data2Vec (vision), and InternVL's vision tower.

`embedding` is `pooler_output` of the first two: the norm of the mean of the patch tokens, or the CLS token, as the
config says. InternVL's tower pools nothing; its `embedding` is the CLS token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from vitfast.models import schema
from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import NORMS, Eps, Flag, Hidden, ViTConfig


@dataclass(frozen=True)
class Settings(common.Settings):
    """config.json of BEiT and Data2Vec."""

    intermediate_size: Hidden = 3072
    layer_scale_init_value: Annotated[float, schema.number(0, 1e6)] = 0.1
    use_mean_pooling: Flag = True
    use_absolute_position_embeddings: Flag = False
    use_relative_position_bias: Flag = False
    use_shared_relative_position_bias: Flag = False


@dataclass(frozen=True)
class InternVLSettings(common.Settings):
    """config.json of InternVL's tower."""

    layer_norm_eps: Eps = 1e-6
    intermediate_size: Hidden = 3072
    image_size: common.SideOrSides = 448
    patch_size: common.SideOrSides = 14
    use_mean_pooling: Flag = True
    use_absolute_position_embeddings: Flag = True
    attention_bias: Flag = False
    use_qk_norm: Flag = False
    norm_type: Annotated[str, schema.one_of(*NORMS)] = "layer_norm"


_FILE = common.BlockNames(
    block="encoder.layer.{}.",
    norm1="layernorm_before.",
    qkv=common.FILE_ATTENTION,
    proj="attention.output.dense.",
    norm2="layernorm_after.",
    fc1=("intermediate.dense.",),
    fc2="output.dense.",
    layer_scales=("lambda_1", "lambda_2"),
)
_MEMORY = replace(
    _FILE, block="layers.{}.", qkv=common.MEMORY_ATTENTION, proj="attention.o_proj.", fc1=("mlp.fc1.",), fc2="mlp.fc2."
)
_INTERNVL = replace(_MEMORY, block="encoder.layer.{}.", proj="attention.projection_layer.")

_TABLE = "relative_position_bias.relative_position_bias_table"
_SHARED = (f"encoder.{_TABLE}", "shared_position_bias.relative_position_bias_table")
_OWN = (f"encoder.layer.{{}}.attention.attention.{_TABLE}", f"layers.{{}}.{_TABLE}")


def _make(facts: Settings, architecture: str, classes: int) -> dict[str, Any]:
    del architecture, classes
    both = facts.use_relative_position_bias and facts.use_shared_relative_position_bias
    require(not both, "relative position both shared and in each block", "config")
    relative = "shared" if facts.use_shared_relative_position_bias else "blocks"
    relative = relative if facts.use_relative_position_bias or facts.use_shared_relative_position_bias else ""
    return {
        "mlp_dim": facts.intermediate_size,
        "position": facts.use_absolute_position_embeddings,
        "position_antialias": False,
        "relative_position": relative,
        "dynamic_size": not relative,
        "layer_scale": facts.layer_scale_init_value > 0,
        "final_norm": not facts.use_mean_pooling,
        "pool": "avg" if facts.use_mean_pooling else "cls",
        "pool_norm": facts.use_mean_pooling,
    }


def _embeddings(source: Source, config: ViTConfig, prefix: str) -> None:
    source.dense("patch_embed", f"{prefix}embeddings.patch_embeddings.projection.")
    position = f"{prefix}embeddings.position_embeddings" if config.position else None
    source.tokens(config, [f"{prefix}embeddings.cls_token"], position, covered=1 if position else 0)


def _weights(source: Source, config: ViTConfig, facts: Settings, prefix: str, architecture: str) -> None:
    del architecture
    _embeddings(source, config, prefix)
    if config.relative_position:
        shared = config.relative_position == "shared"
        spelt = next((name for name in (_SHARED if shared else _OWN) if prefix + name.format(0) in source), "")
        spelt = spelt or (_SHARED if shared else _OWN)[0]
        shape = config.weight_shapes()["relative_position"][0]

        def tables(*given: Tensor) -> Tensor:
            return torch.stack([table.T for table in given])

        source.derive(
            "relative_position", shape, tables, {f"{prefix}{spelt.format(i)}": shape[:0:-1] for i in range(shape[0])}
        )
    common.layout(source.state, prefix, _FILE, _MEMORY).read(source, config, prefix, key_bias=False)
    if facts.use_mean_pooling:
        pooler = f"{prefix}pooler.layernorm."
        pools = any(f"{pooler}{part}" in source for part in ("weight", "bias"))
        require(
            pools, "the mean of the patch tokens (use_mean_pooling) without its norm (pooler.layernorm)", source.what
        )
        source.norm("pool_norm", pooler)
    else:
        source.norm("norm", f"{prefix}layernorm.")


def _make_internvl(facts: InternVLSettings, architecture: str, classes: int) -> dict[str, Any]:
    del architecture, classes
    require(not facts.use_qk_norm, "a norm of q and k over all heads (use_qk_norm)", "config")
    return {
        "mlp_dim": facts.intermediate_size,
        "norm": facts.norm_type,
        "position": facts.use_absolute_position_embeddings,
        "position_antialias": False,
        "layer_scale": True,
        "final_norm": not facts.use_mean_pooling,
    }


def _weights_internvl(
    source: Source, config: ViTConfig, facts: InternVLSettings, prefix: str, architecture: str
) -> None:
    del architecture
    require(config.norm == "layer_norm" or not config.final_norm, "LayerNorm after RMSNorms", source.what)
    _embeddings(source, config, prefix)
    _INTERNVL.read(source, config, prefix, qkv_bias=facts.attention_bias)
    if config.final_norm:
        source.norm("norm", f"{prefix}layernorm.")


def _classifier(name: str) -> Any:
    return lambda state: f"{name}ForImageClassification" if "classifier.weight" in state else f"{name}Model"


def _bases(architecture: str) -> tuple[str, ...]:
    base = "beit." if architecture.startswith("Beit") else "data2vec_vision."
    return (base, "") if architecture.endswith("ForImageClassification") else ("", base)


_LEFT = (r".*relative_position_index", r".*embeddings\.mask_token")

FAMILY = common.Family(
    architectures=(
        *("BeitModel", "BeitForImageClassification"),
        *("Data2VecVisionModel", "Data2VecVisionForImageClassification"),
    ),
    bases=_bases,
    by_model_type={"beit": _classifier("Beit"), "data2vec-vision": _classifier("Data2VecVision")},
    marker="embeddings.patch_embeddings.projection.weight",
    settings=Settings,
    make=_make,
    weights=_weights,
    ignorable=_LEFT,
    says=("pooler",),
)
INTERNVL = common.Family(
    architectures=("InternVLVisionModel",),
    bases=lambda architecture: ("", "vision_tower.", "model.vision_tower."),
    by_model_type={"internvl_vision": lambda state: "InternVLVisionModel"},
    marker="embeddings.patch_embeddings.projection.weight",
    settings=InternVLSettings,
    make=_make_internvl,
    weights=_weights_internvl,
    ignorable=_LEFT,
    defaults={"InternVLVisionModel": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                                      "intermediate_size": 4096}},
)  # fmt: skip
