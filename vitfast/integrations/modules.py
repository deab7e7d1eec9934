"""torch's nn.MultiheadAttention, as torchvision's and open_clip's Vision Transformers use it.

In eval mode torch runs a native kernel there that no hook on scaled_dot_product_attention sees.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitfast.attention import sdpa
from vitfast.integrations import torch_sdpa
from vitfast.integrations.recognise import source
from vitfast.integrations.swap import Match, Swap, original, swap_forwards


def replace(model: nn.Module) -> Swap:
    """Replace the forward of every nn.MultiheadAttention in `model` for which that is exact."""
    swap = Swap(model)
    swap_forwards(model, (find,), swap)
    return swap


def find(module: nn.Module, parent: nn.Module | None) -> Match:
    """Finder for exactly nn.MultiheadAttention; a subclass may do anything, and is left or redirected."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if type(module) is not nn.MultiheadAttention:
        why = f"{type(module).__name__} is a subclass of nn.MultiheadAttention that vitfast does not know"
        return torch_sdpa.find(module) or why
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer has a fused path of its own, which never calls it"
    if module.bias_k is not None or module.bias_v is not None:
        return "add_bias_kv=True appends a learned key and value, which vitfast does not do"
    if module.add_zero_attn:
        return "add_zero_attn=True appends a zero key and value, which vitfast does not do"
    if (
        parent is None
        or not type(parent).__module__.startswith("transformers.")
        or "need_weights=False" in source(type(parent))
    ):
        return multihead_attention
    if _throws_weights_away(parent, module):
        return multihead_attention_output
    return "transformers asks it for the attention weights on every call, which vitfast does not return"


def _throws_weights_away(parent: nn.Module, module: nn.Module) -> bool:
    """Whether every call in the parent's forward takes only the output, as SigLIP's pooling head does."""
    name = next(name for name, child in parent.named_children() if child is module)
    text = source(type(parent).forward)
    calls = re.findall(rf"self\.{name}\b", text)
    return bool(calls) and len(calls) == len(re.findall(rf"self\.{name}\([^()]*\)\[0\]", text))


def multihead_attention_output(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`multihead_attention` for a caller that asks for weights, by default or not, and never looks at them."""
    given = dict(zip(_ARGUMENTS, args, strict=False))
    out, _ = multihead_attention(module, **{**given, **kwargs, "need_weights": False})
    return out, None


_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


def multihead_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """nn.MultiheadAttention.forward for calls without attention weights.

    Calls that ask for weights (need_weights=True), train with dropout, are unbatched or nested, or
    have arguments torch refuses, go to the module's own forward. A query that may see no key gives
    zeros before the output projection, as in torch's composite path (its native one gives NaN).
    """
    batch_axis = 0 if module.batch_first else 1
    if (
        need_weights
        or (module.training and module.dropout > 0)
        or (is_causal and attn_mask is None)
        or any(x.is_nested or x.dim() != 3 for x in (query, key, value))
        or key.shape[:2] != value.shape[:2]
        or key.shape[batch_axis] != query.shape[batch_axis]
        or not _masks_fit(module, query, key, key_padding_mask, attn_mask)
    ):
        return original(module).forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    # As torch does: the hint stands for the mask, unless padding has to be merged into the mask.
    causal = is_causal and key_padding_mask is None
    q, k, v = (_heads(x, module) for x in _project(module, query, key, value))
    mask = _merge(q, key_padding_mask, None if causal else attn_mask)
    out = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    order = (0, 2, 1, 3) if module.batch_first else (2, 0, 1, 3)
    out = out.permute(order).flatten(2)
    return F.linear(out, module.out_proj.weight, module.out_proj.bias), None


def _masks_fit(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> bool:
    """Whether both masks have a shape and dtype that torch accepts."""
    (batch, length), keys = query.shape[:2], key.shape[1]
    if not module.batch_first:
        (length, batch), keys = query.shape[:2], key.shape[0]
    if any(mask is not None and mask.dtype not in (torch.bool, query.dtype) for mask in (key_padding_mask, attn_mask)):
        return False
    if key_padding_mask is not None and key_padding_mask.shape != (batch, keys):
        return False
    shapes = ((length, keys), (batch * module.num_heads, length, keys))
    return attn_mask is None or tuple(attn_mask.shape) in shapes


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values, each of the module's width; one product where all three are the same tensor."""
    bias = module.in_proj_bias
    if module.kdim == module.vdim == module.embed_dim:  # else there is no in_proj_weight
        if query is key and key is value:
            return list(F.linear(query, module.in_proj_weight, bias).chunk(3, dim=-1))
        weights = list(module.in_proj_weight.chunk(3))
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _heads(x: Tensor, module: nn.MultiheadAttention) -> Tensor:
    """[B, N, E], or [N, B, E] unless batch_first, as [B, H, N, D]; a view."""
    x = x.unflatten(-1, (module.num_heads, module.head_dim))
    return x.permute((0, 2, 1, 3) if module.batch_first else (1, 2, 0, 3))


def _merge(q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """One mask as scaled_dot_product_attention takes it (bool: True is seen) from two of nn.MultiheadAttention
    (bool: True is hidden; float: added)."""
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (q.shape[0], -1)))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask.to(q.dtype)
        for mask in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
