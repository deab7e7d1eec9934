"""The cases of kernel benchmarks: those of `vitfast.engine.cases`, attention's backward and a whole block.

The shapes are in shapes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitfast.engine import cases
from vitfast.engine.cases import EPILOGUES, STATS_EPS, Call, Dims, Maker, Op, backend_options
from vitfast.ops import reference

__all__ = ["EPILOGUES", "OPS", "STATS_EPS", "Call", "Case", "Dims", "Maker", "Op", "backend_options", "block",
           "gate_size", "gradients", "nbytes"]  # fmt: skip


def nbytes(*values: Any) -> int:
    """Bytes of all tensors among the values, each counted once."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, (list, tuple, dict)):
            total += nbytes(*(value.values() if isinstance(value, dict) else value))
    return total


def _attention_backward(d: Dims, make: Maker) -> Call:
    call = _ATTENTION.inputs(d, make)
    gradient = make.normal(d["batch"], d["tokens"], d["heads"], d["head_dim"])
    return Call((*call.args, gradient), call.kwargs, (0, 1, 2, 3))


def gradients(attention: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward of an attention function: (q, k, v, gradient of the output) -> dq, dk, dv."""

    def run(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            out = attention(*leaves, **kwargs)
            return torch.autograd.grad(out, leaves, gradient.to(out.dtype))

    return run


def _block(d: Dims, make: Maker) -> Call:
    width, hidden = d["width"], d["hidden"]
    weights: dict[str, Tensor] = {}
    for name, rows, inner in (
        ("qkv", 3 * width, width),
        ("proj", width, width),
        ("fc1", hidden, width),
        ("fc2", width, hidden),
    ):
        weights |= {f"{name}.weight": make.normal(rows, inner, scale=inner**-0.5), f"{name}.bias": make.normal(rows)}
    for name in ("norm1", "norm2"):
        weights |= {f"{name}.weight": make.normal(width), f"{name}.bias": make.normal(width)}
    return Call((make.normal(d["batch"], d["tokens"], width), weights), {"heads": d["heads"]})


def block(x: Tensor, weights: Mapping[str, Tensor], *, heads: int, upcast: bool = False) -> Tensor:
    """A pre-norm transformer block in plain PyTorch, op by op; weights by the names of `vitfast.models.config`."""

    def of(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    linear: Any = reference.linear
    batch, tokens, width = x.shape
    h = reference.layer_norm(x, *of("norm1"), STATS_EPS, upcast=upcast)
    q, k, v = linear(h, *of("qkv"), upcast=upcast).view(batch, tokens, 3, heads, width // heads).unbind(2)
    mixed = reference.attention(q, k, v, upcast=upcast).view(batch, tokens, width)
    x = linear(mixed, *of("proj"), residual=x, upcast=upcast)
    h = reference.layer_norm(x, *of("norm2"), STATS_EPS, upcast=upcast)
    h = linear(h, *of("fc1"), activation="gelu", upcast=upcast)
    return linear(h, *of("fc2"), residual=x, upcast=upcast)


def _block_work(d: Dims) -> int:
    rows, width = d["batch"] * d["tokens"], d["width"]
    return 2 * rows * width * (4 * width + 2 * d["hidden"]) + 4 * rows * d["tokens"] * width


_ATTENTION = cases.OPS["attention"]
OPS: dict[str, Op] = {
    **cases.OPS,
    # 2 products forward, 4 for the gradients; computing the scores twice does not count.
    "attention_backward": replace(
        _ATTENTION,
        inputs=_attention_backward,
        flops=lambda d: 3 * _ATTENTION.flops(d),
        reference=lambda *args, upcast=False, **kwargs: gradients(_ATTENTION.reference)(*args, upcast=upcast, **kwargs),
        backend_op="attention",
    ),
    "block": Op(_block, _block_work, block, lambda d: {}),
}


@dataclass(frozen=True)
class Case(cases.Case):
    """As `vitfast.engine.cases.Case`, of any op that is benchmarked.

    `of_several`: there are such cases in other dtypes beside it, so that its name says which it is in.
    """

    of_several: bool = False
    table: ClassVar[Mapping[str, Op]] = OPS

    @property
    def name(self) -> str:
        """As of every case, the dtype at its end where there are several."""
        return f"{super().name} {str(self.dtype).removeprefix('torch.')}" if self.of_several else super().name


def gate_size(case: Case) -> int:
    """Rows or images that the float64 oracle is asked for: all, or at least two and as many as take it a second."""
    cost = max(case.flops, 1) / case.size
    elements = math.prod(v for k, v in case.dims.items() if k in ("width", "tokens", "heads", "head_dim"))
    return min(case.size, max(2, int(min(2e10 / cost, 4e6 / elements))))
