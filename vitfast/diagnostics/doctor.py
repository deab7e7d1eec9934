"""What would run here, and every reason why not.

`report` asks the machine, torch, Triton and the op registry; it computes nothing and allocates
nothing on a device. Optional packages are imported in a child process, so that a broken one harms
nobody; its reason is reported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vitfast.engine.sites import site_spec
from vitfast.models.config import NAMED
from vitfast.models.plan import SITES
from vitfast.ops import mkldnn, registry, scaled_mm
from vitfast.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

OPTIONAL = {
    "triton": "the kernels",
    "safetensors": "reading checkpoints",
    "huggingface_hub": "models by hub id",
    "PIL": "decoding images",
    "pyarrow": "writing embeddings as Parquet",
    "typer": "the command line",
    "rich": "tables on the command line",
    "transformers": "transformers models",
    "timm": "timm models",
    "torchvision": "torchvision models; timm needs it",
    "onnx": "reading ONNX files",
}
"""Packages that some part of vitfast needs, by import name, and what for."""

REBUILD = "`pip install --no-build-isolation --no-deps --force-reinstall` of vitfast's sources"
MINIMUM = {"torch": (2, 11), "triton": (3, 6)}


def _dims() -> dict[str, dict[str, int]]:
    """The sizes of ViT-B/16 on eight images of 224 pixels, for which backends are asked, by op."""
    config, cpu = NAMED["vit_base_patch16_224"], torch.device("cpu")
    dims: dict[str, dict[str, int]] = {}
    for site in SITES.values():
        spec = site_spec(config, site, 8, cpu, torch.bfloat16, torch.int8 if site.quantized else None)
        dims.setdefault(site.op, dict(spec.dims))
    # No site of the forward has these two: one is layer_norm's, the other, before the forward, has no limits.
    dims |= {"add_layer_norm": dims["layer_norm"], "resample": {}}
    return {op: dims[op] for op in registry.OPS}


DIMS = _dims()
DTYPES: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(DIMS, (torch.float32, torch.float16, torch.bfloat16))
DTYPES.update(dict.fromkeys(registry.QUANTIZED_OPS, (torch.float8_e4m3fn, torch.int8)), resample=(torch.uint8,))


def report() -> dict[str, Any]:
    """Everything `vitfast doctor` shows, as a dict that json.dumps accepts.

    Returns:
        versions: name -> version, or None where there is none;
        platform: system, machine, cpu, cpu_threads (torch's), cores, native_products (by which instructions the C++
        extension multiplies here, or why not; None without it);
        devices: name, device, capability, memory (bytes), multiprocessors, of each CUDA device;
        backends: one entry per op, kind of device and dtype: op, device, dtype, uses (what a call of `vitfast.ops`
        that names no backend takes; None if nothing can run), engine (among what an engine chooses, by measuring
        where there are several; `plan` says what it chose for a model), others: backend -> list of reasons;
        packages: import name -> version or None, reason (why it cannot be imported), for (what);
        warnings: list of sentences.
    """
    packages = _packages()
    devices = _devices()
    versions = {
        "vitfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": packages["triton"]["version"],
        "numpy": _version("numpy")["version"],
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }
    kinds = {entry["name"]: entry["device"] for entry in reversed(devices)}  # one device of each kind
    backends = [
        _backends(op, torch.device(device), dtype)
        for device in [*reversed(kinds.values()), "cpu"]
        for op in registry.OPS
        for dtype in DTYPES[op]
    ]
    answers: dict[str, Any] = {
        "versions": versions,
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cpu_threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "native_products": _native_products(),
        },
        "devices": devices,
        "backends": backends,
        "packages": packages,
    }
    answers["warnings"] = _warnings(answers)
    return answers


def _native_products() -> str | None:
    """By which instructions of the CPU the C++ extension multiplies in each dtype, or why it does not."""
    if registry.backend("linear", "native").missing:
        return None
    simd = importlib.import_module("vitfast._C").build_info()["simd"]
    floats = {"default": "the compiler's vectors", "avx2": "AVX2 FMA"}.get(simd, "AVX-512 FMA")
    integers = "vpmaddwd" if simd in ("avx2", "avx512f") else "vpdpbusd"
    known = {"bf16": ("linear", torch.bfloat16, "vdpbf16ps"), "int8": ("quantized_linear", torch.int8, integers)}
    answers = [f"fp32: {floats}"]
    for name, (op, dtype, instruction) in known.items():
        reasons = registry.backend(op, "native").why_not(registry.Spec(op, "cpu", dtype))
        answers.append(f"{name}: {'; '.join(reasons) or instruction}")
    return ", ".join(answers)


def plan(
    source: Any,
    *,
    device: str | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    weights_key: str | None = None,
) -> dict[str, Any]:
    """Which backend runs each part of a model here, and by what measurement; measures what is not in the cache.

    Args:
        source: as `vitfast.load` takes it. device, dtype, allow_pickle, weights_key: likewise.

    Returns:
        model, device, dtype; memory: as `Engine.memory`; sites: one entry per part of the forward: site, op, dims,
        uses, ms (median milliseconds of each backend that was timed), refused (backend -> reasons), seconds (what that
        measurement took); forms: the same of the forms of a block, where they were measured; seconds: of all
        measurements, when they were made; most_seconds: of which a plan may take so many here, None for any number.

    Raises:
        As `vitfast.load`.
    """
    from vitfast.engine import load, planner

    made = load.load(source, device=device, dtype=dtype, allow_pickle=allow_pickle, weights_key=weights_key)
    sites = []
    for site, uses in made.plan.backends.items():
        spec = site_spec(made.config, SITES[site], 1, made.device, made.dtype, made.plan.quantized)
        measured = made.plan.measured.get(site, {"ms": {}, "refused": {}})
        _, unable = registry.candidates(spec)
        refused = {name: "; ".join(reasons) for name, reasons in unable.items()} | measured["refused"]
        if spec.op == "quantized_linear" and (reasons := scaled_mm.why_not(spec)):
            refused["torch._scaled_mm"] = "; ".join(reasons)
        if spec.device == "cpu" and spec.op in ("linear", "quantized_linear") and (reasons := mkldnn.why_not(spec)):
            refused["oneDNN"] = "; ".join(reasons)
        sites.append(
            {
                "site": site,
                "op": spec.op,
                "dims": dict(spec.dims),
                "uses": uses,
                "ms": measured["ms"],
                "refused": refused,
                "seconds": measured.get("seconds", 0.0),
            }
        )
    return {
        "model": made.config.name,
        "device": str(made.device),
        "dtype": made.precision,
        "memory": made.memory(),
        "sites": sites,
        "forms": made.plan.measured.get("forms"),
        "seconds": planner.seconds(made.plan),
        "most_seconds": planner.GPU_SECONDS if made.device.type == "cuda" else None,
    }


def _version(name: str) -> dict[str, str | None]:
    """Version of a package, or the reason why it cannot be imported."""
    try:
        module = importlib.import_module(name)
        version = str(getattr(module, "__version__", None) or importlib.metadata.version(name))
    except Exception as error:  # a broken package may raise anything; it is reported, not hidden
        return {"version": None, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"version": version, "reason": None}


_CHILD = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
from vitfast.diagnostics.doctor import _version
print("\\n" + json.dumps({name: _version(name) for name in json.loads(sys.argv[1])}))
"""


