"""Which products of a quantised model are worth leaving in bf16: measured on images, one product at a time.

Every product of every block is quantised alone, in a model otherwise in bf16, and judged by the cosine of the image
embeddings to those of bf16. Then all are quantised, and the worst go back to bf16, one after another, until the
cosine of the whole reaches the target. (Sensitivity by one layer at a time as in HAWQ, Dong et al. 2019.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitfast.engine.calibration import TARGET, Calibration
from vitfast.engine.runner import Runner
from vitfast.engine.sites import skipped_products
from vitfast.models.checkpoints import Checkpoint
from vitfast.models.plan import PRODUCTS
from vitfast.models.weights import Block, prepare_weights

BATCH = 32


def calibrate(
    runner: Runner,
    checkpoint: Checkpoint,
    images: Tensor,
    *,
    skip_quantize: tuple[str, ...] = (),
    target: float = TARGET,
) -> Calibration:
    """Measure each product's effect and choose which stay in bf16.

    Args:
        runner: of this checkpoint, made with `skip_quantize=PRODUCTS`: its plan then has both forms of each product,
            and its weights are bf16's. They change meanwhile.
        images: as `Engine.__call__` takes them, a hundred or so of the kind the model will see.
        skip_quantize: products that are in bf16 throughout and not measured, as for `vitfast.load`.
        target: least mean cosine of the embeddings to bf16's.

    Raises:
        ValueError: for images that do not fit, none, or whose embeddings are not finite; a target outside (0, 1); a
            runner that quantises nothing.
    """
    quantized = runner.plan.quantized
    if quantized is None:
        raise ValueError(f"calibration is for dtype 'fp8' or 'int8', got {runner.precision!r}")
    if not 0 < target < 1:
        raise ValueError(f"target must be between 0 and 1, got {target}")
    depth = runner.config.depth
    always = skipped_products(depth, skip_quantize, quantized)
    plan, plain = replace(runner.plan, skip_quantize=frozenset()), runner.weights
    other = prepare_weights(runner.config, checkpoint.weights, plan, device=runner.device, dtype=runner.dtype)
    names = [
        f"blocks.{i}.{product}"
        for i, block in enumerate(plain.blocks)
        if isinstance(block, Block)
        for product in PRODUCTS
    ]
    runner.check(images.shape, images.dtype)

    def forward(part: Tensor) -> Tensor:
        part = runner.prepare(part.to(runner.device), preprocessed=False)
        return runner.forward(part, runner.position(runner.size(part))).embedding.double()

    @torch.inference_mode()
    def embed(skipped: frozenset[str]) -> Tensor:
        blocks = []
        for i, (block, its) in enumerate(zip(plain.blocks, other.blocks, strict=True)):
            taken = [name for name in PRODUCTS if f"blocks.{i}.{name}" not in skipped]
            if isinstance(block, Block):
                block = replace(block, **{name: getattr(its, name) for name in taken})
            blocks.append(block)
        runner.weights = replace(plain, blocks=tuple(blocks))
        return torch.cat([forward(part) for part in images.split(BATCH)])

    want = embed(frozenset(names)) if images.shape[0] else torch.empty(0)
    if not want.numel() or not want.isfinite().all():
        raise ValueError(f"calibration needs images with finite embeddings, got images of shape {tuple(images.shape)}")

    def cosine(skipped: frozenset[str]) -> float:
        return torch.cosine_similarity(embed(skipped), want).mean().item()

    measured = {name: cosine(frozenset(names) - {name}) for name in names if name not in always}
    alone = dict(sorted(measured.items(), key=lambda item: item[1]))
    skipped, waiting = sorted(always), list(alone)
    before = after = cosine(frozenset(skipped))
    while after < target and waiting:
        skipped.append(waiting.pop(0))
        after = cosine(frozenset(skipped))
    return Calibration(runner.precision, images.shape[0], target, alone, tuple(skipped), before, after)
