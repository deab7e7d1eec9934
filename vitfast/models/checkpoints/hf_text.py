"""The text towers of transformers' CLIP and SigLIP, from a whole model's config.json and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from vitfast.models import schema
from vitfast.models.checkpoints import hf_common as common
from vitfast.models.checkpoints.source import Source, read_settings
from vitfast.models.config import Depth, Eps, Heads, Hidden, Width
from vitfast.models.text import TextTower, text_config

_REST = (
    r"vision_model\..*|visual_projection\.weight",
    r"logit_(scale|bias)|text_projection\.weight",
    r"text_model\.(head\..*|embeddings\.(token_embedding\.weight|position_ids))",
)
"""What is not of the text tower's blocks."""

_ID = Annotated[int, schema.whole(0, 100_000_000)]


@dataclass(frozen=True)
class _Clip:
    """text_config of a CLIP, with its defaults."""

    hidden_size: Width = 512
    intermediate_size: Hidden = 2048
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 8
    max_position_embeddings: Annotated[int, schema.whole(1, 65_536)] = 77
    hidden_act: Annotated[str, schema.TEXT] = "quick_gelu"
    layer_norm_eps: Eps = 1e-5
    eos_token_id: _ID = 49407


@dataclass(frozen=True)
class _Siglip:
    """text_config of a SigLIP, with its defaults."""

    hidden_size: Width = 768
    intermediate_size: Hidden = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 12
    max_position_embeddings: Annotated[int, schema.whole(1, 65_536)] = 64
    hidden_act: Annotated[str, schema.TEXT] = "gelu_pytorch_tanh"
    layer_norm_eps: Eps = 1e-6


_KINDS: dict[str, Any] = {"CLIPModel": _Clip, "SiglipModel": _Siglip}


def read(
    config: Mapping[str, Any], state: Mapping[str, Tensor], architecture: str, name: str, where: str,
    directory: Path | None,
) -> TextTower | None:  # fmt: skip
    """The text tower of a whole model; None if it is of another class or its weights are not there.

    Raises:
        CheckpointError: for settings out of their domain, or tensors that do not fit.
    """
    kind = _KINDS.get(architecture)
    table = state.get("text_model.embeddings.token_embedding.weight")
    if kind is None or table is None:
        return None
    given = {**(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    facts = read_settings(kind, given, where, "text_config.")
    ours = text_config(
        context=facts.max_position_embeddings,
        name=name,
        width=facts.hidden_size,
        depth=facts.num_hidden_layers,
        heads=facts.num_attention_heads,
        mlp_dim=facts.intermediate_size,
        activation=common.activation(facts.hidden_act, where),
        norm_eps=facts.layer_norm_eps,
    )
    source = Source(state, f"{name}, text")
    source.tokens(ours, [], "text_model.embeddings.position_embedding.weight", covered=0)
    common.CLIP_NAMES.read(source, ours, "text_model.")
    source.norm("norm", "text_model.final_layer_norm.")
    clip = kind is _Clip
    projection = "text_projection." if clip else "text_model.head."
    for wanted in (f"{projection}weight", "logit_scale", *(() if clip else (f"{projection}bias", "logit_bias"))):
        if wanted not in state:
            source.missing(wanted)
    weights = source.finish(ours, _REST)
    old = clip and facts.eos_token_id == 2  # what configs said before transformers 4.30, and never was the token
    return TextTower(
        config=ours,
        weights=weights,
        embedding=table,
        projection=state[f"{projection}weight"],
        projection_bias=None if clip else state[f"{projection}bias"],
        causal=clip,
        pool="eot" if clip else "last",
        eot=facts.eos_token_id if clip and not old else None,
        scale=state["logit_scale"].float().exp().item(),
        bias=None if clip else state["logit_bias"].float().item(),
        tokenizer=directory,
    )
