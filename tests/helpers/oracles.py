"""Attention spelled out, one query at a time: an oracle that shares no line with vitfast's own reference."""

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int | None = None,
    right: int | None = None,
    offset: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] and log-sum-exp [B, H, N] in `dtype`, with the arguments of `ops.attention`.

    Query i stands at key i + offset and sees from `left` keys before to `right` after. One that sees none
    gives zeros, and -inf for its log-sum-exp.
    """
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    owner = torch.arange(heads, device=q.device) // (heads // k.shape[2])
    k, v = k[:, :, owner], v[:, :, owner]  # the key head of each query head
    outs, lses = [], []
    for i in range(queries):
        low = 0 if left is None else max(i + offset - left, 0)
        high = keys if right is None else min(i + offset + right + 1, keys)
        if high <= low:
            outs.append(q.new_zeros(batch, heads, head_dim))
            lses.append(q.new_full((batch, heads), -float("inf")))
            continue
        scores = torch.einsum("bhd,bkhd->bhk", q[:, i], k[:, low:high])
        scores = scores * (head_dim**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if slopes is not None:
            distance = (torch.arange(low, high, device=q.device) - (i + offset)).abs()
            scores = scores - slopes.to(dtype).expand(batch, heads)[..., None] * distance
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v[:, low:high]))
    if not queries:
        return q.new_zeros(q.shape), q.new_zeros(batch, heads, 0)
    return torch.stack(outs, 1), torch.stack(lses, 2)
