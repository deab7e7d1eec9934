"""What a campaign is made of: its steps in their order, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitfast.benchmarks import smoke

BUDGET_S = 9 * 60.0
"""The budget that the steps' limits are for."""


@dataclass(frozen=True)
class Step:
    """A part of the campaign.

    Attributes:
        kind: "bench": a command of `vitfast bench`, by itself on the GPU; "jobs": several, PARALLEL of them at a time;
            "doctor"; "tests".
        arguments: of the command, or of each.
        limit_s: the most it may take of BUDGET_S; of a larger budget, as much more.
        each_machine: done again by a later call on another machine.
    """

    name: str
    kind: str
    arguments: tuple[tuple[str, ...], ...] = ()
    limit_s: float = 60.0
    each_machine: bool = False


def _model(batches: Sequence[int], models: Sequence[str], providers: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    options = [("-m", models), ("--batch", map(str, batches)), ("--provider", providers)]
    return (("model", *(part for option, values in options for value in values for part in (option, value))),)


BASE, LARGE = "vit_base_patch16_224", "vit_large_patch16_224"
OTHERS = ("vit_tiny_patch16_224", "vit_huge_patch14_224")
OURS = ("vitfast", "vitfast triton", "vitfast native", "vitfast fp8")
GRAPH = "timm CUDA graph"

PARTS = {"linear": 3, "quantized_linear": 4, "attention": 2}
"""Processes among which an op's cases are dealt out to be compiled; one is enough for the others."""
WARM_UP = tuple(
    ("smoke", "--op", op, "--backend", "triton", "-m", BASE, "--batch", "256", "--part", f"{part}/{parts}")
    for op in smoke.SMALL
    for parts in (PARTS.get(op, 1),)
    for part in range(1, parts + 1)
)
CONFIGS = tuple(
    ("smoke", "--op", op, "--backend", "triton", "--configs", "-m", BASE, "--batch", "256", "--part", f"{part}/4")
    for op in ("linear", "attention")
    for part in range(1, 5)
)
"""What the sweep launches, compiled beforehand by as many processes as there may be."""
SMOKE = tuple(("smoke", "--op", op, "--backend", backend) for op, backend in smoke.pairs())
SWEEP = ("sweep", "-m", BASE, "--op", "linear", "--op", "attention", "--batch", "256")

STEPS = (
    Step("doctor", "doctor", limit_s=30, each_machine=True),
    Step("warm-up", "jobs", WARM_UP, limit_s=60, each_machine=True),
    Step("smoke", "jobs", SMOKE, limit_s=60),
    Step("kernels-base", "bench", (("kernels", "-m", BASE, "--batch", "256"),), limit_s=120),
    Step("model-base", "bench", _model((256, 1), (BASE,), (*OURS, GRAPH)), limit_s=100),
    Step("configs", "jobs", CONFIGS, limit_s=40, each_machine=True),
    Step("sweep", "bench", (SWEEP,), limit_s=60),
    Step("model-tuned", "bench", _model((256, 1), (BASE,), (*OURS, GRAPH)), limit_s=60),
    Step("tests", "tests", limit_s=180),
    Step("model-large", "bench", _model((128,), (LARGE,), (*OURS, GRAPH)), limit_s=60),
    Step("model-compiled", "bench", _model((256,), (BASE,), ("vitfast", "transformers", "torch.compile", "TensorRT")),
         limit_s=120),
    Step("kernels-compiled", "bench", (("kernels", "-m", BASE, "--batch", "256", "--slow"),), limit_s=180),
    Step("kernels-large", "bench", (("kernels", "-m", "vit_large_patch14_518", "--batch", "64"),), limit_s=180),
    Step("model-others", "bench", _model((1, 8, 64, 512), OTHERS, (*OURS, GRAPH)), limit_s=180),
)  # fmt: skip

SANITIZING = tuple(
    Step(
        f"smoke-{tool}", "jobs", tuple((f"compute-sanitizer --tool {tool} --error-exitcode 9", *j) for j in SMOKE), 600
    )
    for tool in ("memcheck", "racecheck")
)
"""The smoke set under compute-sanitizer, instead of all else: every launch takes many times as long."""
