"""Backends and what each can do, as data.

A backend entry says on which devices, dtypes, compute capabilities and sizes it runs;
`why_not(spec)` lists every reason why a call would not. A choice is made once, by `choose`; a
forced choice that cannot run raises with all its reasons. Nothing falls back silently, and a
backend that cannot be imported keeps its reason for `vitfast doctor`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vitfast.ops import native, reference
from vitfast.ops.names import did_you_mean

QUANTIZED_OPS = ("quantize", "quantized_linear")
OPS = (
    "patch_embed", "layer_norm", "add_layer_norm", "row_stats", "linear", "attention", "attention_block", "mlp",
    *QUANTIZED_OPS, "resample",
)  # fmt: skip
BACKENDS = ("torch", "triton", "native")

_KERNEL_FILES = {"add_layer_norm": "layer_norm", "row_stats": "layer_norm"}
_FLOATS = ("float32", "float16", "bfloat16")
_QUANTIZED = ("float8_e4m3fn", "int8")
_REFERENCE_DTYPES = {**dict.fromkeys(QUANTIZED_OPS, _QUANTIZED), "resample": ("uint8",)}  # others: floats
_DTYPE_CAPABILITY = {"float8_e4m3fn": (8, 9)}  # older GPUs have no such product, and could only emulate it


KERNELS_BY_CODE = {(op, (9, 0)): ("native", "triton") for op in ("linear", "attention")}
"""(op, compute capability) -> our kernels where their machine code says that another than Triton's is faster: the CUDA
linear with its clusters and the CUDA attention on Hopper (`vitfast inspect --native`; docs/speed-log.md). A prediction,
so that it decides between ours, and nothing about the plain op before them."""

withheld: dict[tuple[str, str], str] = {}
"""(op, backend) -> why this process must not run it, whatever it can; what is put here counts as a reason of its own.
For whoever knows from another process that a kernel does harm on this machine."""


@contextlib.contextmanager
def without(pairs: Iterable[tuple[str, str]], why: str) -> Iterator[None]:
    """Withhold backends for a while."""
    before = dict(withheld)
    withheld.update(dict.fromkeys(pairs, why))
    try:
        yield
    finally:
        withheld.clear()
        withheld.update(before)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message has every reason."""


