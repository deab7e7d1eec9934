"""act(norm(x) Wᵀ + b) * layer_scale + residual, in one pass over the output.

    x [M, K], W [N, K] -> y [M, N]; "swiglu": W [2F, K], gate rows first, y [M, F] = silu(gate) * up
    norm: LayerNorm folded into the product, rstd * (x Wᵀ - mean * weight_sum), where mean and rstd
          come from per-128-column (mean, M2) pairs of x, combined by Chan's formula
    stats: the same pairs of y, as stored, for the LayerNorm that follows

Fused: the folded LayerNorm, bias, activation, LayerScale, residual and row statistics; nothing is
written but y and the statistics. Dtypes: float32, float16, bfloat16; fp32 accumulation and epilogue
(float32 multiplies in full precision, not TF32). Bound by FLOPs at ViT widths and M in the
thousands, by the bytes of W at small M.

Two kernels share the epilogue, both persistent in grouped order (tiles that run together share
operands in L2): `_linear_tma_kernel` moves tiles with the tensor memory accelerator (sm_90 and
later, 16-bit dtypes, rows of a multiple of 16 bytes); `_linear_kernel` takes everything else.

Sources: Ba, Kiros, Hinton 2016 (LayerNorm); Chan, Golub, LeVeque 1979 (combining statistics);
Shazeer 2020 (SwiGLU); Touvron et al. 2021 (LayerScale).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vitfast.kernels import _common
from vitfast.kernels._common import DTYPES, STATS_TILE, CompileCase, Config, activate, silu
from vitfast.kernels._linear_configs import (
    CONFIGS,
    FLOAT32_CONFIGS,
    GROUP_M,
    TMA_CONFIGS,
    check_config,
    pick_config,
    tuning_key,
    uses_tma,
    widest_tile,
)

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")

CAPABILITIES: dict[str, Any] = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {}}


@triton.jit
def _tile_origin(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile number -> (tile row, tile column): down GROUP rows first, then to the next column."""
    first_row = tile // (GROUP * tiles_n) * GROUP
    group_rows = tl.minimum(tiles_m - first_row, GROUP)
    within = tile % (GROUP * tiles_n)
    return first_row + within % group_rows, within // group_rows


@triton.jit
def _combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK: tl.constexpr):
    """Mean and 1/sqrt(var + eps) of rows of x from their (mean, M2) pairs, by Chan's formula."""
    tiles = tl.cdiv(K, 128)
    index = tl.arange(0, STATS_BLOCK)
    count = tl.maximum(tl.minimum(K - index * 128, 128), 0).to(tl.float32)
    pairs = row_stats + (rows.to(tl.int64)[:, None] * tiles + index[None, :]) * 2
    mask = row_ok[:, None] & (index < tiles)[None, :]
    means = tl.load(pairs, mask=mask, other=0.0)  # [BLOCK_M, STATS_BLOCK]
    m2s = tl.load(pairs + 1, mask=mask, other=0.0)
    mean = tl.sum(means * count[None, :], axis=1) / K
    shift = means - mean[:, None]
    m2 = tl.sum(m2s + count[None, :] * shift * shift, axis=1)
    return mean, tl.rsqrt(m2 / K + eps)


