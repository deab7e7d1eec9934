"""What runs each part of the forward: the table of its sites, and a plan that has an implementation for each."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """A place where the forward calls an op. Its sizes are those of `vitfast.engine.sites.site_dims`.

    Attributes:
        name: as plans and predictions have it; the field of `Plan`. op: a name in `vitfast.ops.OPS`.
        product: the product of a block ("qkv", "proj", "fc1", "fc2") whose weights it reads, or "".
        quantized: whether it reads or writes 8 bits; only a quantised model has it.
        parts: the sites whose work it does in one launch, or without a pass that quantises.
        passes_to: the site that reads what it writes; a plan has both or neither.
        optional: a forward can do without it; others then do its work.
        features: what it asks of its op: norm (folded), activation, residual, stats, requantize (8 bits out), group
            scales or head scales (of the rows that it reads).
    """

    name: str
    op: str
    product: str = ""
    quantized: bool = False
    parts: tuple[str, ...] = ()
    passes_to: str = ""
    optional: bool = False
    features: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether it is half a block in one launch."""
        return bool(self.parts) and not self.quantized


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("patch_embed", "patch_embed"),
        Site("layer_norm", "layer_norm"),
        Site("row_stats", "row_stats", optional=True),
        Site("qkv", "linear", "qkv", features=("norm",)),
        Site("attention", "attention"),
        Site("proj", "linear", "proj", features=("residual", "stats")),
        Site("attention_block", "attention_block", parts=("qkv", "attention", "proj"), optional=True),
        Site("fc1", "linear", "fc1", features=("norm", "activation")),
        Site("fc2", "linear", "fc2", features=("residual", "stats")),
        Site("mlp", "mlp", parts=("fc1", "fc2"), optional=True),
        Site("head", "linear"),
        Site("quantize", "quantize", quantized=True, features=("norm",)),
        Site("quantized_qkv", "quantized_linear", "qkv", quantized=True),
        Site("quantized_proj", "quantized_linear", "proj", quantized=True, features=("residual",)),
        Site("quantized_fc1", "quantized_linear", "fc1", quantized=True, features=("activation",)),
        Site("quantized_fc2", "quantized_linear", "fc2", quantized=True, features=("residual",)),
        Site(
            "fc1_requantize", "quantized_linear", "fc1", quantized=True, optional=True,
            parts=("quantized_fc1", "quantize"), passes_to="fc2_group_scales", features=("activation", "requantize"),
        ),
        Site(
            "fc2_group_scales", "quantized_linear", "fc2", quantized=True, optional=True,
            parts=("quantized_fc2",), features=("group scales", "residual"),
        ),
        Site(
            "attention_quantize", "attention", quantized=True, optional=True,
            parts=("attention", "quantize"), passes_to="proj_head_scales", features=("requantize",),
        ),
        Site(
            "proj_head_scales", "quantized_linear", "proj", quantized=True, optional=True,
            parts=("quantized_proj",), features=("head scales", "residual"),
        ),
    )
}  # fmt: skip
"""Where the forward calls an op, by name. All else that is said of sites is derived from this table."""

PRODUCTS = tuple(site.name for site in SITES.values() if site.product == site.name)
"""The products of a block: those that can be quantised."""


class PatchEmbedOp(Protocol):
    """`vitfast.ops.patch_embed`, on a weight that `Plan.packs` may have packed."""

    def __call__(
        self, images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, prefix: Tensor | None, /,
        *, patch_size: tuple[int, int], channels_last: bool,
    ) -> Tensor:  # fmt: skip
        """Shapes, dtypes and errors are those of the op."""


class LayerNormOp(Protocol):
    """`vitfast.ops.layer_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, /) -> Tensor:
        """Shapes, dtypes and errors are those of the op."""


class RowStatsOp(Protocol):
    """`vitfast.ops.row_stats`."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Shapes, dtypes and errors are those of the op."""


class LinearOp(Protocol):
    """`vitfast.ops.linear`, on a weight that `Plan.packs` may have packed. A Tensor; with `stats` a pair of them."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, /, *, activation: str | None = None,
        layer_scale: Tensor | None = None, residual: Tensor | None = None, row_stats: Tensor | None = None,
        weight_sum: Tensor | None = None, eps: float = 1e-6, stats: bool = False,
    ) -> Any:  # fmt: skip
        """Shapes, dtypes and errors are those of the op."""


class AttentionOp(Protocol):
    """`vitfast.ops.attention` of q, k and v [B, N, H, D]. A Tensor; with `quantize` values and scales.

    `heads`: norm and rotation of q and k, by the names of `vitfast.ops.heads.OPTIONS`.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, /, *, bias: Tensor | None = None, scale: float | None = None,
        quantize: torch.dtype | None = None, **heads: Any,
    ) -> Any:  # fmt: skip
        """Shapes, dtypes and errors are those of the op."""


