"""What every launcher needs: configs as data and the choice among them, the device it runs on, checks of strides.

Nothing here knows about the rest of vitfast: `kernels/` imports torch, triton and itself only. Shapes and dtypes are
checked by `vitfast.ops`, once; launchers check what only they know: strides, and that Triton can run on the device.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import triton

DTYPES = ("float32", "float16", "bfloat16")

_listeners: list[list[str]] = []


@contextlib.contextmanager
def launched_configs() -> Iterator[list[str]]:
    """The names of the configs of all launches inside, in order; of all threads, for autograd has one of its own."""
    names: list[str] = []
    _listeners.append(names)
    try:
        yield names
    finally:
        _listeners[:] = [other for other in _listeners if other is not names]


@dataclass(frozen=True)
class Config:
    """One launch configuration of a kernel: block sizes and the compiler's options."""

    name: str
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    min_capability: tuple[int, int] = (8, 0)

    def options(self) -> dict[str, Any]:
        """What a launch passes on, noted for `launched_configs`.

        Products and sums are fused, which Triton 3.10 does only when told to.
        """
        for names in _listeners:
            names.append(self.name)
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def too_new(self, capability: tuple[int, int]) -> list[str]:
        """The reason why a GPU of this compute capability cannot run it, if there is one."""
        if capability >= self.min_capability:
            return []
        return [f"needs compute capability {'.'.join(map(str, self.min_capability))}"]


class Problem(Protocol):
    """What the choice of a config depends on; each op has its own."""

    @property
    def key(self) -> str:
        """The name of this problem in a tuning table."""


AnyConfig = TypeVar("AnyConfig", bound=Config)
AnyProblem = TypeVar("AnyProblem", bound=Problem)


def choose(
    op: str,
    device: torch.device,
    configs: Sequence[AnyConfig],
    problem: AnyProblem,
    why_not: Callable[[AnyConfig, AnyProblem], list[str]],
    pick: Callable[[AnyProblem], AnyConfig],
    config: AnyConfig | None,
) -> AnyConfig:
    """The config that was asked for, else the tuning table's, else the picked one.

    Args:
        why_not: every reason why a config cannot run a problem. pick: the choice where no table has one.

    Raises:
        ValueError: if the config that was asked for, or the table's, cannot run this problem; with all reasons.
    """
    config = config or tuned(op, device, configs, problem.key) or pick(problem)
    if reasons := why_not(config, problem):
        raise ValueError(f"{op}: config {config.name} cannot run this call: {'; '.join(reasons)}")
    return config


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 3 in the interpreter, so that persistent loops do loop."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (9, 0) in the interpreter, to run what Hopper runs."""
    if device.type != "cuda":
        return 9, 0
    return torch.cuda.get_device_capability(device)


@functools.cache
def tuned_choices(device: torch.device) -> dict[str, dict[str, str]]:
    """op -> tuning key -> config name, from configs/<gpu>.json; empty for a GPU that has no table.

    `vitfast bench sweep` writes such tables, of configs that were right and the fastest there.
    """
    if device.type != "cuda":
        return {}
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    path = Path(__file__).parents[1] / "configs" / f"{slug}.json"
    return json.loads(path.read_text()).get("configs", {}) if path.is_file() else {}


def tuned(op: str, device: torch.device, configs: Sequence[AnyConfig], key: str) -> AnyConfig | None:
    """The config that this GPU's table has for a call, or None.

    Raises:
        ValueError: if the table names a config that there is not.
    """
    name = tuned_choices(device).get(op, {}).get(key)
    if name is None:
        return None
    for config in configs:
        if config.name == name:
            return config
    raise ValueError(f"{op}: the tuning table of {device} names config {name!r} for {key!r}; there is no such config")


Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_its_device(launcher: Launcher) -> Launcher:
    """Make a launcher run on its first tensor's GPU: Triton launches on the current one, whatever it is given."""

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(args[0] if args else next(iter(kwargs.values()))):
            return launcher(*args, **kwargs)

    return cast(Launcher, launch)


def check_device(op: str, **tensors: torch.Tensor | None) -> torch.device:
    """Check that all given tensors are on one device that Triton can run on, and return it.

    Raises:
        ValueError: naming the tensor and its device.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, but {first[0]} is on {first[1]}; all must be on one device"
            )
    if first is None:
        raise ValueError(f"{op}: no tensor given")
    if first[1].type != "cuda" and not (first[1].type == "cpu" and interpreting()):
        raise ValueError(
            f"{op}: {first[0]} is on {first[1]}; Triton kernels need a CUDA device (or TRITON_INTERPRET=1 on CPU)"
        )
    return first[1]


def check_last_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError if a given tensor's last axis is not contiguous (stride 1)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the last axis of {name} has stride {tensor.stride(-1)}, expected 1")


def check_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError if a given tensor is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def rows_view(op: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """View [..., K] as [M, K] without copying.

    Raises:
        ValueError: if the leading axes cannot be merged into one stride.
    """
    check_last_contiguous(op, **{name: x})
    try:
        return x.view(-1, x.shape[-1]) if x.numel() else x.reshape(-1, x.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} with shape {tuple(x.shape)} and strides {x.stride()} cannot be viewed as rows"
        ) from None


def fits_tma(rows: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator reads this matrix: rows start at multiples of 16 bytes and are apart."""
    size = rows.element_size()
    whole = rows.stride(0) * size % 16 == 0 and rows.data_ptr() % 16 == 0
    return whole and rows.stride(0) >= rows.shape[1] and rows.stride(1) == 1


def row_stride(rows: torch.Tensor | None) -> int:
    """Stride between the rows of a matrix; 0 where there is none."""
    return 0 if rows is None else rows.stride(0)