@triton.jit
def _norm_and_bias(acc, mean, rstd, weight_sum, bias, columns, column_ok):
    """The folded LayerNorm's correction of the product, then the bias; [BLOCK_M, columns] fp32."""
    if weight_sum is not None:
        column_sum = tl.load(weight_sum + columns, mask=column_ok, other=0.0)
        acc = rstd[:, None] * (acc - mean[:, None] * column_sum[None, :])
    if bias is not None:
        acc += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _activated(acc, up, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION: tl.constexpr):
    """The epilogue before the residual: act(norm(product) + bias) * layer_scale, in fp32."""
    column_ok = columns < N
    value = _norm_and_bias(acc, mean, rstd, weight_sum, bias, columns, column_ok)
    if ACTIVATION == "swiglu":
        value = silu(value) * _norm_and_bias(up, mean, rstd, weight_sum, bias, columns + N, column_ok)
    else:
        value = activate(value, ACTIVATION)
    if layer_scale is not None:
        value *= tl.load(layer_scale + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _store_stats(y_stats, value, rows, row_ok, first_column, N):
    """(mean, M2) of each row of one 128-column tile; columns beyond N do not count."""
    tl.static_assert(value.shape[1] == 128)
    column_ok = first_column + tl.arange(0, 128) < N
    value = value.to(tl.float32)
    count = tl.maximum(tl.minimum(N - first_column, 128), 1).to(tl.float32)
    mean = tl.sum(tl.where(column_ok[None, :], value, 0.0), axis=1) / count
    shift = tl.where(column_ok[None, :], value - mean[:, None], 0.0)
    pairs = y_stats + (rows.to(tl.int64) * tl.cdiv(N, 128) + first_column // 128) * 2
    mask = row_ok & (first_column + tl.zeros_like(rows) < N)  # a 256-column tile may end before its half
    tl.store(pairs, mean, mask=mask)
    tl.store(pairs + 1, tl.sum(shift * shift, axis=1), mask=mask)


@triton.jit
def _halves(tile):
    """[BLOCK_M, BLOCK_N] -> its left and its right half."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def _linear_kernel(
    y,  # [M, N]
    y_stats,  # [M, ceil(N / 128), 2] fp32, or None
    x,  # [M, K]
    weight,  # [N, K], or [2N, K] for swiglu
    bias,  # [N] or [2N], or None
    layer_scale,  # [N], or None
    residual,  # [M, N], or None
    row_stats,  # [M, ceil(K / 128), 2] fp32, or None
    weight_sum,  # [N] or [2N] fp32, or None
    x_stride,
    weight_stride,
    residual_stride,
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tl.static_assert(BLOCK_N <= 128)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Locate.
        tile_m, tile_n = _tile_origin(tile, tiles_m, tiles_n, GROUP)
        first_column = tile_n * BLOCK_N
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        row_ok, column_ok = rows < M, columns < N
        x_tile = x + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]  # [BLOCK_M, BLOCK_K]
        weight_tile = weight + columns.to(tl.int64)[None, :] * weight_stride + inner[:, None]  # [BLOCK_K, BLOCK_N]
        up_tile = weight + (columns.to(tl.int64) + N)[None, :] * weight_stride + inner[:, None]

        # Load and compute.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = None
        if ACTIVATION == "swiglu":
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            inner_ok = inner < K - k
            a = tl.load(x_tile + k, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
            b = tl.load(weight_tile + k, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if ACTIVATION == "swiglu":
                c = tl.load(up_tile + k, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
                up = tl.dot(a, c, up, input_precision="ieee")

        # Epilogue and store.
        mean, rstd = None, None
        if row_stats is not None:
            mean, rstd = _combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK)
        value = _activated(acc, up, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION)
        mask = row_ok[:, None] & column_ok[None, :]
        if residual is not None:
            offsets = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
            value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        value = value.to(y.dtype.element_ty)
        tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], value, mask=mask)
        if y_stats is not None:
            _store_stats(y_stats, value, rows, row_ok, first_column, N)


@triton.jit
def _linear_tma_kernel(
    y,  # descriptor of [M, N], blocks [BLOCK_M, min(BLOCK_N, 128)]
    y_stats,  # [M, ceil(N / 128), 2] fp32, or None
    x,  # descriptor of [M, K], blocks [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [N, K], or [2N, K] for swiglu, blocks [BLOCK_N, BLOCK_K]
    bias,  # [N] or [2N], or None
    layer_scale,  # [N], or None
    residual,  # descriptor like y's, or None
    row_stats,  # [M, ceil(K / 128), 2] fp32, or None
    weight_sum,  # [N] or [2N] fp32, or None
    M,
    N,
    K,
    eps,
    ACTIVATION: tl.constexpr,
    STATS_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PART_N: tl.constexpr = min(BLOCK_N, 128)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Locate.
        tile_m, tile_n = _tile_origin(tile, tiles_m, tiles_n, GROUP)
        first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N

        # Load (beyond the tensors: zeros) and compute.
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = None
        if ACTIVATION == "swiglu":
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a = x.load([first_row, k])
            acc = tl.dot(a, weight.load([first_column, k]).T, acc)
            if ACTIVATION == "swiglu":
                up = tl.dot(a, weight.load([N + first_column, k]).T, up)

        # Epilogue and store (beyond y: dropped). 256 columns go in halves, which need half the
        # registers and are one tile of row statistics each.
        rows = first_row + tl.arange(0, BLOCK_M)
        row_ok = rows < M
        mean, rstd = None, None
        if row_stats is not None:
            mean, rstd = _combine_stats(row_stats, rows, row_ok, K, eps, STATS_BLOCK)
        parts = (acc,)
        if BLOCK_N == 256:
            parts = _halves(acc)
        for part in tl.static_range(len(parts)):
            column = first_column + part * 128
            columns = column + tl.arange(0, PART_N)
            value = _activated(parts[part], up, mean, rstd, weight_sum, bias, layer_scale, columns, N, ACTIVATION)
            if residual is not None:
                value += residual.load([first_row, column]).to(tl.float32)
            value = value.to(y.dtype)
            y.store([first_row, column], value)
            if y_stats is not None:
                _store_stats(y_stats, value, rows, row_ok, column, N)


def _check(x, weight, bias, activation, layer_scale, residual, row_stats, weight_sum) -> None:
    """What `vitfast.ops` checks too: this launcher is also called by itself."""
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or x.shape[-1] < 1:
        raise ValueError(
            f"linear: x [..., K] and weight [N, K] with K >= 1 do not fit: {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation == "swiglu" and weight.shape[0] % 2:
        raise ValueError(f"linear: swiglu needs an even number of weight rows, got {weight.shape[0]}")
    if (row_stats is None) != (weight_sum is None):
        raise ValueError("linear: row_stats and weight_sum go together; only one was given")
    rows, inner = x.numel() // x.shape[-1], x.shape[-1]
    width = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    _common.check_shape("linear", "bias", bias, (weight.shape[0],))
    _common.check_shape("linear", "layer_scale", layer_scale, (width,))
    _common.check_shape("linear", "residual", residual, (*x.shape[:-1], width))
    _common.check_shape("linear", "row_stats", row_stats, (rows, triton.cdiv(inner, STATS_TILE), 2))
    _common.check_shape("linear", "weight_sum", weight_sum, (weight.shape[0],))
    _common.check_dtype("linear", x=x)
    _common.check_dtype("linear", x.dtype, weight=weight, bias=bias, layer_scale=layer_scale, residual=residual)
    _common.check_dtype("linear", torch.float32, row_stats=row_stats, weight_sum=weight_sum)
    _common.check_last_contiguous("linear", weight=weight, bias=bias, layer_scale=layer_scale, weight_sum=weight_sum)
    if row_stats is not None and not row_stats.is_contiguous():
        raise ValueError(f"linear: row_stats must be contiguous, got strides {row_stats.stride()}")


@_common.on_its_device
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_stats: Tensor | None = None,
    weight_sum: Tensor | None = None,
    eps: float = 1e-6,
    stats: bool = False,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vitfast.ops.linear` on CUDA; see there for the arguments and the module for what is fused.

    Args:
        x: [..., K], rows at one stride. weight: [N, K] ([2F, K] for "swiglu"), rows at any stride.
        residual: of the output's shape, rows at one stride.
        config: a member of CONFIGS, not the tuning table's or `pick_config`'s choice. A TMA config needs `uses_tma`.

    Returns:
        [..., N] in x's dtype, contiguous; with `stats` also [M, ceil(N / 128), 2] fp32.

    Raises:
        ValueError: for a shape, dtype, stride, device, activation or config that does not fit.
    """
    device = _common.check_device(
        "linear", x=x, weight=weight, bias=bias, layer_scale=layer_scale,
        residual=residual, row_stats=row_stats, weight_sum=weight_sum,
    )  # fmt: skip
    _check(x, weight, bias, activation, layer_scale, residual, row_stats, weight_sum)
    gated = activation == "swiglu"
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    x_rows = _common.rows_view("linear", "x", x)
    residual_rows = None if residual is None else _common.rows_view("linear", "residual", residual)
    rows, inner = x_rows.shape
    y = x.new_empty((*x.shape[:-1], width))
    y_stats = x.new_empty((rows, triton.cdiv(width, STATS_TILE), 2), dtype=torch.float32) if stats else None
    if not rows or not width:
        return (y, y_stats) if y_stats is not None else y

    tma, sms = uses_tma(width, x_rows, weight, residual_rows), _common.num_sms(device)
    if config is None:
        key = tuning_key(rows, inner, width, x.dtype, tma=tma, gated=gated, stats=stats)
        config = _common.tuned("linear", device, CONFIGS, key) or pick_config(
            rows, width, x.dtype, tma=tma, sms=sms, gated=gated, stats=stats
        )
    check_config(config, x.dtype, tma, gated, stats)
    block_m, block_n, block_k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    # Tiles of 4 warps leave room for a second program, which works while the first is in its epilogue.
    programs = min(triton.cdiv(rows, block_m) * triton.cdiv(width, block_n), sms * (8 // config.num_warps))
    vectors = {"bias": bias, "layer_scale": layer_scale, "row_stats": row_stats, "weight_sum": weight_sum}
    options = {
        "ACTIVATION": activation or "",
        "STATS_BLOCK": triton.next_power_of_2(triton.cdiv(inner, STATS_TILE)),
        "GROUP": GROUP_M,
        **config.blocks,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config in TMA_CONFIGS:
        part = [block_m, min(block_n, 128)]
        _linear_tma_kernel[(programs,)](
            y=TensorDescriptor.from_tensor(y.view(-1, width), part),
            y_stats=y_stats,
            x=TensorDescriptor.from_tensor(x_rows, [block_m, block_k]),
            weight=TensorDescriptor.from_tensor(weight, [block_n, block_k]),
            residual=None if residual_rows is None else TensorDescriptor.from_tensor(residual_rows, part),
            **vectors, M=rows, N=width, K=inner, eps=eps, **options,
        )  # fmt: skip
    else:
        _linear_kernel[(programs,)](
            y=y, y_stats=y_stats, x=x_rows, weight=weight, residual=residual_rows,
            x_stride=x_rows.stride(0),
            weight_stride=weight.stride(0),
            residual_stride=0 if residual_rows is None else residual_rows.stride(0),
            **vectors, M=rows, N=width, K=inner, eps=eps, **options,
        )  # fmt: skip
    return (y, y_stats) if y_stats is not None else y


# Epilogue -> activation and the optional tensors present: the products of a ViT block.
_EPILOGUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gelu": ("gelu", ("bias",)),
    "norm_gelu": ("gelu", ("bias", "row_stats", "weight_sum")),
    "residual_stats": ("", ("y_stats", "bias", "layer_scale", "residual")),
    "norm_swiglu": ("swiglu", ("bias", "row_stats", "weight_sum")),
}


def compile_cases() -> list[CompileCase]:
    """Every config with every epilogue of a ViT block that it serves, at K = 6 to 8 tiles of statistics."""
    return [
        _compile_case(config, name)
        for config in CONFIGS
        for name in _EPILOGUES
        if not (name == "residual_stats" and config.blocks["BLOCK_N"] % STATS_TILE)
        and config.blocks["BLOCK_N"] <= widest_tile(gated="swiglu" in name)
    ]


def _compile_case(config: Config, epilogue: str) -> CompileCase:
    activation, present = _EPILOGUES[epilogue]
    tma, element = config in TMA_CONFIGS, "fp32" if config in FLOAT32_CONFIGS else "bf16"
    m, n, k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    tensors = dict.fromkeys(("y", "x", "weight", "bias", "layer_scale", "residual"), f"*{element}")
    tensors |= dict.fromkeys(("y_stats", "row_stats", "weight_sum"), "*fp32")
    if tma:
        blocks = {"y": (m, min(n, 128)), "residual": (m, min(n, 128)), "x": (m, k), "weight": (n, k)}
        tensors |= {name: f"tensordesc<{element}[{rows},{columns}]>" for name, (rows, columns) in blocks.items()}
    constexprs = {"ACTIVATION": activation, "STATS_BLOCK": 8, "GROUP": GROUP_M, **config.blocks}
    constexprs |= {name: None for name in tensors if name not in ("y", "x", "weight", *present)}
    kernel = _linear_tma_kernel if tma else _linear_kernel
    signature = {
        name: tensors.get(name, "fp32" if name == "eps" else "i32")
        for name in kernel.arg_names
        if name not in constexprs
    }
    return CompileCase(
        kernel="linear",
        config=f"{config.name}_{epilogue}",
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name, kind in signature.items() if kind[0] == "*" or (kind == "i32" and name != "M")),
        archs=tuple(arch for arch in (80, 90, 100) if divmod(arch, 10) >= config.min_capability),
        tile={"M": m, "N": n, "K": k},
    )
