"""What `make gpu` runs after the tests: kernels, then whole models, each in its own process.

    python -m benchmarks.gpu

Every step writes its own result file under benchmarks/results/<gpu>/ as soon as it is done, so
that a run cut short keeps what it has. A failing step is reported at the end and does not stop
the others.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from benchmarks.harness import ROOT

STEPS = (
    ("benchmarks.kernels", "-m", "vit_base_patch16_224", "--batch", "64"),
    (
        "benchmarks.model",
        "-m",
        "vit_base_patch16_224",
        "--batch",
        "256",
        "1",
        "--peer",
        "torch.compile",
        "--rounds",
        "20",
    ),
    ("benchmarks.kernels", "-m", "vit_large_patch16_224", "vit_tiny_patch16_224", "--batch", "64"),
    ("benchmarks.model", "-m", "vit_large_patch16_224", "vit_tiny_patch16_224", "--batch", "128", "--rounds", "10"),
)


def main() -> None:
    """Run every step; exit non-zero if one failed."""
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device: nothing to measure")
    failed = []
    for step in STEPS:
        command = [sys.executable, "-m", *step]
        print("\n$ python -m", *step, flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(" ".join(step))
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
