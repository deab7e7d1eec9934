"""attention(norm(x) Wqkvᵀ + b) Wprojᵀ + b', times layer_scale, plus residual: a block's first half in one launch.

    norm: LayerNorm folded into Wqkv, as in `linear`; mean and variance are those of the rows here, which are whole
    attention: softmax(q kᵀ / sqrt(D)) v of each head, over all tokens of an image
    stats: (mean, M2) pairs of y, as `linear` writes them
    x [B, N, C], Wqkv [3 * H * D, C], rows ordered q, k, v, Wproj [C, H * D]  ->  y [B, N, C]

For C <= 384, D = 32 or 64, fp16 and bf16; any N and H. A program has an image to itself, and goes over it three times,
with a barrier between: rows of x to q, k and v; one head of a tile of queries to its output, with the online softmax
of attention.py; tiles of that to y. What it hands on from one to the next it keeps in a piece of global memory that
no other program touches: it need not fit in shared memory, so that N is free, and comes from L2.

Where there are fewer images than the GPU has room for, several programs share an image's queries, and each of them
computes all keys and values: with P programs 4NCHD(P - 1) FLOPs more, where the result needs 8NCHD + 4N²HD. For a
ViT-Ti/16 at 224 pixels each program beyond the first costs a third. The arithmetic is the same for any P, and so are
the bits.

fp32 accumulation; q, k, v, the softmax's weights and attention's output are rounded to x's dtype, as they are between
the launches that this one takes the place of. Each image's rows are padded to tiles of BLOCK_M (197 to 256); of those
launches only attention does that, the products pad a batch once. Bound by FLOPs, and by the bytes of both weights and
of keys and values, which come from L2. Masks, biases, windows, RoPE and norms of q and k are left to `attention`.

Sources: Vaswani et al. 2017; the online softmax, Milakov and Gimelshein 2018, Dao et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels._parts import launch
from vitfast.kernels._parts.attention_arguments import LOG2E
from vitfast.kernels._parts.epilogue import STATS_TILE
from vitfast.kernels._parts.launch import Config
from vitfast.kernels._parts.whole_rows import MAX_WIDTH, column_tiles, load_block, moments, product, store

HEAD_DIMS = (32, 64)

# From compiling for sm_80, sm_90 and sm_100: as for `mlp` the accumulator [BLOCK_M, C] takes at most 96 registers of a
# thread, and BLOCK_F, the columns of q, k, v and of attention's output that are computed with at a time, is as large as
# spills no register. The name has the largest C. "keys32" pads less at some N. None has been timed.
CONFIGS = [
    Config("width192", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_F": 32}, 4, 2, (9, 0)),
    Config("width192_keys32", {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_F": 32}, 4, 2, (9, 0)),
    Config("width192_sm80", {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_F": 32}, 4, 2),
    Config("width384", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_F": 32}, 8, 3, (9, 0)),
    Config("width384_keys32", {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_F": 32}, 8, 3, (9, 0)),
    Config("width384_sm80", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_F": 32}, 8, 2),
]

CAPABILITIES: dict[str, Any] = {
    "dtypes": ("float16", "bfloat16"),
    "min_capability": (8, 0),
    "limits": {"width": (1, MAX_WIDTH)},
    "choices": {"head_dim": HEAD_DIMS},
}


@dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on: not the images, for configs differ in their order of summation."""

    C: int
    D: int
    N: int
    dtype: torch.dtype
    capability: tuple[int, int]

    @property
    def key(self) -> str:
        """The name in a tuning table."""
        return f"{self.C} {self.D} {self.N} {self.dtype}"


