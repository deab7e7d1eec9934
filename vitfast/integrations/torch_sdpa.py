"""Redirect every call of torch's scaled_dot_product_attention, in whatever model, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitfast import attention


class _Redirect(TorchFunctionMode):
    """Sees each torch function called from Python; passes all on unchanged but one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        # The mode is off in here: vitfast's own calls of torch are not redirected again.
        target = attention.scaled_dot_product_attention if func is F.scaled_dot_product_attention else func
        return target(*args, **(kwargs or {}))


@contextmanager
def use() -> Iterator[None]:
    """Within this context, in this thread, F.scaled_dot_product_attention is vitfast's.

    It reaches code that no module swap knows, at the price of a look at every torch call (about a
    microsecond each): prefer `vitfast.replace_attention` where it does. It does not reach native code
    that never calls the function, such as nn.MultiheadAttention's kernel in eval mode, nor models that
    spell attention out.
    """
    with _Redirect():
        yield
