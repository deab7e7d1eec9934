"""What the attention kernels share: loads of tiles, strides as the kernels want them, argument checks."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vitfast.kernels._common import DTYPES, check_device, check_dtype, check_last_contiguous, check_shape

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)  # kernels see no other globals

CAPABILITIES = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {"head_dim": (1, 256)}}


@triton.jit
def load_rows(pointer, stride, rows, row_count, START: tl.constexpr, SIZE: tl.constexpr,
               HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """Columns START..START+SIZE of some rows; zeros beyond HEAD_DIM and, if BOUNDED, row_count."""
    columns = START + tl.arange(0, SIZE)
    tile = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if START + SIZE <= HEAD_DIM and not BOUNDED:
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
def weights_again(products, scale, bias, seen, row_max, norm):
    """exp(products * scale + bias - row_max) * norm, 0 where not seen; bias and seen are tiles or None."""
    if bias is not None:
        distance = products * scale + bias.to(tl.float32) - row_max
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


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, 0 where an axis has one entry: its stride can be any number, but is never used."""
    return tuple(stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def vector(head_dim: int, *tensors: torch.Tensor) -> int:
    """Elements (a power of two, at most 16 bytes) that divide D and every address and stride."""
    size = tensors[0].element_size()
    steps = [stride for tensor in tensors for stride in strides(tensor)[:-1]]
    return math.gcd(16 // size, head_dim, *steps, *(tensor.data_ptr() // size for tensor in tensors))


def broadcast(op: str, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of `tensor` as seen with `shape`, 0 for the axes it is broadcast along."""
    if tensor is None:
        return (0,) * len(shape)
    pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.ndim > len(shape) or any(have not in (1, want) for have, want in pairs):
        raise ValueError(f"{op}: {name} of shape {tuple(tensor.shape)} cannot be broadcast to {shape}")
    return strides(tensor.expand(shape))


def check_attention(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None
) -> None:
    """Raise ValueError unless these are arguments of attention: shapes, dtypes, strides and devices."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} must be [B, N, H, D], got shape {tuple(tensor.shape)}")
    check_dtype(op, q=q)
    check_dtype(op, q.dtype, k=k, v=v)
    check_dtype(op, bias=bias)
    check_dtype(op, torch.bool, mask=mask)
    batch, _, heads, head_dim = q.shape
    check_shape(op, "k", k, (batch, k.shape[1], heads, head_dim))
    check_shape(op, "v", v, tuple(k.shape))
    low, high = CAPABILITIES["limits"]["head_dim"]
    if not low <= head_dim <= high:
        raise ValueError(f"{op}: head dim must be {low}..{high}, got {head_dim}")
    check_last_contiguous(op, q=q, k=k, v=v)
    check_device(op, q=q, k=k, v=v, bias=bias, mask=mask)
