"""Attention classes of transformers that are off its attention interface and spell attention out.

Each forward follows the eager one of its class. Where the caller wants attention weights, by argument or
by transformers' capturing hooks, the class's own forward runs.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from vitfast.attention import sdpa
from vitfast.integrations.known import Known, dropping, find_known
from vitfast.integrations.recognise import source
from vitfast.integrations.swap import Match, original
from vitfast.integrations.timm_windows import attend_padded, cosine_attention, with_windows
from vitfast.integrations.transformers_attention import weights_collected


def find(module: Any) -> Match:
    """Finder for the classes in the table at the end of this file."""
    matched = find_known(module, CLASSES)
    if matched is _swin_v2:
        text = source(type(module).forward)  # transformers adds the mask twice in the versions seen
        matched = _swin_v2_adding(text.count("attention_mask.unsqueeze(1).unsqueeze(0)"))
    if callable(matched) and importlib.util.find_spec("transformers.utils.output_capturing") is None:
        return "this version of transformers collects attention weights in a way that vitfast does not know"
    return matched


def _weights_wanted(asked: bool | None = False) -> bool:
    """Whether somebody is going to look at attention weights; most classes return them whether asked or not."""
    return bool(asked) or weights_collected()


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]; a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)


def _projected(module: Any, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q of x, k and v of what it sees, by the names that most classes here have."""
    heads = module.num_attention_heads
    return _heads(module.query(x), heads), _heads(module.key(seen), heads), _heads(module.value(seen), heads)


