"""act((x Wᵀ) * x_scale * weight_scale + b) * layer_scale + residual, x and W in 8 bits.

    x [M, K] with x_scale [M], W [N, K] with weight_scale [N] -> y [M, N]
    "swiglu": W [2F, K], gate rows first, y [M, F] = silu(gate) * up
    groups: x_scale [M, ceil(K / G)], one for each G = 128 or 64 columns of a row of x
    requantize: y in x's dtype with y_scale [M, ceil(N / 128)], the groups of the product that follows

Fused: scales, bias, activation, LayerScale and residual, in fp32; y is rounded once. x and W are
float8_e4m3fn or int8, the sums fp32 or int32; y, bias, layer_scale and residual are fp32, fp16 or bf16.
Hopper's FP8 products keep about 14 bits of a running sum; it is therefore moved to fp32 registers every
PROMOTE products, and it is there that scales of groups are applied, one multiplication more a sum. What `requantize`
writes has groups of a tile's columns, so that the program which computes them can scale them: a scale for the whole
row would need all tiles of the row, and a pass over y. Groups of 64 are heads of `attention`. A tile of K is a group:
at 64 it is half as deep, two of the tensor cores' instructions, and twice as many are in flight. Two products in a
tile of 128 would be the same instructions on operands that had to be cut first; groups of 32, one instruction each,
would be scaled for as long as they are multiplied. Bound by FLOPs at ViT widths, by the bytes of y and residual at
small K.

Sources: LLM.int8() (Dettmers et al. 2022), scales of rows and columns applied to the sum; DeepSeek-V3's
technical report (2024), sections 3.3.1 and 3.3.2, scales of 1 x 128 groups and promotion of FP8 sums.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitfast.kernels import _common
from vitfast.kernels._common import SCALE_GROUPS, CompileCase, Config
from vitfast.kernels._linear_configs import GROUP_M
from vitfast.kernels._linear_kernels import _activated, _tile_origin
from vitfast.kernels.linear import ACTIVATIONS
from vitfast.kernels.quantize import in_8_bits

CAPABILITIES: dict[str, Any] = {
    "dtypes": ("float8_e4m3fn", "int8"),
    "min_capability": (8, 0),
    "limits": {},
    "features": ("scale groups", "scale groups of 64", "swiglu"),
}

PROMOTE = 128
SCALE_GROUP = 128
"""Columns that share a scale where `requantize` made them; the last group covers what is left."""

# Where these come from: compiling for sm_80, sm_89, sm_90 and sm_100; each spills no register with the
# epilogues of `compile_cases` and fits the 99 KiB of shared memory of sm_89. None is measured yet. The
# first is for many rows, the second for few, or for swiglu's two accumulators, and the third for those that
# requantise, which takes tiles of one group.
CONFIGS = [
    Config("128x128x128", {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, num_warps=8, num_stages=3),
    Config("64x64x128", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=3),
    Config("64x128x128", {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128}, num_warps=8, num_stages=2),
]


def scale_group(x: Tensor, x_scale: Tensor) -> int:
    """Columns of x that share a scale; 0 where a whole row does, or where x_scale has no such shape."""
    if x_scale.ndim != x.ndim:
        return 0
    return next((group for group in SCALE_GROUPS if triton.cdiv(x.shape[-1], group) == x_scale.shape[-1]), 0)


def pick_config(rows: int, width: int, *, sms: int, gated: bool = False, requantize: bool = False) -> Config:
    """The large tile where it gives every multiprocessor one, else a small one."""
    large, small, one_group = CONFIGS
    tiles = triton.cdiv(rows, large.blocks["BLOCK_M"]) * triton.cdiv(width, large.blocks["BLOCK_N"])
    if gated or tiles < sms:
        return one_group if requantize else small
    return large


def tuning_key(
    rows: int, inner: int, width: int, dtype: torch.dtype, *, gated: bool, requantize: bool, group: int
) -> str:
    """What a tuned choice depends on: the very shape, and what restricts the configs or changes their work.

    `group`: as `scale_group` gives it, 0 for a scale a row.
    """
    flags = {"gated": gated, "requantize": requantize, f"groups of {group}": group > 0}
    return " ".join([f"{rows}x{inner}x{width}", str(dtype), *(name for name, on in flags.items() if on)])


@triton.jit
def _quantized_linear_kernel(
    y,  # [M, N]
    y_scale,  # [M, ceil(N / 128)] fp32 if y is in x's dtype, else None
    x,  # [M, K] float8_e4m3fn or int8
    x_scale,  # [M] fp32, or [M, ceil(K / BLOCK_K)] if GROUPED
    weight,  # [N, K], or [2N, K] for swiglu, in x's dtype
    weight_scale,  # [N] or [2N] fp32
    bias,  # [N] or [2N], or None
    layer_scale,  # [N], or None
    residual,  # [M, N], or None
    x_stride,
    weight_stride,
    residual_stride,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PROMOTE: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Locate.
    tile_m, tile_n = _tile_origin(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_ok, column_ok = rows < M, columns < N
    x_tile = x + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]  # [BLOCK_M, BLOCK_K]
    weight_tile = weight + columns.to(tl.int64)[None, :] * weight_stride + inner[:, None]  # [BLOCK_K, BLOCK_N]
    up_tile = weight + (columns.to(tl.int64) + N)[None, :] * weight_stride + inner[:, None]

    # Load and compute.
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    ACC: tl.constexpr = tl.float32 if GROUPED else SUM
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    up = None
    if ACTIVATION == "swiglu":
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in tl.range(0, K, BLOCK_K):
        inner_ok = inner < K - k
        a = tl.load(x_tile + k, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
        b = tl.load(weight_tile + k, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
        if GROUPED:  # the tile is a group
            group = rows.to(tl.int64) * tl.cdiv(K, BLOCK_K) + k // BLOCK_K
            group_scale = tl.load(x_scale + group, mask=row_ok, other=0.0)[:, None]
            acc += tl.dot(a, b, out_dtype=SUM).to(tl.float32) * group_scale
        else:
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=PROMOTE, out_dtype=SUM)
        if ACTIVATION == "swiglu":
            c = tl.load(up_tile + k, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
            if GROUPED:
                up += tl.dot(a, c, out_dtype=SUM).to(tl.float32) * group_scale
            else:
                up = tl.dot(a, c, up, max_num_imprecise_acc=PROMOTE, out_dtype=SUM)

    # Epilogue and store.
    value = acc.to(tl.float32) * tl.load(weight_scale + columns, mask=column_ok, other=0.0)[None, :]
    if ACTIVATION == "swiglu":
        up = up.to(tl.float32) * tl.load(weight_scale + N + columns, mask=column_ok, other=0.0)[None, :]
    if not GROUPED:
        row_scale = tl.load(x_scale + rows, mask=row_ok, other=0.0)[:, None]
        value *= row_scale
        if ACTIVATION == "swiglu":
            up *= row_scale
    value = _activated(value, up, None, None, None, bias, layer_scale, columns, N, ACTIVATION)
    mask = row_ok[:, None] & column_ok[None, :]
    if residual is not None:
        offsets = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    if y_scale is not None:
        tl.static_assert(BLOCK_N == 128)
        value, group_scale = in_8_bits(value, y.dtype.element_ty)  # beyond N everything was loaded as 0
        tl.store(y_scale + rows.to(tl.int64) * tl.cdiv(N, BLOCK_N) + tile_n, group_scale, mask=row_ok)
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], value.to(y.dtype.element_ty), mask=mask)


def _check(x, x_scale, weight, weight_scale, bias, activation, layer_scale, residual, dtype) -> None:
    """What `vitfast.ops` checks too: this launcher is also called by itself."""
    op = "quantized_linear"
    _common.check_dtype(op, torch.float8_e4m3fn, torch.int8, x=x)
    _common.check_dtype(op, x.dtype, weight=weight)
    _common.check_dtype(op, torch.float32, x_scale=x_scale, weight_scale=weight_scale)
    _common.check_dtype(op, dtype, bias=bias, layer_scale=layer_scale, residual=residual)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{op}: dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or x.shape[-1] < 1:
        raise ValueError(
            f"{op}: x [..., K] and weight [N, K] with K >= 1 do not fit: {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation == "swiglu" and weight.shape[0] % 2:
        raise ValueError(f"{op}: swiglu needs an even number of weight rows, got {weight.shape[0]}")
    width = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    shapes = [tuple(x.shape[:-1])]
    if x_scale.ndim == x.ndim:
        shapes = list(dict.fromkeys((*shapes[0], triton.cdiv(x.shape[-1], group)) for group in SCALE_GROUPS))
    if tuple(x_scale.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{op}: x_scale has shape {tuple(x_scale.shape)}, expected {expected}")
    _common.check_shape(op, "weight_scale", weight_scale, (weight.shape[0],))
    _common.check_shape(op, "bias", bias, (weight.shape[0],))
    _common.check_shape(op, "layer_scale", layer_scale, (width,))
    _common.check_shape(op, "residual", residual, (*x.shape[:-1], width))
    _common.check_last_contiguous(op, weight=weight, weight_scale=weight_scale, bias=bias, layer_scale=layer_scale)
    if not x_scale.is_contiguous():
        raise ValueError(f"{op}: x_scale must be contiguous, got strides {x_scale.stride()}")


@_common.on_its_device
def quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    requantize: bool = False,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vitfast.ops.quantized_linear` on CUDA; see there for the arguments.

    Args:
        x: [..., K], rows at one stride. x_scale: contiguous. weight: [N, K] ([2F, K] for "swiglu"), rows at any stride.
        residual: of the output's shape, rows at one stride.
        config: a member of CONFIGS, not the tuning table's or `pick_config`'s choice; with `requantize` one of 128
            columns.

    Returns:
        [..., N] in `dtype`, contiguous; with `requantize` in x's dtype, and its scales [..., ceil(N / 128)].

    Raises:
        ValueError: for a shape, dtype, stride, device or activation that does not fit.
    """
    op = "quantized_linear"
    device = _common.check_device(
        op, x=x, x_scale=x_scale, weight=weight, weight_scale=weight_scale,
        bias=bias, layer_scale=layer_scale, residual=residual,
    )  # fmt: skip
    _check(x, x_scale, weight, weight_scale, bias, activation, layer_scale, residual, dtype)
    gated = activation == "swiglu"
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    x_rows = _common.rows_view(op, "x", x)
    residual_rows = None if residual is None else _common.rows_view(op, "residual", residual)
    rows, inner = x_rows.shape
    y = x.new_empty((*x.shape[:-1], width), dtype=x.dtype if requantize else dtype)
    y_scale = None
    if requantize:
        y_scale = x.new_empty((*x.shape[:-1], triton.cdiv(width, SCALE_GROUP)), dtype=torch.float32)
    if not rows or not width:
        return y if y_scale is None else (y, y_scale)
    group = scale_group(x, x_scale)
    if config is None:
        key = tuning_key(rows, inner, width, x.dtype, gated=gated, requantize=requantize, group=group)
        config = _common.tuned(op, device, CONFIGS, key) or pick_config(
            rows, width, sms=_common.num_sms(device), gated=gated, requantize=requantize
        )
    if requantize and config.blocks["BLOCK_N"] != SCALE_GROUP:
        raise ValueError(f"{op}: config {config.name} has tiles of other than {SCALE_GROUP} columns, a group of scales")
    tiles = triton.cdiv(rows, config.blocks["BLOCK_M"]) * triton.cdiv(width, config.blocks["BLOCK_N"])
    _quantized_linear_kernel[(tiles,)](
        y=y, y_scale=y_scale, x=x_rows, x_scale=x_scale, weight=weight, weight_scale=weight_scale,
        bias=bias, layer_scale=layer_scale, residual=residual_rows,
        x_stride=x_rows.stride(0),
        weight_stride=weight.stride(0),
        residual_stride=0 if residual_rows is None else residual_rows.stride(0),
        M=rows, N=width, K=inner,
        ACTIVATION=activation or "", PROMOTE=PROMOTE, GROUPED=group > 0, GROUP=GROUP_M,
        **_with_group(config, group).options(),
    )  # fmt: skip
    return y if y_scale is None else (y, y_scale)


