"""What the attention kernels share: packed sequences, tiles of rows and scores, products over a head."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(pointer, stride, rows, row_count, START: tl.constexpr, SIZE: tl.constexpr,
               HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """Columns START..START+SIZE of some rows; zeros beyond HEAD_DIM and, if BOUNDED, row_count."""
    columns = START + tl.arange(0, SIZE)
    return load_columns(pointer, stride, rows, row_count, columns, START + SIZE > HEAD_DIM, HEAD_DIM, BOUNDED)


@triton.jit
def load_columns(pointer, stride, rows, row_count, columns, PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
                 BOUNDED: tl.constexpr):  # fmt: skip
    """These columns of some rows; zeros beyond HEAD_DIM, where PADDED says that some are, and as `load_rows`."""
    tile = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if not PADDED and not BOUNDED:
        return tl.load(tile)
    else:
        inside = (columns < HEAD_DIM)[None, :]
        if BOUNDED:
            inside &= (rows < row_count)[:, None]
        return tl.load(tile, mask=inside, other=0.0)


@triton.jit
def load_scores(rows, stride, start, in_tile, left, BOUNDED: tl.constexpr):
    """A tile of the bias or the mask, [BLOCK_M or 1, BLOCK_N]; `rows` are pointers to its rows."""
    tile = rows + tl.cast(start, tl.int64) * stride + in_tile.to(tl.int64)[None, :] * stride
    if BOUNDED:
        return tl.load(tile, mask=(in_tile < left)[None, :], other=0)
    else:
        return tl.load(tile)


@triton.jit
def load_tile(pointer, stride, rows, row_count, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr,
              D_REST: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """Both chunks of some rows; the first one twice where D_REST is 0 (Triton has no None tile)."""
    main = load_rows(pointer, stride, rows, row_count, 0, D_MAIN, HEAD_DIM, BOUNDED)
    rest = main
    if D_REST > 0:
        rest = load_rows(pointer, stride, rows, row_count, D_MAIN, D_REST, HEAD_DIM, BOUNDED)
    return main, rest


@triton.jit
def store_tile(pointer, stride, rows, row_count, main, rest, HEAD_DIM: tl.constexpr, D_MAIN: tl.constexpr,
               D_REST: tl.constexpr):  # fmt: skip
    """Both chunks of some rows, in the dtype of what `pointer` points to."""
    tile = pointer + rows.to(tl.int64)[:, None] * stride
    inside = (rows < row_count)[:, None]
    columns = tl.arange(0, D_MAIN)
    tl.store(tile + columns[None, :], main.to(pointer.dtype.element_ty), mask=inside & (columns < HEAD_DIM)[None, :])
    if D_REST > 0:
        columns = D_MAIN + tl.arange(0, D_REST)
        tl.store(tile + columns[None, :], rest.to(pointer.dtype.element_ty),
                 mask=inside & (columns < HEAD_DIM)[None, :])  # fmt: skip


@triton.jit
def score_product(a, a_rest, b, b_rest, D_REST: tl.constexpr):
    """a bᵀ over both chunks of the head."""
    product = tl.dot(a, tl.trans(b), input_precision="ieee")
    if D_REST > 0:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision="ieee")
    return product


@triton.jit
def add_product(acc, acc_rest, weights, tile, tile_rest, D_REST: tl.constexpr):
    """acc + weights tile, both chunks; the weights are rounded to the tile's dtype."""
    weights = weights.to(tile.dtype)
    acc = tl.dot(weights, tile, acc, input_precision="ieee")
    if D_REST > 0:
        acc_rest = tl.dot(weights, tile_rest, acc_rest, input_precision="ieee")
    return acc, acc_rest


@triton.jit
def sequence(cu_seqlens, index, rows):
    """First row and length of a sequence packed among `rows`; all of them where nothing is packed (None)."""
    if cu_seqlens is not None:  # bounded by `rows`, so that wrong lengths read no memory but the tensors'
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + index), 0), rows).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens + index + 1), rows).to(tl.int32)
        return first, tl.maximum(end - first.to(tl.int32), 0)
    else:
        return 0, rows
