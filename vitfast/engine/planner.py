"""Which backend runs each site of the forward: by capability first, then by measurement.

For every site the registry names the backends able to run it. If one is left, or a backend is
forced, that is the choice. If several are, each is checked against the reference and timed on the
site's own shapes, weights packed beforehand where its product wants that, and the fastest right one
is kept. Choices are stored as JSON under the user cache directory, keyed by everything that could
change them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from vitfast.engine import progress
from vitfast.engine.plan_cache import digest, load_plan, plan_key, plans_dir, save_plan
from vitfast.engine.sites import (
    FUSED_SITES,
    LINEAR_SITES,
    OPTIONAL_SITES,
    QUANTIZED_PRODUCTS,
    Call,
    plan_sites,
    site_call,
    site_dtype,
    site_spec,
)
from vitfast.models.config import ViTConfig
from vitfast.models.plan import HIDDEN_SITES, MIXED_SITES, Plan
from vitfast.ops import accuracy, mkldnn, native, reference, registry, scaled_mm
from vitfast.ops.registry import Backend, BackendError, Spec, candidates, choose

FUSED_MAX_WIDTH = 384
"""Widest model for which half a block in one launch is a candidate; wider, mlp would be two `linear` anyway."""
GPU_BATCH = 64
"""Images whose shapes are measured on a GPU; on a CPU as many as have CPU_ROWS tokens."""
CPU_ROWS = 1600
TIE = 0.15
"""A backend takes the place of one before it only if it is faster by this share; less is within the noise of
a busy machine. On the CPU native comes first: its sums err less than torch's (docs/numerics.md)."""

APART = {
    HIDDEN_SITES: ("quantized_fc1", "quantized_fc2", "quantize"),
    MIXED_SITES: ("attention", "quantized_proj", "quantize"),
}
"""Sites of a quantised model that pass 8 bits on, and what they take the place of; a plan keeps the faster. quantize is
measured at the model's width, which hidden rows exceed."""


class PlanError(RuntimeError):
    """No backend able to run a site gave a right result on this device; lists each one's error."""


