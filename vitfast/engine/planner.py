"""Which backend runs each site of the forward: by capability first, then by measurement.

For every site the registry names the backends able to run it. If one is left, or a backend is
forced, that is the choice. If several are, each is checked against the reference and timed on the
site's own shapes, weights packed beforehand where its product wants that, and the fastest right one
is kept. On a GPU the ways to put a block together are then timed as wholes (forms.py). Choices are
stored as JSON under the user cache directory, keyed by everything that could change them.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from vitfast.engine import forms, plan_cache, progress
from vitfast.engine.cases import Call, Case
from vitfast.engine.clock import captured, time_calls
from vitfast.engine.sites import folds_norms, plan_sites, site_case, site_spec, why_not_quantized
from vitfast.models.config import ViTConfig
from vitfast.models.plan import SITES, Plan, Site
from vitfast.ops import accuracy, mkldnn, native, reference, registry, scaled_mm
from vitfast.ops.registry import Backend, BackendError, Spec, candidates, choose

FUSED_MAX_WIDTH = 384
"""Widest model for which half a block in one launch is a candidate; wider, mlp would be two `linear` anyway."""
GPU_BATCH = 64
"""Images whose shapes are measured on a GPU; on a CPU as many as have CPU_ROWS tokens."""
GPU_SECONDS = 30.0
"""A measured plan may take so long on a GPU, where minutes may be all there is, and the measurement that it is in then:
what is left runs on the first able backend, and the next load measures again, with what is compiled by then."""
CPU_ROWS = 1600
TIES = {"cpu": 0.15, "cuda": 0.03}
"""A backend takes the place of one before it only if it is faster by this share; less is within the noise, on a CPU
that of a busy machine. There native comes first: its sums err less than torch's (docs/numerics.md)."""


class PlanError(RuntimeError):
    """No backend able to run a site gave a right result on this device; lists each one's error."""


def packed_op(entry: Backend, spec: Spec) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """`pack` of a weight [N, K] and the op that reads it, for a backend that has them for this spec."""
    if spec.op == "quantized_linear" and entry.name == "native" and spec.device == "cpu":
        return native.pack_quantized, native.quantized_linear_packed
    if spec.op == "quantized_linear" and entry.name == "torch":
        if not scaled_mm.why_not(spec):
            return scaled_mm.pack, scaled_mm.linear
        if not mkldnn.why_not(spec):
            return mkldnn.pack_quantized, mkldnn.quantized_linear
        if spec.device == "cpu" and spec.dtype == torch.float8_e4m3fn:
            return torch.Tensor.float, reference.quantized_linear
    if spec.op == "linear" and entry.name == "native" and spec.device == "cpu":
        return native.pack, native.linear_packed
    if spec.op == "linear" and entry.name == "torch" and not mkldnn.why_not(spec):
        return mkldnn.pack, mkldnn.linear
    if spec.op == "patch_embed" and entry.name == "native" and spec.device == "cpu":
        linear = registry.backend("linear", "native")  # whose product in bf16 it is
        if str(spec.dtype).removeprefix("torch.") not in linear.lacking:
            return native.pack_patch_embed, native.patch_embed_packed
    return None