class AttentionBlockOp(Protocol):
    """`vitfast.ops.attention_block`. A Tensor; with `stats` a pair of them."""

    def __call__(
        self, x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, /,
        *, heads: int, layer_scale: Tensor | None, residual: Tensor, weight_sum: Tensor | None = None,
        eps: float = 1e-6, stats: bool = False,
    ) -> Any:  # fmt: skip
        """Shapes, dtypes and errors are those of the op."""


class MlpOp(Protocol):
    """`vitfast.ops.mlp`. A Tensor; with `stats` a pair of them."""

    def __call__(
        self, x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, /,
        *, activation: str, layer_scale: Tensor | None, residual: Tensor, weight_sum: Tensor | None = None,
        eps: float = 1e-6, stats: bool = False,
    ) -> Any:  # fmt: skip
        """Shapes, dtypes and errors are those of the op."""


class QuantizeOp(Protocol):
    """`vitfast.ops.quantize`: values in 8 bits and their scales."""

    def __call__(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        /,
        *,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """Shapes, dtypes and errors are those of the op."""


class QuantizedLinearOp(Protocol):
    """`vitfast.ops.quantized_linear`. A Tensor; with `requantize` values in 8 bits and their scales."""

    def __call__(
        self, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, /, *,
        activation: str | None = None, layer_scale: Tensor | None = None, residual: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16, requantize: bool = False,
    ) -> Any:  # fmt: skip
        """Shapes, dtypes and errors are those of the op."""


def absent(*args: Any, **kwargs: Any) -> Any:
    """Stands in a plan for an op that the model does not have: plain products or quantised ones, patches under a stem.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("the forward called a site that its plan does not have")


@dataclass(frozen=True)
class Plan:
    """The implementation of each site, by its name, and how the forward is put together.

    Attributes:
        row_stats ... proj_head_scales: as the op they are typed for; None where an optional one is not in use.
            `attention_block` and `mlp` take the place of their parts; `fc1_requantize` and `attention_quantize` pass
            8 bits on to `fc2_group_scales` and `proj_head_scales`.
        backends: site -> "torch", "triton" or "native", of all sites in use.
        fold_norm: LayerNorm is a correction inside the following product, from statistics that the previous wrote.
        quick_gelu_as_silu: the 1.702 of x * sigmoid(1.702 x) moves into fc1 and its inverse into fc2, for backends
            that fuse SiLU only.
        packs: of some sites, what turns their weight [N, K] into the form that they read; patch_embed's is told of
            the images, too.
        quantized: the dtype in which the products of the blocks are computed, None for that of the model;
            those named in `skip_quantize` ("blocks.3.fc2") are left as they are.
        measured: what the choices were made by, for each site that had one (see `vitfast.engine.planner.measure`).
    """

    layer_norm: LayerNormOp
    attention: AttentionOp
    head: LinearOp
    backends: Mapping[str, str]
    patch_embed: PatchEmbedOp = absent
    qkv: LinearOp = absent
    proj: LinearOp = absent
    fc1: LinearOp = absent
    fc2: LinearOp = absent
    row_stats: RowStatsOp | None = None
    attention_block: AttentionBlockOp | None = None
    mlp: MlpOp | None = None
    quantize: QuantizeOp = absent
    quantized_qkv: QuantizedLinearOp = absent
    quantized_proj: QuantizedLinearOp = absent
    quantized_fc1: QuantizedLinearOp = absent
    quantized_fc2: QuantizedLinearOp = absent
    fc1_requantize: QuantizedLinearOp | None = None
    fc2_group_scales: QuantizedLinearOp = absent
    attention_quantize: AttentionOp | None = None
    proj_head_scales: QuantizedLinearOp = absent
    fold_norm: bool = False
    quick_gelu_as_silu: bool = False
    packs: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    quantized: torch.dtype | None = None
    skip_quantize: frozenset[str] = frozenset()
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """Whether half a block is one launch, or each half."""
        return self.attention_block is not None or self.mlp is not None

    def __repr__(self) -> str:
        lines = [f"  {site}: {name}{f' (ms: {times})' if times else ''}" for site, name, times in self._rows()]
        return "\n".join([f"Plan({', '.join(self._ways()) or 'plain'})", *lines])

    def _repr_html_(self) -> str:
        cells = [("part", "runs", "ms, as measured"), *self._rows()]
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
        return f"<b>Plan</b>: {html.escape(', '.join(self._ways()) or 'plain')}<table>{rows}</table>"

    def _ways(self) -> list[str]:
        """How the forward is put together, in words."""
        ways = ["norms folded"] if self.fold_norm else []
        ways += [f"{site} in one op" for site in ("attention_block", "mlp") if site in self.backends]
        return ways + ([f"products in {str(self.quantized).removeprefix('torch.')}"] if self.quantized else [])

    def _rows(self) -> list[tuple[str, str, str]]:
        """(site, backend, milliseconds of each backend that was measured there, the fastest first)."""
        rows = []
        for site, name in self.backends.items():
            times = sorted(self.measured.get(site, {}).get("ms", {}).items(), key=lambda item: item[1])
            rows.append((site, name, ", ".join(f"{backend} {ms:.3g}" for backend, ms in times)))
        return rows
