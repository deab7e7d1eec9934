"""The attention functions behind transformers' names "vitfast" and "vitfast_flash", and their masks.

"vitfast" follows transformers' "sdpa": masks are [B, 1, N, Nk]. "vitfast_eager" follows its "eager", where a mask is
added to the scores and says all: without one, nothing is causal. "vitfast_flash" follows its
"flash_attention_2": padding is one bool per token and is taken out before attention; packed sequences
come as cu_seqlens. Where flash-attn's arguments cannot say what a mask says, the mask is made in full
and the call runs as "vitfast", so that no mask is lost.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.attention import flash_attn, sdpa

NAME, EAGER_NAME, FLASH_NAME = "vitfast", "vitfast_eager", "vitfast_flash"

_HARMLESS = frozenset(
    ("output_hidden_states", "return_dict", "use_cache", "position_ids", "cache_position", "num_items_in_batch")
)
"""Keyword arguments that a model may hand through to its attention function and that do not concern it."""

IMPLEMENTED = _HARMLESS | {"query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
IMPLEMENTED |= {"position_bias", "sliding_window", "output_attentions"}
IMPLEMENTED |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""What a layer may hand over in its code. Weights are refused when they are asked for, and lengths of packed sequences
come only where FlashAttention is asked for."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind the name, with the behaviour of transformers' "sdpa".

    A model that transformers runs with "eager" only is run as "vitfast_eager".

    Args:
        module: the calling attention layer; its `is_causal` counts where the argument is None, and a
            layer without one is causal, as transformers has it.
        query: [B, H, N, D]; key, value: [B, H or fewer, Nk, D].
        attention_mask: bool (True is seen) or additive, broadcastable to [B, H, N, Nk].
        position_bias: added to the scaled scores, broadcastable alike.

    Returns:
        [B, N, H, D], contiguous, and None for the attention weights.

    Raises:
        ValueError: if an argument is given that would change the result and is not implemented.
    """
    window = kwargs.pop("sliding_window", None)
    if window is not None and attention_mask is None and key.shape[2] > window:
        raise ValueError(f"sliding_window={window} over {key.shape[2]} keys needs a mask; {NAME!r} got none")
    _refuse(module, NAME, kwargs)
    causal = attention_mask is None and query.shape[2] > 1
    causal = causal and _is_causal(module, is_causal) and not _only_eager(type(module).__module__)
    mask = attention_mask
    if position_bias is not None:
        mask, causal = _biased(position_bias, mask, causal, query, key), False
    groups, shared = query.shape[1] // key.shape[1], False
    if groups > 1:  # the kernels read the shared heads where they are
        route = sdpa.explain(query, key, value, mask, dropout, causal, scaling, enable_gqa=True)
        shared = route.backend == "triton"
    if groups > 1 and not shared:  # copied, as "sdpa" does it: torch's fused ops do not all take fewer key heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = sdpa.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=shared
    )
    return out.transpose(1, 2).contiguous(), None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention_forward` with the behaviour of transformers' "eager": a mask says all, windows included."""
    del is_causal, sliding_window
    return attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal=False, **kwargs)


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What transformers' mask interface gives a model for "vitfast": the mask of "sdpa", or of "eager" where only
    that is known."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    file = type(kwargs.get("config")).__module__.replace(".configuration_", ".modeling_")
    return eager_mask(*args, **kwargs) if _only_eager(file) else sdpa_mask(*args, **kwargs)


@sdpa.constant_when_traced
@functools.cache
def _only_eager(file: str) -> bool:
    """Whether a file of transformers has models, and none of them supports "sdpa"."""
    kinds = [kind for kind in vars(sys.modules.get(file, sys)).values() if getattr(kind, "__module__", "") == file]
    models = [kind for kind in kinds if hasattr(kind, "_supports_sdpa")]
    return bool(models) and not any(kind._supports_sdpa for kind in models)


def _biased(bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """Position bias and mask as one additive mask; hidden positions get the dtype's smallest number, as in "sdpa"."""
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(key.dtype).min)
    return bias + mask


def flash_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind "vitfast_flash", on flash-attn's functions; fp32 is taken as it is.

    Args:
        module, query, key, value, is_causal: as in `attention_forward`; causal aligned at the bottom right.
        attention_mask: [B, tokens], True or 1 for a real token, or a mask in full as `attention_forward`
            takes it. If there is one, it says all, and cu_seq_lens are not looked at.
        sliding_window: a query sees keys that are less than this far away.
        softcap: scores become softcap * tanh(score / softcap).
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: all or none; sequences packed one after
            another along N, in all rows of the batch.

    Returns:
        [B, N, H, D], contiguous, and None. Queries that are padding give zeros if causal or windowed,
        else what a real query would get.

    Raises:
        ValueError: if an argument is given that would change the result and is not implemented.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        return attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal,
            sliding_window=sliding_window, softcap=softcap, **kwargs,
        )  # fmt: skip
    _refuse(module, FLASH_NAME, kwargs)
    window = -1 if sliding_window is None or key.shape[2] <= sliding_window else sliding_window - 1
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": _is_causal(module, is_causal),
        "window_size": (window, window),
        "softcap": softcap or 0.0,
    }
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    packed = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if attention_mask is not None:
        return _without_padding(q, k, v, attention_mask.bool(), options), None
    if all(part is None for part in packed):
        return flash_attn.flash_attn_func(q, k, v, **options), None
    if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        raise ValueError(
            f"cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k go together; None are "
            f"{', '.join(name for name, part in zip(_PACKED, packed, strict=True) if part is None)}"
        )
    lengths = (cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k))
    q_rows, k_rows, v_rows = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn.flash_attn_varlen_func(q_rows, k_rows, v_rows, *lengths, **options)
    return out.unflatten(0, q.shape[:2]), None


_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _without_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Attention among the real tokens; q, k, v [B, N, H, D], mask [B, tokens]."""
    tokens, windowed = mask.shape[1], options["window_size"] != (-1, -1)
    # Where order counts, queries are the last ones of the tokens. Else they may be others than the keys, as in
    # cross-attention, and the mask says nothing of them.
    ordered = options["causal"] or windowed
    if k.shape[1] < tokens or (ordered and tokens < q.shape[1]):
        raise ValueError(f"attention_mask {tuple(mask.shape)} does not fit {q.shape[1]} queries and {k.shape[1]} keys")
    if windowed and ((mask & ~F.pad(mask, (1, -1))).sum(1) > 1).any():
        raise ValueError("attention_mask has padding between real tokens, which would shift a sliding window")
    k, v = k[:, :tokens], v[:, :tokens]  # a static cache holds places beyond
    real = mask[:, -q.shape[1] :] if ordered else mask.new_ones(q.shape[:2])
    (rows_q, *lengths_q), (rows_k, *lengths_k) = _real_rows(real), _real_rows(mask)
    lengths: list[Any] = [part for pair in zip(lengths_q, lengths_k, strict=True) for part in pair]
    q_rows, k_rows, v_rows = (x.flatten(0, 1)[rows] for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
    out = flash_attn.flash_attn_varlen_func(q_rows, k_rows, v_rows, *lengths, **options)
    padded = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:])
    return padded.index_copy(0, rows_q, out).unflatten(0, q.shape[:2])


def _real_rows(real: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which rows of [B * N] are real tokens, cu_seqlens, and the longest length."""
    lengths = real.sum(1, dtype=torch.int32)
    return real.flatten().nonzero()[:, 0], F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), int(lengths.max())


def flash_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What transformers' mask interface gives a model: padding [B, tokens] or None, or else a mask in full.

    transformers' own for FlashAttention looks at padding only. Here the mask stays a mask if it says more
    than causal, padding and sliding window (packed sequences, image tokens that see each other, unused
    places in a cache), or if the model is not written for FlashAttention and may handle a mask of
    two axes as one of four.
    """
    from transformers.masking_utils import flash_attention_mask, sdpa_mask

    if _says_only_padding(kwargs) and _written_for_flash(kwargs.get("config")):
        return flash_attention_mask(*args, **kwargs)
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _says_only_padding(arguments: Mapping[str, Any]) -> bool:
    """Whether the mask that these arguments describe is plain causal, windowed or none, padding aside."""
    if arguments.get("attention_mask") is None:
        queries_end = arguments.get("q_offset", 0) + arguments["q_length"]
        if queries_end != arguments.get("kv_offset", 0) + arguments["kv_length"]:
            return False  # of keys without a place among the queries, only a mask can tell whether they are real
    # transformers forbids to skip a mask to which something has been added.
    return bool(arguments.get("allow_is_causal_skip") or arguments.get("allow_is_bidirectional_skip"))


def _written_for_flash(config: Any) -> bool:
    from transformers import MODEL_MAPPING

    kinds = MODEL_MAPPING.get(type(config), ())
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return bool(kinds) and all(getattr(kind, "_supports_flash_attn", False) for kind in kinds)


def load_flash(theirs: Callable[..., Any], implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """In place of transformers' loader of flash-attn functions (`theirs`): vitfast's for "vitfast_flash"."""
    if implementation != FLASH_NAME:
        return theirs(implementation, *args, **kwargs)
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    no_paged_cache = None
    functions = (flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func)
    return (*functions, no_paged_cache, _pad_input, _unpad_input)


def weights_collected() -> bool:
    """Whether a hook of transformers waits for attention weights; not all layers are told of output_attentions."""
    try:
        from transformers.utils import output_capturing
    except ImportError:  # a version without these hooks
        return False
    collector = output_capturing._active_collector  # of which torch.compile can trace this half only
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return any("attentions" in name for name in collected or ())


def _refuse(module: nn.Module, name: str, arguments: Mapping[str, Any]) -> None:
    """Raise for an argument that is neither harmless nor off."""
    if weights_collected():
        arguments = {"output_attentions": True, **arguments}
    for argument, value in arguments.items():
        if argument not in _HARMLESS and value is not None and value is not False:
            shown = value if isinstance(value, bool | int | float | str) else type(value).__name__
            raise ValueError(
                f"{type(module).__name__}: attn_implementation={name!r} does not implement {argument}={shown}; "
                'use "eager" or "sdpa" for this call'
            )


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """A layer that does not say is causal, as transformers has it."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
