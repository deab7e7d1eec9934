"""Where the time of a forward goes on a CPU: each site of the engine's plan, and what is in none of them.

A site's ops are timed where the forward calls them, so that all it does between them is left for the rest: Python,
what torch runs besides, and threads that wait for the next op. FLOPs are those of the table of sites, as in a
prediction: attention in windows counts as attention over all tokens.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vitfast.benchmarks import timing
from vitfast.benchmarks.device import CpuDevice
from vitfast.benchmarks.result_file import FORWARD
from vitfast.engine.cases import Case
from vitfast.engine.engine import Engine
from vitfast.engine.sites import site_dims
from vitfast.models.plan import SITES

REST = "rest"
"""What stands in place of a site for what is in none."""


@dataclass
class _Spent:
    """What some calls took together."""

    calls: int = 0
    ms: float = 0.0
    page_faults: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        faults, start = _page_faults(), time.perf_counter()
        yield
        self.ms += (time.perf_counter() - start) * 1e3
        self.page_faults += _page_faults() - faults
        self.calls += 1


@dataclass
class _Round:
    """One forward, and the rates of the CPU's product instructions right before it."""

    sites: Mapping[str, _Spent]
    telemetry: Mapping[str, Any]
    whole: _Spent = field(default_factory=_Spent)

    def rest(self) -> _Spent:
        """The whole less the sites."""
        ms, faults = (sum(getattr(spent, name) for spent in self.sites.values()) for name in ("ms", "page_faults"))
        return _Spent(1, self.whole.ms - ms, self.whole.page_faults - faults)


def measure(engine: Engine, images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """What each site takes in a forward of the engine on images, which has run before.

    Returns:
        A row for every site that is called, in the order of its table, one for REST and one for FORWARD: site, calls a
        forward, median_ms of these together with p20_ms and p80_ms over the rounds, page_faults a forward (the median);
        and, where there are products, flops, dtype (of the operands) and gflop_per_s. FORWARD has the sum of all flops
        and instruction_tflops, which the machine allowed meanwhile (see `vitfast.benchmarks.device`).

    Raises:
        ValueError: if the engine is not on a CPU, where an op has not ended when its call returns.
    """
    if engine.device.type != "cpu":
        raise ValueError(f"sites are timed by the CPU's clock, which does not see what a {engine.device.type} does")
    device = CpuDevice()
    done = [_forward(engine, images, device.telemetry()) for _ in range(rounds)]
    rows = [
        _row(name, [one.sites[name] for one in done]) | _work(engine, name, len(images), done[0].sites[name].calls)
        for name in SITES
        if name in engine.plan.backends and done[0].sites[name].calls
    ]
    total = {"flops": sum(row.get("flops", 0) for row in rows)} | timing.clocks([one.telemetry for one in done])
    rows += [_row(REST, [one.rest() for one in done]), _row(FORWARD, [one.whole for one in done]) | total]
    for row in rows:
        if row.get("flops"):
            row["gflop_per_s"] = row["flops"] / row["median_ms"] / 1e6
    return rows


def _forward(engine: Engine, images: Tensor, telemetry: Mapping[str, Any]) -> _Round:
    """One forward with its sites counted; the engine's plan is its own again afterwards."""
    runner, plan = engine.runner, engine.plan
    made = _Round({site: _Spent() for site in plan.backends}, telemetry)

    def counted(call: Callable[..., Any], spent: _Spent) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with spent.counted():
                return call(*args, **kwargs)

        return run

    calls: dict[str, Any] = {site: counted(getattr(plan, site), spent) for site, spent in made.sites.items()}
    runner.plan = replace(plan, **calls)
    try:
        with made.whole.counted():
            engine(images)
    finally:
        runner.plan = plan
    return made


def _row(name: str, rounds: list[_Spent]) -> dict[str, Any]:
    about = timing.summary([spent.ms for spent in rounds])
    times = {key: about[key] for key in ("median_ms", "p20_ms", "p80_ms")}
    return {
        "site": name,
        "calls": rounds[0].calls,
        **times,
        "page_faults": statistics.median(spent.page_faults for spent in rounds),
    }


def _work(engine: Engine, name: str, batch: int, calls: int) -> dict[str, Any]:
    """FLOPs of the calls of a site, and the dtype that they are in; nothing where there are no products."""
    site = SITES[name]
    precision = engine.precision if site.quantized else ""
    dims = site_dims(engine.config, site, batch, precision=precision)
    case = Case(site.op, dims, engine.device, engine.dtype)
    if not case.flops:
        return {}
    return {"flops": calls * case.flops, "dtype": str(case.operand_dtype).removeprefix("torch.")}


def _page_faults() -> int:
    """Pages that this process has touched for the first time, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
