"""transformers Pixtral, the vision tower: RMSNorm, gated feed-forward networks and rotary positions; nothing is pooled.

`embedding` is the mean of the patch tokens. Images are given whole here; they are not packed into one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from vitfast.models import schema
from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import Depth, Eps, Heads, Hidden, ViTConfig, Width


@dataclass(frozen=True)
class Settings(common.Settings):
    """config.json of the tower."""

    hidden_size: Width = 1024
    num_hidden_layers: Depth = 24
    num_attention_heads: Heads = 16
    intermediate_size: Hidden = 4096
    hidden_act: Annotated[str, schema.TEXT] = "silu"
    layer_norm_eps: Eps = 1e-5
    image_size: common.SideOrSides = 1024
    rope_theta: Annotated[float, schema.number(1e-6, 1e9)] = 10_000.0
    rope_parameters: Annotated[Any, schema.OBJECT] = None

    def common(self, where: str) -> dict[str, Any]:
        """The fields of ViTConfig that all transformers families have."""
        act = common.activation(self.hidden_act, where)
        gated = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}.get(act, "")
        require(bool(gated), f"a gated MLP with {self.hidden_act}", where)
        return super().common(where) | {"activation": gated, "norm_eps": 1e-5}

    @property
    def theta(self) -> float:
        """The base of the rotary frequencies."""
        return float((self.rope_parameters or {}).get("rope_theta", self.rope_theta))


_NAMES = common.BlockNames(
    block="transformer.layers.{}.",
    norm1="attention_norm.",
    qkv=("attention.q_proj.", "attention.k_proj.", "attention.v_proj."),
    proj="attention.o_proj.",
    norm2="ffn_norm.",
    fc1=("feed_forward.gate_proj.", "feed_forward.up_proj."),
    fc2="feed_forward.down_proj.",
)


def _make(facts: Settings, architecture: str, classes: int) -> dict[str, Any]:
    del architecture, classes
    return {
        "mlp_dim": facts.intermediate_size,
        "norm": "rms_norm",
        "prefix_tokens": 0,
        "class_token": False,
        "position": False,
        "rope": "index",
        "pre_norm": True,
        "final_norm": False,
        "pool": "none",
    }


def _weights(source: Source, config: ViTConfig, facts: Settings, prefix: str, architecture: str) -> None:
    del architecture
    source.dense("patch_embed", f"{prefix}patch_conv.", bias=False)
    source.copy("norm_pre.weight", f"{prefix}ln_pre.weight")
    half = config.head_dim // 2
    turns = 1 / facts.theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    rows, columns = turns[::2], turns[1::2]
    require(len(rows) == len(columns), f"rotary embedding of heads of {config.head_dim} channels", source.what)
    table = torch.stack([torch.cat([rows, columns * 0]), torch.cat([rows * 0, columns])])
    source.derive("rope", (1, 1, 2, half), lambda: table[None, None], {})
    _NAMES.read(source, config, prefix, qkv_bias=False, proj_bias=False, mlp_bias=False)


FAMILY = common.Family(
    architectures=("PixtralVisionModel",),
    bases=lambda architecture: ("", "vision_tower."),
    by_model_type={"pixtral": lambda state: "PixtralVisionModel"},
    marker="patch_conv.weight",
    settings=Settings,
    make=_make,
    weights=_weights,
    ignorable=(r".*patch_positional_embedding\..*",),
)
