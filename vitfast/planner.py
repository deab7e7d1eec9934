"""Which backend runs each site of the forward: by capability first, then by measurement.

For every site the registry names the backends able to run it. If one is left, or a backend is
forced, that is the choice. If several are, each is checked against the reference and timed on the
site's own shapes, weights packed beforehand where its product wants that, and the fastest right one
is kept. Choices are stored as JSON under the user cache directory, keyed by everything that could
change them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import vitfast
from vitfast import testing
from vitfast.config import ViTConfig
from vitfast.model import PRODUCTS, QUANTIZED_SITES, SITES, Plan
from vitfast.ops import mkldnn, native, reference, registry
from vitfast.ops.registry import Backend, BackendError, Spec, candidates, choose, device_capability

LINEAR_SITES = ("qkv", "proj", "fc1", "fc2", "head")
QUANTIZED_PRODUCTS = QUANTIZED_SITES[1:]
OPTIONAL_SITES = ("mlp", "row_stats")
"""Sites that a forward can do without: fc1 and fc2 take the first's place, layer_norm the second's."""
MLP_MAX_WIDTH = 384
"""Widest model for which the one-launch mlp is a candidate; wider, it would be two `linear` anyway."""
GPU_BATCH = 64
"""Images whose shapes are measured on a GPU; on a CPU as many as have CPU_ROWS tokens."""
CPU_ROWS = 1600
TIE = 0.15
"""A backend takes the place of one before it only if it is faster by this share; less is within the noise of
a busy machine. On the CPU native comes first: its sums err less than torch's (docs/numerics.md)."""


class PlanError(RuntimeError):
    """No backend able to run a site gave a right result on this device; lists each one's error."""


@dataclass(frozen=True)
class Call:
    """One site's op at its shapes, with arguments to check and time it on."""

    op: str
    spec: Spec
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def plan_sites(quantized: torch.dtype | None, keep: frozenset[str]) -> tuple[str, ...]:
    """The sites that a plan has to choose a backend for."""
    if quantized is None:
        return SITES
    kept = {name.rpartition(".")[2] for name in keep}
    plain = [site for site in SITES if site not in OPTIONAL_SITES and (site not in PRODUCTS or site in kept)]
    return (*plain, *QUANTIZED_SITES)


def site_dtype(site: str, dtype: torch.dtype, quantized: torch.dtype | None) -> torch.dtype:
    """The dtype that backends are asked about: a quantised site's own, else the model's."""
    return quantized if site in QUANTIZED_SITES else dtype


def site_spec(config: ViTConfig, site: str, batch: int, device: torch.device, dtype: torch.dtype) -> Spec:
    """The registry's description of one site at a batch size."""
    op = "linear" if site in LINEAR_SITES else "quantized_linear" if site in QUANTIZED_PRODUCTS else site
    tokens, c, f = config.tokens(), config.width, config.mlp_dim
    hd, up = config.heads * config.head_dim, 2 * f if config.gated else f
    rows = batch * tokens
    dims = {
        "patch_embed": {"width": c, "patch": config.in_channels * config.patch_size[0] * config.patch_size[1]},
        "layer_norm": {"width": c},
        "row_stats": {"width": c},
        "qkv": {"rows": rows, "inner": c, "width": 3 * hd},
        "attention": {"head_dim": config.head_dim, "queries": tokens, "keys": tokens},
        "proj": {"rows": rows, "inner": hd, "width": c},
        "fc1": {"rows": rows, "inner": c, "width": up},
        "fc2": {"rows": rows, "inner": f, "width": c},
        "mlp": {"rows": rows, "width": c, "hidden": up},
        "head": {"rows": batch, "inner": c, "width": max(config.num_classes, config.projection_dim, 1)},
        "quantize": {"rows": rows, "width": max(c, hd, f)},
    }[site.removeprefix("quantized_")]
    return Spec(op, device.type, dtype, device_capability(device), dims)


