"""The towers of OpenAI's CLIP and open_clip: image and text, from a state dict and what its sizes do not say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitfast.models.checkpoints.hf_common import BlockNames
from vitfast.models.checkpoints.source import Source, require
from vitfast.models.config import ViTConfig
from vitfast.models.text import TextTower, text_config

MARKER = "visual.conv1.weight"

TEXT = (
    r"(transformer|token_embedding|ln_final|text|text_decoder)\..*",
    r"positional_embedding|text_projection|logit_scale|logit_bias|attn_mask",
    r"input_resolution|context_length|vocab_size",
)
"""Names of the text tower, of CoCa's decoder, and what all share."""

_NAMES = BlockNames(
    block="transformer.resblocks.{}.",
    norm1="ln_1.",
    qkv=("attn.in_proj_",),
    proj="attn.out_proj.",
    norm2="ln_2.",
    fc1=("mlp.c_fc.",),
    fc2="mlp.c_proj.",
    layer_scales=("ls_1.gamma", "ls_2.gamma"),
)


@dataclass(frozen=True)
class Vision:
    """What the shapes of an image tower do not say.

    Attributes:
        head_width: channels of a head. activation, norm_eps, pre_norm, pool: as in ViTConfig.
        norm_after_pool: the last norm is of the pooled vector. pool_heads: of attention pooling (CoCa).
    """

    head_width: int = 64
    activation: str = "gelu"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    pool: str = "cls"
    norm_after_pool: bool = False
    pool_heads: int = 8


@dataclass(frozen=True)
class Text:
    """What the shapes of a text tower do not say: fields of `TextTower` and ViTConfig; heads 0: 64 channels each."""

    heads: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-5
    causal: bool = True
    pool: str = "eot"
    eot: int | None = None
    pad: int = 0
    tokenizer: Path | None = None


def vision(state: Mapping[str, Tensor], facts: Vision, name: str) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Translate the image tower in a whole model's state dict.

    Raises:
        CheckpointError: for what the forward does not have, or tensors that do not fit.
    """
    require(MARKER in state, "a state dict without visual.conv1.weight (no Vision Transformer)", name)
    require("visual.layer1.0.conv1.weight" not in state, "a ResNet as vision tower", name)
    require("visual.attn_pool_contrastive.query" not in state, "two poolings by attention", name)
    config = _vision_config(state, facts, name)
    source = Source(state, name)
    source.dense("patch_embed", "visual.conv1.", bias=False)
    source.tokens(config, ["visual.class_embedding"], "visual.positional_embedding", covered=1)
    if config.pre_norm:
        source.norm("norm_pre", "visual.ln_pre.")
    _NAMES.read(source, config, "visual.")
    if config.attention_pool:
        _read_pool(source, config)
    source.norm("pool_norm" if config.pool_norm else "norm", "visual.ln_post.")
    if config.projection_dim:
        source.transposed("projection.weight", "visual.proj")
    return config, source.finish(config, TEXT)


def _vision_config(state: Mapping[str, Tensor], facts: Vision, name: str) -> ViTConfig:
    """The architecture that the shapes and `facts` say."""
    patches, position = state[MARKER], state.get("visual.positional_embedding")
    require(patches.ndim == 4, f"visual.conv1.weight {list(patches.shape)}", name)
    width, channels, height, side = patches.shape
    require(position is not None and position.ndim == 2, "a state dict without visual.positional_embedding", name)
    assert position is not None
    grid = math.isqrt(max(len(position) - 1, 0))
    require(grid > 0 and grid * grid + 1 == len(position), f"a grid of {len(position) - 1} patches", name)
    projection, query = state.get("visual.proj"), state.get("visual.attn_pool.query")
    pool: dict[str, Any] = {"pool": facts.pool, "pool_norm": facts.norm_after_pool}
    if query is not None:
        require(facts.pool == "cls", f"attentional pooling with pool_type={facts.pool!r}", name)
        pool = {"pool": "map_all", "pool_norm": True, "pool_heads": facts.pool_heads, "pool_dim": query.shape[-1]}
    return ViTConfig(
        **_sizes(state, "visual.", name),
        image_size=(grid * height, grid * side),
        patch_size=(height, side),
        width=width,
        heads=max(width // facts.head_width, 1),
        in_channels=channels,
        activation=facts.activation,
        norm_eps=facts.norm_eps,
        pre_norm=facts.pre_norm,
        final_norm=query is not None or not facts.norm_after_pool,
        projection_dim=projection.shape[1] if projection is not None and projection.ndim == 2 else 0,
        dynamic_size=False,  # neither library takes another size than the model was made for
        name=name,
        **pool,
    )


def _sizes(state: Mapping[str, Tensor], prefix: str, name: str) -> dict[str, Any]:
    """Depth and hidden width of a tower, and whether it has LayerScale."""
    first = f"{prefix}{_NAMES.block.format(0)}"
    blocks = {m[1] for key in state if (m := re.match(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.", key))}
    hidden = state.get(f"{first}mlp.c_fc.weight")
    require(hidden is not None, f"a state dict without {first}mlp.c_fc.weight", name)
    assert hidden is not None
    return {"depth": len(blocks), "mlp_dim": len(hidden), "layer_scale": f"{first}ls_1.gamma" in state}


def _read_pool(source: Source, config: ViTConfig) -> None:
    """CoCa's attention pooling, of whose queries the first gives the embedding; it is the same for every image."""
    theirs, pooled, width = "visual.attn_pool.", config.pooled_dim, config.width
    source.norm("norm", f"{theirs}ln_k.")
    queries = source.state[f"{theirs}query"].shape[0]
    apart = f"{theirs}attn.q_proj_weight" in source
    whole = {f"{theirs}attn.in_proj_weight": (3 * pooled, width)}
    first = {f"{theirs}attn.q_proj_weight": (pooled, pooled)} if apart else whole
    others = {f"{theirs}attn.{part}_proj_weight": (pooled, width) for part in "kv"} if apart else whole
    bias = {f"{theirs}attn.in_proj_bias": (3 * pooled,)}

    def query(rows: Tensor, weight: Tensor, shift: Tensor, products: Tensor, added: Tensor) -> Tensor:
        return products[:pooled] @ F.layer_norm(rows[0], (pooled,), weight, shift, config.norm_eps) + added[:pooled]

    norm = {f"{theirs}ln_q.{kind}": (pooled,) for kind in ("weight", "bias")}
    source.derive("pool.query", (pooled,), query, {f"{theirs}query": (queries, pooled), **norm, **first, **bias})

    def last(*parts: Tensor) -> Tensor:  # k and v, apart or after q
        return torch.cat(parts)[-2 * pooled :]

    source.derive("pool.kv.weight", (2 * pooled, width), last, others)
    source.derive("pool.kv.bias", (2 * pooled,), last, bias)
    source.dense("pool.proj", f"{theirs}attn.out_proj.")


