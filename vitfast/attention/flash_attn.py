"""The flash-attn functions, by their names, signatures and conventions, on vitfast's attention.

Layout (B, N, H, D), or (tokens, H, D) for sequences of different lengths packed one after another.
With n queries and m keys, query i stands at key i + m - n (aligned at the bottom right); `causal`
lets it see the keys up to there, `window_size` = (left, right) those from `left` before to `right`
after, -1 being no limit. Scores are

    softcap * tanh(q kᵀ * scale / softcap)    with softcap > 0, else q kᵀ * scale
    - alibi_slope * |key - position of the query|

A query that may see no key gives zeros and a log-sum-exp of +inf. Keys and values may have fewer
heads, each serving a run of query heads.

Conventions: github.com/Dao-AILab/flash-attention, flash_attn_interface.py (version 2).

Where `vitfast.explain` has a call on the Triton kernels, they do all of this but dropout, without masks, biases
or padding in memory. On torch's route, windows and slopes become masks and biases for
`scaled_dot_product_attention`, sequences of different lengths are padded, and softcap, the log-sum-exp and a
deterministic gradient are computed in plain torch, which holds all scores in memory in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import ops
from vitfast.attention.sdpa import explain, scaled_dot_product_attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Options:
    """The arguments all functions share, checked."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool

    def __post_init__(self) -> None:
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}")
        if self.dropout_p and self.return_attn_probs:
            raise ValueError(
                f"return_attn_probs needs dropout_p = 0, got {self.dropout_p}: no dropout mask is returned"
            )
        if not self.softcap >= 0:
            raise ValueError(f"softcap must be 0 (off) or positive, got {self.softcap}")
        if len(self.window_size) != 2 or any(side < -1 for side in self.window_size):
            raise ValueError(f"window_size must be two numbers of keys, -1 for no limit, got {self.window_size}")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention with flash-attn's conventions (see the top of this file).

    Args:
        q: [B, Nq, H, D]. k, v: [B, Nk, Hk, D] with Hk a divisor of H; fp16, bf16 or fp32.
        dropout_p: probability of a weight being dropped, in [0, 1); pass 0 in evaluation.
        softmax_scale: 1 / sqrt(D) by default.
        causal, window_size: which keys a query sees, aligned at the bottom right.
        softcap: 0 is off.
        alibi_slopes: fp32, [H] or [B, H].
        deterministic: whether a backward must give the same bits every time.
        return_attn_probs: also return the log-sum-exp of the scores.

    Returns:
        [B, Nq, H, D]; with return_attn_probs the tuple (out, lse [B, H, Nq] fp32, None).

    Raises:
        ValueError: if a shape, dtype or option does not fit.
        BackendError: as `scaled_dot_product_attention` does.
    """
    options = _Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    _check(q, k, v, 4, "[B, N, H, D]")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]}, k and v {k.shape[0]}; they must be equal")
    out, lse = _attend(q, k, v, options, k.shape[1] - q.shape[1], None)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` on qkv [B, N, 3, H, D]; nothing is copied. Raises and returns as it does."""
    q, k, v = _unpack("qkv", qkv, 5, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` on q [B, Nq, H, D] and kv [B, Nk, 2, Hk, D]. Raises and returns as it does."""
    k, v = _unpack("kv", kv, 5, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention within each of B sequences that lie packed one after another.

    Without host synchronisation. On torch's route the sequences are padded to the longest, attended under a
    mask and packed again: exact, at the cost of a padded copy of q, k, v and out, of a bool mask
    [B, 1, max_seqlen_q, max_seqlen_k], and of the products of the padding.

    Args:
        q: [tokens of all queries, H, D]. k, v: [tokens of all keys, Hk, D].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1]; sequence i is rows cu[i] to cu[i + 1] - 1.
            The first entry must be 0, the last the number of tokens. Checked where they are on the
            CPU; on a GPU reading them would be a synchronisation.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; checked likewise.
        block_table: a paged key cache; only None is taken.

    The other arguments are those of `flash_attn_func`.

    Returns:
        [tokens, H, D]; with return_attn_probs the tuple (out, lse [H, tokens] fp32, None).

    Raises:
        ValueError: if a shape, dtype or option does not fit.
        BackendError: as `scaled_dot_product_attention` does.
    """
    options = _Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    if block_table is not None:
        raise ValueError(f"block_table (a paged key cache) must be None, got shape {tuple(block_table.shape)}")
    _check(q, k, v, 3, "[tokens, H, D]")
    _check_lengths("q", cu_seqlens_q, max_seqlen_q, q)
    _check_lengths("k", cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens_q has {len(cu_seqlens_q)} entries, cu_seqlens_k {len(cu_seqlens_k)}")

    packed = (q[None], k[None], v[None])
    if _on_kernels(*packed, options):
        out, lse = _with_kernels(
            *packed,
            options,
            cu_queries=cu_seqlens_q,
            cu_keys=cu_seqlens_k,
            max_queries=max_seqlen_q,
            max_keys=max_seqlen_k,
        )
        return (out[0], _wanted(lse)[0], None) if return_attn_probs else out[0]
    rows_q, real_q = _padded_rows(cu_seqlens_q, max_seqlen_q, q)
    rows_k, real_k = _padded_rows(cu_seqlens_k, max_seqlen_k, k)
    lengths_q, lengths_k = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    padded = (_gather(q, rows_q, real_q), _gather(k, rows_k, real_k), _gather(v, rows_k, real_k))
    out, lse = _attend(*padded, options, (lengths_k - lengths_q)[:, None, None, None], real_k[:, None, None, :])

    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous().long(), token, right=True)
    place = token - cu_seqlens_q[:-1].long()[sequence]
    out = out[sequence, place]
    return (out, _wanted(lse)[sequence, :, place].transpose(0, 1), None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` on qkv [tokens, 3, H, D]. Raises and returns as it does."""
    q, k, v = _unpack("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _unpack(name: str, packed: Tensor, axes: int, count: int) -> tuple[Tensor, ...]:
    if packed.ndim != axes or packed.shape[-3] != count:
        layout = f"[B, N, {count}, H, D]" if axes == 5 else f"[tokens, {count}, H, D]"
        raise ValueError(f"{name} must be {layout}, got shape {tuple(packed.shape)}")
    return packed.unbind(-3)


def _check(q: Tensor, k: Tensor, v: Tensor, axes: int, layout: str) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != axes:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS or tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; q, k and v must share one of {FLOATS}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}; they must be on one device")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; they must be equal")
    if k.shape[-1] != q.shape[-1] or not q.shape[-1]:
        raise ValueError(f"q has head dim {q.shape[-1]}, k and v {k.shape[-1]}; they must be equal and positive")
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the heads of k and v must divide q's, got {k.shape[-2]} and {q.shape[-2]}")


def _check_lengths(name: str, cu_seqlens: Tensor, max_seqlen: int, tokens: Tensor) -> None:
    whole = cu_seqlens.dtype in (torch.int32, torch.int64)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or not whole or cu_seqlens.device != tokens.device:
        shape, kind = tuple(cu_seqlens.shape), f"{cu_seqlens.dtype} on {cu_seqlens.device}"
        raise ValueError(
            f"cu_seqlens_{name} must be int32 or int64 [B + 1] on {tokens.device}, got {kind}, shape {shape}"
        )
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen_{name} must not be negative, got {max_seqlen}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(tokens) or lengths.min() < 0 or lengths.max() > max_seqlen:
        raise ValueError(
            f"cu_seqlens_{name} must rise from 0 to the {len(tokens)} tokens in steps of at most "
            f"max_seqlen_{name} = {max_seqlen}, got {cu_seqlens.tolist()}"
        )


def _padded_rows(cu_seqlens: Tensor, max_seqlen: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For the padded batch: the row that each place takes, and whether the place is real; [B, max_seqlen]."""
    place = torch.arange(max_seqlen, device=tokens.device)
    rows = cu_seqlens[:-1, None].long() + place
    return rows.clamp(max=max(tokens.shape[0] - 1, 0)), place < cu_seqlens.diff()[:, None]


def _gather(tokens: Tensor, rows: Tensor, real: Tensor) -> Tensor:
    """Padded [B, max_seqlen, H, D]. Padding is zero: a weight of 0 would not silence another sequence's NaN."""
    if not tokens.shape[0]:
        return tokens.new_zeros(*rows.shape, *tokens.shape[1:])
    return tokens[rows].masked_fill(~real[..., None, None], 0.0)


def _on_kernels(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> bool:
    """Whether the Triton kernels take a call on [B, N, H, D]; they have all options but dropout.

    Raises:
        BackendError: where they are forced and cannot.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        route = explain(q, k, v, None, options.dropout_p, False, options.softmax_scale, k.shape[1] != q.shape[1])
    return route.backend == "triton"


def _with_kernels(q: Tensor, k: Tensor, v: Tensor, options: _Options, **lengths: Any) -> tuple[Tensor, Tensor | None]:
    """Attention on [B, N, H, D] and, where asked for, the log-sum-exp [B, H, Nq], on the Triton kernels."""
    left, right = options.window_size
    slopes = options.alibi_slopes
    with torch.autocast(q.device.type, enabled=False):  # flash-attn computes in the dtype it is given
        result = ops.attention(
            q,
            k,
            v,
            left=None if left < 0 else left,
            right=0 if options.causal else None if right < 0 else right,
            offset=0 if lengths else k.shape[1] - q.shape[1],
            softcap=options.softcap,
            slopes=None if slopes is None else slopes.float(),
            scale=options.softmax_scale,
            return_lse=options.return_attn_probs,
            backend="triton",
            **lengths,
        )
    if not options.return_attn_probs:
        return result, None
    out, lse = result
    return out, lse.masked_fill(lse == float("-inf"), float("inf"))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, options: _Options, offset: int | Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention on [B, N, H, D]: the output and, where asked for, the log-sum-exp [B, H, Nq].

    offset: keys less queries, an int or [B, 1, 1, 1]. real: which keys are no padding, [B, 1, 1, Nk].
    """
    if real is None and _on_kernels(q, k, v, options):
        return _with_kernels(q, k, v, options)
    with torch.autocast(q.device.type, enabled=False):  # flash-attn computes in the dtype it is given
        return _in_given_dtype(q, k, v, options, offset, real)


def _in_given_dtype(q, k, v, options: _Options, offset, real) -> tuple[Tensor, Tensor | None]:
    queries, keys = q.shape[1], k.shape[1]
    left, right = options.window_size
    if options.causal:
        right = 0
    slopes = options.alibi_slopes
    if slopes is not None and tuple(slopes.shape) not in ((q.shape[2],), (q.shape[0], q.shape[2])):
        raise ValueError(f"alibi_slopes must be [H] or [B, H] = {(q.shape[0], q.shape[2])}, got {tuple(slopes.shape)}")
    top_left = left < 0 and right == 0 and isinstance(offset, int) and offset == 0 and slopes is None
    # torch's CPU kernel hides keys before it scales, and -inf times such a scale is no -inf: then a mask hides them.
    top_left &= options.softmax_scale is None or options.softmax_scale > 0

    mask = real
    distance = None  # key's position less the query's, [.., Nq, Nk]
    if slopes is not None or ((left >= 0 or right >= 0) and not top_left):
        key, query = torch.arange(keys, device=q.device), torch.arange(queries, device=q.device)
        distance = key - (query[:, None] + offset)
        if left >= 0:
            mask = _both(mask, distance >= -left)
        if right >= 0:
            mask = _both(mask, distance <= right)

    bias = None
    if slopes is not None:
        assert distance is not None
        bias = -slopes.float()[..., None, None] * distance.abs()  # [H, Nq, Nk] or [B, H, Nq, Nk]
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    plain = options.softcap > 0 or options.return_attn_probs or (options.deterministic and gradient)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if not plain:
        added = mask if bias is None else _masked(bias, mask)
        call = (q, k, v, added, options.dropout_p, top_left, options.softmax_scale, k.shape[1] != q.shape[1])
        # torch's op rounds the bias to a half-precision q's dtype, ruinous for |i - j|, or refuses it, by device.
        if bias is None or q.dtype == torch.float32:
            return scaled_dot_product_attention(*call).transpose(1, 2).contiguous(), None
    if top_left:
        mask = _both(mask, torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril())
    return _plain(q, k, v, bias, mask, options)


def _wanted(lse: Tensor | None) -> Tensor:
    """The log-sum-exp, which every route gives where it is asked for."""
    assert lse is not None
    return lse


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _plain(q, k, v, bias, mask, options: _Options) -> tuple[Tensor, Tensor]:
    """The formula itself, in fp32, on [B, H, N, D]; gives [B, N, H, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (tensor.float().repeat_interleave(group, 1) for tensor in (k, v))
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    scores = q.float() @ k.transpose(-2, -1) * scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if bias is not None:
        scores = scores + bias
    scores = _masked(scores, mask)
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # queries that see no key
    scores = scores.masked_fill(blind, 0.0)  # -inf less -inf would be NaN
    lse = scores.logsumexp(-1).masked_fill(blind[..., 0], float("inf"))
    weights = F.dropout(torch.softmax(scores, -1).masked_fill(blind, 0.0), options.dropout_p)
    return (weights @ v).to(q.dtype).transpose(1, 2).contiguous(), lse
