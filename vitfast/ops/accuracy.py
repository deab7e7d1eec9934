"""What is right: the one rule by which tests, the planner and benchmarks judge a result.

Numbers about accuracy stand here and nowhere else. The rule: a kernel's error against the oracle
(`reference` with upcast=True) is at most twice the error of the same-dtype torch backend, plus a
floor of two ulps of the largest value; its RMS error stays under a bound per dtype; and inf and
nan stand in exactly the same places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor


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
    # Pixels, which are computed in integers from integers: every bit.
    torch.uint8: Tolerance(rms=0.0, ulp=0.0),
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

GATED_E4M3_PRODUCTS = E4M3_PRODUCTS | {
    # silu(a) b of two such sums has the relative errors of both, which are cut and so have one sign: they add up.
    torch.float32: replace(E4M3_PRODUCTS[torch.float32], rms=2 * E4M3_PRODUCTS[torch.float32].rms),
}
"""The same where two products of each value are multiplied (activation "swiglu")."""

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


def tolerances_for(args: Iterable[Any], activation: str | None = None) -> Tolerances:
    """The bounds for an op's result by its arguments: those of E4M3_PRODUCTS if some are in e4m3 on a GPU."""
    e4m3 = (a for a in args if isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn)
    if not any(a.is_cuda for a in e4m3):
        return TOLERANCES
    return GATED_E4M3_PRODUCTS if activation == "swiglu" else E4M3_PRODUCTS


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
    # Where the oracle is: the CPU would take minutes for what a GPU compares in milliseconds.
    got, want, base = (t.detach().to(oracle.device).double() for t in (actual, oracle, baseline))
    if not (_finite(got) and _finite(want)):
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


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass that writes nothing."""
    return not values.numel() or all(bool(edge.isfinite()) for edge in values.aminmax())


def why_not_close_in_8_bits(actual: Tensor, oracle: Tensor, baseline: Tensor) -> list[str]:
    """As `why_not_close`, for a peer that multiplies in 8 bits: by EIGHT_BIT_RMS alone."""
    if actual.shape != oracle.shape:
        return [f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"]
    if actual.dtype != baseline.dtype:
        return [f"dtype {actual.dtype}, expected {baseline.dtype}"]
    rms = ((actual.double() - oracle).square().mean() / oracle.square().mean()).sqrt().item()
    return [] if rms <= EIGHT_BIT_RMS else [f"relative RMS error {rms:.3e} exceeds {EIGHT_BIT_RMS:.3e}"]
