"""What tests and benchmarks share: tolerances, input makers, shape grids, interpreter support.

Numbers about accuracy stand here and nowhere else. The rule: a kernel's error against the oracle
(`reference` with upcast=True) is at most twice the error of the same-dtype torch backend, plus a
floor of two ulps of the largest value; its RMS error stays under a bound per dtype; and inf and
nan stand in exactly the same places.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vitfast.config import ViTConfig


@dataclass(frozen=True)
class Tolerance:
    """`rms`: bound on RMS(error) / RMS(oracle). `ulp`: spacing of the dtype's numbers near 1."""

    rms: float
    ulp: float


Tolerances = Mapping[torch.dtype, Tolerance]
"""By the dtype of a result."""

TOLERANCES = {
    # Rounding an input or output once costs about ulp / 4 RMS; sums over K <= 4096 in fp32 add
    # less. Eight such roundings in a row (bf16, fp16), or a long fp32 sum, stay below these bounds.
    torch.float32: Tolerance(rms=2e-6, ulp=2.0**-23),
    torch.float16: Tolerance(rms=1e-3, ulp=2.0**-10),
    torch.bfloat16: Tolerance(rms=8e-3, ulp=2.0**-7),
    # Quantised rows: a value on the brink may round to its neighbour, which is one of 2^-3 (e4m3) or of one in
    # 127. If one value in a thousand does, the RMS error is 2e-3 of a row of normal numbers, or less.
    torch.float8_e4m3fn: Tolerance(rms=4e-3, ulp=2.0**-3),
    torch.int8: Tolerance(rms=4e-3, ulp=1 / 127),
}

E4M3_PRODUCTS = TOLERANCES | {
    # Hopper's tensor cores keep 14 bits of a sum of e4m3 products, cut and not rounded (Badash et al. 2026, "Hawkeye",
    # arXiv 2603.20421; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.3.2). On random operands, and
    # promoted to fp32 every 128 columns, that is 5e-5 RMS.
    torch.float32: Tolerance(rms=2.0**-13, ulp=2.0**-13),
    # With an error e of RMS 2^-13 before the rounding, and steps s of e4m3 that average 0.06 of the RMS, a share of
    # 2 E|e| / s of the values round to the neighbour: sqrt(2 E|e| E s) = 3.5e-3 RMS, beside what TOLERANCES has.
    torch.float8_e4m3fn: Tolerance(rms=8e-3, ulp=2.0**-3),
}
"""Bounds for what a GPU makes of e4m3 operands; see `tolerances_for`."""

EIGHT_BIT_RMS = 5e-2
"""Bound on RMS(error) / RMS(oracle) of a peer that multiplies in 8 bits. e4m3 rounds an operand by 2.6 % RMS, so
a product of two by 3.7 %, and so their sum; INT8 with a scale per row rounds by less."""

PEER_TOLERANCE = 1e-4
"""Largest error of a whole forward in fp32 against another library's, by the largest value of the output.
Both round differently at every step; over a few layers this comes to 1e-6 ... 1e-5; a wrong weight to 1e-1."""


@dataclass(frozen=True)
class ModelTolerance:
    """How far two right forwards of a whole model in one dtype may be apart.

    `rms`: RMS(difference) / RMS(values). `error`: largest difference / largest value.
    """

    rms: float
    error: float


MODEL_TOLERANCES = {
    torch.float64: ModelTolerance(PEER_TOLERANCE * 2.0**-29, PEER_TOLERANCE * 2.0**-29),  # as many ulps as in fp32
    torch.float32: ModelTolerance(PEER_TOLERANCE, PEER_TOLERANCE),
    # About twice what transformers' SDPA and eager attention differ by on two photos (CLIP ViT-B/16 and DINOv2
    # ViT-S/14 with their trained weights, on a CPU): in fp16 rms 7.8e-3 and error 3.6e-2, in bf16 3.1e-2 and 0.10.
    # Both worst on CLIP's tokens before its last norm; its embeddings differ four to eight times less.
    torch.float16: ModelTolerance(rms=1.6e-2, error=8e-2),
    torch.bfloat16: ModelTolerance(rms=6.4e-2, error=0.25),
}

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


def tolerances_for(args: Iterable[Any]) -> Tolerances:
    """The bounds for an op's result by its arguments: E4M3_PRODUCTS if some are in e4m3 and on a GPU."""
    e4m3 = (a for a in args if isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn)
    return E4M3_PRODUCTS if any(a.is_cuda for a in e4m3) else TOLERANCES


