"""timm's attention classes: instance forwards that do what timm's do, with vitfast's attention inside.

timm has no switch for attention. Each forward here follows the fused path of one class of timm; it is
used only where timm's own forward reads exactly the attributes and takes exactly the arguments that
this file knows, so that another version of timm is left alone rather than changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitfast.attention import sdpa
from vitfast.integrations import timm_windows, torch_sdpa
from vitfast.integrations.known import Known, dropping, find_known
from vitfast.integrations.norms import read_norms
from vitfast.integrations.swap import Match, Swap, original, swap_forwards, unknown_attention
from vitfast.ops import Rope


def replace(model: nn.Module) -> Swap:
    """Replace the forward of every attention of timm in `model` for which that is exact."""
    swap = Swap(model)
    swap_forwards(model, (find, _rest), swap)
    return swap


def find(module: nn.Module, parent: nn.Module | None) -> Match:
    """Finder for the classes in the table at the end of this file and in `timm_windows`."""
    del parent
    return find_known(module, _CLASSES | timm_windows.CLASSES)


def _rest(module: nn.Module, parent: nn.Module | None) -> Match:
    """Other classes of timm: those that call torch's attention, and those that are left."""
    if not type(module).__module__.startswith("timm."):
        return None
    return torch_sdpa.find(module) or unknown_attention(module, parent)


def _packed(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as [B, H, N, D] views of a packed projection [B, N, 3 * H * D]."""
    q, k, v = x.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _separate(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as [B, H or key heads, N, D] from three projections."""
    q, k, v = (p(x).unflatten(-1, (-1, module.head_dim)) for p in (module.q_proj, module.k_proj, module.v_proj))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _biased(module: Any, x: Tensor) -> Tensor:
    """The packed projection of EVA and BEiT, whose key bias is a constant zero."""
    if module.q_bias is None:
        return module.qkv(x)
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    return module.qkv(x) + bias if module.qkv_bias_separate else F.linear(x, module.qkv.weight, bias)


def _rotated(module: Any, x: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
    """RoPE on all but the prefix tokens of x [B, H, N, D]."""
    from timm.layers import apply_rot_embed_cat

    prefix = module.num_prefix_tokens
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(module, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], rotated], dim=2).to(dtype)


