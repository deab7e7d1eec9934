"""The arguments of the attention launchers, as the three kernels want them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from vitfast.kernels._parts.launch import check_device, check_last_contiguous

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on: not on the batch, so that an image's bits do not either.

    `kind`: as in `AttentionConfig`. `given`: what the call asks beyond softmax(q kᵀ * scale) v.
    """

    head_dim: int
    queries: int
    keys: int
    dtype: torch.dtype
    capability: tuple[int, int]
    kind: str = "half"
    given: tuple[str, ...] = ()
    in_8_bits: bool = False
    scale: float = 1.0

    @property
    def key(self) -> str:
        """The name in a tuning table."""
        asked = (*self.given, *(["in 8 bits"] if self.in_8_bits else []))
        return " ".join([str(self.head_dim), f"{self.queries}x{self.keys}", str(self.dtype), *asked])


def head_chunks(head_dim: int) -> tuple[int, int]:
    """Cut D into a power of two and a smaller one (0 for none): 64 -> 64, 0; 72 -> 64, 16; 112 -> 128, 0.

    Products need a chunk of at least 16.
    """
    main = max(16, 1 << head_dim.bit_length() - 1)
    if head_dim <= main:
        return main, 0
    rest = max(16, triton.next_power_of_2(head_dim - main))
    return (main, rest) if rest < main else (2 * main, 0)


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, 0 where an axis has one entry: its stride can be any number, but is never used."""
    return tuple(stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def vector(head_dim: int, *tensors: torch.Tensor) -> int:
    """Elements (a power of two, at most 16 bytes) that divide D and every address and stride."""
    size = tensors[0].element_size()
    steps = [stride for tensor in tensors for stride in strides(tensor)[:-1]]
    return math.gcd(16 // size, head_dim, *steps, *(tensor.data_ptr() // size for tensor in tensors))


def kernel_arguments(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    left: int | None = None,
    right: int | None = None,
    offset: int = 0,
    scale: float | None = None,
    cu_queries: torch.Tensor | None = None,
    cu_keys: torch.Tensor | None = None,
    **_: Any,
) -> dict[str, Any]:
    """What all three kernels take, by name, of a call that `vitfast.ops` has checked; see `attention`.

    Raises:
        ValueError: if a stride or device does not fit.
    """
    check_last_contiguous(op, q=q, k=k, v=v, slopes=slopes, cu_queries=cu_queries, cu_keys=cu_keys)
    check_device(op, q=q, k=k, v=v, bias=bias, mask=mask, slopes=slopes, cu_queries=cu_queries, cu_keys=cu_keys)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    shape = (batch, heads, queries, keys)
    if cu_queries is not None:
        batch = len(cu_queries) - 1
    main, rest = head_chunks(head_dim)
    farthest = queries + keys + abs(offset)  # no key is farther from a query's position
    return {
        "q_strides": strides(q)[:3],
        "k_strides": strides(k)[:3],
        "v_strides": strides(v)[:3],
        "bias_strides": _score_strides(bias, shape),
        "mask_strides": _score_strides(mask, shape),
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "mask": mask,
        "slopes": slopes,
        "cu_queries": cu_queries,
        "cu_keys": cu_keys,
        "slopes_stride_b": 0 if slopes is None else strides(slopes.expand(batch, heads))[0],
        "query_rows": queries,
        "key_rows": keys,
        "offset": offset,
        "left": None if left is None or left >= farthest else max(left, -farthest),
        "right": None if right is None or right >= farthest else max(right, -farthest),
        "softcap": float(softcap) or None,
        "scale": float(head_dim**-0.5 if scale is None else scale),
        "GROUP": heads // max(k.shape[2], 1),
        "HEAD_DIM": head_dim,
        "D_MAIN": main,
        "D_REST": rest,
    }


HEAD_OPTIONS = ("cos", "sin", "interleaved", "q_weight", "k_weight", "q_bias", "k_bias", "norm_eps", "rms")
"""The options of `head_arguments`; the other kernels' options are those of `kernel_arguments`."""


def head_arguments(
    op: str,
    q: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    rms: bool = False,
) -> dict[str, Any]:
    """What the forward does to the heads of q and k, by name, of a call that `vitfast.ops` has checked.

    Raises:
        ValueError: if a stride or device does not fit.
    """
    norms = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    check_last_contiguous(op, cos=cos, sin=sin, **norms)
    check_device(op, q=q, cos=cos, sin=sin, **norms)
    arguments: dict[str, Any] = {
        **norms,
        "cos": cos,
        "sin": sin,
        "table_strides": None,
        "prefix": None,
        "norm_eps": None if q_weight is None else float(norm_eps),
        "RMS": rms,
        "INTERLEAVED": interleaved,
    }
    if cos is None or sin is None:
        return arguments
    if strides(sin) != strides(cos):
        raise ValueError(f"{op}: cos and sin must be laid out alike, got strides {cos.stride()} and {sin.stride()}")
    batch, tokens, heads, head_dim = q.shape
    rows = cos.shape[-2]
    table_strides = strides(cos.expand(batch, heads, rows, head_dim))[:3]
    return arguments | {"table_strides": table_strides, "prefix": tokens - rows}


def last_block(block: int, count: int, arguments: dict[str, Any]) -> int:
    """Width of the last tile out of `count`: as narrow as what is left, where every row of a call has the same left."""
    if any(arguments[name] is not None for name in ("left", "right", "cu_keys")):
        return block
    return min(block, max(16, triton.next_power_of_2(count % block)))


def _score_strides(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a bias or mask as seen with [B, H, Nq, Nk], 0 for the axes it is broadcast along."""
    return (0,) * len(shape) if tensor is None else strides(tensor.expand(shape))
