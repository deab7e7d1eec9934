"""Put vitfast's attention under models of other libraries, and take it away again.

`replace_attention` picks what fits: transformers' attention interface and the classes off it
(`integrations.transformers`), timm's attention classes (`integrations.timm`), torch's
nn.MultiheadAttention (`integrations.modules`), each usable alone, those of the dinov2 and dinov3
repositories, and any other module that calls torch's scaled_dot_product_attention;
`integrations.torch_sdpa.use()` redirects every such call for a while. What cannot be replaced exactly
is left and named.
"""

from __future__ import annotations

from torch import nn

from vitfast.integrations import dino, modules, timm, torch_sdpa, transformers
from vitfast.integrations.swap import Swap, swap_forwards, unknown_attention

__all__ = ["Swap", "replace_attention"]


def replace_attention(model: nn.Module, *, strict: bool = False) -> Swap:
    """Route a model's attention through `vitfast.attention.sdpa.scaled_dot_product_attention`, in place.

    Args:
        model: any torch module; those of transformers, timm, torchvision, open_clip, dinov2 and dinov3 are recognised.
        strict: raise if any attention in the model is left; the model is then unchanged.

    Returns:
        The handle: `.replaced`, `.left` (name -> why) and `.restore()`; also a context manager.

    Raises:
        ValueError: if `model` is not a module; or, if strict, with every module left and why.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    swap = Swap(model)
    finders = (transformers.find, timm.find, dino.find, modules.find, torch_sdpa.find, unknown_attention)
    try:
        transformers.switch(model, swap)
        swap_forwards(model, finders, swap)
        if strict and swap.left:
            listed = "\n  ".join(f"{name or 'the model'}: {why}" for name, why in swap.left.items())
            raise ValueError(f"{len(swap.left)} attention module(s) cannot be replaced:\n  {listed}")
    except BaseException:
        swap.restore()
        raise
    return swap