def time_calls(
    calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int = 10, seconds: float = 2.0
) -> list[float]:
    """Median milliseconds of each call, in interleaved rounds, with a cold L2 cache on a GPU.

    Args:
        seconds: no round is begun after so long, but for the first three.
    """
    times: list[list[float]] = [[] for _ in calls]
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for call in calls:
        call()
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begun > seconds:
            break
        for i, call in enumerate(calls):
            if flush is None:
                start = time.perf_counter()
                call()
                times[i].append((time.perf_counter() - start) * 1e3)
            else:
                flush.zero_()
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                call()
                after.record()
                after.synchronize()
                times[i].append(before.elapsed_time(after))
    return [sorted(t)[len(t) // 2] for t in times]


def packed_op(entry: Backend, spec: Spec) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """`pack` of a weight [N, K] and the op that reads it, for a backend that has them for this spec."""
    if spec.op == "quantized_linear" and entry.name == "torch":
        if not scaled_mm.why_not(spec):
            return scaled_mm.pack, scaled_mm.linear
        if spec.device == "cpu" and spec.dtype == torch.float8_e4m3fn:
            return torch.Tensor.float, reference.quantized_linear
    if spec.op not in ("linear", "patch_embed") or spec.device != "cpu" or spec.dtype != torch.float32:
        return None
    if spec.op == "patch_embed":
        return (native.pack_patch_embed, native.patch_embed_packed) if entry.name == "native" else None
    if entry.name == "native":
        return native.pack, native.linear_packed
    return (mkldnn.pack, mkldnn.linear) if entry.name == "torch" and mkldnn.available() else None


def _runner(entry: Backend, call: Call) -> Callable[[], Any]:
    """The call as a planned model makes it."""
    run, args = cast(Any, entry.call), call.args
    if packed := packed_op(entry, call.spec):
        pack, run = packed
        layout = call.kwargs | {"uint8": args[0].dtype == torch.uint8} if call.op == "patch_embed" else {}
        at = 2 if call.op == "quantized_linear" else 1  # the weight's place: after x, or x and its scales
        args = (*args[:at], pack(args[at], **layout), *args[at + 1 :])
    return functools.partial(run, *args, **call.kwargs)


def measure(call: Call, entries: Sequence[Backend], device: torch.device) -> tuple[Backend, dict[str, Any]]:
    """Check each backend on the call against the reference, time the right ones, keep the fastest (see TIE).

    Returns:
        The winner, and a record: milliseconds by backend, and the reason for each one left out.

    Raises:
        PlanError: if none is right.
    """
    oracle = getattr(reference, call.op)(*call.args, **call.kwargs, upcast=True)
    baseline = getattr(reference, call.op)(*call.args, **call.kwargs)
    tolerances = accuracy.tolerances_for(call.args)
    right, wrong = [], {}
    run = {entry.name: _runner(entry, call) for entry in entries}
    for entry in entries:
        try:
            accuracy.assert_close(run[entry.name](), oracle, baseline, what=call.op, tolerances=tolerances)
            right.append(entry)
        except (AssertionError, RuntimeError, ValueError) as error:
            wrong[entry.name] = f"{type(error).__name__}: {error}"
    del oracle, baseline
    if not right:
        raise PlanError(f"no backend is right for {call.op} on {device}: {wrong}")
    times = time_calls([run[entry.name] for entry in right], device)
    median = dict(zip((entry.name for entry in right), times, strict=True))
    best = right[0]
    for entry in right[1:]:
        if median[entry.name] < (1 - TIE) * median[best.name]:
            best = entry
    return best, {"ms": median, "refused": wrong}


def _site_backends(
    config: ViTConfig,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    batch: int,
    quantized: torch.dtype | None = None,
    keep: frozenset[str] = frozenset(),
) -> tuple[dict[str, Backend], dict[str, Any]]:
    """The backend of every site, and what was measured to choose it."""
    chosen: dict[str, Backend] = {}
    record: dict[str, Any] = {}
    sites = plan_sites(config, quantized, keep)
    what = f"measuring which backend is fastest for {config.name or 'this model'} on {device}, once"
    for site in progress.said(sites, len(sites), what):
        if site in FUSED_SITES and config.width > FUSED_MAX_WIDTH:
            continue
        its_dtype = site_dtype(site, dtype, quantized)
        spec = site_spec(config, site, batch, device, its_dtype)
        if backend != "auto":
            if site == "attention_block":
                continue  # no measurement says that it is worth having
            if site not in OPTIONAL_SITES or not registry.backend(spec.op, backend).why_not(spec):
                chosen[site] = choose(spec, backend)
            continue
        able, refused = candidates(spec)
        if not able:
            raise BackendError(f"no backend can run {site}: {refused}")
        if device.type == "cpu":  # where Triton would be its interpreter, for tests
            able = sorted((e for e in able if e.name != "triton"), key=lambda e: e.name != "native")
        if len(able) == 1 or (site == "head" and not config.num_classes and not config.projection_dim):
            chosen[site] = able[0]
        else:
            chosen[site], record[site] = measure(site_call(config, site, batch, device, its_dtype), able, device)
    for site, parts in FUSED_SITES.items():
        slower = site in record and _best(record, site) > sum(_best(record, part) for part in parts)
        if site in chosen and (slower or chosen[site].name == "torch"):  # which runs the parts one by one
            del chosen[site]
    for pair, apart in APART.items():
        if pair[0] in record and sum(_best(record, s) for s in pair) > sum(_best(record, s) for s in apart):
            for site in pair:
                del chosen[site]
    return chosen, record


def _best(record: dict[str, Any], site: str) -> float:
    """Fastest measured milliseconds at a site; 0 where there was nothing to choose from."""
    return min(record[site]["ms"].values()) if site in record else 0.0


def build(
    config: ViTConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    batch: int | None = None,
    quantized: torch.dtype | None = None,
    keep: frozenset[str] = frozenset(),
) -> Plan:
    """Choose an implementation for every site.

    Args:
        backend: "auto", or one of "torch" (its plain ops), "triton", "native" for all sites.
        batch: the batch size whose shapes are measured; by default see GPU_BATCH.
        quantized, keep: as in `Plan`.

    Raises:
        BackendError: if a forced backend cannot run a site; the message has every reason.
        PlanError: if no backend gives a right result on this device.
    """
    batch = batch or (GPU_BATCH if device.type == "cuda" else max(1, CPU_ROWS // config.tokens()))
    if backend != "auto":
        chosen, _ = _site_backends(config, device, dtype, backend, batch, quantized, keep)
        packed = backend != "torch"
        return assemble(config, chosen, device=device, dtype=dtype, packed=packed, quantized=quantized, keep=keep)
    key = plan_key(config, device, dtype, batch)
    if quantized:
        key |= {"quantized": str(quantized), "sites": list(plan_sites(config, quantized, keep))}
    path = plans_dir() / f"{digest(key)}.json"
    saved = load_plan(path, key)
    if saved is None:
        chosen, measured = _site_backends(config, device, dtype, backend, batch, quantized, keep)
        save_plan(path, key, {site: entry.name for site, entry in chosen.items()}, measured)
    else:
        names, measured = saved
        chosen = {}
        for site, name in names.items():
            chosen[site] = choose(site_spec(config, site, batch, device, site_dtype(site, dtype, quantized)), name)
    plan = assemble(config, chosen, device=device, dtype=dtype, packed=True, quantized=quantized, keep=keep)
    return replace(plan, measured=measured)


def assemble(
    config: ViTConfig,
    chosen: dict[str, Backend],
    *,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool,
    quantized: torch.dtype | None = None,
    keep: frozenset[str] = frozenset(),
) -> Plan:
    """Make a Plan of chosen backends: fold norms where every product is Triton, pack weights on the CPU.

    Args:
        packed: whether packed weights may be used. Not by a forced "torch": it runs the plain ops, and
            gives the bits that the model's own library gives.
        quantized, keep: as in `Plan`.
    """
    names = {site: entry.name for site, entry in chosen.items()}
    calls = {site: cast(Any, entry.call) for site, entry in chosen.items()}
    packs = {}
    for site in (site for site in ("patch_embed", *LINEAR_SITES, *QUANTIZED_PRODUCTS) if packed and site in chosen):
        spec = site_spec(config, site, 1, device, site_dtype(site, dtype, quantized))
        if found := packed_op(chosen[site], spec):
            packs[site], calls[site] = found
    fuse_attention, fuse_mlp = (names.get(site) in ("triton", "native") for site in FUSED_SITES)
    on_triton = {site for site, name in names.items() if name == "triton"}
    # Those that read a folded norm, and those that write statistics for one that does not find them itself.
    folding = {"attention_block"} if fuse_attention else {"row_stats", "qkv"}
    folding |= {"mlp"} if fuse_mlp else {"fc1"} if fuse_attention else {"proj", "fc1", "fc2"}
    return Plan(
        calls=calls,
        backends=names,
        fold_norm=on_triton >= folding,
        fuse_attention=fuse_attention,
        fuse_mlp=fuse_mlp,
        quick_gelu_as_silu=calls.get("fc1") is mkldnn.linear,
        packs=packs,
        quantized=quantized,
        keep=keep,
    )