def site_call(config: ViTConfig, site: str, batch: int, device: torch.device, dtype: torch.dtype) -> Call:
    """Random arguments of one site's real shapes, scaled so that activations stay near 1."""
    generator = torch.Generator(device).manual_seed(0)

    made_in = torch.bfloat16 if site in QUANTIZED_SITES else dtype

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(made_in)

    spec = site_spec(config, site, batch, device, dtype)
    tokens, c = config.tokens(), config.width

    def product(inner: int, width: int, **kwargs: Any) -> Call:
        # A head may have one output: with few rows the error it is allowed would be zero by luck.
        x = random(batch, tokens, inner) if site != "head" else random(max(batch, 64), inner)
        args = (x, random(width, inner, scale=inner**-0.5), random(width))
        return Call("linear", spec, args, kwargs)

    inner, width = spec.dims.get("inner", 0), spec.dims.get("width", 0)
    if site == "patch_embed":
        (height, breadth), (rows, columns) = config.image_size, config.grid(config.image_size)
        pixels = torch.randint(
            0, 256, (batch, height, breadth, config.in_channels), generator=generator, device=device, dtype=torch.uint8
        )
        prefix = random(config.prefix_tokens, c) if config.prefix_tokens else None
        position = random(rows * columns, c)
        patch = spec.dims["patch"]
        weight = random(c, patch, scale=1 / (64 * patch**0.5))
        kwargs = {"patch_size": config.patch_size, "channels_last": True}
        return Call(site, spec, (pixels, weight, random(c), position, prefix), kwargs)
    if site == "layer_norm":
        return Call(site, spec, (random(batch, tokens, c), random(c), random(c), config.norm_eps), {})
    if site == "row_stats":
        return Call(site, spec, (random(batch, tokens, c),), {})
    if site == "attention":
        qkv = random(batch, tokens, 3, config.heads, config.head_dim)
        return Call(site, spec, tuple(qkv.unbind(2)), {})
    if site == "mlp":
        up = spec.dims["hidden"]
        weights = (random(up, c, scale=c**-0.5), random(up), random(c, config.mlp_dim, scale=c**-0.5), random(c))
        kwargs = {"activation": config.activation, "residual": random(batch, tokens, c)}
        return Call(site, spec, (random(batch, tokens, c), *weights), kwargs)
    if site in QUANTIZED_SITES:
        return _quantized_call(config, site, spec, random)
    if site == "fc1":
        return product(inner, width, activation=config.activation)
    if site in ("proj", "fc2"):
        return product(inner, width, residual=random(batch, tokens, c))
    return product(inner, width)


def _quantized_call(config: ViTConfig, site: str, spec: Spec, random: Callable[..., Tensor]) -> Call:
    """`site_call` of a quantised site; `random` makes bf16."""
    c, rows = config.width, spec.dims["rows"]
    if site == "quantize":
        args = (random(rows, c), random(c), random(c), config.norm_eps)
        return Call(site, spec, args, {"dtype": spec.dtype})
    inner, width = spec.dims["inner"], spec.dims["width"]
    x = reference.quantize(random(rows, inner), dtype=spec.dtype)
    weight = reference.quantize(random(width, inner, scale=inner**-0.5), dtype=spec.dtype)
    kwargs: dict[str, Any] = {"activation": config.activation} if site == "quantized_fc1" else {}
    if site in ("quantized_proj", "quantized_fc2"):
        kwargs["residual"] = random(rows, width)
    return Call(spec.op, spec, (*x, *weight, random(width)), kwargs)


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


def packed_linear(entry: Backend, spec: Spec) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """`pack` of a weight [N, K] and the linear that reads it, for a backend that has them for this spec."""
    if spec.op != "linear" or spec.device != "cpu" or spec.dtype != torch.float32:
        return None
    if entry.name == "native":
        return native.pack, native.linear_packed
    return (mkldnn.pack, mkldnn.linear) if entry.name == "torch" and mkldnn.available() else None


