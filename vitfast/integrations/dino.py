"""Attention of the dinov2 and dinov3 repositories, as torch.hub loads them.

The present Attention of dinov2 calls torch's function and is redirected (`torch_sdpa.find`); its first
version, and what its MemEffAttention does with and without xFormers, are here. In dinov3 a block may call
`forward_list` instead of `forward`; both come to `compute_attention`, which is what is replaced. Where the kernels run
it they rotate q and k too, if the module's `apply_rope` is found to do what they do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.attention import sdpa
from vitfast.integrations.known import Known, dropping, find_known
from vitfast.integrations.swap import Match, Method, original
from vitfast.ops import Rope, reference


def find(module: nn.Module, parent: nn.Module | None) -> Match:
    """Finder for the classes in the table at the end of this file."""
    del parent
    matched = find_known(module, CLASSES)
    if isinstance(matched, Method) and _rotates_halves(module):
        return Method(matched.name, _dinov3_fused)
    return matched


def _rotates_halves(module: Any) -> bool:
    """Whether `apply_rope` is `Rope`: tried on numbers, since half of its code is elsewhere in the repository."""
    q, k = torch.linspace(-1, 2, 48, dtype=torch.float64, device="cpu").view(2, 1, 1, 3, 8)
    sin, cos = torch.linspace(-2, 1, 32, dtype=torch.float64, device="cpu").view(2, 2, 8)
    theirs = module.apply_rope(q, k, (sin, cos))
    ours = reference.prepare_heads(q.transpose(1, 2), k.transpose(1, 2), cos=cos, sin=sin)
    return all(torch.allclose(mine.transpose(1, 2), other) for mine, other in zip(ours, theirs, strict=True))


def _dinov2(module: Any, x: Tensor, *attn_bias: Any, **biases: Any) -> Tensor:
    """Without bias; packed images come with one, for xFormers, in training."""
    if any(bias is not None for bias in (*attn_bias, *biases.values())) or dropping(module, module.attn_drop):
        return original(module).forward(module, x, *attn_bias, **biases)
    return module.proj_drop(module.proj(_attend(module, module.qkv(x))))


def _dinov3(
    module: Any, qkv: Tensor, attn_bias: Any = None, rope: tuple[Tensor, Tensor] | None = None, fuse: bool = False
) -> Tensor:
    if attn_bias is not None:
        return original(module).compute_attention(module, qkv, attn_bias, rope)  # which says that it takes none
    return _attend(module, qkv, rope, fuse)


_dinov3_fused = functools.partial(_dinov3, fuse=True)


def _attend(module: Any, qkv: Tensor, rope: tuple[Tensor, Tensor] | None = None, fuse: bool = False) -> Tensor:
    """[B, N, 3 * H * D] -> [B, N, H * D]."""
    q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out = None
    if rope is not None:
        sin, cos = rope
        out = sdpa.fused(q, k, v, rope=Rope(cos, sin), qk_norm=None) if fuse else None
        if out is None:
            q, k = module.apply_rope(q, k, rope)
    if out is None:
        out = sdpa.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


CLASSES = {
    "dinov2.layers.attention.Attention": Known(_dinov2, "x", "qkv num_heads scale attn_drop proj proj_drop"),
    "dinov2.layers.attention.MemEffAttention": Known(_dinov2, "x attn_bias", "qkv num_heads proj proj_drop"),
    "dinov3.layers.attention.SelfAttention": Known(
        _dinov3, "qkv attn_bias rope", "qkv num_heads apply_rope", method="compute_attention"
    ),
}
