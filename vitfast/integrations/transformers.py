"""transformers: `attn_implementation="vitfast"` or `"vitfast_flash"`, and the switch of a live model.

A model is built with a name after `register()`, or switched to "vitfast" by `replace(model)`. The
functions behind the names, and the masks that belong to them, stand in `transformers_attention`;
registering a function alone would lose the masks without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from vitfast.integrations import torch_sdpa, transformers_meaning, transformers_modules, transformers_rope
from vitfast.integrations.recognise import attends, source
from vitfast.integrations.swap import Match, Swap, swap_forwards
from vitfast.integrations.transformers_attention import (
    EAGER_NAME,
    FLASH_NAME,
    NAME,
    attention_forward,
    eager_attention_forward,
    flash_attention_forward,
    flash_mask,
    load_flash,
    mask,
)

_NAMES = (NAME, EAGER_NAME, FLASH_NAME)
_BUILT_IN = "computes its scores itself, off transformers' attention interface"


def register() -> None:
    """Make "vitfast", "vitfast_eager" and "vitfast_flash" known to transformers; may be called again.

    "vitfast" means what "sdpa" means there, "vitfast_eager" what "eager" does (see `transformers_attention`).
    transformers takes a name with "flash" in it for FlashAttention: vision towers that pack images of
    different sizes (Qwen-VL and its like) then hand over cu_seqlens in one call, where they loop over
    the images otherwise, and padding comes as one bool per token.

    Raises:
        ImportError: if transformers, or a version of it with both interfaces, is not installed.
    """
    from transformers import AttentionInterface, modeling_flash_attention_utils
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask)
    AttentionInterface.register(EAGER_NAME, eager_attention_forward)
    AttentionMaskInterface.register(EAGER_NAME, eager_mask)
    AttentionInterface.register(FLASH_NAME, flash_attention_forward)
    AttentionMaskInterface.register(FLASH_NAME, flash_mask)
    # For a name with "flash" transformers loads the functions when a model is built, from packages it knows;
    # there is no registry for others.
    loader = getattr(modeling_flash_attention_utils, "_lazy_imports", None)
    if loader is not None and getattr(loader, "func", None) is not load_flash:
        modeling_flash_attention_utils._lazy_imports = functools.partial(load_flash, loader)


def replace(model: nn.Module) -> Swap:
    """Set "vitfast" on every transformers model in `model` that follows the attention interface.

    Or "vitfast_eager", where the model runs "eager" now: its meaning is kept. Layers whose attention means
    something else than ours, or takes what ours does not have, stay, with all that share their config. The
    setting lives in the models' configs: another model that shares a config object is switched with it.
    `restore` puts back what each config and sub-config had. Modules off the interface get another forward
    if they are known (`transformers_modules`: Swinv2, Hiera, ImageGPT, BLIP, ...) or call torch's attention
    (SAM's image encoder, Data2Vec); else they are named in `.left`.
    """
    swap = Swap(model)
    switch(model, swap)
    swap_forwards(model, (find,), swap)
    return swap


def switch(model: nn.Module, swap: Swap) -> None:
    """Set the attention of the transformers models in `model`, and name in `swap.left` the layers that stay.

    `find` then tells what came of the others.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for top in _models(model):
        layers = [m for m in top.modules() if _on_interface(m) and hasattr(m, "config")]
        if all(_setting(module) in _NAMES for module in layers):
            continue
        configs = list(_configs(top))
        if any(config.output_attentions for config in configs if hasattr(config, "output_attentions")):
            continue  # find says why
        reasons = {id(layer): transformers_meaning.why_not(layer, _setting(layer)) for layer in layers}
        kept = {id(layer.config): layer for layer in reversed(layers) if reasons[id(layer)]}
        for layer in layers:
            first = kept.get(id(layer.config))
            if reasons[id(layer)] or first is not None:
                other = f"it shares its config with {names[id(first)]}, which cannot be switched" if first else ""
                swap.left[names[id(layer)]] = reasons[id(layer)] or other
        register()
        before = [config._attn_implementation_internal for config in configs]
        top.set_attn_implementation(NAME)
        for config, old in zip(configs, before, strict=True):
            if config._attn_implementation_internal == NAME and transformers_meaning.runs_eager(old):
                config._attn_implementation_internal = EAGER_NAME
            if id(config) in kept:
                config._attn_implementation_internal = old
        after = [config._attn_implementation_internal for config in configs]
        swap.on_restore(functools.partial(_put_back, configs, before, after))


def find(module: nn.Module, parent: nn.Module | None) -> Match:
    """Finder for transformers' attention layers; True, or a forward, for those that `switch` has switched."""
    del parent
    if not _on_interface(module):
        theirs = type(module).__module__.startswith("transformers.") and not _is_model(module)
        if (matched := transformers_modules.find(module)) is not None or not theirs:
            return matched
        matched = torch_sdpa.find(module)
        return f"{type(module).__name__} {_BUILT_IN}" if matched is None and attends(module) else matched
    setting = _setting(module)
    if setting in _NAMES:
        return transformers_rope.find(module)
    if getattr(getattr(module, "config", None), "output_attentions", False):
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


def _setting(layer: nn.Module) -> str | None:
    """The attention implementation that a layer on the interface asks for."""
    return getattr(getattr(layer, "config", None), "_attn_implementation", None)


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