def _with_group(config: Config, group: int) -> Config:
    """The config where so many columns of x share a scale: a tile of K is a group, with as much in flight."""
    if not group:
        return config
    stages = config.num_stages * config.blocks["BLOCK_K"] // group
    return replace(config, blocks=config.blocks | {"BLOCK_K": group}, num_stages=stages)


# Epilogue -> activation and the optional tensors present: the products of a ViT block. groups: of 128, fc2's; heads:
# groups of 64, proj's.
_EPILOGUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bias": ("", ("bias",)),
    "gelu": ("gelu", ("bias",)),
    "gelu_requantize": ("gelu", ("bias", "y_scale")),
    "residual": ("", ("bias", "layer_scale", "residual")),
    "residual_groups": ("", ("bias", "layer_scale", "residual")),
    "residual_heads": ("", ("bias", "layer_scale", "residual")),
    "swiglu": ("swiglu", ("bias",)),
    "swiglu_requantize": ("swiglu", ("bias", "y_scale")),
}


def compile_cases() -> list[CompileCase]:
    """Both dtypes in every config with every epilogue of a ViT block that `pick_config` gives it, bf16 around."""
    large, small, one_group = CONFIGS
    served = {large.name: set(_EPILOGUES) - {"swiglu", "swiglu_requantize"}}
    served |= {small.name: {name for name in _EPILOGUES if "requantize" not in name}}
    served |= {one_group.name: {name for name in _EPILOGUES if "requantize" in name}}
    return [
        _compile_case(config, kind, epilogue)
        for config in CONFIGS
        for kind in ("fp8e4nv", "i8")
        for epilogue in _EPILOGUES
        if epilogue in served[config.name]
    ]


