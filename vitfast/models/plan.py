"""What runs each part of the forward: the sites, and a plan that has an implementation for each."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SITES = (
    "patch_embed", "layer_norm", "row_stats", "qkv", "attention", "proj", "attention_block", "fc1", "fc2", "mlp",
    "head",
)  # fmt: skip
"""Where the forward calls an op; qkv, proj, fc1, fc2 and head are all `linear`, at their own shapes."""

PRODUCTS = ("qkv", "proj", "fc1", "fc2")
"""The products of a block: those that can be quantised."""
HIDDEN_SITES = ("hidden_fc1", "hidden_fc2")
"""fc1 and fc2 of a quantised MLP that hands its hidden rows on in 8 bits, with scales of groups: no pass between."""
MIXED_SITES = ("mixed_attention", "mixed_proj")
"""attention and proj of a quantised model whose attention writes 8 bits, with a scale for each head: no pass between.
Where the head dim is one of `ops.SCALE_GROUPS`."""
QUANTIZED_SITES = ("quantize", *(f"quantized_{site}" for site in PRODUCTS), *HIDDEN_SITES, *MIXED_SITES)
"""Where the forward of a quantised model calls an op; the products are `quantized_linear`."""


@dataclass(frozen=True)
class Plan:
    """The implementation of each site, and how the forward is put together.

    Every callable has the signature of the op's reference. `packs` turn the [N, K] weights of some
    sites into the form that the site's callable wants; patch_embed's is told of the images, too.
    `fold_norm`: LayerNorm is applied as a correction inside the following product, from statistics
    the previous product wrote.
    `fuse_attention`: qkv, attention and proj run as the one op `attention_block`, likewise with `fold_norm`.
    `fuse_mlp`: fc1, activation and fc2 run as the one op `mlp`, norm and statistics included if `fold_norm`.
    `quick_gelu_as_silu`: the 1.702 of x * sigmoid(1.702 x) moves into fc1 and its inverse into fc2, for backends
    that fuse SiLU only.
    `quantized`: the dtype in which the products of the blocks are computed, None for that of the model;
    the products named in `keep` ("blocks.3.fc2") are left as they are.
    `measured`: what the choices were made by, for each site that had one (see `vitfast.engine.planner.measure`).
    """

    calls: Mapping[str, Callable[..., Tensor]]
    backends: Mapping[str, str]
    fold_norm: bool = False
    fuse_attention: bool = False
    fuse_mlp: bool = False
    quick_gelu_as_silu: bool = False
    packs: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    quantized: torch.dtype | None = None
    keep: frozenset[str] = frozenset()
    measured: Mapping[str, Any] = field(default_factory=dict)

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
