"""`vitfast.load`: any source of weights to an engine that is ready to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitfast.engine.calibration import TARGET
from vitfast.engine.engine import Engine
from vitfast.models.checkpoints import load as load_checkpoint

if TYPE_CHECKING:
    from os import PathLike


def load(
    source: str | PathLike[str] | torch.nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    keep: tuple[str, ...] = (),
    calibration: Tensor | None = None,
    target: float = TARGET,
    allow_pickle: bool = False,
    revision: str | None = None,
    weights_key: str | None = None,
) -> Engine:
    """Load a Vision Transformer and make it ready to run.

    Args:
        source: a live timm, transformers or torchvision model, of which the engine is a snapshot; a directory or
            .safetensors file; or a Hugging Face hub id.
        device: "cpu", "cuda", "cuda:1"...; the GPU if there is one by default.
        dtype: "fp32", "fp16", "bf16" or a torch dtype; bf16 on a GPU and fp32 on the CPU by default. "fp8" and
            "int8" compute the products of the blocks on quantised operands and all else in bf16; on the CPU
            that is an emulation, for accuracy and not for speed (docs/numerics.md).
        backend: "auto", or "torch", "triton" or "native" to force one. A forced "torch" runs PyTorch's
            plain ops; on the CPU that gives the bits of the model's own library, at its speed.
        keep: products that "fp8" and "int8" leave in bf16: "fc2" for every block's, "blocks.3.fc2" for one.
        calibration: images as the engine takes them, some dozens of the kind it will see: products are measured on
            them and the worst kept in bf16, until the embeddings' mean cosine to bf16 is `target`. What was
            measured and kept is the engine's `calibration`.
        allow_pickle: read .bin, .pth, .pt, .ckpt and .pth.tar files too (weights only, but still a pickle).
        revision: of a hub id.
        weights_key: which of a training checkpoint's state dicts, "state_dict" or "model_ema"; by default the one that
            timm's own loader takes, the averaged weights first, with a warning that says so.

    Raises:
        ValueError, CheckpointError: if the source, device or dtype does not fit; with the reason.
        BackendError: if a forced backend cannot run this model here; with every reason.
    """
    checkpoint = load_checkpoint(source, allow_pickle=allow_pickle, revision=revision, weights_key=weights_key)
    found = None
    if calibration is not None:
        from vitfast.engine.calibrate import calibrate

        found = calibrate(
            checkpoint, calibration, device=device, dtype=dtype, backend=backend, keep=keep, target=target
        )
        keep = found.kept
    engine = Engine(checkpoint, device=device, dtype=dtype, backend=backend, keep=keep)
    engine.calibration = found
    return engine
