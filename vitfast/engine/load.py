"""`vitfast.load`: any source of weights to an engine that is ready to run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitfast.engine import plan_cache
from vitfast.engine.calibrate import calibrate
from vitfast.engine.calibration import TARGET, Calibration
from vitfast.engine.dtypes import QUANTIZED
from vitfast.engine.engine import Engine
from vitfast.engine.runner import Runner
from vitfast.images.preprocess import Preprocess
from vitfast.models.checkpoints import load as load_checkpoint
from vitfast.models.checkpoints import saved
from vitfast.models.plan import PRODUCTS

if TYPE_CHECKING:
    from os import PathLike


def load(
    source: str | PathLike[str] | torch.nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    skip_quantize: tuple[str, ...] = (),
    calibration: Tensor | None = None,
    target: float = TARGET,
    allow_pickle: bool = False,
    revision: str | None = None,
    weights_key: str | None = None,
    model: str | None = None,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    deterministic: bool = False,
    keep: tuple[str, ...] | None = None,
) -> Engine:
    """Load a Vision Transformer and make it ready to run.

    Args:
        source: a live timm, transformers or torchvision model, of which the engine is a snapshot; a directory, also one
            that `Engine.save` wrote; a weight file; or a Hugging Face hub id.
        device: "cpu", "cuda", "cuda:1"...; the GPU if there is one by default.
        dtype: "fp32", "fp16", "bf16" or a torch dtype; bf16 on a GPU and fp32 on the CPU by default. "fp8" and
            "int8" compute the products of the blocks on quantised operands and all else in bf16. On a CPU "int8"
            needs AVX-512 VNNI to be fast and AVX2 to be multiplied in integers at all; elsewhere, and "fp8" on any
            CPU, it is an emulation, for accuracy and not for speed (docs/numerics.md).
        backend: "auto", or "torch", "triton" or "native" to force one. A forced "torch" runs PyTorch's
            plain ops; on the CPU that gives the bits of the model's own library, at its speed.
        skip_quantize: products that "fp8" and "int8" leave in bf16: "fc2" for every block's, "blocks.3.fc2" for one.
        calibration: images as the engine takes them, some dozens of the kind it will see: products are measured on
            them and the worst left in bf16, until the embeddings' mean cosine to bf16 is `target`. What was
            measured and left in bf16 is the engine's `calibration`.
        allow_pickle: read .bin, .pth, .pt, .ckpt and .pth.tar files too (weights only, but still a pickle).
        revision: of a hub id.
        weights_key: which of a training checkpoint's state dicts, "state_dict" or "model_ema"; by default the one that
            timm's own loader takes, the averaged weights first, with a warning that says so.
        model: the architecture of a bare weight file, by name: "vit_base_patch16_224" (timm), "vit_b_16" (torchvision),
            "dinov2_vits14" (the dinov2 repository), "ViT-B/32" (OpenAI's CLIP), "ViT-B-32" (open_clip).
        preprocess: how images are prepared, in place of what the source says: a `Preprocess`, or a mapping with some
            of size (shortest side, or (height, width)), crop, mean, std, interpolation, draft.
        deterministic: with backend "auto", choose backends by a fixed order and not by their times, so that the same
            weights and pixels give the same bits after every load (docs/numerics.md); on a GPU that is PyTorch's op
            unless a shipped table names another.
        keep: the name that `skip_quantize` had in 0.1.0; deprecated.

    Raises:
        ValueError, CheckpointError: if the source, device or dtype does not fit; with the reason.
        BackendError: if a forced backend cannot run this model here; with every reason.
    """
    if keep is not None:
        warnings.warn("vitfast.load(keep=) is now skip_quantize=", DeprecationWarning, stacklevel=2)
        if skip_quantize:
            raise ValueError(f"keep={keep!r} is the old name of skip_quantize={skip_quantize!r}: give one of them")
        skip_quantize = keep
    checkpoint = load_checkpoint(
        source,
        allow_pickle=allow_pickle,
        revision=revision,
        weights_key=weights_key,
        model=model,
        preprocess=preprocess,
    )
    if not isinstance(source, torch.nn.Module) and (folder := Path(source).expanduser()).is_dir():
        plan_cache.adopt(saved.plan(folder))
    options: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend, "deterministic": deterministic}
    measured: Calibration | None = None
    if calibration is not None:
        if not isinstance(dtype, str) or dtype not in QUANTIZED:
            raise ValueError(f"calibration is for dtype {' or '.join(map(repr, QUANTIZED))}, got {dtype!r}")
        runner = Runner(checkpoint, skip_quantize=PRODUCTS, **options)
        measured = calibrate(runner, checkpoint, calibration, skip_quantize=skip_quantize, target=target)
        skip_quantize = measured.skip_quantize
        del runner
    engine = Engine(checkpoint, skip_quantize=skip_quantize, **options)
    engine.calibration = measured
    return engine
