"""timm's attention classes beyond the plain ViT: windows, pooled or grouped queries, convolutional projections.

Only those that spell attention out are here; a class that calls torch's attention keeps its forward, and
its calls are redirected (`torch_sdpa.find`). Each forward follows the unfused path of one class of timm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitfast.attention import sdpa
from vitfast.integrations.known import Known, dropping
from vitfast.integrations.swap import original


def with_windows(bias: Tensor, mask: Tensor | None, batch: int) -> Tensor:
    """Position bias [1, H, N, N] and, where windows are shifted, mask [windows, N, N], for [B * windows, H, N, D]."""
    if mask is None:
        return bias
    masked = bias + mask[:, None].to(bias.dtype)
    return masked.repeat(batch // mask.shape[0], 1, 1, 1)


def attend_padded(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention whose values are wider than its keys: zeros make up the difference, and change no product."""
    missing = value.shape[-1] - query.shape[-1]
    query, key, value = (
        F.pad(x, (0, max(more, 0))) for x, more in ((query, missing), (key, missing), (value, -missing))
    )
    out = sdpa.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return out[..., : value.shape[-1] + min(missing, 0)]


def _projected(module: Any, x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D], projected."""
    return module.proj_drop(module.proj(x.transpose(1, 2).flatten(2)))


def _heads(module: Any, x: Tensor) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]; a view."""
    return x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)


def _packed(module: Any, x: Tensor) -> Any:
    """q, k and v as [B, H, N, D] views of a packed projection [B, N, 3 * H * D]."""
    return x.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _swin(module: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, mask)
    q, k, v = _packed(module, module.qkv(x))
    bias = with_windows(module._get_rel_pos_bias(), mask, x.shape[0])
    return _projected(module, sdpa.scaled_dot_product_attention(q, k, v, attn_mask=bias))


def cosine_attention(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, bias: Tensor) -> Tensor:
    """Swin V2's: scores are cosines times a learnt factor per head [H, 1, 1], at most 100, plus the bias."""
    factor = logit_scale.clamp(max=math.log(1.0 / 0.01)).exp()
    q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
    # Under autocast the factor makes q wider than v, and eager would narrow the scores' product with v.
    return sdpa.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=bias, scale=1.0)


def _swin_v2(module: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, mask)
    qkv_bias = None if module.q_bias is None else torch.cat((module.q_bias, module.k_bias, module.v_bias))
    if qkv_bias is None or module.qkv_bias_separate:
        qkv = module.qkv(x) if qkv_bias is None else module.qkv(x) + qkv_bias
    else:
        qkv = F.linear(x, module.qkv.weight, qkv_bias)
    area = module.window_size[0] * module.window_size[1]
    table = module.cpb_mlp(module.relative_coords_table).view(-1, module.num_heads)
    bias = table[module.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
    bias = with_windows(16 * torch.sigmoid(bias)[None], mask, x.shape[0])
    q, k, v = _packed(module, qkv)
    return _projected(module, cosine_attention(q, k, v, module.logit_scale, bias))


def _swin_v2_cr(module: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, mask)
    bias = with_windows(module._relative_positional_encodings(), mask, x.shape[0])
    q, k, v = _packed(module, module.qkv(x))
    return _projected(module, cosine_attention(q, k, v, module.logit_scale.view(module.num_heads, 1, 1), bias))


def _gcvit(module: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x, q_global)
    if module.use_global and q_global is not None:
        k, v = (_heads(module, part) for part in module.qkv(x).chunk(2, dim=-1))
        q = q_global.repeat_interleave(x.shape[0] // q_global.shape[0], dim=0)
        q = _heads(module, q.flatten(1, -2))
    else:
        q, k, v = _packed(module, module.qkv(x))
    bias = module.rel_pos.get_bias()
    return _projected(module, sdpa.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=module.scale))


def _mvit_v2(module: Any, x: Tensor, feat_size: Any) -> tuple[Tensor, Any]:
    from timm.models.mvitv2 import cal_rel_pos_type, reshape_post_pool, reshape_pre_pool

    def pooled(part: Tensor, pool: Any, norm: Any) -> tuple[Tensor, Any]:
        size = feat_size
        if pool is not None:
            part, token = reshape_pre_pool(part, feat_size, module.has_cls_token)
            part, size = reshape_post_pool(pool(part), module.num_heads, token)
            part = part.contiguous()  # from channels first: the kernels read whole rows of D
        return (part if norm is None else norm(part)), size

    q, k, v = _packed(module, module.qkv(x))
    q, q_size = pooled(q, module.pool_q, module.norm_q)
    k, k_size = pooled(k, module.pool_k, module.norm_k)
    v, _ = pooled(v, module.pool_v, module.norm_v)
    bias = None
    if module.rel_pos_type == "spatial":  # which timm adds to the scores in place; to zeros, it is the bias
        bias = q.new_zeros(*q.shape[:3], k.shape[2])
        sizes = (module.has_cls_token, q_size, k_size)
        bias = cal_rel_pos_type(bias, q, *sizes, module.rel_pos_h, module.rel_pos_w)
    out = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=module.scale)
    if module.residual_pooling:
        out = out + q
    return module.proj(out.transpose(1, 2).flatten(2)), q_size


