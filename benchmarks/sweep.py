"""`vitfast bench sweep`: every config of our Triton kernels at the shapes of models, and the table of the best.

The table, kernels/configs/<gpu>.json, is what the launchers (`kernels/_common.py`, `tuned`) and the registry
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vitfast.benchmarks import kernels
from vitfast.benchmarks.cases import Call, Case, backend_options
from vitfast.benchmarks.device import Device
from vitfast.benchmarks.environment import ROOT
from vitfast.benchmarks.peers import BASELINE, Peer, Thunk, peers_of
from vitfast.benchmarks.result_file import write
from vitfast.engine.planner import FUSED_MAX_WIDTH
from vitfast.models.plan import SITES

OURS = "vitfast triton"
OPS = (
    "attention", "linear", "patch_embed", "layer_norm", "add_layer_norm", "row_stats", "attention_block", "mlp",
    "quantized_linear", "quantize",
)  # fmt: skip


def _linear_key(call: Call) -> str:
    from vitfast.kernels._linear_configs import tuning_key, uses_tma

    x, weight = call.args[:2]
    gated = call.kwargs.get("activation") == "swiglu"
    width = weight.shape[0] // (2 if gated else 1)
    tma = uses_tma(width, x, weight, call.kwargs.get("residual"))
    stats = call.kwargs.get("stats", False)
    return tuning_key(x.shape[0], x.shape[1], width, x.dtype, tma=tma, gated=gated, stats=stats)


def _mlp_key(call: Call) -> str:
    from vitfast.kernels.mlp import tuning_key

    x = call.args[0]
    return tuning_key(x.shape[1], x.dtype, gated=call.kwargs["activation"] == "swiglu")


def _attention_block_key(call: Call) -> str:
    from vitfast.kernels.attention_block import tuning_key

    x, proj_weight = call.args[0], call.args[3]
    return tuning_key(x.shape[2], proj_weight.shape[1] // call.kwargs["heads"], x.shape[1], x.dtype)


def _attention_key(call: Call) -> str:
    from vitfast.kernels.attention import tuning_key

    return tuning_key(*call.args[:2], backend_options(call.kwargs))


def _quantized_linear_key(call: Call) -> str:
    from vitfast.kernels.quantized_linear import scale_group, tuning_key

    x, x_scale, weight = call.args[:3]
    gated, requantize = call.kwargs.get("activation") == "swiglu", call.kwargs.get("requantize", False)
    width = weight.shape[0] // (2 if gated else 1)
    group = scale_group(x, x_scale)
    return tuning_key(x.shape[0], x.shape[1], width, x.dtype, gated=gated, requantize=requantize, group=group)


TUNED: dict[str, Callable[[Call], str]] = {
    "attention": _attention_key,
    "attention_block": _attention_block_key,
    "linear": _linear_key,
    "mlp": _mlp_key,
    "quantized_linear": _quantized_linear_key,
}
"""Ops whose launcher takes `config`, and the key under which it looks a choice up. The others run as they are."""


def sweep(
    cases: Sequence[Case],
    device: Device,
    *,
    rounds: int = 10,
    seconds: float = math.inf,
    on_rows: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    """Check and time every config that a case can run; `on_rows` gets the rows of each case.

    Args:
        seconds: for everything; cases that are left then are not swept.

    Returns:
        swept and proven: op -> dtypes; configs as they stand in the table.
    """
    found: list[tuple[Case, str, list[dict[str, Any]]]] = []
    start = time.perf_counter()
    fused = {site.op for site in SITES.values() if site.fused}
    cases = [case for case in cases if case.op not in fused or case.dims["width"] <= FUSED_MAX_WIDTH]
    for index, case in enumerate(cases):
        if time.perf_counter() - start > seconds:
            choices = decide(found)  # what was cut short is proven for nothing
            left = {(case.op, _dtype(case)) for case in cases[index:]}
            proven = {op: [t for t in dtypes if (op, t) not in left] for op, dtypes in choices["proven"].items()}
            return choices | {"proven": {op: dtypes for op, dtypes in proven.items() if dtypes}}
        key = TUNED[case.op](case.inputs()) if case.op in TUNED else ""
        rows = kernels.run_case(case, device, _contestants(case), rounds)
        on_rows(rows)
        found.append((case, key, rows))
    return decide(found)


def decide(found: Sequence[tuple[Case, str, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """The table's choices from measured rows: per op and key the least total time, of configs right in every case."""
    times: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for case, key, rows in found:
        times[case.op, _dtype(case), key].append({row["peer"]: row["median_ms"] for row in rows if row["correct"]})
    configs: dict[str, dict[str, str]] = defaultdict(dict)
    swept: dict[str, list[str]] = defaultdict(list)
    losing = set()
    for (op, dtype, key), measured in times.items():
        if dtype not in swept[op]:
            swept[op].append(dtype)
        total = {
            peer: sum(ms[peer] for ms in measured)
            for peer in measured[0]
            if peer.startswith(OURS) and all(peer in ms for ms in measured)
        }
        if not total:
            losing.add((op, dtype))
            continue
        best = min(total, key=lambda peer: total[peer])
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


def _contestants(case: Case) -> dict[str, Peer]:
    """Plain torch, and our kernel in every config, or as it is."""
    peers = peers_of(case)
    found = {BASELINE: peers[BASELINE]}
    if case.op not in TUNED:
        return found | {OURS: peers[OURS]}
    module = importlib.import_module(f"vitfast.kernels.{case.op}")
    for config in module.CONFIGS:
        name = f"{OURS} {config.name}"
        found[name] = Peer(name, functools.partial(_with_config, module, case, config))
    return found


def _with_config(module: Any, case: Case, config: Any, call: Call) -> Thunk:
    if case.device.type == "cuda" and torch.cuda.get_device_capability(case.device) < config.min_capability:
        raise ValueError(f"config {config.name} needs compute capability {config.min_capability}")
    return functools.partial(getattr(module, case.op), *call.args, **backend_options(call.kwargs), config=config)
