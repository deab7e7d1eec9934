"""Whole models: the engine against timm, in one interleaved run.

    python -m benchmarks.model -m vit_base_patch16_224 --batch 8 --device cpu --threads 2

Weights are random (speed does not depend on them), images are random normal numbers of the
model's size, already on the device. Every contestant's logits are compared with timm's fp32
forward first; one that is wrong gets no time.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.peers import PEERS, Absent
from vitfast import testing
from vitfast.engine import resolve_device, resolve_dtype


def compare(
    name: str, batch: int, device: torch.device, dtype: torch.dtype, *, rounds: int = 15, peers: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One row per contestant: times, img/s, ratio to timm eager's median, error against timm in fp32.

    Args:
        peers: names in PEERS beside the engine and timm eager, which always run.
    """
    timm = testing.import_peer("timm")
    torch.manual_seed(0)
    oracle = timm.create_model(name, pretrained=False).eval().to(device)
    images = testing.make(batch, 3, *oracle.patch_embed.img_size, seed=1).to(device)
    given = images.to(dtype)
    runs: dict[str, Callable[[Tensor], Tensor]] = {}
    rows: list[dict[str, Any]] = []
    case = f"{name} batch {batch} {str(dtype).removeprefix('torch.')}"
    with torch.inference_mode():
        expected = oracle(images).double()
    for peer in dict.fromkeys(("vitfast", "timm eager", *peers)):
        rows.append({"case": case, "peer": peer, "correct": False})
        try:
            runs[peer] = PEERS[peer](oracle, given)
        except Absent as error:
            rows[-1]["error"] = str(error)
    with torch.inference_mode():
        errors = {}
        for peer, run in runs.items():
            difference = run(given).to(expected) - expected
            errors[peer] = (difference.abs().max() / expected.abs().max()).item()
        bound = max(2 * errors["timm eager"], testing.PEER_TOLERANCE)
        calls = {peer: functools.partial(run, given) for peer, run in runs.items() if errors[peer] <= bound}
        times = harness.time_interleaved(calls, device, rounds)
    for row in rows:
        if (peer := row["peer"]) in errors:
            row |= {"correct": peer in calls, "max_error": errors[peer]}
            if peer not in calls:
                row["error"] = f"incorrect: error {errors[peer]:.1e} exceeds {bound:.1e}"
        if peer in calls:
            row |= harness.summary(times[peer])
            row["images_per_s"] = 1e3 * batch / row["median_ms"]
            row["ratio"] = harness.summary(times["timm eager"])["median_ms"] / row["median_ms"]
    return rows


COLUMNS = ["case", "peer", "correct", "max_error", "median_ms", "p20_ms", "p80_ms", "images_per_s", "ratio", "error"]


def main() -> None:
    """Parse arguments, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", nargs="+", default=["vit_base_patch16_224"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="fp32, fp16 or bf16; the engine's default otherwise")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer", nargs="+", default=[], choices=list(PEERS), help="further contestants")
    parser.add_argument("--json", type=Path, default=None, help="result file; by default under benchmarks/results/")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    rows = []
    for name in args.model:
        for batch in args.batch:
            rows += compare(name, batch, device, dtype, rounds=args.rounds, peers=args.peer)
    harness.print_table("ms per batch; ratio: times as fast as timm eager", rows, COLUMNS)
    print(f"written to {harness.save('model', device, rows, args.json)}")
    if any(str(row.get("error", "")).startswith("incorrect") for row in rows):
        raise SystemExit("a contestant was wrong")


if __name__ == "__main__":
    main()
