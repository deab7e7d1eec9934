"""Which products of a quantised model are worth keeping in bf16: measured on images, one product at a time.

Every product of every block is quantised alone, in a model otherwise in bf16, and judged by the cosine of the image
embeddings to those of bf16. Then all are quantised, and the worst go back to bf16, one after another, until the
cosine of the whole reaches the target. (Sensitivity by one layer at a time as in HAWQ, Dong et al. 2019.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitfast.engine.calibration import TARGET, Calibration
from vitfast.engine.dtypes import QUANTIZED
from vitfast.engine.engine import Engine
from vitfast.engine.sites import kept_products
from vitfast.models.checkpoints import Checkpoint
from vitfast.models.plan import PRODUCTS
from vitfast.models.weights import prepare_weights

BATCH = 32


def calibrate(
    checkpoint: Checkpoint,
    images: Tensor,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None,
    backend: str = "auto",
    keep: tuple[str, ...] = (),
    target: float = TARGET,
) -> Calibration:
    """Measure each product's effect and choose which stay in bf16.

    Args:
        images: as `Engine.__call__` takes them, a hundred or so of the kind the model will see.
        device, dtype, backend, keep: as for `vitfast.load`; what `keep` names is in bf16 throughout.
        target: least mean cosine of the embeddings to bf16's.

    Raises:
        ValueError: for images that do not fit, none, or whose embeddings are not finite; a target outside (0, 1).
    """
    if not isinstance(dtype, str) or dtype not in QUANTIZED:
        raise ValueError(f"calibration is for dtype {' or '.join(map(repr, QUANTIZED))}, got {dtype!r}")
    if not 0 < target < 1:
        raise ValueError(f"target must be between 0 and 1, got {target}")
    # With every product kept the plan has both forms of each, and these weights are bf16's.
    engine = Engine(checkpoint, device=device, dtype=dtype, backend=backend, graphs=False, keep=PRODUCTS)
    always = kept_products(engine.config.depth, keep, QUANTIZED[dtype])
    plan = replace(engine.plan, keep=frozenset())
    plain = engine._weights
    other = prepare_weights(engine.config, checkpoint.weights, plan, device=engine.device, dtype=engine.dtype)
    names = [f"blocks.{i}.{site}" for i in range(engine.config.depth) for site in PRODUCTS]

    def embed(kept: frozenset[str]) -> Tensor:
        blocks = tuple(
            replace(block, **{s: getattr(its, s) for s in PRODUCTS if f"blocks.{i}.{s}" not in kept})
            for i, (block, its) in enumerate(zip(plain.blocks, other.blocks, strict=True))
        )
        engine._weights = replace(plain, blocks=blocks)
        return torch.cat([engine(part).embedding.double() for part in images.split(BATCH)])

    want = embed(frozenset(names))
    if not want.numel() or not want.isfinite().all():
        raise ValueError(f"calibration needs images with finite embeddings, got images of shape {tuple(images.shape)}")

    def cosine(kept: frozenset[str]) -> float:
        return torch.cosine_similarity(embed(kept), want).mean().item()

    measured = {name: cosine(frozenset(names) - {name}) for name in names if name not in always}
    alone = dict(sorted(measured.items(), key=lambda item: item[1]))
    kept, waiting = sorted(always), list(alone)
    before = after = cosine(frozenset(kept))
    while after < target and waiting:
        kept.append(waiting.pop(0))
        after = cosine(frozenset(kept))
    return Calibration(dtype, images.shape[0], target, alone, tuple(kept), before, after)