def problem_of(x: Tensor, qkv_weight: Tensor, *_: Any, heads: int, **__: Any) -> Problem:
    """The problem of a call of `attention_block` with these arguments."""
    _, N, C = x.shape
    return Problem(C, qkv_weight.shape[0] // (3 * heads), N, x.dtype, launch.capability(x.device))


def why_not(config: Config, problem: Problem) -> list[str]:
    """Every reason why a config cannot run a problem; empty if it can."""
    reasons = config.too_new(problem.capability)
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it needs 16 bits, got {problem.dtype}")
    if problem.C > MAX_WIDTH:
        reasons.append(f"it needs C <= {MAX_WIDTH}, got {problem.C}")
    if problem.D not in HEAD_DIMS:
        reasons.append(f"it needs a head dim of {' or '.join(map(str, HEAD_DIMS))}, got {problem.D}")
    return reasons


def pick_config(problem: Problem) -> Config:
    """The config of a call that no tuning table knows: the first that is wide enough and spills no register."""
    name = "width192" if problem.C <= 192 else "width384"
    return next(
        config for config in CONFIGS if config.name in (name, f"{name}_sm80") and not config.too_new(problem.capability)
    )


def programs_of_image(batch: int, tokens: int, config: Config, sms: int) -> int:
    """How many programs share an image: as many as leave no multiprocessor idle, and none without a tile of queries.

    Two blocks of 4 warps, or one of 8, are taken to be on a multiprocessor at once.
    """
    tiles = triton.cdiv(tokens, config.blocks["BLOCK_M"])
    wanted = min(tiles, max(1, sms * (8 // config.num_warps) // batch))
    return triton.cdiv(tiles, triton.cdiv(tiles, wanted))


@triton.jit
def _store_block(tensor, value, rows, row_ok, columns, C):
    """[rows, columns] of a contiguous matrix of C columns."""
    mask = row_ok[:, None] & (columns < C)[None, :]
    tl.store(tensor + rows.to(tl.int64)[:, None] * C + columns[None, :], value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    qkv,
    queries,
    query_ok,
    columns,
    hd,
    N,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """softmax(q kᵀ * scale) v of the head that has these columns of q, [BLOCK_M, HEAD_DIM] fp32."""
    q = load_block(qkv, queries, query_ok, columns, hd, 3 * hd)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for first in tl.range(0, N, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_ok = keys < N
        k = load_block(qkv + hd, keys, key_ok, columns, hd, 3 * hd)
        v = load_block(qkv + 2 * hd, keys, key_ok, columns, hd, 3 * hd)
        scores = tl.where(key_ok[None, :], tl.dot(q, k.T) * scale_log2, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        largest = larger
    return acc / total[:, None]


@triton.jit
def _attention_block_kernel(
    y,  # [B, N, C]
    y_stats,  # [B * N, ceil(C / 128), 2] fp32, or None
    qkv,  # [B, P, N, 3, H, D], where program (image, part) keeps q, k, v, and attention's output in the place of q
    x,  # [B, N, C]
    qkv_weight,  # [3 * H * D, C]
    qkv_bias,  # [3 * H * D], or None
    proj_weight,  # [C, H * D]
    proj_bias,  # [C], or None
    layer_scale,  # [C], or None
    residual,  # [B, N, C], or None
    weight_sum,  # [3 * H * D] fp32: norm(x) is folded into qkv; or None
    x_stride,
    qkv_stride,
    proj_stride,
    residual_stride,
    N,
    C,
    heads,
    scale_log2,  # scale * log2(e)
    eps,
    HEAD_DIM: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # Locate. Columns of x and y as in `mlp`. The loops compute what does not change in them anew (disable_licm):
    # addresses of whole tiles, kept from one to the next, would take more registers than there are.
    image, part = tl.program_id(0), tl.program_id(1)
    hd = heads * HEAD_DIM
    qkv += (image.to(tl.int64) * tl.num_programs(1) + part) * N * (3 * hd)
    columns0 = tl.arange(0, C0)
    columns1 = columns0
    if C1 > 0:
        columns1 = C0 + tl.arange(0, C1)
    tiles = tl.cdiv(N, BLOCK_M)
    tiles_of_part = tl.cdiv(tiles, tl.num_programs(1))
    first_tile = part * tiles_of_part
    last_tile = tl.minimum(first_tile + tiles_of_part, tiles)

    # q of this part's tokens, k and v of all.
    for tile in tl.range(0, tiles, disable_licm=True):
        tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token_ok = tokens < N
        rows = image * N + tokens
        x0 = load_block(x, rows, token_ok, columns0, C, x_stride)
        x1 = x0
        if C1 > 0:
            x1 = load_block(x, rows, token_ok, columns1, C, x_stride)
        mean, rstd = None, None
        if weight_sum is not None:
            mean, rstd = moments(x0, x1, columns0, columns1, C, eps, C1)
        begin = tl.where((tile >= first_tile) & (tile < last_tile), 0, hd)
        for first in tl.range(begin, 3 * hd, BLOCK_F):
            units = first + tl.arange(0, BLOCK_F)
            value = product(
                x0, x1, mean, rstd, qkv_weight, weight_sum, qkv_bias, units, units < 3 * hd, columns0, columns1, C,
                qkv_stride, C1,
            )  # fmt: skip
            _store_block(qkv, value, tokens, token_ok, units, 3 * hd)
    tl.debug_barrier()  # from here on the program's threads read what others of them have written

    # Attention, one head of a tile at a time.
    for item in tl.range(first_tile * heads, last_tile * heads, disable_licm=True):
        tokens = item // heads * BLOCK_M + tl.arange(0, BLOCK_M)
        token_ok = tokens < N
        columns = item % heads * HEAD_DIM + tl.arange(0, HEAD_DIM)
        out = _attend(qkv, tokens, token_ok, columns, hd, N, scale_log2, BLOCK_M, BLOCK_N, HEAD_DIM)
        tl.debug_barrier()  # the queries whose place it takes have been read
        _store_block(qkv, out, tokens, token_ok, columns, 3 * hd)
    tl.debug_barrier()

    # The projection.
    for tile in tl.range(first_tile, last_tile, disable_licm=True):
        tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token_ok = tokens < N
        rows = image * N + tokens
        acc0 = tl.zeros((BLOCK_M, C0), dtype=tl.float32)
        if C1 > 0:
            acc1 = tl.zeros((BLOCK_M, C1), dtype=tl.float32)
        for first in tl.range(0, hd, BLOCK_F):
            units = first + tl.arange(0, BLOCK_F)
            attended = load_block(qkv, tokens, token_ok, units, hd, 3 * hd)
            acc0 = tl.dot(attended, load_block(proj_weight, columns0, columns0 < C, units, hd, proj_stride).T, acc0)
            if C1 > 0:
                acc1 = tl.dot(attended, load_block(proj_weight, columns1, columns1 < C, units, hd, proj_stride).T, acc1)
        store(y, y_stats, acc0, proj_bias, layer_scale, residual, residual_stride, rows, token_ok, 0, columns0, C)
        if C1 > 0:
            store(y, y_stats, acc1, proj_bias, layer_scale, residual, residual_stride, rows, token_ok, C0, columns1, C)


@launch.on_its_device
def attention_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    heads: int,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vitfast.ops.attention_block` on CUDA, with arguments that it has checked.

    Args:
        x: [B, N, C], rows at one stride, C <= MAX_WIDTH, in 16 bits. qkv_weight: [3 * heads * D, C] with D in
            HEAD_DIMS; proj_weight: [C, heads * D].
        residual: of x's shape, rows at one stride.
        weight_sum: [3 * heads * D] fp32, where a LayerNorm of x is folded into qkv.
        config: a member of CONFIGS instead of the tuning table's or `pick_config`'s choice.

    Returns:
        [B, N, C] in x's dtype, contiguous; with `stats` also [B * N, ceil(C / 128), 2] fp32.

    Raises:
        ValueError: for a stride, device or config that does not fit, and what no config can run.
    """
    op = "attention_block"
    device = launch.check_device(
        op, x=x, qkv_weight=qkv_weight, qkv_bias=qkv_bias, proj_weight=proj_weight, proj_bias=proj_bias,
        layer_scale=layer_scale, residual=residual, weight_sum=weight_sum,
    )  # fmt: skip
    launch.check_last_contiguous(
        op, qkv_weight=qkv_weight, qkv_bias=qkv_bias, proj_weight=proj_weight, proj_bias=proj_bias,
        layer_scale=layer_scale, weight_sum=weight_sum,
    )  # fmt: skip
    B, N, C = x.shape
    x_rows = launch.rows_view(op, "x", x)
    residual_rows = None if residual is None else launch.rows_view(op, "residual", residual)
    y = x.new_empty(x.shape)
    y_stats = x.new_empty((B * N, triton.cdiv(C, STATS_TILE), 2), dtype=torch.float32) if stats else None
    if not B * N:
        return (y, y_stats) if y_stats is not None else y
    shape = problem_of(x, qkv_weight, heads=heads)
    config = launch.choose(op, device, CONFIGS, shape, why_not, pick_config, config)
    programs = programs_of_image(B, N, config, launch.num_sms(device))
    qkv = x.new_empty((B, programs, N, qkv_weight.shape[0]))
    large, small = column_tiles(C)
    _attention_block_kernel[(B, programs)](
        y, y_stats, qkv, x_rows, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, residual_rows, weight_sum,
        x_rows.stride(0), qkv_weight.stride(0), proj_weight.stride(0), launch.row_stride(residual_rows),
        N, C, heads, shape.D**-0.5 * LOG2E, eps, HEAD_DIM=shape.D, C0=large, C1=small,
        **config.options(),
    )  # fmt: skip
    return (y, y_stats) if y_stats is not None else y