def _cross_vit(module: Any, x: Tensor) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x)
    q, k, v = _heads(module, module.wq(x[:, :1])), _heads(module, module.wk(x)), _heads(module, module.wv(x))
    return _projected(module, sdpa.scaled_dot_product_attention(q, k, v, scale=module.scale))


def _volo_class(module: Any, x: Tensor) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x)
    k, v = (_heads(module, part) for part in module.kv(x).chunk(2, dim=-1))
    q = _heads(module, module.q(x[:, :1]))
    return _projected(module, sdpa.scaled_dot_product_attention(q, k, v, scale=module.scale))


def _convit(module: Any, x: Tensor) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x)
    q, k, v = _packed(module, module.qkv(x))
    return _projected(module, sdpa.scaled_dot_product_attention(q, k, v, scale=module.scale))


def _tnt(module: Any, x: Tensor) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x)
    q, k = (_heads(module, part) for part in module.qk(x).chunk(2, dim=-1))
    v = _heads(module, module.v(x))
    return _projected(module, sdpa.scaled_dot_product_attention(q, k, v, scale=module.scale))


def _visformer(module: Any, x: Tensor) -> Tensor:
    if dropping(module, module.attn_drop):
        return original(module).forward(module, x)
    qkv = module.qkv(x).flatten(2).unflatten(1, (3, module.num_heads, module.head_dim))
    q, k, v = qkv.permute(1, 0, 2, 4, 3).contiguous().unbind(0)  # channels last: the kernels read whole rows of D
    out = sdpa.scaled_dot_product_attention(q, k, v, scale=module.scale)
    out = out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
    return module.proj_drop(module.proj(out))


def _levit(module: Any, x: Tensor) -> Tensor:
    sizes = [module.key_dim, module.key_dim, module.val_dim]
    q, k, v = _levit_tokens(module, module.qkv(x)).unflatten(-1, (module.num_heads, -1)).split(sizes, dim=-1)
    return _levit_attend(module, q, k, v, x)


def _levit_downsample(module: Any, x: Tensor) -> Tensor:
    kv = _levit_tokens(module, module.kv(x)).unflatten(-1, (module.num_heads, -1))
    k, v = kv.split([module.key_dim, module.val_dim], dim=-1)
    q = _levit_tokens(module, module.q(x)).unflatten(-1, (module.num_heads, -1))
    return _levit_attend(module, q, k, v, x)


def _levit_tokens(module: Any, x: Tensor) -> Tensor:
    """[B, N, C] of tokens, or of an image [B, C, H, W]: the kernels read whole rows of D."""
    return x.flatten(2).transpose(1, 2).contiguous() if module.use_conv else x


def _levit_attend(module: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """From [B, N, H, D] to the projected output."""
    bias = module.get_attention_biases(x.device)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = attend_padded(q, k, v, bias, module.scale).transpose(1, 2).flatten(2)
    if module.use_conv:
        stride = getattr(module, "stride", 1)
        out = out.transpose(1, 2).unflatten(2, [(size - 1) // stride + 1 for size in x.shape[2:]])
    return module.proj(out)


_DROP = "attn_drop proj proj_drop "
_LEVIT = "use_conv num_heads key_dim val_dim val_attn_dim scale get_attention_biases proj "

CLASSES = {
    "timm.models.swin_transformer.WindowAttention": Known(
        _swin,
        "x mask",
        _DROP + "qkv num_heads fused_attn _get_rel_pos_bias training scale softmax",
        experimental=True,
    ),
    "timm.models.swin_transformer_v2.WindowAttention": Known(
        _swin_v2,
        "x mask",
        _DROP + "qkv q_bias k_bias v_bias qkv_bias_separate num_heads logit_scale cpb_mlp relative_coords_table "
        "relative_position_index window_size softmax",
    ),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": Known(
        _swin_v2_cr, "x mask", _DROP + "qkv num_heads logit_scale _relative_positional_encodings"
    ),
    "timm.models.gcvit.WindowAttentionGlobal": Known(
        _gcvit, "x q_global", _DROP + "qkv use_global num_heads head_dim scale rel_pos"
    ),
    "timm.models.mvitv2.MultiScaleAttention": Known(
        _mvit_v2,
        "x feat_size",
        "qkv num_heads pool_q pool_k pool_v norm_q norm_k norm_v has_cls_token scale rel_pos_type rel_pos_h rel_pos_w "
        "residual_pooling dim_out proj",
    ),
    "timm.models.crossvit.CrossAttention": Known(_cross_vit, "x", _DROP + "num_heads wq wk wv scale"),
    "timm.models.volo.ClassAttention": Known(_volo_class, "x", _DROP + "kv q num_heads head_dim scale"),
    "timm.models.convit.MHSA": Known(_convit, "x", _DROP + "qkv num_heads scale"),
    "timm.models.tnt.Attention": Known(_tnt, "x", _DROP + "qk v num_heads head_dim scale"),
    "timm.models.visformer.Attention": Known(
        _visformer, "x", _DROP + "qkv num_heads head_dim fused_attn training scale", experimental=True
    ),
    "timm.models.levit.Attention": Known(_levit, "x", _LEVIT + "qkv"),
    "timm.models.levit.AttentionDownsample": Known(_levit_downsample, "x", _LEVIT + "kv q stride"),
}