@dataclass(frozen=True)
class Spec:
    """One op at one shape: all that a backend needs to know to say yes or no.

    `dims` holds the op's sizes by name (head_dim, rows, width, ...), `features` what the call asks
    beyond the plain op, by the names in backends' `features`.
    """

    op: str
    device: str
    dtype: torch.dtype
    capability: tuple[int, int] | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    features: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        op: str,
        tensor: torch.Tensor,
        dtype: torch.dtype | None = None,
        features: tuple[str, ...] = (),
        **dims: int,
    ) -> Spec:
        """The spec of a call whose tensors live where `tensor` does."""
        return cls(op, tensor.device.type, dtype or tensor.dtype, device_capability(tensor.device), dims, features)


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    `limits` maps a name of `Spec.dims` to its inclusive (low, high), `choices` to all values there
    are, `multiples` to what must divide it. `lacking` maps a dtype of `dtypes` to why this machine has not got it.
    `per_device` has the fields that are others on some device.
    Where the backend could not be loaded `missing` says why, and `call` raises it.
    """

    name: str
    op: str
    call: Callable[..., Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = _FLOATS
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    per_device: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    missing: str = ""

    def why_not(self, spec: Spec) -> list[str]:
        """Every reason why this backend cannot run `spec`; empty if it can."""
        if self.missing or (self.op, self.name) in withheld:
            return [self.missing or withheld[self.op, self.name]]
        if spec.device in self.per_device:
            here = replace(self, choices={}, limits={}, multiples={}, lacking={}, per_device={})
            return replace(here, **self.per_device[spec.device]).why_not(spec)
        reasons = []
        if spec.device not in self.devices:
            reasons.append(f"device {spec.device} is not among {', '.join(self.devices)}")
        dtype = str(spec.dtype).removeprefix("torch.")
        if dtype not in self.dtypes:
            reasons.append(f"dtype {dtype} is not among {', '.join(self.dtypes)}")
        elif dtype in self.lacking:
            reasons.append(self.lacking[dtype])
        outputs = (feature.removesuffix(" output") for feature in spec.features)
        least = max(self.min_capability or (0, 0), *(_DTYPE_CAPABILITY.get(kind, (0, 0)) for kind in (dtype, *outputs)))
        have = ".".join(map(str, spec.capability or ()))
        if spec.capability and spec.capability < least:
            reasons.append(f"compute capability {have} is below {'.'.join(map(str, least))}")
        if spec.capability and self.max_capability and spec.capability > self.max_capability:
            reasons.append(f"compute capability {have} is above {'.'.join(map(str, self.max_capability))}")
        for name, (low, high) in self.limits.items():
            if name in spec.dims and not low <= spec.dims[name] <= high:
                reasons.append(f"{name} {spec.dims[name]} is outside {low}..{high}")
        for name, values in self.choices.items():
            if name in spec.dims and spec.dims[name] not in values:
                reasons.append(f"{name} {spec.dims[name]} is not among {', '.join(map(str, values))}")
        for name, step in self.multiples.items():
            if spec.dims.get(name, 0) % step:
                reasons.append(f"{name} {spec.dims[name]} is not a multiple of {step}")
        reasons += [f"it has no {feature}" for feature in spec.features if feature not in self.features]
        return reasons


@functools.cache
def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, None elsewhere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def backend(op: str, name: str) -> Backend:
    """The entry of one backend for one op. Loading is tried once and its outcome remembered.

    Raises:
        ValueError: if there is no such op or backend.
    """
    if op not in OPS:
        raise ValueError(f"no op named {op!r}; the ops are {', '.join(OPS)}{did_you_mean(op, OPS)}")
    if name == "torch":
        dtypes = _REFERENCE_DTYPES.get(op, (*_FLOATS, "float64"))
        features = reference.FEATURES.get(op, ())
        return Backend("torch", op, getattr(reference, op), dtypes=dtypes, features=features)
    if name == "triton":
        return _triton(op)
    if name == "native":
        return _native(op)
    near = did_you_mean(name, BACKENDS)
    raise ValueError(f"no backend named {name!r}; the backends are {', '.join(BACKENDS)}{near}")


def _absent(name: str, op: str, why: str) -> Backend:
    """The entry of a backend that could not be loaded."""

    def call(*_: Any, **__: Any) -> Any:
        raise BackendError(f"backend {name!r} cannot run {op}: {why}")

    return Backend(name, op, call, missing=why)


def _triton(op: str) -> Backend:
    try:
        module = importlib.import_module(f"vitfast.kernels.{_KERNEL_FILES.get(op, op)}")
        common = importlib.import_module("vitfast.kernels._parts.launch")
    except ImportError as error:
        return _absent("triton", op, f"triton kernels cannot be imported: {error}")
    entry = module.CAPABILITIES
    return Backend(
        "triton",
        op,
        getattr(module, op),
        devices=("cpu", "cuda") if common.interpreting() else ("cuda",),
        dtypes=entry["dtypes"],
        min_capability=entry["min_capability"],
        limits=entry["limits"],
        choices=entry.get("choices", {}),
        features=entry.get("features", ()),
    )


def _native(op: str) -> Backend:
    try:
        extension = importlib.import_module("vitfast._C")
    except ImportError as error:
        return _absent("native", op, f"the C++ extension is not built: {error}")
    if op not in extension.ops():
        return _absent("native", op, f"the C++ extension has no {op}")
    call = getattr(native, op, None) or getattr(torch.ops.vitfast_native, op)
    return Backend("native", op, call, **extension.ops()[op])


def tuning_table(gpu: str) -> Path:
    """Where the table of a GPU is, if there is one: what `vitfast bench sweep` found of our kernels."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(__file__).parents[1] / "kernels" / "configs" / f"{slug}.json"


@functools.cache
def proven(op: str, dtype: torch.dtype, gpu: str) -> bool:
    """Whether a shipped table for this GPU says that our kernel of `op` was right and faster there in this dtype."""
    table = tuning_table(gpu)
    dtypes = json.loads(table.read_text()).get("proven", {}).get(op, []) if table.is_file() else []
    return str(dtype).removeprefix("torch.") in dtypes


def candidates(spec: Spec) -> tuple[list[Backend], dict[str, list[str]]]:
    """Backends able to run `spec`, in default order, and the reasons of the others by name.

    The default order puts the plain torch op first; a Triton kernel comes before it only on a GPU
    for which a shipped table says that it is right and faster. Of our kernels Triton's come first, unless
    KERNELS_BY_CODE has another order.
    """
    able, refused = [], {}
    plain, *ours = BACKENDS
    for name in (plain, *KERNELS_BY_CODE.get((spec.op, spec.capability or (0, 0)), ours)):
        entry = backend(spec.op, name)
        if reasons := entry.why_not(spec):
            refused[name] = reasons
        else:
            able.append(entry)
    if spec.device == "cuda" and proven(spec.op, spec.dtype, torch.cuda.get_device_name()):
        able.sort(key=lambda entry: entry.name != "triton")
    return able, refused


def choose(spec: Spec, name: str = "auto") -> Backend:
    """The backend that runs `spec`: the named one, or with "auto" the first in default order.

    Raises:
        BackendError: if the named backend (or any, with "auto") cannot run it; has every reason.
        ValueError: if there is no backend of that name.
    """
    if name != "auto":
        entry = backend(spec.op, name)
        if reasons := entry.why_not(spec):
            raise BackendError(f"backend {name!r} cannot run {spec.op}: {'; '.join(reasons)}")
        return entry
    able, refused = candidates(spec)
    if not able:
        listed = "; ".join(f"{key}: {', '.join(value)}" for key, value in refused.items())
        raise BackendError(f"no backend can run {spec.op}: {listed}")
    return able[0]
