"""How much two outputs differ: nested outputs as named tensors, their errors, and the verdict.

The arithmetic of `vitfast.verify`. Tensors are compared in float64 on the CPU; what counts as the same
is said in `vitfast.verify`, and the numbers for it stand in `vitfast.testing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from vitfast.diagnostics.report import Difference
from vitfast.ops import accuracy


def flatten(output: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested tuples, lists, mappings and dataclasses by name; tensors as copies on the CPU.

    None is left out: an output that is None on one side only shows as missing there. Other leaves that
    are no tensors are kept as they are. A lone tensor is named "output".
    """
    if output is None:
        return {}
    if isinstance(output, Tensor):
        return {name or "output": output.detach().to("cpu", copy=True)}
    dot = f"{name}." if name else ""
    if isinstance(output, Mapping):
        parts = {f"{dot}{key}": value for key, value in output.items()}
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts = {f"{dot}{key}": value for key, value in zip(output._fields, output, strict=True)}
    elif isinstance(output, tuple | list):
        parts = {f"{name}[{index}]": value for index, value in enumerate(output)}
    elif is_dataclass(output) and not isinstance(output, type):
        parts = {f"{dot}{item.name}": getattr(output, item.name) for item in fields(output)}
    else:
        return {name or "output": output}
    return {leaf: value for key, part in parts.items() for leaf, value in flatten(part, key).items()}


class Tally:
    """What is known so far of one output, batch by batch."""

    def __init__(self, name: str, tolerance: float | None = None, *, with_oracle: bool = False) -> None:
        self.name = name
        self._with_oracle = with_oracle
        self._tolerance = tolerance
        self._limit: accuracy.ModelTolerance | None = None
        self._first: Tensor | None = None  # on the meta device: shape and dtype only
        self._sums = _Sums()
        self._problems: list[str] = []
        self._bad_batches = 0

    def add(self, before: Any, after: Any, oracle: Any = None) -> bool:
        """Compare one batch of this output, None where a side has none; whether it passes.

        Args:
            before, after: CPU tensors, or whatever else `flatten` gave.
            oracle: the exact result, if this output is judged by the rule of `accuracy.assert_close`.
        """
        given = [leaf for leaf in (before, after) if isinstance(leaf, Tensor)]
        if given and self._first is None:
            self._first = given[0].to("meta")
        problems = _mismatches(before, after)
        if len(given) == 2 and before.shape == after.shape and not any(map(_exotic, given)):
            problems += self._compare(before, after, oracle)
        if problems:
            self._bad_batches += 1
            self._problems = self._problems or problems
        return not problems

    def _compare(self, before: Tensor, after: Tensor, oracle: Any) -> list[str]:
        if not before.is_floating_point():
            self._limit = accuracy.ModelTolerance(0.0, 0.0)
            self._sums += _measure(before, after, self._classes(before))
            wrong = int((before != after).sum())
            return [f"{wrong} of {before.numel()} values differ"] if wrong else []
        if self._with_oracle and before.dtype in accuracy.TOLERANCES:
            if not isinstance(oracle, Tensor) or oracle.shape != after.shape:
                return [f"the oracle gives {_describe(oracle)}, expected shape {tuple(after.shape)}"]
            sums = _measure(oracle, after, self._classes(before))
            own = _measure(oracle, before, False)
            sums.max_before, sums.before_square = own.max_error, own.error_square
            self._sums += sums
            if before.dtype != after.dtype:  # said already, and the rule needs one dtype
                return []
            return _no_numbers(sums, after) or accuracy.why_not_close(after, oracle, before)
        sums = _measure(before, after, self._classes(before))
        self._sums += sums
        if self._tolerance is not None:
            self._limit = accuracy.ModelTolerance(self._tolerance, self._tolerance)
        else:
            self._limit = accuracy.MODEL_TOLERANCES.get(before.dtype)
        if self._limit is None:
            return [f"no tolerance is known for {_dtype(before)}: pass one"]
        return _no_numbers(sums, after) or _excess(sums, self._limit)

    def _classes(self, tensor: Tensor) -> bool:
        """Whether the last axis holds one number per class."""
        logits = self.name.rpartition(".")[2] == "logits" and tensor.ndim >= 2
        return (logits or (self.name == "output" and tensor.ndim == 2)) and tensor.shape[-1] > 1

    def result(self) -> Difference:
        """The sum of it."""
        sums, first = self._sums, self._first
        ruled = self._with_oracle and self._limit is None and sums.elements > 0
        more = self._bad_batches - 1
        return Difference(
            name=self.name,
            shape=() if first is None else tuple(first.shape),
            dtype="" if first is None else _dtype(first),
            elements=sums.elements,
            max_error=sums.max_error,
            mean_error=sums.error / max(sums.elements, 1),
            relative_error=_ratio(sums.max_error, sums.max_value),
            relative_rms=_ratio(sums.error_square, sums.value_square) ** 0.5,
            cosine_mean=sums.cosine / sums.cosine_rows if sums.cosine_rows else None,
            cosine_min=sums.min_cosine if sums.cosine_rows else None,
            top1_flips=sums.flips if sums.rows else None,
            top1_rows=sums.rows or None,
            nonfinite=sums.nonfinite,
            nonfinite_mismatches=sums.nonfinite_mismatches,
            allowed_rms=None if self._limit is None else self._limit.rms,
            allowed_error=None if self._limit is None else self._limit.error,
            before_error=_ratio(sums.max_before, sums.max_value) if ruled else None,
            before_rms=_ratio(sums.before_square, sums.value_square) ** 0.5 if ruled else None,
            problems=(*self._problems, *([f"and {more} more of the batches differ"] if more > 0 else [])),
        )


