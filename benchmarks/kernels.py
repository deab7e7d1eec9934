"""Kernels one by one: each backend of each op at the shapes of real models, checked before timed.

    python -m benchmarks.kernels --batch 64

The sites are those of the model's forward (qkv, attention, fc1, ...). A row has milliseconds,
TFLOP/s and GB/s (of the operands and results, each counted once), and the ratio to the torch backend.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from vitfast import planner, testing
from vitfast.config import NAMED, ViTConfig
from vitfast.engine import resolve_device, resolve_dtype
from vitfast.model import SITES
from vitfast.ops import reference
from vitfast.ops.registry import BACKENDS, backend
from vitfast.predict import flops


def nbytes(*values: Any) -> int:
    """Bytes of all tensors among the values, each counted once."""
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
    return sum(t.numel() * t.element_size() for t in flat if isinstance(t, torch.Tensor))


def site_rows(
    name: str, config: ViTConfig, site: str, batch: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    """One row per backend at one site."""
    call = planner.site_call(config, site, batch, device, dtype)
    oracle_of, kwargs = getattr(reference, call.op), call.kwargs
    oracle, baseline = oracle_of(*call.args, **kwargs, upcast=True), oracle_of(*call.args, **kwargs)
    rows, calls = [], {}
    for peer in BACKENDS:
        entry = backend(call.op, peer)
        row: dict[str, Any] = {"case": f"{name} {site} batch {batch}", "op": call.op, "peer": peer}
        row |= {"dtype": str(dtype).removeprefix("torch."), "dims": dict(call.spec.dims), "correct": False}
        rows.append(row)
        if reasons := entry.why_not(call.spec):
            row["error"] = "; ".join(reasons)
            continue
        assert entry.call is not None
        try:
            testing.assert_close(entry.call(*call.args, **kwargs), oracle, baseline, what=site)
        except AssertionError as error:
            row["error"] = f"incorrect: {error}"
            continue
        row["correct"] = True
        calls[peer] = functools.partial(entry.call, *call.args, **kwargs)
    times = harness.time_interleaved(calls, device, rounds, cold=True)
    moved = nbytes(call.args, kwargs, baseline)
    for row in rows:
        if row["correct"]:
            row |= harness.summary(times[row["peer"]])
            row["tflops"] = flops(config, site, batch) / row["median_ms"] / 1e9
            row["gb_per_s"] = moved / row["median_ms"] / 1e6
    torch_ms = next((row["median_ms"] for row in rows if row["peer"] == "torch" and row["correct"]), None)
    for row in rows:
        if torch_ms and row["correct"]:
            row["ratio"] = torch_ms / row["median_ms"]
    return rows


COLUMNS = ["case", "peer", "correct", "median_ms", "p20_ms", "p80_ms", "tflops", "gb_per_s", "ratio", "error"]


def main() -> None:
    """Parse arguments, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", nargs="+", default=["vit_base_patch16_224"], choices=sorted(NAMED))
    parser.add_argument("--site", nargs="+", default=list(SITES), choices=SITES)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    rows = []
    with torch.inference_mode():
        for name in args.model:
            for batch in args.batch:
                for site in args.site:
                    if site != "mlp" or NAMED[name].width <= planner.MLP_MAX_WIDTH:
                        rows += site_rows(name, NAMED[name], site, batch, device, dtype, args.rounds)
    harness.print_table("ms per call; ratio: times as fast as torch", rows, COLUMNS)
    print(f"written to {harness.save('kernels', device, rows, args.json)}")
    if any(str(row.get("error", "")).startswith("incorrect") for row in rows):
        raise SystemExit("a kernel was wrong")


if __name__ == "__main__":
    main()