def text(state: Mapping[str, Tensor], facts: Text, name: str) -> TextTower | None:
    """The text tower in a whole model's state dict; None if it has none of open_clip's own.

    Raises:
        CheckpointError: for tensors that do not fit.
    """
    prefix = "text." if "text.token_embedding.weight" in state else ""
    table, position = state.get(f"{prefix}token_embedding.weight"), state.get(f"{prefix}positional_embedding")
    if table is None or position is None or f"{prefix}{_NAMES.block.format(0)}ln_1.weight" not in state:
        return None
    width = table.shape[1]
    config = text_config(
        **_sizes(state, prefix, name),
        context=len(position),
        name=name,
        width=width,
        heads=facts.heads or max(width // 64, 1),
        activation=facts.activation,
        norm_eps=facts.norm_eps,
    )
    source = Source(state, f"{name}, text")
    source.tokens(config, [], f"{prefix}positional_embedding", covered=0)
    _NAMES.read(source, config, prefix)
    source.norm("norm", f"{prefix}ln_final.")
    if "logit_scale" not in state:
        source.missing("logit_scale")
    rest = rf"{re.escape(prefix)}(token_embedding\.weight|text_projection.*|cls_emb|attn_mask)"
    weights = source.finish(config, (r"(visual|text_decoder)\..*", *TEXT[1:], rest))
    matrix, linear = state.get(f"{prefix}text_projection"), state.get(f"{prefix}text_projection.weight")
    class_token, bias = state.get(f"{prefix}cls_emb"), state.get("logit_bias")
    return TextTower(
        config=config,
        weights=weights,
        embedding=table,
        projection=linear if matrix is None else matrix.mT.contiguous(),
        projection_bias=state.get(f"{prefix}text_projection.bias"),
        causal=facts.causal,
        pool=facts.pool,
        eot=facts.eot,
        scale=state["logit_scale"].float().exp().item(),
        bias=None if bias is None else bias.float().item(),
        tokenizer=facts.tokenizer,
        class_token=class_token,
        pad=None if class_token is None else facts.pad,
    )