def _fused(
    module: Any, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """Attention with the module's norms and rope in the kernel; None where that is not to be, or not exact."""
    if sdpa.torch_first(q):
        return None
    exact, norm = read_norms(module.q_norm, module.k_norm, q.shape[-1])
    if not exact:
        return None
    rotation = None
    if rope is not None:
        if rope.shape[-2] + module.num_prefix_tokens != q.shape[-2]:
            return None
        sin, cos = rope.chunk(2, dim=-1)
        rotation = Rope(cos, sin, interleaved=not getattr(module, "rotate_half", False))
    return sdpa.fused(q, k, v, rope=rotation, qk_norm=norm, attn_mask=attn_mask, is_causal=is_causal)


def _joined(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)


def _projected(module: Any, x: Tensor, gate: Tensor | None) -> Tensor:
    """What Attention, AttentionRope and EvaAttention do after attention; x is [B, H, N, D]."""
    x = module.norm(_joined(x))
    if gate is not None:
        x = x * gate
    return module.proj_drop(module.proj(x))


def _attention(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, attn_mask, is_causal)
    gate = module.gate(x).sigmoid() if module.gate is not None else None
    q, k, v = _packed(module, module.qkv(x))
    out = _fused(module, q, k, v, None, attn_mask, is_causal)
    if out is None:
        out = sdpa.scaled_dot_product_attention(
            module.q_norm(q), module.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal
        )
    return _projected(module, out, gate)


def _attention_rope(
    module: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, rope, attn_mask, is_causal)
    qkv = _packed(module, module.qkv(x)) if module.qkv is not None else _separate(module, x)
    return _with_rope(module, x, qkv, rope, attn_mask, is_causal)


def _eva_attention(
    module: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, rope, attn_mask, is_causal)
    qkv = _packed(module, _biased(module, x)) if module.qkv is not None else _separate(module, x)
    return _with_rope(module, x, qkv, rope, attn_mask, is_causal)


def _with_rope(
    module: Any,
    x: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    rope: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """What AttentionRope and EvaAttention share."""
    gate = module.gate(x).sigmoid() if module.gate is not None else None
    q, k, v = qkv
    out = _fused(module, q, k, v, rope, attn_mask, is_causal)
    if out is None:
        q, k = module.q_norm(q), module.k_norm(k)
        if rope is not None:
            q, k = (_rotated(module, part, rope, v.dtype) for part in (q, k))
        if (groups := q.shape[1] // k.shape[1]) > 1:  # copied, as timm does
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    return _projected(module, out, gate)


def _beit_attention(module: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, shared_rel_pos_bias)
    q, k, v = _packed(module, _biased(module, x))
    bias = shared_rel_pos_bias
    if module.relative_position_bias_table is not None:
        bias = module._get_rel_pos_bias()
        if shared_rel_pos_bias is not None:
            bias = bias + shared_rel_pos_bias
    out = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return module.proj_drop(module.proj(_joined(out)))


def _rel_pos_attention(module: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, shared_rel_pos)
    q, k, v = _packed(module, module.qkv(x))
    bias = module.rel_pos.get_bias() if module.rel_pos is not None else shared_rel_pos
    out = sdpa.scaled_dot_product_attention(module.q_norm(q), module.k_norm(k), v, attn_mask=bias)
    return module.proj_drop(module.proj(_joined(out)))


def _attention_pool_latent(module: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if module.pos_embed is not None:
        x = x + module.pos_embed.unsqueeze(0).to(x.dtype)
    latent = module.q(module.latent.expand(x.shape[0], -1, -1))
    q = latent.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
    k, v = module.kv(x).unflatten(-1, (2, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    out = sdpa.scaled_dot_product_attention(module.q_norm(q), module.k_norm(k), v, attn_mask=attn_mask)
    x = module.proj_drop(module.proj(_joined(out)))
    if module.mlp is not None:
        x = x + module.mlp(module.norm(x))
    if module.pool == "token":
        return x[:, 0]
    return x.mean(1) if module.pool == "avg" else x


def _parallel_scaling_block(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, attn_mask, is_causal)
    hidden, *qkv = module.in_proj(module.in_norm(x)).split(module.in_split, dim=-1)
    if module.mlp_bias is not None:
        hidden = hidden + module.mlp_bias
    q, k, v = (part.unflatten(-1, (module.num_heads, module.head_dim)) for part in qkv)
    q, k, v = (part.transpose(1, 2) for part in (module.q_norm(q), module.k_norm(k), v))
    out = _joined(sdpa.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal))
    hidden = module.mlp_drop(module.mlp_act(hidden))
    if module.out_proj is not None:
        y = module.out_proj(torch.cat((out, hidden), dim=-1))
    else:
        y = module.attn_out_proj(out) + module.mlp_out_proj(hidden)
    return x + module.drop_path(module.ls(y))


_FUSED = "fused_attn scale "
_AROUND = _FUSED + "attn_drop training num_heads proj proj_drop "

_CLASSES = {
    "timm.layers.attention.Attention": Known(
        _attention, "x attn_mask is_causal", _AROUND + "qkv head_dim attn_dim q_norm k_norm norm gate"
    ),
    "timm.layers.attention.AttentionRope": Known(
        _attention_rope,
        "x rope attn_mask is_causal",
        _AROUND
        + "qkv q_proj k_proj v_proj head_dim attn_dim q_norm k_norm norm gate num_kv_heads num_kv_groups "
        + "num_prefix_tokens",
    ),
    "timm.models.eva.EvaAttention": Known(
        _eva_attention,
        "x rope attn_mask is_causal",
        _AROUND
        + "qkv q_proj k_proj v_proj q_bias k_bias v_bias qkv_bias_separate q_norm k_norm norm gate num_prefix_tokens",
    ),
    "timm.models.beit.Attention": Known(
        _beit_attention,
        "x shared_rel_pos_bias",
        _AROUND + "qkv q_bias k_bias v_bias qkv_bias_separate relative_position_bias_table _get_rel_pos_bias",
    ),
    "timm.models.vision_transformer_relpos.RelPosAttention": Known(
        _rel_pos_attention, "x shared_rel_pos", _AROUND + "qkv head_dim q_norm k_norm rel_pos"
    ),
    "timm.layers.attention_pool.AttentionPoolLatent": Known(
        _attention_pool_latent,
        "x attn_mask",
        _FUSED + "pos_embed latent latent_len q kv num_heads head_dim q_norm k_norm proj proj_drop norm mlp pool",
    ),
    "timm.models.vision_transformer.ParallelScalingBlock": Known(
        _parallel_scaling_block,
        "x attn_mask is_causal",
        _FUSED
        + "attn_drop training num_heads head_dim in_norm in_proj in_split mlp_bias q_norm k_norm mlp_act mlp_drop "
        + "out_proj attn_out_proj mlp_out_proj drop_path ls",
    ),
}
