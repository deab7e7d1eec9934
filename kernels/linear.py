"""act(norm(x) Wᵀ + b) * layer_scale + residual, in one pass over the output.

    x [M, K], W [N, K] -> y [M, N]; "swiglu": W [2F, K], gate rows first, y [M, F] = silu(gate) * up
    norm: LayerNorm folded into the product, rstd * (x Wᵀ - mean * weight_sum), where mean and rstd
          come from per-128-column (mean, M2) pairs of x, combined by Chan's formula
    stats: the same pairs of y, as stored, for the LayerNorm that follows

Fused: the folded LayerNorm, bias, activation, LayerScale, residual and row statistics; nothing is
written but y and the statistics. Dtypes: float32, float16, bfloat16; fp32 accumulation and epilogue
(float32 multiplies in full precision, not TF32). Bound by FLOPs at ViT widths and M in the
thousands, by the bytes of W at small M.

Two kernels (`_linear_kernels.py`) share the epilogue, both persistent in grouped order (tiles that run together
share operands in L2): `_linear_tma_kernel` moves tiles with the tensor memory accelerator (sm_90 and later,
16-bit dtypes, rows of a multiple of 16 bytes); `_linear_kernel` takes everything else. With few rows there are fewer
tiles than multiprocessors: K may then be split among programs, which write bare fp32 sums, and `_linear_sum_kernel`
adds these up, part after part, and does the epilogue. There are no atomics: the bits are the same every time.

Sources: Ba, Kiros, Hinton 2016 (LayerNorm); Chan, Golub, LeVeque 1979 (combining statistics);
Shazeer 2020 (SwiGLU); Touvron et al. 2021 (LayerScale).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vitfast.kernels import _common
from vitfast.kernels._common import DTYPES, STATS_TILE, CompileCase, Config
from vitfast.kernels._linear_configs import (
    CONFIGS,
    FLOAT32_CONFIGS,
    GROUP_M,
    SUM_CONFIG,
    TMA_CONFIGS,
    check_config,
    pick_config,
    split_of,
    tuning_key,
    uses_tma,
    widest_tile,
)
from vitfast.kernels._linear_kernels import _linear_kernel, _linear_sum_kernel, _linear_tma_kernel

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu")

CAPABILITIES: dict[str, Any] = {"dtypes": DTYPES, "min_capability": (8, 0), "limits": {}}


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
            rows, width, x.dtype, inner=inner, tma=tma, sms=sms, gated=gated, stats=stats
        )
    check_config(config, x.dtype, tma, gated, stats)
    split = split_of(config)
    partial = x.new_empty((split, rows, width), dtype=torch.float32) if split > 1 else None
    epilogue = {
        "bias": bias, "layer_scale": layer_scale, "row_stats": row_stats, "weight_sum": weight_sum,
        "eps": eps, "ACTIVATION": activation or "",
        "STATS_BLOCK": triton.next_power_of_2(triton.cdiv(inner, STATS_TILE)),
    }  # fmt: skip
    if partial is None:
        _product(config, sms, (y, y_stats, None), x_rows, weight, residual_rows, epilogue)
        return (y, y_stats) if y_stats is not None else y
    bare = {**dict.fromkeys(epilogue), "eps": eps, "ACTIVATION": "", "STATS_BLOCK": 1}
    _product(config, sms, (None, None, partial), x_rows, weight, None, bare)
    sum_m, sum_n = SUM_CONFIG.blocks["BLOCK_M"], SUM_CONFIG.blocks["BLOCK_N"]
    _linear_sum_kernel[(triton.cdiv(rows, sum_m) * triton.cdiv(width, sum_n),)](
        y, y_stats, partial, residual=residual_rows,
        residual_stride=0 if residual_rows is None else residual_rows.stride(0),
        M=rows, N=width, K=inner, SPLIT_K=split, **epilogue, **SUM_CONFIG.options(),
    )  # fmt: skip
    return (y, y_stats) if y_stats is not None else y


def _product(
    config: Config,
    sms: int,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    epilogue: dict[str, Any],
) -> None:
    """Launch the kernel of a config on matrices. `outputs`: y, y_stats and partial, as the kernels take them."""
    y, y_stats, partial = outputs
    (rows, inner), width = x.shape, (y if partial is None else partial).shape[-1]
    block_m, block_n, block_k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    split = split_of(config)
    jobs = triton.cdiv(rows, block_m) * triton.cdiv(width, block_n) * split
    # Tiles of 4 warps leave room for a second program, which works while the first is in its epilogue.
    programs = min(jobs, sms * (8 // config.num_warps))
    sizes = {"M": rows, "N": width, "K": inner, "GROUP": GROUP_M}
    options = {**epilogue, **sizes, **config.options(), "SPLIT_K": split}
    if config in TMA_CONFIGS:
        part = [block_m, min(block_n, 128)]
        _linear_tma_kernel[(programs,)](
            y=None if y is None else TensorDescriptor.from_tensor(y.view(-1, width), part),
            y_stats=y_stats,
            partial=partial,
            x=TensorDescriptor.from_tensor(x, [block_m, block_k]),
            weight=TensorDescriptor.from_tensor(weight, [block_n, block_k]),
            residual=None if residual is None else TensorDescriptor.from_tensor(residual, part),
            **options,
        )
    else:
        _linear_kernel[(programs,)](
            y=y, y_stats=y_stats, partial=partial, x=x, weight=weight, residual=residual,
            x_stride=x.stride(0),
            weight_stride=weight.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            **options,
        )  # fmt: skip


# Epilogue -> activation and the optional tensors present: the products of a ViT block.
_EPILOGUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gelu": ("gelu", ("bias",)),
    "norm_gelu": ("gelu", ("bias", "row_stats", "weight_sum")),
    "residual_stats": ("", ("y_stats", "bias", "layer_scale", "residual")),
    "norm_swiglu": ("swiglu", ("bias", "row_stats", "weight_sum")),
}


def compile_cases() -> list[CompileCase]:
    """Every config with every epilogue of a ViT block that it serves, at K = 6 to 8 tiles of statistics.

    A config that splits K has no epilogue; the kernel that adds up its parts has them.
    """
    products = [
        _compile_case(config, name)
        for config in CONFIGS
        for name in (_EPILOGUES if split_of(config) == 1 else {"part": None})
        if not (name == "residual_stats" and config.blocks["BLOCK_N"] % STATS_TILE)
        and config.blocks["BLOCK_N"] <= widest_tile(gated="swiglu" in name)
    ]
    return products + [_sum_case(name) for name in _EPILOGUES if "swiglu" not in name]


def _compile_case(config: Config, epilogue: str) -> CompileCase:
    activation, present = _EPILOGUES.get(epilogue, ("", ()))
    outputs = ("partial",) if epilogue == "part" else ("y",)
    tma, element = config in TMA_CONFIGS, "fp32" if config in FLOAT32_CONFIGS else "bf16"
    m, n, k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    tensors = dict.fromkeys(("y", "x", "weight", "bias", "layer_scale", "residual"), f"*{element}")
    tensors |= dict.fromkeys(("y_stats", "partial", "row_stats", "weight_sum"), "*fp32")
    if tma:
        blocks = {"y": (m, min(n, 128)), "residual": (m, min(n, 128)), "x": (m, k), "weight": (n, k)}
        tensors |= {name: f"tensordesc<{element}[{rows},{columns}]>" for name, (rows, columns) in blocks.items()}
    constexprs = {"ACTIVATION": activation, "STATS_BLOCK": 8, "GROUP": GROUP_M, **config.blocks}
    constexprs["SPLIT_K"] = split_of(config)
    constexprs |= {name: None for name in tensors if name not in (*outputs, "x", "weight", *present)}
    return _case(
        _linear_tma_kernel if tma else _linear_kernel, config, epilogue, tensors, constexprs, {"M": m, "N": n, "K": k}
    )


def _sum_case(epilogue: str) -> CompileCase:
    activation, present = _EPILOGUES[epilogue]
    tensors = dict.fromkeys(("y", "bias", "layer_scale", "residual"), "*bf16")
    tensors |= dict.fromkeys(("y_stats", "partial", "row_stats", "weight_sum"), "*fp32")
    constexprs = {"ACTIVATION": activation, "STATS_BLOCK": 8, "SPLIT_K": 8, **SUM_CONFIG.blocks}
    constexprs |= {name: None for name in tensors if name not in ("y", "partial", *present)}
    m, n = SUM_CONFIG.blocks["BLOCK_M"], SUM_CONFIG.blocks["BLOCK_N"]
    return _case(_linear_sum_kernel, SUM_CONFIG, epilogue, tensors, constexprs, {"M": m, "N": n})


def _case(
    fn: Any, config: Config, epilogue: str, tensors: dict[str, str], constexprs: dict[str, Any], tile: dict[str, int]
) -> CompileCase:
    signature = {
        name: tensors.get(name, "fp32" if name == "eps" else "i32") for name in fn.arg_names if name not in constexprs
    }
    return CompileCase(
        kernel="linear_sum" if fn is _linear_sum_kernel else "linear",
        config=f"{config.name}_{epilogue}",
        fn=fn,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=tuple(name for name, kind in signature.items() if kind[0] == "*" or (kind == "i32" and name != "M")),
        archs=tuple(arch for arch in (80, 90, 100) if divmod(arch, 10) >= config.min_capability),
        tile=tile,
    )
