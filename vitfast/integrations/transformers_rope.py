"""Layers on transformers' attention interface that rotate q and k: forwards that hand the tables to the kernel.

The function behind a name of the interface gets q and k rotated. Where the kernels are to run a layer of a class that
is known here, they rotate instead, and no rotated copy is made; else the layer's own forward runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitfast.attention import sdpa
from vitfast.integrations.known import Known, dropping, find_known, path
from vitfast.integrations.swap import Match, original
from vitfast.integrations.transformers_attention import (
    _HARMLESS,
    EAGER_NAME,
    NAME,
    attention_forward,
    weights_collected,
)
from vitfast.ops import Rope


def find(module: nn.Module) -> Match:
    """The forward for a layer whose attention is "vitfast" already; True if it needs none, or is not known exactly."""
    if path(type(module)) not in CLASSES or "forward" in module.__dict__:
        return True
    matched = find_known(module, CLASSES)
    return matched if callable(matched) else True


def _dinov3(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if position_embeddings is None or _own(module, hidden_states, kwargs):
        return original(module).forward(module, hidden_states, attention_mask, position_embeddings, **kwargs)
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    q, k, v = (
        projection(hidden_states).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    cos, sin = position_embeddings
    options: Any = {"attn_mask": attention_mask, "scale": module.scaling}
    fused = sdpa.fused(q, k, v, rope=Rope(cos, sin), qk_norm=None, **options)
    if fused is not None:
        out = fused.transpose(1, 2)
    else:
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        out, _ = attention_forward(module, q, k, v, attention_mask, scaling=module.scaling)
    return module.o_proj(out.flatten(2)), None


def _own(module: Any, hidden_states: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether the layer's own forward is to run: on torch's route, and where more is asked than attention."""
    return bool(
        sdpa.torch_first(hidden_states)
        or module.config._attn_implementation not in (NAME, EAGER_NAME)
        or module.is_causal
        or dropping(module, module.dropout)
        or weights_collected()
        or any(value is not None and value is not False and name not in _HARMLESS for name, value in arguments.items())
    )


CLASSES = {
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention": Known(
        _dinov3,
        "hidden_states attention_mask position_embeddings kwargs",
        "num_heads head_dim q_proj k_proj v_proj o_proj config scaling training dropout",
    ),
}
