"""Helpers for tests of kernels: input makers, shape grids, poisoned memory, interpreter support.

Nothing at run time imports this file. What is right is said in `vitfast.ops.accuracy`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vitfast.models.config import ViTConfig
from vitfast.ops.accuracy import assert_close, tolerances_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Real shapes, each with the model it comes from.
TOKENS = {
    50: "B/32 at 224",
    197: "/16 at 224",
    257: "/14 at 224",
    577: "/16 at 384",
    785: "/8 at 224",
    1025: "/16 at 512",
    1370: "/14 at 518",
}
WIDTHS = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "G"}
HEAD_DIMS = {
    32: "small heads",
    64: "nearly all",
    72: "So400m",
    76: "EVA-02 S-like widths",
    80: "H",
    88: "g",
    96: "some MAE decoders",
    104: "G",
    112: "odd timm configs",
    128: "large heads",
}
AWKWARD_ROWS = {1: "a single row", 7: "less than any tile", 131: "prime", 257: "one more than a tile"}


def device() -> torch.device:
    """The device tests run on: the GPU if there is one, else the CPU (Triton in its interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal random numbers of standard deviation `scale`, the same on every device."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device(), dtype)


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """What fills memory nobody may read: NaN, or the largest integer."""
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def guarded(tensor: Tensor, margin: int = 4096) -> Tensor:
    """A contiguous copy that lies inside a larger poisoned buffer: an out-of-bounds read shows.

    The margin (in elements) keeps the copy 16-byte aligned, as a fresh allocation would be.
    """
    size = tensor.numel()
    buffer = tensor.new_full((size + 2 * margin,), poison_value(tensor.dtype))
    inner = buffer[margin : margin + size].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def strided(tensor: Tensor, gap: int = 8) -> Tensor:
    """The same values with rows `gap` elements further apart, poison between and around; last axis contiguous."""
    *lead, last = tensor.shape
    buffer = guarded(tensor.new_full((*lead, last + gap), poison_value(tensor.dtype)))
    view = buffer[..., :last]
    view.copy_(tensor)
    return view


def check_op(op: Callable[..., Any], reference: Callable[..., Any], *args: Any, what: str = "", **kwargs: Any) -> None:
    """Run a kernel and both references on the same arguments and compare. Tensors in args are guarded
    copies only if the caller made them so."""
    oracle = reference(*args, **kwargs, upcast=True)
    baseline = reference(*args, **kwargs)
    assert_close(
        op(*args, **kwargs), oracle, baseline, what=what, tolerances=tolerances_for(args, kwargs.get("activation"))
    )


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Make torch.empty, empty_like and Tensor.new_empty, when called from vitfast, give poison."""

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if getattr(original, "poisons", False):  # nested: the outer wrapper would look like vitfast's own call
            return original

        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("vitfast") and tensor.device.type in ("cpu", "cuda"):
                tensor.fill_(poison_value(tensor.dtype))
            return tensor

        allocate.poisons = True  # type: ignore[attr-defined]
        return allocate

    with torch.device("meta"):
        torch.empty(0)  # torch notes, the first time, which functions a device context rules: the original ones
    places = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    originals = [getattr(place, name) for place, name in places]
    try:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, wrap(original))
        yield
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)


def repair_interpreter() -> None:
    """Make bf16 and fp8 right in Triton's interpreter, which holds them as raw bit patterns.

    `tl.dot` there multiplies bf16's patterns as integers: operands are widened to fp32 first, which is
    exact. Casts from fp32 drop the low bits, where a GPU rounds to nearest even: they round.
    tests/test_testing.py fails when Triton no longer needs one of these.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder.create_dot, "widens_bf16", False):
        return
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    convert = InterpreterBuilder.create_fp_to_fp

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return widen(src)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded)
        return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
            return convert(self, src, dst_type, *rest)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    create_dot.widens_bf16 = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def random_weights(config: ViTConfig, seed: int = 0) -> dict[str, Tensor]:
    """Canonical weights of a config, random at the scale training gives: norms near 1, activations O(1)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (shape, _) in config.weight_shapes().items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.1 * values
        elif name.endswith("weight"):
            weights[name] = values * values[0].numel() ** -0.5
        elif "layer_scale" in name:
            weights[name] = 0.1 + 0.02 * values
        else:
            weights[name] = 0.1 * values
    return weights


_IN_ACCURACY = (
    "E4M3_PRODUCTS", "EIGHT_BIT_RMS", "MODEL_TOLERANCES", "PEER_TOLERANCE", "TOLERANCES", "ModelTolerance", "Tolerance",
    "Tolerances", "assert_close", "tolerances_for", "why_not_close", "why_not_close_in_8_bits",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """What stood here in 0.1.0, from where it is now, with a DeprecationWarning."""
    if name == "import_peer":
        place, now = "vitfast.models.libraries", "import_library"
    elif name in _IN_ACCURACY:
        place, now = "vitfast.ops.accuracy", name
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"vitfast.testing.{name} has moved to {place}.{now}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(place), now)