def _image_gpt(
    module: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    across = module.is_cross_attention or encoder_hidden_states is not None
    if across or _weights_wanted(output_attentions) or dropping(module, module.attn_dropout):
        return original(module).forward(
            module, hidden_states, layer_past, attention_mask, encoder_hidden_states, encoder_attention_mask, use_cache,
            output_attentions, **kwargs,
        )  # fmt: skip
    q, k, v = (_heads(part, module.num_heads) for part in module.c_attn(hidden_states).chunk(3, dim=2))
    if layer_past is not None:
        cache = getattr(layer_past, "self_attention_cache", layer_past)
        k, v = cache.update(k, v, module.layer_idx)
    scale = module.head_dim**-0.5 if module.scale_attn_weights else 1.0
    if module.scale_attn_by_inverse_layer_idx:
        scale /= module.layer_idx + 1
    queries, keys = q.shape[2], k.shape[2]
    # Without a mask the causal triangle needs no tensor; reorder_and_upcast_attn is what the kernels do anyway.
    causal = attention_mask is None and queries == keys
    mask = attention_mask
    if not causal and queries > 1:
        seen = module.bias[:, :, keys - queries : keys, :keys]
        if mask is None:
            mask = seen
        else:
            mask = mask + torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    out = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return module.resid_dropout(module.c_proj(_joined(out))), None


def _blip(module: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    if _weights_wanted(kwargs.get("output_attentions")) or dropping(module, module.dropout):
        return original(module).forward(module, hidden_states, **kwargs)
    qkv = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return module.projection(_joined(sdpa.scaled_dot_product_attention(q, k, v, scale=module.scale))), None


def _group_vit(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if _weights_wanted(kwargs.get("output_attentions")) or dropping(module, module.dropout):
        return original(module).forward(module, hidden_states, attention_mask, encoder_hidden_states, **kwargs)
    seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    projections = ((module.q_proj, hidden_states), (module.k_proj, seen), (module.v_proj, seen))
    q, k, v = (_heads(project(x), module.num_heads) for project, x in projections)
    out = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=module.scale)
    return module.out_proj(_joined(out)), None


def _swin(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
) -> tuple[Tensor]:
    if _weights_wanted(output_attentions) or dropping(module, module.dropout):
        return original(module).forward(module, hidden_states, attention_mask, output_attentions)
    q, k, v = _projected(module, hidden_states, hidden_states)
    area = module.window_size[0] * module.window_size[1]
    bias = module.relative_position_bias_table[module.relative_position_index.view(-1)].view(area, area, -1)
    bias = with_windows(bias.permute(2, 0, 1)[None], attention_mask, hidden_states.shape[0])
    return (_joined(sdpa.scaled_dot_product_attention(q, k, v, attn_mask=bias)),)


def _swin_v2(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    *,
    times: int,
) -> tuple[Tensor]:
    """With the mask added so many times."""
    if _weights_wanted(output_attentions) or dropping(module, module.dropout):
        return original(module).forward(module, hidden_states, attention_mask, output_attentions)
    q, k, v = _projected(module, hidden_states, hidden_states)
    area = module.window_size[0] * module.window_size[1]
    table = module.continuous_position_bias_mlp(module.relative_coords_table).view(-1, module.num_attention_heads)
    bias = table[module.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
    mask = None if attention_mask is None else attention_mask * times
    bias = with_windows(16 * torch.sigmoid(bias)[None], mask, hidden_states.shape[0])
    return (_joined(cosine_attention(q, k, v, module.logit_scale, bias)),)


@functools.cache
def _swin_v2_adding(times: int) -> Any:
    """One function for all layers, so that their classes are one, too."""
    return functools.partial(_swin_v2, times=times)


def _hiera(module: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, None]:
    if _weights_wanted(output_attentions):
        return original(module).forward(module, hidden_states, output_attentions)
    batch, tokens, _ = hidden_states.shape
    windows = tokens // (module.query_stride * module.window_size) if module.use_mask_unit_attn else 1
    # Token t of window w is row t * windows + w; each window is a batch entry of its own.
    qkv = module.qkv(hidden_states).view(batch, tokens // windows, windows, 3, module.num_heads, module.head_dim)
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)
    if module.query_stride > 1:
        q = q.unflatten(2, (module.query_stride, -1)).max(2).values
    out = sdpa.scaled_dot_product_attention(q, k, v, scale=module.scale)
    out = out.unflatten(0, (batch, windows)).permute(0, 3, 1, 2, 4).reshape(batch, -1, module.hidden_size_output)
    return module.proj(out), None


def _pvt(module: Any, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False) -> tuple[Tensor]:
    if _weights_wanted(output_attentions) or dropping(module, module.dropout):
        return original(module).forward(module, hidden_states, height, width, output_attentions)
    reduce = module.sequence_reduction if module.sequences_reduction_ratio > 1 else None
    return (_attend_reduced(module, hidden_states, height, width, reduce),)


def _glpn(
    module: Any, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
) -> tuple[Tensor]:
    if _weights_wanted(output_attentions) or dropping(module, module.dropout):
        return original(module).forward(module, hidden_states, height, width, output_attentions)
    return (_attend_reduced(module, hidden_states, height, width, module.sr if module.sr_ratio > 1 else None),)


def _pvt_v2(
    module: Any, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
) -> tuple[Tensor]:
    if _weights_wanted(output_attentions) or dropping(module, module.attn_drop):
        return original(module).forward(module, hidden_states, height, width, output_attentions)
    reduce = module.spatial_reduction if module.linear_attention or module.spatial_reduction_ratio > 1 else None
    return (module.proj_drop(module.proj(_attend_reduced(module, hidden_states, height, width, reduce))),)


def _attend_reduced(module: Any, x: Tensor, height: int, width: int, reduce: Any) -> Tensor:
    """Attention of all tokens to those of a smaller image, which a convolution makes."""
    seen = x
    if reduce is not None:
        image = x.transpose(1, 2).unflatten(2, (height, width))
        linear = getattr(module, "linear_attention", False)
        seen = module.layer_norm(reduce(module.pool(image) if linear else image).flatten(2).transpose(1, 2))
        seen = module.act(seen) if linear else seen
    return _joined(sdpa.scaled_dot_product_attention(*_projected(module, x, seen)))


def _mobile_vit(module: Any, hidden_states: Tensor) -> Tensor:
    if dropping(module, module.dropout):
        return original(module).forward(module, hidden_states)
    return _joined(sdpa.scaled_dot_product_attention(*_projected(module, hidden_states, hidden_states)))


def _timesformer(module: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    if _weights_wanted(output_attentions) or dropping(module, module.attn_drop):
        return original(module).forward(module, hidden_states, output_attentions)
    q, k, v = (_heads(part, module.num_heads) for part in module.qkv(hidden_states).chunk(3, dim=-1))
    return (_joined(sdpa.scaled_dot_product_attention(q, k, v, scale=module.scale)),)


def _levit(module: Any, hidden_state: Tensor) -> Tensor:
    sizes = [module.key_dim, module.key_dim, module.attention_ratio * module.key_dim]
    qkv = _heads(module.queries_keys_values(hidden_state), module.num_attention_heads)
    q, k, v = qkv.split(sizes, dim=-1)
    return _levit_projected(module, q, k, v)


def _levit_subsample(module: Any, hidden_state: Tensor) -> Tensor:
    kv = _heads(module.keys_values(hidden_state), module.num_attention_heads)
    k, v = kv.split([module.key_dim, module.attention_ratio * module.key_dim], dim=-1)
    q = _heads(module.queries(module.queries_subsample(hidden_state)), module.num_attention_heads)
    return _levit_projected(module, q, k, v)


def _levit_projected(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend_padded(q, k, v, module.get_attention_biases(q.device), module.scale)
    return module.projection(module.activation(_joined(out)))


def _mask2former(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    key_value_states: Tensor | None = None,
    key_value_position_embeddings: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, None]:
    crossed = key_value_states is not None or key_value_position_embeddings is not None
    if crossed or position_embeddings is None or _weights_wanted(output_attentions) or dropping(module, module.dropout):
        return original(module).forward(
            module, hidden_states, attention_mask, position_embeddings, key_value_states,
            key_value_position_embeddings, output_attentions,
        )  # fmt: skip
    x = hidden_states.transpose(0, 1)  # from [N, B, C]
    placed = x + position_embeddings.transpose(0, 1)
    projections = ((module.q_proj, placed), (module.k_proj, placed), (module.v_proj, x))
    q, k, v = (_heads(project(part), module.num_heads) for project, part in projections)
    mask = None if attention_mask is None else attention_mask.unflatten(0, (x.shape[0], module.num_heads))
    out = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=module.scaling)
    return module.out_proj(_joined(out)).transpose(0, 1), None


def _table_transformer(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    object_queries: Tensor | None = None,
    key_value_states: Tensor | None = None,
    spatial_position_embeddings: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, None]:
    if key_value_states is None:
        seen, places = hidden_states, object_queries
    else:
        seen, places = key_value_states, spatial_position_embeddings
    if (
        object_queries is None
        or places is None
        or _weights_wanted(output_attentions)
        or dropping(module, module.dropout)
    ):
        return original(module).forward(
            module, hidden_states, attention_mask, object_queries, key_value_states, spatial_position_embeddings,
            output_attentions,
        )  # fmt: skip
    parts = ((module.q_proj, hidden_states + object_queries), (module.k_proj, seen + places), (module.v_proj, seen))
    q, k, v = (_heads(project(x), module.num_heads) for project, x in parts)
    mask = attention_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # True is hidden here
    out = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=module.scaling)
    return module.out_proj(_joined(out)), None


_LEVIT = (
    "key_dim attention_ratio num_attention_heads scale get_attention_biases out_dim_projection projection activation "
)
_SWIN = (
    "query key value num_attention_heads attention_head_size window_size relative_position_index dropout all_head_size "
)
_SWIN_V2 = _SWIN + "logit_scale continuous_position_bias_mlp relative_coords_table"
_MASKED = "with_pos_embed q_proj k_proj v_proj scaling _shape num_heads head_dim dropout training out_proj"
_PROJECTIONS = "query key value attention_head_size "
_MODELS = "transformers.models."

CLASSES = {
    _MODELS + "imagegpt.modeling_imagegpt.ImageGPTAttention": Known(
        _image_gpt,
        "hidden_states layer_past attention_mask encoder_hidden_states encoder_attention_mask use_cache "
        "output_attentions kwargs",
        "layer_idx q_attn c_attn split_size num_heads head_dim reorder_and_upcast_attn _upcast_and_reordered_attn "
        "_attn _merge_heads c_proj resid_dropout",
    ),
    _MODELS + "blip.modeling_blip.BlipAttention": Known(
        _blip, "hidden_states kwargs", "qkv num_heads scale dropout embed_dim projection"
    ),
    _MODELS + "groupvit.modeling_groupvit.GroupViTAttention": Known(
        _group_vit,
        "hidden_states attention_mask encoder_hidden_states kwargs",
        "q_proj scale _shape k_proj v_proj num_heads head_dim dropout training out_proj",
    ),
    _MODELS + "swinv2.modeling_swinv2.Swinv2SelfAttention": Known(
        _swin_v2, "hidden_states attention_mask output_attentions", _SWIN_V2
    ),
    _MODELS + "swin2sr.modeling_swin2sr.Swin2SRSelfAttention": Known(
        _swin_v2, "hidden_states attention_mask output_attentions", _SWIN_V2
    ),
    _MODELS + "donut.modeling_donut_swin.DonutSwinSelfAttention": Known(
        _swin, "hidden_states attention_mask output_attentions", _SWIN + "relative_position_bias_table"
    ),
    _MODELS + "maskformer.modeling_maskformer_swin.MaskFormerSwinSelfAttention": Known(
        _swin, "hidden_states attention_mask output_attentions", _SWIN + "relative_position_bias_table"
    ),
    _MODELS + "hiera.modeling_hiera.HieraMaskUnitAttention": Known(
        _hiera,
        "hidden_states output_attentions",
        "use_mask_unit_attn query_stride window_size qkv num_heads head_dim scale hidden_size_output proj",
    ),
    _MODELS + "pvt.modeling_pvt.PvtEfficientSelfAttention": Known(
        _pvt,
        "hidden_states height width output_attentions",
        "transpose_for_scores query key value sequences_reduction_ratio sequence_reduction layer_norm "
        "attention_head_size dropout all_head_size",
    ),
    _MODELS + "glpn.modeling_glpn.GLPNEfficientSelfAttention": Known(
        _glpn,
        "hidden_states height width output_attentions",
        _PROJECTIONS + "sr_ratio sr layer_norm dropout all_head_size",
    ),
    _MODELS + "pvt_v2.modeling_pvt_v2.PvtV2SelfAttention": Known(
        _pvt_v2,
        "hidden_states height width output_attentions",
        _PROJECTIONS + "transpose_for_scores linear_attention spatial_reduction pool act layer_norm "
        "spatial_reduction_ratio attn_drop proj proj_drop",
    ),
    _MODELS + "mobilevit.modeling_mobilevit.MobileViTSelfAttention": Known(
        _mobile_vit, "hidden_states", _PROJECTIONS + "dropout all_head_size"
    ),
    _MODELS + "timesformer.modeling_timesformer.TimesformerSelfAttention": Known(
        _timesformer, "hidden_states output_attentions", "qkv num_heads scale attn_drop"
    ),
    _MODELS + "levit.modeling_levit.LevitAttention": Known(_levit, "hidden_state", _LEVIT + "queries_keys_values"),
    _MODELS + "levit.modeling_levit.LevitAttentionSubsample": Known(
        _levit_subsample, "hidden_state", _LEVIT + "keys_values queries queries_subsample resolution_out"
    ),
    _MODELS + "table_transformer.modeling_table_transformer.TableTransformerAttention": Known(
        _table_transformer,
        "hidden_states attention_mask object_queries key_value_states spatial_position_embeddings output_attentions",
        _MASKED,
    ),
    _MODELS + "mask2former.modeling_mask2former.Mask2FormerAttention": Known(
        _mask2former,
        "hidden_states attention_mask position_embeddings key_value_states key_value_position_embeddings "
        "output_attentions",
        _MASKED,
    ),
    _MODELS + "oneformer.modeling_oneformer.OneFormerAttention": Known(
        _mask2former,
        "hidden_states attention_mask position_embeddings key_value_states key_value_position_embeddings "
        "output_attentions",
        _MASKED,
    ),
}
