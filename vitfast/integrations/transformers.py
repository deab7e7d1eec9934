"""transformers: `attn_implementation="vitfast"`, and the switch of a live model.

A model is built with it after `register()`, or switched by `replace(model)`. Masks come from
transformers' own mask interface in the form that SDPA takes; registering the function alone would
lose them without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitfast import attention
from vitfast.integrations.swap import Found, Swap, attends, source, swap_forwards

NAME = "vitfast"

_HARMLESS = frozenset(
    ("output_hidden_states", "return_dict", "use_cache", "position_ids", "cache_position", "num_items_in_batch")
)
"""Keyword arguments that a model may hand through to its attention function and that do not concern it."""

_BUILT_IN = "computes its scores itself, off transformers' attention interface"


def register() -> None:
    """Make `attn_implementation="vitfast"` known to transformers; may be called again.

    Raises:
        ImportError: if transformers, or a version of it with both interfaces, is not installed.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def replace(model: nn.Module) -> Swap:
    """Set "vitfast" on every transformers model in `model` that follows the attention interface.

    The setting lives in the models' configs: another model that shares a config object is switched
    with it. `restore` puts back what each config and sub-config had. Modules off the interface
    (Swinv2, Hiera, ImageGPT, BLIP, SAM's image encoder, ...) are named in `.left`.
    """
    swap = Swap()
    switch(model, swap)
    swap_forwards(model, (find,), swap)
    return swap


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
    for name, argument in kwargs.items():
        if name not in _HARMLESS and argument is not None and argument is not False:
            shown = argument if isinstance(argument, bool | int | float | str) else type(argument).__name__
            raise ValueError(
                f"{type(module).__name__}: attn_implementation={NAME!r} does not implement {name}={shown}; "
                'use "eager" or "sdpa" for this call'
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    mask = attention_mask
    if position_bias is not None:
        mask, causal = _biased(position_bias, mask, causal, query, key), False
    if (groups := query.shape[1] // key.shape[1]) > 1:  # copied: the kernels take one key head per query head
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = attention.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def _biased(bias: Tensor, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """Position bias and mask as one additive mask; hidden positions get the dtype's smallest number, as in "sdpa"."""
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(key.dtype).min)
    return bias + mask


def switch(model: nn.Module, swap: Swap) -> None:
    """Set the attention of the transformers models in `model`; `find` then tells what came of it."""
    for top in _models(model):
        if not any(_on_interface(module) for module in top.modules()):
            continue
        configs = list(_configs(top))
        if any(config.output_attentions for config in configs if hasattr(config, "output_attentions")):
            continue  # find says why
        register()
        before = [config._attn_implementation_internal for config in configs]
        top.set_attn_implementation(NAME)
        after = [config._attn_implementation_internal for config in configs]
        swap.on_restore(functools.partial(_put_back, configs, before, after))


def find(module: nn.Module, parent: nn.Module | None) -> Found:
    """Finder for transformers' attention layers; True for those that `switch` has switched."""
    del parent
    if not _on_interface(module):
        theirs = type(module).__module__.startswith("transformers.") and not _is_model(module)
        return f"{type(module).__name__} {_BUILT_IN}" if theirs and attends(type(module)) else None
    config = getattr(module, "config", None)
    setting = getattr(config, "_attn_implementation", None)
    if setting == NAME:
        return True
    if getattr(config, "output_attentions", False):
        return f"its config asks for attention weights (output_attentions=True), which {NAME!r} does not return"
    return f"transformers keeps it at attn_implementation={setting!r}"


def _put_back(configs: list[Any], before: list[str | None], after: list[str | None]) -> str:
    """Restore the settings; says which ones are not what `switch` had left."""
    problems = []
    for config, old, new in zip(configs, before, after, strict=True):
        if (now := config._attn_implementation_internal) == new:
            config._attn_implementation_internal = old
        else:
            problems.append(f"{type(config).__name__} has attn_implementation={now!r} by now")
    return "; ".join(problems)


def _is_model(module: nn.Module) -> bool:
    """Whether this is a PreTrainedModel, told without importing transformers."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__ == "transformers.modeling_utils"
        for kind in type(module).__mro__
    )


def _models(module: nn.Module) -> Iterator[Any]:
    """The outermost transformers models in a module."""
    if _is_model(module):
        yield module
    else:
        for child in module.children():
            yield from _models(child)


def _on_interface(module: nn.Module) -> bool:
    """Whether this layer asks the attention interface for its function at every call."""
    return not _is_model(module) and "ALL_ATTENTION_FUNCTIONS" in source(type(module).forward)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every config in a model, sub-configs included, once each."""
    seen: set[int] = set()
    pending = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    while pending:
        config = pending.pop()
        if id(config) not in seen and hasattr(config, "_attn_implementation_internal"):
            seen.add(id(config))
            yield config
            pending += [sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None]
