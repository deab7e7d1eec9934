"""Whole models: the engine against timm, in one interleaved run.

    python -m benchmarks.model -m vit_base_patch16_224 --batch 8 --device cpu --threads 2

Weights are random (speed does not depend on them), images are random normal numbers of the
model's size, already on the device. Every contestant's logits are compared with timm's fp32
forward first; one that is wrong gets no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vitfast
from benchmarks import harness
from vitfast import testing


def contestants(name: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[Any, dict[str, Callable]]:
    """timm's fp32 model as the oracle, and each contestant as a function of images."""
    timm = testing.import_peer("timm")
    torch.manual_seed(0)
    oracle = timm.create_model(name, pretrained=False).eval().to(device)
    engine = vitfast.load(oracle, device=device, dtype=dtype)
    eager = timm.create_model(name, pretrained=False).eval()
    eager.load_state_dict(oracle.state_dict())
    eager = eager.to(device, dtype)
    runs: dict[str, Callable] = {"vitfast": lambda x: engine(x).logits, "timm eager": eager}
    if compiled:
        mode = "max-autotune" if device.type == "cuda" else "default"
        runs[f"timm torch.compile ({mode})"] = torch.compile(eager, mode=mode)
    return oracle, runs


def compare(
    name: str,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int = 15,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row per contestant: times, img/s, ratio to timm eager's median, error against fp32."""
    oracle, runs = contestants(name, device, dtype, compiled)
    images = testing.make(batch, 3, *oracle.patch_embed.img_size, seed=1).to(device)
    half = images.to(dtype)
    with torch.inference_mode():
        expected = oracle(images).double()
        errors = {}
        for peer, run in runs.items():
            difference = run(half).double() - expected
            errors[peer] = (difference.abs().max() / expected.abs().max()).item()
        bound = max(2 * errors["timm eager"], 1e-4)
        calls = {peer: (lambda run=run: run(half)) for peer, run in runs.items() if errors[peer] <= bound}
        times = harness.time_interleaved(calls, device, rounds)
    rows = []
    for peer in runs:
        row: dict[str, Any] = {
            "case": f"{name} batch {batch} {str(dtype).removeprefix('torch.')}",
            "peer": peer,
            "correct": errors[peer] <= bound,
            "max_error": errors[peer],
        }
        if row["correct"]:
            row |= harness.summary(times[peer])
            row["images_per_s"] = 1e3 * batch / row["median_ms"]
        rows.append(row)
    reference = next((row["median_ms"] for row in rows if row["peer"] == "timm eager" and row["correct"]), None)
    for row in rows:
        if reference and row["correct"]:
            row["ratio"] = reference / row["median_ms"]
    return rows


COLUMNS = ["case", "peer", "correct", "max_error", "median_ms", "p20_ms", "p80_ms", "images_per_s", "ratio"]


def main() -> None:
    """Parse arguments, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", nargs="+", default=["vit_base_patch16_224"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="fp32, fp16 or bf16; the engine's default otherwise")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile as a further contestant")
    parser.add_argument("--json", type=Path, default=None, help="result file; by default under benchmarks/results/")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    from vitfast.engine import resolve_device, resolve_dtype

    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    rows = []
    for name in args.model:
        for batch in args.batch:
            rows += compare(name, batch, device, dtype, rounds=args.rounds, compiled=args.compile)
    harness.print_table("ms per batch; ratio: times as fast as timm eager", rows, COLUMNS)
    print(f"written to {harness.save('model', device, rows, args.json)}")
    if not all(row["correct"] for row in rows):
        raise SystemExit("a contestant was wrong")


if __name__ == "__main__":
    main()
