"""What keeps an engine's results its own, whatever modes its caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def isolated(run: Callable[..., Result]) -> Callable[..., Result]:
    """Run a function without autograd, and neither in the caller's autocast nor in its inference mode.

    Autocast would round what is to be computed in the engine's dtype. Tensors that are made in inference mode cannot
    be saved for a backward pass, nor be written to outside of it: a probe on the outputs could not be trained, and
    buffers that are kept from one call to the next would belong to the first caller's mode.
    """

    @functools.wraps(run)
    def wrapper(*args: object, **kwargs: object) -> Result:
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast("cuda", enabled=False),
                torch.autocast("cpu", enabled=False),
            ):
                return run(*args, **kwargs)
        with torch.no_grad():
            return run(*args, **kwargs)

    return wrapper