def planned_call(entry: Backend, spec: Spec, call: Call) -> Callable[[], Any]:
    """The call as a planned model makes it: on a packed weight, where the backend has that for this spec."""
    run, args = cast(Any, entry.call), call.args
    if packed := packed_op(entry, spec):
        pack, run = packed
        layout = call.kwargs | {"uint8": args[0].dtype == torch.uint8} if spec.op == "patch_embed" else {}
        at = 2 if spec.op == "quantized_linear" else 1  # the weight's place: after x, or x and its scales
        args = (*args[:at], pack(args[at], **layout), *args[at + 1 :])
    return functools.partial(run, *args, **call.kwargs)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short at that moment, which is no property of a backend."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def measure(
    case: Case, entries: Sequence[Backend], device: torch.device, *, timed: bool = True
) -> tuple[Backend, dict[str, Any]]:
    """Check each backend on the case against the reference, time the right ones, keep the fastest (see TIES).

    Any error of a backend is a reason to leave it out; but one for want of memory holds for this measurement only.

    Args:
        timed: if False, the first right one is kept.

    Returns:
        The winner, and a record: milliseconds by backend, and the reason for each one left out; `out_of_memory`,
        which backends were left out for want of memory.

    Raises:
        PlanError: if none is right.
        torch.OutOfMemoryError, MemoryError, RuntimeError: if memory is too short for the reference, or for all.
    """
    call, right, wrong = case.inputs(), [], {}
    starved: dict[str, Exception] = {}
    answers = [case.table[case.op].reference(*call.args, **call.kwargs, upcast=upcast) for upcast in (True, False)]
    tolerances = accuracy.tolerances_for(call.args, call.kwargs.get("activation"))
    runs: dict[str, Callable[[], Any]] = {}
    for entry in entries:
        try:
            run = planned_call(entry, case.spec, call)
            accuracy.assert_close(run(), answers[0], answers[1], what=case.op, tolerances=tolerances)
            runs[entry.name] = captured(run, device) if timed else run
        except Exception as error:  # a compiler's errors, a kernel's, a wrong result: all are reasons
            wrong[entry.name] = f"{type(error).__name__}: {error}"
            if out_of_memory(error):
                starved[entry.name] = error
        else:
            right.append(entry)
    del answers
    if not right and starved:
        raise next(iter(starved.values()))
    if not right:
        raise PlanError(f"no backend is right for {case.op} on {device}: {wrong}")
    record: dict[str, Any] = {"ms": {}, "refused": wrong} | ({"out_of_memory": list(starved)} if starved else {})
    if not timed:
        return right[0], record
    times = time_calls([runs[entry.name] for entry in right], device)
    median = dict(zip((entry.name for entry in right), times, strict=True))
    fastest = _fastest(median, device)
    return next(entry for entry in right if entry.name == fastest), record | {"ms": median}


def _fastest(median: Mapping[str, float], device: torch.device) -> str:
    """The first that no later one beats by more than the noise (see TIES)."""
    names = iter(median)
    best = next(names)
    for name in names:
        if median[name] < (1 - TIES[device.type]) * median[best]:
            best = name
    return best


@dataclass(frozen=True)
class _Request:
    """For what a plan is asked."""

    config: ViTConfig
    device: torch.device
    dtype: torch.dtype
    backend: str
    batch: int
    quantized: torch.dtype | None
    skip_quantize: frozenset[str]
    deterministic: bool

    def sites(self) -> tuple[Site, ...]:
        return plan_sites(self.config, self.quantized, self.skip_quantize)

    def spec(self, site: Site) -> Spec:
        return site_spec(self.config, site, self.batch, self.device, self.dtype, self.quantized)

    def case(self, site: Site) -> Case:
        return site_case(self.config, site, self.batch, self.device, self.dtype, self.quantized)


def _forced(asked: _Request) -> dict[str, Backend]:
    """The named backend for every site, but for optional ones that it cannot run."""
    chosen: dict[str, Backend] = {}
    for site in asked.sites():
        if site.name == "attention_block" or (site.fused and asked.config.width > FUSED_MAX_WIDTH):
            continue  # no measurement says that attention_block is worth having
        spec = asked.spec(site)
        if not site.optional or not registry.backend(spec.op, asked.backend).why_not(spec):
            chosen[site.name] = choose(spec, asked.backend)
    return _without_idle_sites(chosen)