@dataclass
class _Sums:
    """Sums over elements, rows and batches; `max_` and `min_` fields are extremes instead."""

    elements: int = 0
    error: float = 0.0
    error_square: float = 0.0
    value_square: float = 0.0
    max_error: float = 0.0
    max_value: float = 0.0
    cosine: float = 0.0
    cosine_rows: int = 0
    min_cosine: float = 1.0
    flips: int = 0
    rows: int = 0
    nonfinite: int = 0
    nonfinite_mismatches: int = 0
    max_before: float = 0.0
    before_square: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        joined = {}
        for item in fields(self):
            pair = (getattr(self, item.name), getattr(other, item.name))
            joined[item.name] = {"max": max, "min": min}.get(item.name[:3], sum)(pair)
        return _Sums(**joined)


def _measure(want: Tensor, got: Tensor, classes: bool) -> _Sums:
    """Errors of `got` against `want`, of one shape; with classes, count rows whose argmax differs."""
    a, b = want.double(), got.double()
    finite = torch.isfinite(a) & torch.isfinite(b)
    same = (a == b) | (a.isnan() & b.isnan())
    sums = _Sums(
        nonfinite=int((~torch.isfinite(a)).sum()),
        nonfinite_mismatches=int((~finite & ~same).sum()),
        elements=int(finite.sum()),
    )
    if classes:
        sums.flips = int((a.argmax(-1) != b.argmax(-1)).sum())
        sums.rows = a.shape[:-1].numel()
    a, b = a.where(finite, 0), b.where(finite, 0)
    if sums.elements:
        error = (b - a).abs()
        sums.error, sums.max_error = error.sum().item(), error.max().item()
        sums.error_square, sums.value_square = error.square().sum().item(), a.square().sum().item()
        sums.max_value = a.abs().max().item()
        if a.ndim and a.shape[-1] > 1:
            lengths = a.norm(dim=-1), b.norm(dim=-1)
            cosine = (a * b).sum(-1) / (lengths[0] * lengths[1])
            cosine = cosine.where((lengths[0] > 0) & (lengths[1] > 0), (lengths[0] == lengths[1]).double())
            cosine = cosine.clamp(-1, 1)  # two zero vectors agree, a zero vector and another do not
            sums.cosine, sums.min_cosine, sums.cosine_rows = cosine.sum().item(), cosine.min().item(), cosine.numel()
    return sums


def _mismatches(before: Any, after: Any) -> list[str]:
    """What keeps two leaves from being the same kind of tensor."""
    if before is None or after is None:
        there, missing = ("after", "before") if before is None else ("before", "after")
        return [f"{there} gives {_describe(after if before is None else before)}, {missing} has no such output"]
    problems = []
    for side, leaf in (("before", before), ("after", after)):
        if not isinstance(leaf, Tensor):
            problems.append(
                f"{side} gives {_describe(leaf)}, not a tensor: wrap the model in a function that picks its tensors"
            )
        elif _exotic(leaf):
            problems.append(f"{side} gives {_describe(leaf)}, which cannot be compared: only dense real tensors can")
    if problems:
        return problems
    if before.shape != after.shape:
        problems.append(f"shape {tuple(after.shape)}, expected {tuple(before.shape)}")
    if before.dtype != after.dtype:
        problems.append(f"dtype {_dtype(after)}, expected {_dtype(before)}")
    return problems


def _exotic(tensor: Tensor) -> bool:
    return tensor.is_complex() or tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized


def _excess(sums: _Sums, limit: accuracy.ModelTolerance) -> list[str]:
    problems = []
    if sums.nonfinite_mismatches:
        plural = "s" * (sums.nonfinite_mismatches != 1)
        problems.append(f"NaN or infinity in {sums.nonfinite_mismatches} place{plural} on one side only")
    worst, rms = _ratio(sums.max_error, sums.max_value), _ratio(sums.error_square, sums.value_square) ** 0.5
    if not worst <= limit.error:
        problems.append(
            f"max error {sums.max_error:.1e} is {worst:.1e} of the largest value, allowed {limit.error:.1e}"
        )
    if not rms <= limit.rms:
        problems.append(f"relative RMS error {rms:.1e}, allowed {limit.rms:.1e}")
    return problems


def _no_numbers(sums: _Sums, after: Tensor) -> list[str]:
    return ["there is no place where both sides are finite"] if after.numel() and not sums.elements else []


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else float("inf")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"a {type(leaf).__name__}"
    return f"a tensor {tuple(leaf.shape) if not leaf.is_nested else 'nested'} {_dtype(leaf)} {leaf.layout}"
