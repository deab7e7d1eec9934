"""transformers AIMv2, the vision tower: RMSNorm, also of the patch embeddings, SwiGLU, and attention pooling.

`embedding` is `pooler_output`: what a learned query gathers, or without a head the mean of the patch tokens;
of Aimv2Model it is projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from vitfast.models import schema
from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import Depth, Eps, Flag, Heads, Hidden, ViTConfig, Width


@dataclass(frozen=True)
class Settings(common.Settings):
    """config.json of the tower."""

    hidden_size: Width = 1024
    num_hidden_layers: Depth = 24
    num_attention_heads: Heads = 8
    intermediate_size: Hidden = 2816
    hidden_act: Annotated[str, schema.TEXT] = "silu"
    rms_norm_eps: Eps = 1e-5
    patch_size: common.SideOrSides = 14
    qkv_bias: Flag = False
    mlp_bias: Flag = False
    use_head: Flag = True
    is_native: Flag = False

    def common(self, where: str) -> dict[str, Any]:
        """The fields of ViTConfig that all transformers families have."""
        require(self.hidden_act in ("silu", "swish"), f"a gated MLP with {self.hidden_act}", where)
        require(not self.is_native, "sine and cosine positions of the native resolution (is_native)", where)
        return super().common(where) | {"activation": "swiglu", "norm_eps": self.rms_norm_eps}


_NAMES = common.BlockNames(
    block="encoder.layers.{}.",
    norm1="rms_norm1.",
    qkv=common.MEMORY_ATTENTION,
    proj="attention.out_proj.",
    norm2="rms_norm2.",
    fc1=("ffn.gate_proj.", "ffn.up_proj."),
    fc2="ffn.down_proj.",
)


def _make(facts: Settings, architecture: str, classes: int) -> dict[str, Any]:
    del architecture, classes
    pool = {"pool": "map", "pool_heads": facts.num_attention_heads} if facts.use_head else {"pool": "none"}
    return {
        **pool,
        "mlp_dim": facts.intermediate_size,
        "norm": "rms_norm",
        "embed_norm": True,
        "prefix_tokens": 0,
        "class_token": False,
        "dynamic_size": False,  # the model takes no other size
    }


def _weights(source: Source, config: ViTConfig, facts: Settings, prefix: str, architecture: str) -> None:
    del architecture
    source.dense("patch_embed", f"{prefix}embeddings.patch_embed.")
    source.copy("embed_norm.weight", f"{prefix}embeddings.rms_norm.weight")
    source.tokens(config, [], f"{prefix}embeddings.position_embedding.weight", covered=0)
    bias = facts.qkv_bias
    _NAMES.read(source, config, prefix, qkv_bias=bias, proj_bias=bias, mlp_bias=facts.mlp_bias)
    source.copy("norm.weight", f"{prefix}rms_norm.weight")
    if config.attention_pool:
        source.derive("pool.query", (config.width,), Tensor.flatten, {f"{prefix}head.cls_token": (1, 1, config.width)})
        source.dense("pool.kv", f"{prefix}head.k_proj.", f"{prefix}head.v_proj.", bias=facts.qkv_bias)
        source.dense("pool.proj", f"{prefix}head.output_proj.")


FAMILY = common.Family(
    architectures=("Aimv2VisionModel",),
    bases=lambda architecture: ("", "vision_model."),
    by_model_type={"aimv2_vision_model": lambda state: "Aimv2VisionModel"},
    marker="embeddings.patch_embed.weight",
    settings=Settings,
    make=_make,
    weights=_weights,
    ignorable=(r".*embeddings\.position_ids",),
)
