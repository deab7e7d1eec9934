"""Whole forwards against float64, and plans that fuse what a test wants fused."""

import dataclasses

import torch
from helpers.engines import PREPROCESS, engine

import vitfast
from vitfast import testing
from vitfast.engine import planner
from vitfast.models import vit
from vitfast.models.weights import prepare_weights
from vitfast.ops import accuracy


def oracle(config, images):
    """The same forward in float64 on unrounded weights, torch ops only."""
    plan = planner.build(config, device=testing.device(), dtype=torch.float64, backend="torch")
    weights = prepare_weights(
        config,
        testing.random_weights(config),
        plan,
        device=testing.device(),
        dtype=torch.float64,
        mean=PREPROCESS.mean,
        std=PREPROCESS.std,
    )
    if images.dtype != torch.uint8:
        images = images.double()
    return vit.forward(config, weights, weights.positions, images, plan)


def changed(plan, fused=(), fold_norm=None):
    """A plan that fuses these halves on Triton, and no others; what only a measurement puts into a plan, too."""
    calls = {site: vitfast.ops.registry.backend(site, "triton").call for site in fused}
    fold_norm = plan.fold_norm if fold_norm is None else fold_norm
    return dataclasses.replace(plan, **{"attention_block": None, "mlp": None} | calls, fold_norm=fold_norm)


def check(config, images, dtype, backend, **plan_changes):
    """Every output of a backend against float64, measured against the torch backend's own error."""
    candidate, baseline = engine(config, dtype=dtype, backend=backend), engine(config, dtype=dtype, backend="torch")
    if plan_changes:
        runner = candidate.runner
        runner.plan = changed(runner.plan, **plan_changes)
        runner.weights = prepare_weights(
            config,
            testing.random_weights(config),
            runner.plan,
            device=runner.device,
            dtype=runner.dtype,
            mean=PREPROCESS.mean,
            std=PREPROCESS.std,
        )
    got, base, want = candidate(images), baseline(images), oracle(config, images)
    for field in ("tokens", "embedding", "logits"):
        values = [getattr(output, field) for output in (got, want, base)]
        if values[1] is None:
            assert values[0] is None
        else:
            accuracy.assert_close(*values, what=f"{backend} {field}")
