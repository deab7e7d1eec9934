"""Attention of the dinov2 and dinov3 repositories, as torch.hub loads them.

The present Attention of dinov2 calls torch's function and is redirected (`torch_sdpa.find`); its first
version, and what its MemEffAttention does with and without xFormers, are here. In dinov3 a block may call
`forward_list` instead of `forward`; both come to `compute_attention`, which is what is replaced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitfast import attention
from vitfast.integrations.known import Known, dropping, find_known
from vitfast.integrations.swap import Found


def find(module: nn.Module, parent: nn.Module | None) -> Found:
    """Finder for the classes in the table at the end of this file."""
    del parent
    return find_known(module, CLASSES)


def _dinov2(module: Any, x: Tensor, *attn_bias: Any, **biases: Any) -> Tensor:
    """Without bias; packed images come with one, for xFormers, in training."""
    if any(bias is not None for bias in (*attn_bias, *biases.values())) or dropping(module, module.attn_drop):
        return type(module).forward(module, x, *attn_bias, **biases)
    return module.proj_drop(module.proj(_attend(module, module.qkv(x))))


def _dinov3(module: Any, qkv: Tensor, attn_bias: Any = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    if attn_bias is not None:
        return type(module).compute_attention(module, qkv, attn_bias, rope)  # which says that it takes none
    return _attend(module, qkv, rope)


def _attend(module: Any, qkv: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[B, N, 3 * H * D] -> [B, N, H * D]."""
    q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if rope is not None:
        q, k = module.apply_rope(q, k, rope)
    return attention.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


CLASSES = {
    "dinov2.layers.attention.Attention": Known(_dinov2, "x", "qkv num_heads scale attn_drop proj proj_drop"),
    "dinov2.layers.attention.MemEffAttention": Known(_dinov2, "x attn_bias", "qkv num_heads proj proj_drop"),
    "dinov3.layers.attention.SelfAttention": Known(
        _dinov3, "qkv attn_bias rope", "qkv num_heads apply_rope", method="compute_attention"
    ),
}
