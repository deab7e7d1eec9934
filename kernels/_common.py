"""What every kernel file shares: device checks, configs as data, and small @triton.jit math.

Nothing here knows about the rest of vitfast: `kernels/` imports torch, triton and itself only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl

STATS_TILE = 128
"""Columns that one (mean, M2) pair of partial row statistics covers; the last pair covers the rest."""

SCALE_GROUPS = (128, 64)
"""Columns of an 8-bit row that may share a scale, where a row has several; the last group covers what is left. 64 is a
head's."""

DTYPES = ("float32", "float16", "bfloat16")

SHARED_MEMORY_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory one block may use, by architecture (CUDA C++ programming guide, table of
compute capabilities). Triton does not check it when compiling for another chip."""


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


@dataclass(frozen=True)
class CompileCase:
    """One specialisation to compile without a GPU, as `vitfast inspect` and the tests do.

    `signature` maps run-time argument names to Triton types ("*bf16", "i32", "fp32",
    "tensordesc<bf16[128,64]>", ...) in the kernel's argument order; `constexprs` holds the rest.
    `aligned` names the arguments divisible by 16 (pointers and, where true of the models, sizes).
    """

    kernel: str
    config: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    archs: tuple[int, ...] = (80, 90, 100)
    tile: dict[str, int] = field(default_factory=dict)
    """Axis letter (M, N, ...) -> tile side, for tile efficiency at real shapes."""


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
    path = Path(__file__).parent / "configs" / f"{slug}.json"
    return json.loads(path.read_text()).get("configs", {}) if path.is_file() else {}


def tuned(op: str, device: torch.device, configs: Sequence[Config], key: str) -> Config | None:
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


def check_dtype(op: str, *allowed: torch.dtype, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError if a given tensor has none of the allowed dtypes (default: fp32, fp16, bf16)."""
    allowed = allowed or (torch.float32, torch.float16, torch.bfloat16)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; allowed are {', '.join(map(str, allowed))}")


def check_shape(op: str, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor (if given) has exactly this shape."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_last_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError if a given tensor's last axis is not contiguous (stride 1)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the last axis of {name} has stride {tensor.stride(-1)}, expected 1")


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


@triton.jit
def erf_gelu(x):
    """x * Phi(x), the exact GELU (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def tanh_gelu(x):
    """The tanh approximation of GELU; tanh(u) is written as 2*sigmoid(2u) - 1."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def quick_gelu(x):
    """x * sigmoid(1.702 x), as CLIP uses it."""
    return x * tl.sigmoid(1.702 * x)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Element-wise activation by name; "" is the identity. x is fp32."""
    if ACTIVATION == "gelu":
        x = erf_gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = tanh_gelu(x)
    elif ACTIVATION == "quick_gelu":
        x = quick_gelu(x)
    elif ACTIVATION == "silu":
        x = silu(x)
    return x