def _measured(asked: _Request) -> tuple[dict[str, Backend], dict[str, Any]]:
    """The fastest right backend of every site, and what was measured to choose it."""
    chosen: dict[str, Backend] = {}
    record: dict[str, Any] = {}
    config, device, sites = asked.config, asked.device, asked.sites()
    limited = device.type == "cuda" and not asked.deterministic
    # There torch's part of a pair may be an emulation, and what does without the pair a product of oneDNN.
    in_int8 = device.type == "cpu" and asked.quantized == torch.int8
    end = time.perf_counter() + (GPU_SECONDS if limited else math.inf)
    what = f"measuring which backend is fastest for {config.name or 'this model'} on {device}, once"
    for site in progress.said(sites, len(sites), what):
        if site.fused and config.width > FUSED_MAX_WIDTH:
            continue
        able, refused = candidates(asked.spec(site))
        if not able:
            raise BackendError(f"no backend can run {site.name}: {refused}")
        if device.type == "cpu":  # where Triton would be its interpreter, for tests
            able = sorted((e for e in able if e.name != "triton"), key=lambda e: e.name != "native")
        chosen[site.name] = able[0]
        no_head = site.name == "head" and not config.num_classes and not config.projection_dim
        if no_head or (len(able) == 1 and not in_int8):
            continue
        if time.perf_counter() > end:
            record[site.name] = _no_time([entry.name for entry in able[1:]])
            continue

        def tried(batch: int, site: Site = site, able: Sequence[Backend] = able) -> dict[str, Any]:
            case = replace(asked, batch=batch).case(site)
            chosen[site.name], found = measure(case, able, device, timed=not asked.deterministic)
            return found

        names = [entry.name for entry in able]
        record[site.name] = _where_memory_allows(tried, asked.batch, names)
    if device.type == "cuda" and not asked.deterministic and not asked.quantized:
        return _with_fastest_form(asked, chosen, record, end), record
    for site in SITES.values():
        together = (site, *([SITES[site.passes_to]] if site.passes_to else []))
        if not site.parts or site.name not in chosen or not any(member.name in record for member in together):
            continue
        parts = [part for member in together for part in member.parts]
        if not _faster(record, [member.name for member in together], parts):
            for member in together:
                chosen.pop(member.name, None)
    return _without_idle_sites(chosen), record


