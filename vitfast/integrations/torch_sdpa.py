"""Redirect calls of torch's scaled_dot_product_attention: every one for a while, or those of one module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitfast.attention import sdpa
from vitfast.integrations.recognise import source
from vitfast.integrations.swap import Match, original

UNFUSED = "fused_attn is off, so it spells attention out"


class _Redirect(TorchFunctionMode):
    """Sees each torch function called from Python; passes all on unchanged but one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        # The mode is off in here: vitfast's own calls of torch are not redirected again.
        target = _attend if func is F.scaled_dot_product_attention else func
        return target(*args, **(kwargs or {}))


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The call on vitfast, whose kernels take four axes: [B, H, windows, N, D] goes in as [B * windows, H, N, D]."""
    batch = query.shape[:-2]
    alike = batch == key.shape[:-2] == value.shape[:-2]
    if query.ndim != 5 or not alike or args or set(kwargs) - {"dropout_p", "scale"}:
        return sdpa.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = sdpa.scaled_dot_product_attention(q, k, v, **kwargs)
    return out.unflatten(0, (batch[0], batch[2])).transpose(1, 2)


@contextmanager
def use() -> Iterator[None]:
    """Within this context, in this thread, F.scaled_dot_product_attention is vitfast's.

    It reaches code that no module swap knows, at the price of a look at every torch call (a few
    microseconds each): prefer `vitfast.replace_attention` where it does. It does not reach native code
    that never calls the function, such as nn.MultiheadAttention's kernel in eval mode, nor models that
    spell attention out.
    """
    with _Redirect():
        yield


def redirected(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, in which torch's attention is vitfast's."""
    with _Redirect():
        return original(module).forward(module, *args, **kwargs)


def find(module: Any, parent: nn.Module | None = None) -> Match:
    """Finder for modules, of any library, whose forward calls torch's attention: it is kept and its calls redirected.

    Every argument of a call is handed on, so nothing can get lost. A forward that also has a softmax of
    its own may not come to its call of torch; only timm's flag `fused_attn` is known to decide that.
    """
    del parent
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if type(module).__module__.partition(".")[0] == "torch" or "scaled_dot_product_attention" not in _names(code):
        return None
    text = source(type(module).forward)
    if "softmax" not in text.lower():
        return redirected
    if "if self.fused_attn:" not in text:
        return None
    return redirected if module.fused_attn else UNFUSED


def _names(code: CodeType | None) -> set[str]:
    """The names that code refers to, functions defined in it included; what a comment says does not count."""
    if code is None:
        return set()
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
