"""`vitfast bench sweep`: every config of our Triton kernels at the shapes of models, and the table of the best.

The table, kernels/configs/<gpu>.json, is what the launchers (`kernels/_parts/launch.py`, `tuned`) and the registry
(`proven`) read:

    gpu, date, commit, torch, triton    where it comes from
    proven     op -> dtypes in which it was right and at least as fast as plain torch at every shape swept
    configs    op -> tuning key -> name of the fastest config, of those that were right at all shapes of that key
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitfast.benchmarks import kernels
from vitfast.benchmarks.cases import Call, Case, backend_options
from vitfast.benchmarks.device import Device
from vitfast.benchmarks.environment import ROOT
from vitfast.benchmarks.providers import BASELINE, Provider, Thunk, providers_of
from vitfast.benchmarks.result_file import write
from vitfast.benchmarks.watch import Watch
from vitfast.engine.planner import FUSED_MAX_WIDTH
from vitfast.models.plan import SITES
from vitfast.ops import registry

OURS = "vitfast triton"
OPS = (
    "attention", "linear", "patch_embed", "layer_norm", "add_layer_norm", "row_stats", "attention_block", "mlp",
    "quantized_linear", "quantize", "resample",
)  # fmt: skip


TUNED = ("attention", "attention_block", "linear", "mlp", "quantized_linear")
"""Ops whose launcher takes `config`; the others run as they are."""


def problem_of(case: Case, call: Call) -> Any:
    """What the choice of a config depends on for a call; its `key` is that under which the launcher looks one up."""
    return _kernel_file(case).problem_of(*call.args, **backend_options(call.kwargs))


def _kernel_file(case: Case) -> Any:
    return importlib.import_module(f"vitfast.kernels.{case.op}")


def sweep(
    cases: Sequence[Case],
    device: Device,
    *,
    rounds: int = 10,
    seconds: float = math.inf,
    before: Sequence[dict[str, Any]] = (),
    finished: Container[str] = (),
    died: Mapping[tuple[str, str], dict[str, Any]] | None = None,
    watch: Watch | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    """Check and time every config that is worth a try at a case; `on_rows` gets the rows of each case.

    Args:
        seconds: for everything; cases that are left then are not swept.
        before: rows of an earlier run: those of the cases in `finished` count as swept.
        died: (case, provider) -> the row of one that is not to run again. watch: told what is about to run.

    Raises:
        ContextLost: if the device cannot go on; its `row` names what that is due to.

    Returns:
        swept and proven: op -> dtypes; configs as they stand in the table.
    """
    swept: list[tuple[Case, str, list[dict[str, Any]]]] = []
    start = time.perf_counter()
    cases = [case for case in cases if _wanted(case)]
    for index, case in enumerate(cases):
        if time.perf_counter() - start > seconds:
            choices = decide(swept)  # what was cut short is proven for nothing
            left = {(case.op, _dtype(case)) for case in cases[index:]}
            proven = {op: [t for t in dtypes if (op, t) not in left] for op, dtypes in choices["proven"].items()}
            return choices | {"proven": {op: dtypes for op, dtypes in proven.items() if dtypes}}
        key = problem_of(case, case.inputs()).key if case.op in TUNED else ""
        rows = [row for row in before if row["case"] == case.name]
        if case.name not in finished:
            lost = {name: row for (of, name), row in (died or {}).items() if of == case.name}
            able = {name: provider for name, provider in providers(case, device).items() if name not in lost}
            rows = list(lost.values())
            if kernels.REFERENCE not in lost:
                rows += kernels.run_case(case, device, able, rounds, watch)
            on_rows(rows)
        swept.append((case, key, rows))
    return decide(swept)


def _wanted(case: Case) -> bool:
    """Not of halves of a block wider than one launch goes, nor of bare products: no forward has these."""
    fused = {site.op for site in SITES.values() if site.fused}
    return (case.op not in fused or case.dims["width"] <= FUSED_MAX_WIDTH) and case.dims.get("epilogue") != "plain"


def decide(cases: Sequence[tuple[Case, str, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """The table's choices from measured rows: per op and key the least total time, of configs right in every case."""
    times: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for case, key, rows in cases:
        times[case.op, _dtype(case), key].append({row["provider"]: row["median_ms"] for row in rows if row["correct"]})
    configs: dict[str, dict[str, str]] = defaultdict(dict)
    swept: dict[str, list[str]] = defaultdict(list)
    losing = set()
    for (op, dtype, key), measured in times.items():
        if dtype not in swept[op]:
            swept[op].append(dtype)
        total = {
            provider: sum(ms[provider] for ms in measured)
            for provider in measured[0]
            if provider.startswith(OURS) and all(provider in ms for ms in measured)
        }
        if not total:
            losing.add((op, dtype))
            continue
        best = min(total, key=lambda provider: total[provider])
        if op in TUNED:
            configs[op][key] = best.removeprefix(f"{OURS} ")
        if any(ms[best] > ms.get(BASELINE, float("inf")) for ms in measured):
            losing.add((op, dtype))
    proven = {op: [dtype for dtype in dtypes if (op, dtype) not in losing] for op, dtypes in swept.items()}
    return {
        "swept": dict(swept),
        "proven": {op: dtypes for op, dtypes in proven.items() if dtypes},
        "configs": dict(configs),
    }


def _dtype(case: Case) -> str:
    return str(case.operand_dtype).removeprefix("torch.")


def table_path(device: Device) -> Path:
    """Where a GPU's table belongs: kernels/configs in a checkout, the same folder of an installed package."""
    return ROOT / "kernels" / "configs" / f"{device.slug}.json"


def write_table(path: Path, choices: dict[str, Any], environment: dict[str, Any]) -> None:
    """Write a table; choices for keys and ops that were not swept this time are kept from the one that is there."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    configs, proven = old.get("configs", {}), old.get("proven", {})
    for op, chosen in choices["configs"].items():
        configs[op] = dict(sorted({**configs.get(op, {}), **chosen}.items()))
    for op, dtypes in choices["swept"].items():
        kept = set(proven.get(op, [])) - set(dtypes) | set(choices["proven"].get(op, []))
        proven = {**proven, op: sorted(kept)}
    table = {
        "gpu": environment["gpu"],
        "date": environment["date"],
        "commit": environment["commit"],
        "torch": environment["torch"],
        "triton": environment["packages"].get("triton"),
        "proven": {op: dtypes for op, dtypes in sorted(proven.items()) if dtypes},
        "configs": configs,
    }
    write(path, json.dumps(table, indent=1) + "\n")


def providers(case: Case, device: Device) -> dict[str, Provider]:
    """Plain torch, and our kernel in every config that can run a case and is worth a try there, or as it is."""
    everyone = providers_of(case)
    swept = {BASELINE: everyone[BASELINE]}
    if (case.spec.op, "triton") in registry.withheld:
        return swept
    if case.op not in TUNED:
        return swept | {OURS: everyone[OURS]}
    module, problem = _kernel_file(case), problem_of(case, case.inputs())
    able = [config for config in module.CONFIGS if not module.why_not(config, problem)]
    if case.op == "linear":
        sms = importlib.import_module("vitfast.kernels._parts.launch").num_sms(device.torch_device)
        able = [config for config in able if module.worth_trying(config, problem, sms)]
    for config in able:
        name = f"{OURS} {config.name}"
        swept[name] = Provider(name, functools.partial(_with_config, module, case, config))
    return swept


def _with_config(module: Any, case: Case, config: Any, call: Call) -> Thunk:
    return functools.partial(getattr(module, case.op), *call.args, **backend_options(call.kwargs), config=config)