def _where_memory_allows(run: Callable[[int], dict[str, Any]], batch: int, names: list[str]) -> dict[str, Any]:
    """What a measurement at a batch size gives, or at a smaller one if memory is too short for some of it.

    Args:
        run: the measurement. names: what is measured.

    Returns:
        Its record; with `seconds`, and, if memory was short, `out_of_memory` (what it was short for, at first) and the
        `batch` that was measured in the end.
    """
    begun = time.perf_counter()
    starved: list[str] = []
    while True:
        try:
            found = run(batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            found = {"ms": {}, "refused": {}, "out_of_memory": names}
        starved = starved or found.get("out_of_memory", [])
        if batch == 1 or "out_of_memory" not in found:
            break
        batch = max(1, batch // 4)
    found["seconds"] = time.perf_counter() - begun
    return found | ({"out_of_memory": starved, "batch": batch} if starved else {})


def _no_time(names: list[str]) -> dict[str, Any]:
    """The record of what was not measured because GPU_SECONDS were over."""
    why = f"not measured: the {GPU_SECONDS:.0f} s of a plan were over"
    return {"ms": {}, "refused": dict.fromkeys(names, why), "late": names, "seconds": 0.0}


def _with_fastest_form(
    asked: _Request, chosen: dict[str, Backend], record: dict[str, Any], end: float
) -> dict[str, Backend]:
    """The choices of the form of a block that is fastest as a whole; `record` gets its measurement, as "forms".

    Args:
        end: by time.perf_counter(), when it is too late to measure.
    """
    config, device, dtype = asked.config, asked.device, asked.dtype
    entries: dict[str, dict[str, Backend]] = {}
    for site in asked.sites():
        if site.name in chosen:
            able, _ = candidates(asked.spec(site))
            wrong = record.get(site.name, {}).get("refused", {})
            entries[site.name] = {entry.name: entry for entry in able if entry.name not in wrong}
    times = {site: measured["ms"] for site, measured in record.items()}
    possible = forms.candidates(chosen, entries, times)
    if len(possible) == 1:
        return possible[forms.PLAIN]
    if time.perf_counter() > end:
        record["forms"] = _no_time([name for name in possible if name != forms.PLAIN])
        return possible[forms.PLAIN]
    common: dict[str, Any] = {"device": device, "dtype": dtype}
    plans = {name: assemble(config, choices, packed=True, **common) for name, choices in possible.items()}
    plain = {site: registry.backend(SITES[site].op, "torch") for site in possible[forms.PLAIN]}
    whole = assemble(config, plain, packed=False, **common)

    def tried(batch: int) -> dict[str, Any]:
        return forms.measure(config, plans, whole, batch=batch, **common)

    found = _where_memory_allows(tried, asked.batch, list(possible))
    record["forms"] = found
    if not found["ms"]:
        return possible[forms.PLAIN]
    return possible[_fastest(found["ms"], device)]


def _faster(record: Mapping[str, Any], together: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether sites were measured to take no longer than those whose work they do.

    quantize is measured at the model's width, which hidden rows exceed.
    """

    def best(site: str) -> float:  # 0 where there was nothing to choose from
        return min(record[site]["ms"].values(), default=0.0) if site in record else 0.0

    timed = all(record[site]["ms"] for site in together if site in record)
    return timed and sum(map(best, together)) <= sum(map(best, parts))


def _without_idle_sites(chosen: dict[str, Backend]) -> dict[str, Backend]:
    """Choices less those that would only seem to fuse, as torch runs the parts one by one, and halves of pairs."""
    idle = {site.name for site in SITES.values() if site.fused and site.name in chosen
            and chosen[site.name].name == "torch"}  # fmt: skip
    for site in SITES.values():
        if site.passes_to and not {site.name, site.passes_to} <= chosen.keys():
            idle |= {site.name, site.passes_to}
    return {name: entry for name, entry in chosen.items() if name not in idle}


def build(
    config: ViTConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    batch: int | None = None,
    quantized: torch.dtype | None = None,
    skip_quantize: frozenset[str] = frozenset(),
    deterministic: bool = False,
) -> Plan:
    """Choose an implementation for every site.

    Args:
        backend: "auto", or one of "torch" (its plain ops), "triton", "native" for all sites.
        batch: the batch size whose shapes are measured; by default see GPU_BATCH.
        quantized, skip_quantize: as in `Plan`.
        deterministic: with "auto", take the first right backend in default order instead of the fastest, so that
            the choice does not depend on a clock; nothing is read from the cache or kept there.

    Raises:
        ValueError: if products are to be quantised in blocks that do more than such blocks can.
        BackendError: if a forced backend cannot run a site; the message has every reason.
        PlanError: if no backend gives a right result on this device.
    """
    if quantized and (reason := why_not_quantized(config)):
        raise ValueError(f"products in 8 bits are not for blocks with {reason}: load the model in another dtype")
    batch = batch or default_batch(config, device)
    asked = _Request(config, device, dtype, backend, batch, quantized, skip_quantize, deterministic)
    measured: dict[str, Any] = {}
    if backend != "auto":
        chosen = _forced(asked)
    elif deterministic:
        chosen, measured = _measured(asked)
    else:
        chosen, measured = _remembered(asked) or _remember(asked)
    plan = assemble(
        config, chosen, device=device, dtype=dtype, packed=backend != "torch", quantized=quantized,
        skip_quantize=skip_quantize,
    )  # fmt: skip
    return replace(plan, measured=measured)


def _key(asked: _Request) -> dict[str, Any]:
    key = plan_cache.plan_key(asked.config, asked.device, asked.dtype, asked.batch)
    if asked.quantized:
        key |= {"quantized": str(asked.quantized), "sites": [site.name for site in asked.sites()]}
    return key


def record(
    plan: Plan, config: ViTConfig, *, device: torch.device, dtype: torch.dtype, batch: int | None = None
) -> dict[str, Any]:
    """A measured plan as `vitfast.engine.plan_cache` keeps it: for what it was made, choices and measurements."""
    batch = batch or default_batch(config, device)
    asked = _Request(config, device, dtype, "auto", batch, plan.quantized, plan.skip_quantize, False)
    return {"key": _key(asked), "choices": dict(plan.backends), "measured": dict(plan.measured)}


def seconds(plan: Plan) -> float:
    """How long the measurements of a plan took, when they were made."""
    return sum(record.get("seconds", 0.0) for record in plan.measured.values())


def default_batch(config: ViTConfig, device: torch.device) -> int:
    """The batch size whose shapes are measured."""
    return GPU_BATCH if device.type == "cuda" else max(1, CPU_ROWS // config.tokens())


def _remembered(asked: _Request) -> tuple[dict[str, Backend], dict[str, Any]] | None:
    """The choices of an earlier measurement; None if there is none or, with a warning, if they cannot be used."""
    key = _key(asked)
    saved = plan_cache.load_plan(key)
    if saved is None:
        return None
    names, measured = saved
    sites = {site.name: site for site in asked.sites()}
    try:
        if unknown := names.keys() - sites.keys():
            raise BackendError(f"this model has no {', '.join(sorted(unknown))}")
        if missing := {name for name, site in sites.items() if not site.optional} - names.keys():
            raise BackendError(f"it says nothing of {', '.join(sorted(missing))}")
        chosen = {name: choose(asked.spec(sites[name]), backend) for name, backend in names.items()}
        if _without_idle_sites(chosen).keys() != chosen.keys():
            raise BackendError("it has half of a pair of sites, or a fused one on torch")
    except BackendError as error:
        plan_cache.warn_of(key, str(error))
        return None
    return chosen, measured


def _remember(asked: _Request) -> tuple[dict[str, Backend], dict[str, Any]]:
    """Measure, and keep the choices, unless memory or time was too short to measure them all."""
    chosen, measured = _measured(asked)
    starved = [f"{site} ({', '.join(r['out_of_memory'])})" for site, r in measured.items() if "out_of_memory" in r]
    if starved:
        warnings.warn(
            f"memory was too short to measure {', '.join(starved)} on {asked.batch} images: fewer decide, or the first "
            "able backend is taken, and this plan is not kept",
            stacklevel=2,
        )
    late = [site for site, found in measured.items() if "late" in found]
    if late:
        warnings.warn(
            f"the {GPU_SECONDS:.0f} s that a plan may take were over before {', '.join(late)}: there the first able "
            "backend is taken, and this plan is not kept: the next load measures again, with what is compiled by now",
            stacklevel=2,
        )
    if not starved and not late:
        plan_cache.save_plan(_key(asked), {site: entry.name for site, entry in chosen.items()}, measured)
    return chosen, measured


def assemble(
    config: ViTConfig,
    chosen: Mapping[str, Backend],
    *,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool,
    quantized: torch.dtype | None = None,
    skip_quantize: frozenset[str] = frozenset(),
) -> Plan:
    """Make a Plan of chosen backends: fold norms where all that read or write one can, pack weights on the CPU.

    A plan without row_stats (or attention_block, which finds them itself) keeps its norms apart.

    Args:
        packed: whether packed weights may be used. Not by a forced "torch": it runs the plain ops, and
            gives the bits that the model's own library gives.
        quantized, skip_quantize: as in `Plan`.
    """
    names = {site: entry.name for site, entry in chosen.items()}
    calls = {site: cast(Any, entry.call) for site, entry in chosen.items()}
    packs = {}
    for site in chosen if packed else ():
        spec = site_spec(config, SITES[site], 1, device, dtype, quantized)
        if packed_pair := packed_op(chosen[site], spec):
            packs[site], calls[site] = packed_pair
    able = {site for site, name in names.items() if name in forms.FOLDING}
    # Those that read a folded norm, and those that write statistics for one that does not find them itself.
    folding = {"attention_block"} if "attention_block" in chosen else {"row_stats", "qkv"}
    folding |= {"mlp"} if "mlp" in chosen else {"fc1"} if "attention_block" in chosen else {"proj", "fc1", "fc2"}
    return Plan(
        **calls,
        backends=names,
        fold_norm=able >= folding and folds_norms(config),
        quick_gelu_as_silu=calls.get("fc1") is mkldnn.linear and dtype == torch.float32,
        packs=packs,
        quantized=quantized,
        skip_quantize=skip_quantize,
    )
