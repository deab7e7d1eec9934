"""What is done to the heads of q and k as they are loaded: a norm over the head's channels, then rotary embedding.

    norm(x)   = (x - mean) / sqrt(var + eps) * weight + bias, or with RMS x / sqrt(mean(x²) + eps) * weight + bias
    rotate(x) = x * cos + rotate_half(x) * sin, where rotate_half makes each pair of channels (a, b) into (-b, a)

A pair is two neighbours if INTERLEAVED, else channels d and d + D / 2 (Su et al. 2021, RoFormer; the halves are
GPT-NeoX's). All in fp32, rounded once to the dtype of q and k. No rotated copy is ever in memory: partners half a
head away are a second load of the same rows, which are in cache by then.

`norm` is (weight, bias, eps), `rope` is (cos, sin, stride of their rows, tokens before the first row); a weight or cos
that is None is absent, and so is its code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitfast.kernels._parts.attention_tiles import load_columns, load_rows


@triton.jit
def head_moments(pointer, stride, rows, row_count, norm, RMS: tl.constexpr, HEAD_DIM: tl.constexpr,
                 D_MAIN: tl.constexpr, D_REST: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """Mean (0 with RMS) and 1 / sqrt(variance + eps) of each row, [rows, 1]; 0 and 1 without a norm."""
    weight, _, eps = norm
    if weight is None:
        return 0.0, 1.0
    else:
        main = load_rows(pointer, stride, rows, row_count, 0, D_MAIN, HEAD_DIM, BOUNDED).to(tl.float32)
        rest = main
        if D_REST > 0:
            rest = load_rows(pointer, stride, rows, row_count, D_MAIN, D_REST, HEAD_DIM, BOUNDED).to(tl.float32)
        mean = 0.0
        if not RMS:
            total = tl.sum(main, 1, keep_dims=True)
            if D_REST > 0:
                total += tl.sum(rest, 1, keep_dims=True)
            mean = total / HEAD_DIM
            main = tl.where((tl.arange(0, D_MAIN) < HEAD_DIM)[None, :], main - mean, 0.0)
            if D_REST > 0:
                rest = tl.where((D_MAIN + tl.arange(0, D_REST) < HEAD_DIM)[None, :], rest - mean, 0.0)
        squares = tl.sum(main * main, 1, keep_dims=True)
        if D_REST > 0:
            squares += tl.sum(rest * rest, 1, keep_dims=True)
        return mean, tl.rsqrt(squares / HEAD_DIM + eps)


@triton.jit
def _norm(x, columns, moments, norm, HEAD_DIM: tl.constexpr):
    """x in fp32, normed if there is a weight; its columns beyond HEAD_DIM are 0."""
    x = x.to(tl.float32)
    weight, bias, _ = norm
    mean, rstd = moments
    if weight is not None:
        inside = columns < HEAD_DIM
        x = (x - mean) * rstd * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def load_head(pointer, stride, rows, row_count, tokens, moments, norm, rope, INTERLEAVED: tl.constexpr,
              START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """Columns START..START+SIZE of some rows, as `load_rows`, normed and rotated.

    `moments` are those of `head_moments`, `tokens` the rows' places in the sequence.
    """
    tile = load_rows(pointer, stride, rows, row_count, START, SIZE, HEAD_DIM, BOUNDED)
    weight, _, _ = norm
    cos, sin, table_stride, prefix = rope
    if weight is None and cos is None:
        return tile
    else:
        columns = START + tl.arange(0, SIZE)
        x = _norm(tile, columns, moments, norm, HEAD_DIM)
        if cos is not None:
            if INTERLEAVED:
                even, odd = tl.split(x.reshape(x.shape[0], SIZE // 2, 2))
                rotated = tl.join(-odd, even).reshape(x.shape[0], SIZE)
            else:
                first = columns < HEAD_DIM // 2
                partners = tl.where(first, columns + HEAD_DIM // 2, columns - HEAD_DIM // 2)
                rotated = load_columns(pointer, stride, rows, row_count, partners, START + SIZE > HEAD_DIM, HEAD_DIM,
                                      BOUNDED)  # fmt: skip
                rotated = _norm(rotated, partners, moments, norm, HEAD_DIM)
                rotated = tl.where(first[None, :], -rotated, rotated)
            places = tokens - prefix
            inside = (places >= 0)[:, None] & (columns < HEAD_DIM)[None, :]
            if BOUNDED:
                inside &= (rows < row_count)[:, None]
            table = places.to(tl.int64)[:, None] * table_stride + columns[None, :]
            cos_tile = tl.load(cos + table, mask=inside, other=1.0).to(tl.float32)
            sin_tile = tl.load(sin + table, mask=inside, other=0.0).to(tl.float32)
            x = x * cos_tile + rotated * sin_tile
        return x.to(tile.dtype)
