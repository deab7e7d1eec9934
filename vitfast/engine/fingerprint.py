"""A hash that says which model an engine runs: two agree in it only if architecture and weights are the same."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from torch import Tensor

from vitfast.models.checkpoints import Checkpoint


def fingerprint(checkpoint: Checkpoint) -> str:
    """The first 32 hex digits of a SHA-256 over the architecture and the weights as stored, those of stem and neck too.

    The model's name plays no part, nor where it lies, nor in what it is computed. It takes a pass over the weights.

    Raises:
        ValueError: if blocks have code of their own, which no hash can tell from other code.
    """
    if checkpoint.own_blocks:
        raise ValueError(f"blocks {sorted(checkpoint.own_blocks)} have code of their own, which has no fingerprint")
    described = asdict(checkpoint.config)
    whole = hashlib.sha256(repr(sorted((k, v) for k, v in described.items() if k != "name")).encode())
    weights = dict(checkpoint.weights)
    for part, module in (("stem", checkpoint.stem), ("neck", checkpoint.neck)):
        if module is not None:
            weights |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    names = sorted(weights)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        for name, digest in zip(names, pool.map(lambda name: _digest(weights[name]), names), strict=True):
            whole.update(f"{name} {weights[name].dtype} {list(weights[name].shape)} ".encode() + digest)
    return whole.hexdigest()[:32]


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
