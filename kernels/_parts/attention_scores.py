"""From products q kᵀ to scores and weights, for the forward and the backward alike: one formula, one band.

    score = cap(product * scale) + bias - slope * |key - position|    where position - left <= key <= position + right

cap(x) = softcap * tanh(x / softcap). A query's position is its index plus an offset, so that causal masking can be
aligned at either end. Arguments that are None are absent, and so is their code. `keys` and `positions` are [.., 1] and
[1, ..] in either order: a tile of scores is [queries, keys] in the forward and for dq, [keys, queries] for dk and dv.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)  # kernels see no other globals


@triton.jit
def tanh(x):
    """tanh to two ulps of fp32. Near 0, where 1 - 2 / (e + 1) cancels, a polynomial fitted at Chebyshev points."""
    square = x * x
    near = x + x * square * (
        -0.33333328 + square * (0.13332783 + square * (-0.0538525 + square * (0.02100365 - square * 0.00610496)))
    )
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * _LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def make_scores(products, scale, softcap, bias, slope, keys, positions):
    """The formula above, without the band; bias is a tile."""
    scores = products * scale
    if softcap is not None:
        scores = softcap * tanh(scores / softcap)
    if bias is not None:
        scores += bias.to(tl.float32)
    if slope is not None:
        scores -= slope * tl.abs(keys - positions).to(tl.float32)
    return scores


@triton.jit
def cap_slope(products, scale, softcap):
    """The derivative of cap at products * scale."""
    capped = tanh(products * scale / softcap)
    return 1.0 - capped * capped


@triton.jit
def recompute_weights(products, scale, softcap, bias, slope, keys, positions, seen, row_max, norm):
    """exp(score - row_max) * norm, 0 where not seen; `seen` is a tile or None."""
    if softcap is not None or bias is not None or slope is not None:
        distance = make_scores(products, scale, softcap, bias, slope, keys, positions) - row_max
    else:
        distance = tl.fma(products, scale, -row_max)
    if seen is not None:
        distance = tl.where(seen != 0, distance, float("-inf"))
    return tl.exp2(distance * _LOG2E) * norm


@triton.jit
def load_stats(row_max, row_sum, rows, row_count):
    """Row maxima and 1 / sums; +inf beyond the end and for rows that saw no key, whose weights are thus 0."""
    inside = rows < row_count
    largest = tl.load(row_max + rows, mask=inside, other=float("inf"))
    largest = tl.where(largest == float("-inf"), float("inf"), largest)
    total = tl.load(row_sum + rows, mask=inside, other=1.0)
    return largest, 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def in_band(seen, keys, positions, left, right):
    """`seen`, and within the band."""
    if right is not None:
        seen = seen & (keys <= positions + right)
    if left is not None:
        seen = seen & (keys >= positions - left)
    return seen


@triton.jit
def band_tiles(first, before, after, count, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Where to walk: the tiles of BLOCK, out of `count`, of which rows first..first + SIZE - 1 see something.

    Row r sees r - before .. r + after, both ends optional. Returns begin, inner, tail, end: every row sees all of
    the tiles in inner..tail; those in begin..inner and tail..end are on the band's edges, or the last. All but `end`
    are multiples of BLOCK.
    """
    begin = 0
    inner = 0
    tail = count // BLOCK * BLOCK
    end = count
    if after is not None:
        tail = tl.minimum(tail, tl.maximum(first + after + 1, 0) // BLOCK * BLOCK)
        end = tl.minimum(end, tl.maximum(first + SIZE + after, 0))
    if before is not None:
        begin = tl.maximum(first - before, 0) // BLOCK * BLOCK
        inner = tl.cdiv(tl.minimum(tl.maximum(first + SIZE - 1 - before, 0), end), BLOCK) * BLOCK
        tail = tl.maximum(tail, inner)
    return begin, inner, tail, end
