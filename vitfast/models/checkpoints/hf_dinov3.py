"""transformers DINOv3 (ViT).

`embedding` is the normalised CLS token (`pooler_output`). Rotary frequencies are computed in fp32 from `rope_theta`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from vitfast.models import schema
from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import Eps, Flag, Heads, Hidden, Tokens, ViTConfig, Width


@dataclass(frozen=True)
class Settings(common.Settings):
    """config.json."""

    hidden_size: Width = 384
    num_attention_heads: Heads = 6
    intermediate_size: Hidden = 1536
    layer_norm_eps: Eps = 1e-5
    num_register_tokens: Tokens = 0
    rope_theta: Annotated[float, schema.number(1e-6, 1e9)] = 100.0
    use_gated_mlp: Flag = False
    query_bias: Flag = True
    key_bias: Flag = False
    value_bias: Flag = True
    proj_bias: Flag = True
    mlp_bias: Flag = True

    def common(self, where: str) -> dict[str, Any]:
        """The fields of ViTConfig that all transformers families have."""
        if not self.use_gated_mlp:
            return super().common(where)
        require(self.hidden_act in ("silu", "swish"), f"a gated MLP with {self.hidden_act}", where)
        return super().common(where) | {"activation": "swiglu"}


_FILE = common.BlockNames(
    block="layer.{}.",
    norm1="norm1.",
    qkv=common.MEMORY_ATTENTION,
    proj="attention.o_proj.",
    norm2="norm2.",
    fc1=("mlp.up_proj.",),
    fc2="mlp.down_proj.",
    layer_scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
_MEMORY = replace(_FILE, block="model.layer.{}.")


def _make(facts: Settings, architecture: str, classes: int) -> dict[str, Any]:
    del architecture, classes
    return {
        "mlp_dim": facts.intermediate_size,
        "prefix_tokens": 1 + facts.num_register_tokens,
        "position": False,
        "layer_scale": True,
        "rope": "centered",
    }


def _weights(source: Source, config: ViTConfig, facts: Settings, prefix: str, architecture: str) -> None:
    del architecture
    source.dense("patch_embed", f"{prefix}embeddings.patch_embeddings.")
    registers = [f"{prefix}embeddings.register_tokens"] if facts.num_register_tokens else []
    source.tokens(config, [f"{prefix}embeddings.cls_token", *registers], None, covered=0)
    half = config.head_dim // 2
    turns = 2 * math.pi / facts.rope_theta ** torch.arange(0, 1, 4 / config.head_dim, dtype=torch.float32)
    require(2 * len(turns) == half, f"rotary embedding of heads of {config.head_dim} channels", source.what)
    table = torch.stack([torch.cat([turns, turns * 0]), torch.cat([turns * 0, turns])])
    source.derive("rope", (1, 1, 2, half), lambda: table[None, None], {})
    names = common.layout(source.state, prefix, _FILE, _MEMORY)
    if facts.use_gated_mlp:
        names = replace(names, fc1=("mlp.gate_proj.", "mlp.up_proj."))
    biased = facts.query_bias, facts.value_bias
    require(biased[0] == biased[1], "a bias of q or v only", source.what)
    options = {"key_bias": facts.key_bias, "proj_bias": facts.proj_bias, "mlp_bias": facts.mlp_bias}
    require(biased[0] or not facts.key_bias, "a bias of k only", source.what)
    names.read(source, config, prefix, qkv_bias=biased[0], **options)
    source.norm("norm", f"{prefix}norm.")


FAMILY = common.Family(
    architectures=("DINOv3ViTModel", "DINOv3ViTBackbone"),
    bases=lambda architecture: ("", "model."),
    by_model_type={"dinov3_vit": lambda state: "DINOv3ViTModel"},
    marker="embeddings.patch_embeddings.weight",
    settings=Settings,
    make=_make,
    weights=_weights,
    ignorable=(r".*embeddings\.mask_token", r".*embeddings\.register_tokens"),
)