def _compile_case(config: Config, kind: str, epilogue: str) -> CompileCase:
    activation, present = _EPILOGUES[epilogue]
    tensors = dict.fromkeys(("y", "bias", "layer_scale", "residual"), "*bf16")
    tensors |= dict.fromkeys(("x", "weight", *(("y",) if "y_scale" in present else ())), f"*{kind}")
    tensors |= dict.fromkeys(("x_scale", "weight_scale", "y_scale"), "*fp32")
    group = {"residual_groups": 128, "residual_heads": 64}.get(epilogue, 0)
    config = _with_group(config, group)
    constexprs: dict[str, Any] = {"ACTIVATION": activation, "PROMOTE": PROMOTE, "GROUPED": group > 0}
    constexprs |= {"GROUP": GROUP_M, **config.blocks}
    constexprs |= {name: None for name in ("y_scale", "bias", "layer_scale", "residual") if name not in present}
    names = _quantized_linear_kernel.arg_names
    signature = {name: tensors.get(name, "i32") for name in names if name not in constexprs}
    return CompileCase(
        kernel="quantized_linear",
        config=f"{config.name}_{kind}_{epilogue}",
        fn=_quantized_linear_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name in signature if name != "M"),
        archs=(89, 90, 100) if kind == "fp8e4nv" else (80, 90, 100),
        tile={axis: config.blocks[f"BLOCK_{axis}"] for axis in "MNK"},
    )