def assert_close(
    actual: Tensor | Sequence[Tensor],
    oracle: Tensor | Sequence[Tensor],
    baseline: Tensor | Sequence[Tensor],
    what: str = "",
    tolerances: Tolerances = TOLERANCES,
) -> None:
    """Check a result against the oracle, by the rule at the top of this file.

    Args:
        actual: the result under test. oracle: the upcast reference. baseline: the torch backend's
            result in the same dtype. Sequences are compared pairwise.
        tolerances: of `tolerances_for`, where the arguments are not all on the CPU.

    Raises:
        AssertionError: with the largest errors and the bounds they broke.
    """
    if not isinstance(actual, Tensor):
        if not len(actual) == len(oracle) == len(baseline):
            raise AssertionError(f"{what}: {len(actual)} tensors, expected {len(oracle)}")
        for i, parts in enumerate(zip(actual, oracle, baseline, strict=True)):
            assert_close(*parts, what=f"{what}[{i}]", tolerances=tolerances)
        return
    problems = why_not_close(actual, cast(Tensor, oracle), cast(Tensor, baseline), tolerances)
    if problems:  # raised, not asserted: the planner relies on it, with or without python -O
        raise AssertionError(f"{what or 'result'} {tuple(actual.shape)} {actual.dtype}: {'; '.join(problems)}")


def why_not_close(actual: Tensor, oracle: Tensor, baseline: Tensor, tolerances: Tolerances = TOLERANCES) -> list[str]:
    """What is wrong with a result by the rule of `assert_close`, one sentence each; empty if nothing is."""
    if actual.shape != oracle.shape:
        return [f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"]
    if actual.dtype != baseline.dtype:
        return [f"dtype {actual.dtype}, expected {baseline.dtype}"]
    tolerance = tolerances[actual.dtype]
    got, want, base = (t.detach().double().cpu() for t in (actual, oracle, baseline))
    for kind, test in (("nan", torch.isnan), ("inf", torch.isinf)):
        if not torch.equal(test(got), test(want)):
            return [f"{kind} in other places than in the oracle"]
    finite = torch.isfinite(want)
    got, want, base = got[finite], want[finite], base[finite]
    if not got.numel():
        return []
    error, base_error = (got - want).abs(), (base - want).abs()
    base_error = base_error.nan_to_num(0.0, posinf=0.0)  # a baseline that overflows excuses nothing
    bound = 2 * base_error.max().item() + 2 * tolerance.ulp * want.abs().max().item()
    size = max(want.square().mean().sqrt().item(), 1e-30)
    rms, rms_base = (e.square().mean().sqrt().item() / size for e in (error, base_error))
    rms_bound = max(tolerance.rms, 2 * rms_base)
    problems = []
    if not error.max().item() <= bound:
        problems.append(f"max error {error.max():.3e} exceeds {bound:.3e} (torch: {base_error.max():.3e})")
    if not rms <= rms_bound:
        problems.append(f"relative RMS error {rms:.3e} exceeds {rms_bound:.3e} (torch: {rms_base:.3e})")
    return problems


def why_not_close_in_8_bits(actual: Tensor, oracle: Tensor, baseline: Tensor) -> list[str]:
    """As `why_not_close`, for a peer that multiplies in 8 bits: by EIGHT_BIT_RMS alone."""
    if actual.shape != oracle.shape:
        return [f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"]
    if actual.dtype != baseline.dtype:
        return [f"dtype {actual.dtype}, expected {baseline.dtype}"]
    rms = ((actual.double() - oracle).square().mean() / oracle.square().mean()).sqrt().item()
    return [] if rms <= EIGHT_BIT_RMS else [f"relative RMS error {rms:.3e} exceeds {EIGHT_BIT_RMS:.3e}"]


def check_op(op: Callable[..., Any], reference: Callable[..., Any], *args: Any, what: str = "", **kwargs: Any) -> None:
    """Run a kernel and both references on the same arguments and compare. Tensors in args are guarded
    copies only if the caller made them so."""
    oracle = reference(*args, **kwargs, upcast=True)
    baseline = reference(*args, **kwargs)
    assert_close(op(*args, **kwargs), oracle, baseline, what=what, tolerances=tolerances_for(args))


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


_SHIM: list[Any] = []


def import_peer(name: str) -> Any:
    """Import a library that vitfast is compared with: timm, torchvision or transformers.

    torchvision's compiled ops cannot load beside a CPU-only torch build, and its import then fails
    for want of two schemas it never runs here; they are declared first where that is the case.

    Raises:
        ImportError: if the library is not installed.
    """
    if name in ("timm", "torchvision") and not _SHIM and not hasattr(torch.ops.torchvision, "nms"):
        spec = importlib.util.find_spec("torchvision")
        if spec is None:
            raise ImportError(f"{name} needs torchvision, which is not installed")
        try:
            torch.ops.load_library(str(next(Path(str(spec.origin)).parent.glob("_C*.so"))))
        except (OSError, StopIteration):
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _SHIM.append(library)  # a Library undefines its schemas when it is collected
    return importlib.import_module(name)


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
