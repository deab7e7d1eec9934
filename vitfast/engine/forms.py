"""The ways a block can be put together, measured as wholes: with norms of their own, folded, or half in one launch.

Site by site a folded product stands beside one without a norm, which is less work: only the whole tells which form is
faster. Each is checked against the plain block in float64, over two blocks, so that what one hands on to the next is
right as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitfast.engine import clock
from vitfast.models import vit
from vitfast.models.config import ViTConfig
from vitfast.models.plan import Plan
from vitfast.models.weights import Weights, prepare_weights
from vitfast.ops import accuracy
from vitfast.ops.registry import Backend

PLAIN = "unfused"
PRODUCTS = ("qkv", "proj", "fc1", "fc2")
FOLDING = ("triton", "native")
"""Backends whose products read a folded norm and write row statistics."""


def candidates(chosen: Mapping[str, Backend], entries: Mapping[str, Mapping[str, Backend]], times: Any) -> Any:
    """The forms that the backends of a model's sites allow, PLAIN first: name -> backend by site.

    Args:
        chosen: the fastest right backend of every site.
        entries: site -> backend's name -> that backend, of those that were right there, in default order.
        times: site -> backend's name -> milliseconds; of those that have none the first counts.
    """
    halves = [site for site in ("attention_block", "mlp") if entries.get(site, {}).get("triton")]
    plain = {site: entry for site, entry in chosen.items() if site not in ("row_stats", "attention_block", "mlp")}
    made = {PLAIN: plain}
    stats = entries.get("row_stats", {}).get("triton")
    able = {site: [e for name, e in entries.get(site, {}).items() if name in FOLDING] for site in PRODUCTS}
    if stats is None or not all(able.values()):
        return made
    best = {
        site: min(found, key=lambda entry, site=site: times.get(site, {}).get(entry.name, 0.0))  # type: ignore[misc]
        for site, found in able.items()
    }
    made["folded"] = {**plain, "row_stats": stats, **best}
    for name in FOLDING:
        alone = {site: entries[site][name] for site in PRODUCTS if name in entries[site]}
        if alone.keys() == set(PRODUCTS) and alone != best:
            made[f"folded {name}"] = {**plain, "row_stats": stats, **alone}
    for fused in (halves[:1], halves[1:], halves) if len(halves) == 2 else (halves,):
        if fused:
            name = f"folded, {' and '.join(fused)} in one launch"
            made[name] = {**made["folded"], **{site: entries[site]["triton"] for site in fused}}
    return made


@torch.no_grad()
def measure(
    config: ViTConfig, plans: Mapping[str, Plan], plain: Plan, *, device: torch.device, dtype: torch.dtype, batch: int
) -> dict[str, Any]:
    """Check every form of a block against the plain one and time those that are right.

    Args:
        plans: by the name of the form. plain: of plain torch ops, which the others are compared with.

    Returns:
        ms: form -> median milliseconds of one block; refused: form -> why; out_of_memory: forms that memory was too
        short for, if there are any.
    """
    config = replace(config, depth=2)
    weights, x = _random(config, device, dtype, batch)
    exact = _blocks(config, _prepared(config, weights, plain, device, torch.float64), x.double(), plain)
    rounded = _blocks(config, _prepared(config, weights, plain, device, dtype), x, plain)
    record: dict[str, Any] = {"ms": {}, "refused": {}}
    runs = {}
    for name, plan in plans.items():
        try:
            prepared = _prepared(config, weights, plan, device, dtype)
            accuracy.assert_close(_blocks(config, prepared, x, plan), exact, rounded, what="two blocks")
            stats = vit.first_stats(plan, x)  # in a model, the block before writes them

            def run(plan: Plan = plan, prepared: Weights = prepared, stats: Tensor | None = stats) -> Any:
                return vit.run_block(config, prepared, 0, x, stats, plan, prepared.positions.of_block(config, 0))

            runs[name] = clock.captured(run, device)
        except Exception as error:  # a compiler's errors, a kernel's, a wrong result: all are reasons
            record["refused"][name] = f"{type(error).__name__}: {error}"
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                record.setdefault("out_of_memory", []).append(name)
    record["ms"] = dict(zip(runs, clock.time_calls(list(runs.values()), device), strict=True))
    return record


def _random(
    config: ViTConfig, device: torch.device, dtype: torch.dtype, batch: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Weights of a model, rounded to its dtype, and a residual stream [B, N, C]."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weights = {}
    for name, (shape, _) in config.weight_shapes().items():
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 1.0
        weights[name] = (normal(*shape) * scale).to(dtype)
    return weights, normal(batch, config.tokens(), config.width).to(dtype)


def _prepared(
    config: ViTConfig, weights: Mapping[str, Tensor], plan: Plan, device: torch.device, dtype: torch.dtype
) -> Weights:
    return prepare_weights(config, weights, plan, device=device, dtype=dtype)


def _blocks(config: ViTConfig, weights: Weights, x: Tensor, plan: Plan) -> Tensor:
    """Both blocks, the second on what the first hands on."""
    stats = vit.first_stats(plan, x)
    for i in range(config.depth):
        x, stats = vit.run_block(config, weights, i, x, stats, plan, weights.positions.of_block(config, i))
    return x
