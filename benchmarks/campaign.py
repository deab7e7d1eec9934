"""`vitfast bench all`: the benchmarks worth having of a GPU, the most telling first, within a budget of time.

Every step is a process of its own: one that crashes the GPU's context or hangs in a compiler takes no other with it.
It writes its result file case by case, so that a step cut short keeps what it has, and the next begins.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitfast.benchmarks.device import Device
from vitfast.benchmarks.environment import environment
from vitfast.benchmarks.page import page
from vitfast.benchmarks.result_file import read, results_folder, write

STOPPING_S = 15.0
"""Kept for a step to finish its case and measure the roofs again after its own budget."""


@dataclass(frozen=True)
class Step:
    """A command of `vitfast bench`, and the largest share of the whole budget that it may take."""

    name: str
    arguments: tuple[str, ...]
    share: float


def _model(batches: Sequence[int], models: Sequence[str], providers: Sequence[str]) -> tuple[str, ...]:
    options = [("-m", models), ("--batch", map(str, batches)), ("--provider", ("vitfast", "timm eager", *providers))]
    return ("model", *(part for option, values in options for value in values for part in (option, value)))


BASE, LARGE = "vit_base_patch16_224", "vit_large_patch16_224"
OTHERS = ("vit_tiny_patch16_224", "vit_huge_patch14_224")

STEPS = (
    Step("kernels-base", ("kernels", "-m", BASE, "--batch", "256"), 0.25),
    Step("model-base", _model((256, 1), (BASE,), ("vitfast fp8", "timm CUDA graph")), 0.25),
    Step("model-compiled", _model((256,), (BASE,), ("torch.compile", "transformers", "TensorRT")), 0.3),
    Step("model-large", _model((128,), (LARGE,), ("vitfast fp8", "timm CUDA graph")), 0.2),
    Step("kernels-large", ("kernels", "-m", "vit_large_patch14_518", "--batch", "64"), 0.25),
    Step("model-autotuned", _model((256,), (BASE,), ("torch.compile max-autotune",)), 0.5),
    Step("model-others", _model((1, 8, 64, 512), OTHERS, ("timm CUDA graph",)), 0.4),
    Step("kernels-compiled", ("kernels", "-m", BASE, "--batch", "256", "--slow"), 0.5),
    Step("kernels-full", ("kernels", "--grid", "full"), 1.0),
)


def run(
    device: Device,
    budget_s: float,
    *,
    steps: Sequence[Step] = STEPS,
    say: Callable[[str], None],
    command: Sequence[str] = (sys.executable, "-m", "vitfast", "bench"),
) -> tuple[Path, list[str], list[str]]:
    """Run steps in order until the budget is spent.

    Returns:
        The page that shows all results; what failed or was wrong; and what there was no time for, one line each.
    """
    end = time.monotonic() + budget_s
    entry = environment(device)
    folder = results_folder() / device.slug
    stem = f"{entry['date'][:16].replace(':', '')}-{(entry['commit'] or 'nocommit')[:9]}"
    paths, failed, unfinished = [], [], []
    for number, step in enumerate(steps, 1):
        left = min(end - time.monotonic(), step.share * budget_s)
        if left < 2 * STOPPING_S:
            unfinished.append(f"{step.name}: not begun, no time")
            continue
        path = folder / f"{stem}-{number}-{step.name}.json"
        own = ("--device", str(device.torch_device), "--budget", f"{left - STOPPING_S:.0f}s", "--json", str(path))
        say(f"\n$ vitfast bench {' '.join(step.arguments)}   ({left:.0f} s)")
        try:
            code = subprocess.run([*command, *step.arguments, *own], timeout=left, check=False).returncode
            if code:
                failed.append(f"{step.name}: exit code {code}")
        except subprocess.TimeoutExpired:
            unfinished.append(f"{step.name}: stopped after {left:.0f} s; finished cases are kept")
        if path.is_file():
            paths.append(path)
    shown = folder / f"{stem}.html"
    write(shown, page([read(path) for path in paths]))
    return shown, failed, unfinished