def _packages() -> dict[str, dict[str, str | None]]:
    """Optional packages: those this process has, then the others, imported in a child process."""
    versions = {name: _version(name) for name in OPTIONAL if name == "triton" or name in sys.modules}
    rest = [name for name in OPTIONAL if name not in versions]
    if rest:
        versions |= _versions_in_child(rest)
    return {name: {**versions[name], "for": OPTIONAL[name]} for name in OPTIONAL}


def _versions_in_child(names: list[str]) -> dict[str, dict[str, str | None]]:
    command = [sys.executable, "-c", _CHILD, json.dumps(names), json.dumps(sys.path)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        tail = str(getattr(error, "stderr", None) or "").strip().splitlines()[-1:]
        reason = "; ".join(["the child process that imports it failed", type(error).__name__, *tail])
        return {name: {"version": None, "reason": reason} for name in names}
    return json.loads(child.stdout.splitlines()[-1])


def _driver() -> str | None:
    """Version of the NVIDIA driver, None if nvidia-smi is not there or knows of no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else None


def _devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices


def _backends(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What runs one op: the registry's answer, with a reason for each backend that is not taken."""
    spec = registry.Spec(op, device.type, dtype, registry.device_capability(device), DIMS[op])
    able, refused = registry.candidates(spec)
    others = dict(refused)
    for entry in able[1:]:
        others[entry.name] = [f"able, but {able[0].name} comes first in default order"]
    return {
        "op": op,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "uses": able[0].name if able else None,
        # On the CPU Triton is its interpreter, which an engine never takes unless it is forced.
        "engine": [entry.name for entry in able if device.type != "cpu" or entry.name != "triton"],
        "others": {name: others[name] for name in registry.BACKENDS if name in others},
    }


def _warnings(report: Mapping[str, Any]) -> list[str]:
    versions, packages, devices = report["versions"], report["packages"], report["devices"]
    warnings = []
    for name, minimum in MINIMUM.items():
        if versions[name] and _numbers(versions[name]) < minimum:
            needed = ".".join(map(str, minimum))
            warnings.append(f"{name} {versions[name]} is older than {needed}, the oldest that is supported")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if versions["triton"] is None:
        warnings.append(f"there are no Triton kernels: triton cannot be imported ({packages['triton']['reason']})")
    elif not devices:
        state = "is set" if interpreting else "is not set"
        warnings.append(
            "triton without a CUDA device: kernels run only in its interpreter, which is for tests and "
            f"very slow (TRITON_INTERPRET=1, which {state})"
        )
    elif interpreting:
        warnings.append("TRITON_INTERPRET=1 is set: kernels run in Triton's interpreter, not on the GPU")
    old = versions["triton"] and _numbers(versions["triton"]) < (3, 7)
    if interpreting and old and _numbers(versions["numpy"]) >= (2, 4):
        warnings.append("Triton's interpreter before 3.7 fails with numpy 2.4 or later")
    if not devices and versions["driver"]:
        reason = "is built without CUDA" if torch.version.cuda is None else "sees no device"
        warnings.append(f"there is an NVIDIA driver ({versions['driver']}), but torch {versions['torch']} {reason}")
    for device in devices:
        if _numbers(device["capability"]) < (8, 0):
            warnings.append(f"{device['device']}: compute capability {device['capability']} is below 8.0")
    if old and any(_numbers(device["capability"])[0] == 9 for device in devices):
        warnings.append(
            "Triton before 3.7 leaves out a fence that Hopper asks for where wgmma reads what cp.async brought "
            "(Triton's pull request 10537): no wrong result of it has been seen here, but there may be some"
        )
    native = registry.backend(registry.OPS[0], "native")
    if native.missing:
        warnings.append(f"{native.missing}; where torch and a C++ compiler are, {REBUILD} builds it")
    elif devices and (state := _cuda_kernels()).startswith("not built: "):
        reason = state.removeprefix("not built: ")
        warnings.append(f"the C++ extension has no CUDA kernels ({reason}); once that is mended, {REBUILD} builds them")
    for entry in report["backends"]:
        if entry["uses"] is None:
            warnings.append(f"nothing can run {entry['op']} in {entry['dtype']} on {entry['device']}")
    for name, package in packages.items():
        absent = f"ModuleNotFoundError: No module named {name!r}"
        if package["version"] is None and name != "triton" and package["reason"] != absent:
            warnings.append(f"{name} is installed but cannot be imported: {package['reason']}")
    return warnings


def _cuda_kernels() -> str:
    """The architectures for which the C++ extension has CUDA kernels, or "not built: " and the reason."""
    return importlib.import_module("vitfast._C").build_info()["cuda"]


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor number of "2.13.0+cpu" and its like; (0, 0) if there are none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def render(report: Mapping[str, Any]) -> RenderableType:
    """A `report` for the terminal; ops that agree in all dtypes share one line."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(title="versions and platform", show_header=False, title_justify="left")
    for name, value in {**report["versions"], **report["platform"]}.items():
        facts.add_row(name, "none" if value is None else str(value))
    for device in report["devices"]:
        facts.add_row(
            device["device"],
            f"{device['name']}, compute capability {device['capability']}, {device['memory'] / 2**30:.0f} GiB, "
            f"{device['multiprocessors']} multiprocessors",
        )
    if not report["devices"]:
        facts.add_row("devices", "no CUDA device; the CPU only")

    columns = ("device", "op", "dtypes", "a call uses", "an engine uses", "why not the others")
    backends = Table(*columns, title="backends, for ViT-B/16 at batch 8")
    backends.title_justify = "left"
    lines: dict[tuple[str, ...], list[str]] = {}
    for entry in report["backends"]:
        reasons = "\n".join(f"{name}: {'; '.join(why)}" for name, why in entry["others"].items())
        engine = " or ".join(entry["engine"]) or "nothing"
        engine += ", as measured" if len(entry["engine"]) > 1 else ""
        key = (entry["device"], entry["op"], entry["uses"] or "nothing", engine, reasons)
        lines.setdefault(key, []).append(entry["dtype"])
    for (device, op, uses, engine, reasons), dtypes in lines.items():
        shown = "all" if len(dtypes) == len(DTYPES[op]) else ", ".join(dtypes)
        backends.add_row(device, op, shown, uses, engine, Text(reasons))

    packages = Table("package", "version", "for", title="packages", title_justify="left")
    for name, package in report["packages"].items():
        packages.add_row(name, Text(package["version"] or f"none: {package['reason']}"), package["for"])

    warnings = [Text(f"warning: {sentence}", style="yellow") for sentence in report["warnings"]]
    return Group(facts, backends, packages, *(warnings or [Text("no warnings", style="green")]))


def render_plan(plan: Mapping[str, Any]) -> RenderableType:
    """A `plan` for the terminal."""
    from rich.table import Table
    from rich.text import Text

    title = f"plan of {plan['model'] or 'the model'} on {plan['device']} in {plan['dtype']}"
    table = Table("part", "op", "uses", "ms, as measured", "why not the others", title=title, title_justify="left")
    most = f", of {plan['most_seconds']:.0f} s at most" if plan["most_seconds"] else ""
    table.caption = (
        f"{plan['memory']['weights'] / 2**20:.1f} MiB of weights; measured once in {plan['seconds']:.1f} s{most}"
    )
    table.caption_justify = "left"
    for entry in plan["sites"]:
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(entry["ms"].items(), key=lambda item: item[1]))
        reasons = "\n".join(f"{name}: {why}" for name, why in entry["refused"].items())
        table.add_row(entry["site"], entry["op"], entry["uses"], times or "no other was able", Text(reasons))
    return table
