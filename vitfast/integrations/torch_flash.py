"""vitfast among torch's own flash attention implementations, on CUDA (torch 2.13 and later).

Under `use`, or after `register` and `torch.nn.attention.activate_flash_attention_impl("vitfast")`, torch's
dispatcher runs vitfast's kernel where it would run FlashAttention 2: in any model, compiled or not, native
code included, with no look at each torch call. It concerns only the calls for which torch chooses flash:
fp16 and bf16, without a mask. `torch_sdpa.use` and `vitfast.replace_attention` reach masked calls too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from vitfast import ops

NAME = "vitfast"


class _Handle:
    """What is put into the dispatcher, until `remove`."""

    def __init__(self, key: str = "CUDA") -> None:
        self._library: Any = torch.library.Library("aten", "IMPL")
        self._library.impl("_scaled_dot_product_flash_attention", _flash_attention, key)

    def remove(self) -> None:
        self._library = None  # with the last reference go its implementations


def register() -> None:
    """Make the name "vitfast" known to torch.nn.attention.activate_flash_attention_impl; may be called again.

    Raises:
        RuntimeError: if this torch has no registry of flash attention implementations.
    """
    _registry().register_flash_attention_impl(NAME, register_fn=_Handle)


@contextmanager
def use() -> Iterator[None]:
    """Within this context, in the whole process, torch's flash attention on CUDA is vitfast's, and comes first.

    On recent GPUs torch asks cuDNN before flash, so the order is set too. What was active before comes back at
    the end.

    Raises:
        RuntimeError: if this torch has no registry of flash attention implementations.
    """
    registry = _registry()
    register()
    backends = registry.SDPBackend
    order = [backends.FLASH_ATTENTION, backends.CUDNN_ATTENTION, backends.EFFICIENT_ATTENTION, backends.MATH]
    before = registry.current_flash_attention_impl()
    registry.activate_flash_attention_impl(NAME)
    try:
        with registry.sdpa_kernel(order, set_priority=True):
            yield
    finally:
        registry.restore_flash_attention_impl()
        if before is not None:
            registry.activate_flash_attention_impl(before)


def _registry() -> Any:
    """torch.nn.attention, if it has what is needed."""
    registry = torch.nn.attention
    needed = ("register", "activate", "current", "restore")
    if missing := [name for name in needed if not hasattr(registry, f"{name}_flash_attention_impl")]:
        raise RuntimeError(
            f"torch {torch.__version__} cannot {', '.join(missing)} flash attention implementations (2.13 can); "
            "use vitfast.replace_attention or vitfast.integrations.torch_sdpa.use"
        )
    return registry


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention, [B, H, N, D]; its gradient stays torch's, from out and log-sum-exp."""
    if dropout_p or return_debug_mask:
        given = f"dropout_p={dropout_p}, return_debug_mask={return_debug_mask}"
        raise RuntimeError(f"vitfast's flash attention has no dropout and no debug mask, got {given}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, log_sum_exp = ops.attention(q, k, v, causal=is_causal, scale=scale, return_lse=True, backend="triton")
    out = out.transpose(1, 2)
    if out.stride() != torch.empty_like(query, device="meta").stride():  # which torch.compile counts on
        out = torch.empty_like(query).copy_(out)
    nothing = query.new_empty(0)
    random_state, offset = (torch.zeros(size, dtype=torch.uint64, device=query.device) for size in ((2,), ()))
    lengths = (query.shape[2], key.shape[2])
    return out, log_sum_exp, None, None, *lengths, random_state, offset, nothing