def _runner(entry: Backend, call: Call) -> Callable[[], Any]:
    """The call as a planned model makes it."""
    run, args = cast(Any, entry.call), call.args
    if packed := packed_linear(entry, call.spec):
        pack, run = packed
        args = (args[0], pack(args[1]), *args[2:])
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
    right, wrong = [], {}
    run = {entry.name: _runner(entry, call) for entry in entries}
    for entry in entries:
        try:
            testing.assert_close(run[entry.name](), oracle, baseline, what=call.op)
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
    for site in plan_sites(quantized, keep):
        if site == "mlp" and config.width > MLP_MAX_WIDTH:
            continue
        its_dtype = site_dtype(site, dtype, quantized)
        spec = site_spec(config, site, batch, device, its_dtype)
        if backend != "auto":
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
    if "mlp" in record and _best(record, "mlp") > _best(record, "fc1") + _best(record, "fc2"):
        del chosen["mlp"]
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
        plan = assemble(config, chosen, device=device, dtype=dtype, packed=backend != "torch")
        return replace(plan, quantized=quantized, keep=keep)
    key = plan_key(config, device, dtype, batch)
    if quantized:
        key |= {"quantized": str(quantized), "sites": list(plan_sites(quantized, keep))}
    path = plans_dir() / f"{_digest(key)}.json"
    saved = load_plan(path, key)
    if saved is None:
        chosen, measured = _site_backends(config, device, dtype, backend, batch, quantized, keep)
        save_plan(path, key, {site: entry.name for site, entry in chosen.items()}, measured)
    else:
        names, measured = saved
        chosen = {}
        for site, name in names.items():
            chosen[site] = choose(site_spec(config, site, batch, device, site_dtype(site, dtype, quantized)), name)
    plan = assemble(config, chosen, device=device, dtype=dtype, packed=True)
    return replace(plan, measured=measured, quantized=quantized, keep=keep)


def assemble(
    config: ViTConfig, chosen: dict[str, Backend], *, device: torch.device, dtype: torch.dtype, packed: bool
) -> Plan:
    """Make a Plan of chosen backends: fold norms where every product is Triton, pack weights on the CPU.

    Args:
        packed: whether packed weights may be used. Not by a forced "torch": it runs the plain ops, and
            gives the bits that the model's own library gives.
    """
    names = {site: entry.name for site, entry in chosen.items()}
    calls = {site: cast(Any, entry.call) for site, entry in chosen.items()}
    packs = {}
    for site in (site for site in LINEAR_SITES if packed and site in chosen):
        if found := packed_linear(chosen[site], site_spec(config, site, 1, device, dtype)):
            packs[site], calls[site] = found
    fused = names.get("mlp") in ("triton", "native")
    on_triton = {site for site, name in names.items() if name == "triton"}
    folding = {"row_stats", "qkv", "mlp"} if fused else {"row_stats", "qkv", "proj", "fc1", "fc2"}
    return Plan(
        calls=calls,
        backends=names,
        fold_norm=on_triton >= folding,
        fuse_mlp=fused,
        quick_gelu_as_silu=calls.get("fc1") is mkldnn.linear,
        packs=packs,
    )


def plan_key(config: ViTConfig, device: torch.device, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """All that could change which backend is fastest. Plans are exchanged between machines that agree in it."""
    key = {
        "torch": torch.__version__,
        "vitfast": vitfast.__version__,
        "dtype": str(dtype),
        "batch": batch,
        "config": repr(config),
    }
    if device.type == "cuda":
        import triton

        return key | {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    extension = [op for op in registry.OPS if not registry.backend(op, "native").missing]
    return key | {"device": _cpu_name(), "threads": torch.get_num_threads(), "extension": extension}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return f"{match[1] if match else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """Where vitfast keeps what it can make again: $VITFAST_CACHE, else vitfast in the user's cache folder."""
    if folder := os.environ.get("VITFAST_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitfast"


def plans_dir() -> Path:
    """Where plans are kept."""
    return cache_dir() / "plans"


def load_plan(path: Path, key: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Choices and measurements that `save_plan` saved; None if there are none or, with a warning, for another key."""
    if not path.is_file():
        return None
    plan = json.loads(path.read_text())
    made_for = plan.get("key", {})
    if differing := sorted(name for name in {*key, *made_for} if key.get(name) != made_for.get(name)):
        told = "; ".join(f"{name} {made_for.get(name)!r}, here {key.get(name)!r}" for name in differing)
        warnings.warn(f"the plan {path} is measured again, it was made for {told}", stacklevel=2)
        return None
    return plan["choices"], plan["measured"]


def save_plan(path: Path, key: dict[str, Any], choices: dict[str, str], measured: dict[str, Any]) -> None:
    """Write choices, what they were made for and their measurements as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        json.dump({"key": key, "choices": choices, "measured": measured}, file, indent=1)
    os.replace(file.name, path)
