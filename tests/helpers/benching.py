"""A device whose time is counted, not measured, and providers that take as long as they say."""

import functools

import torch
from typer.testing import CliRunner, Result

from vitfast import testing
from vitfast.benchmarks import kernels
from vitfast.benchmarks.cases import Case
from vitfast.benchmarks.device import CpuDevice
from vitfast.benchmarks.providers import BASELINE, Provider
from vitfast.cli.app import app
from vitfast.ops import reference


class CountedDevice(CpuDevice):
    """Runs on the CPU; its clock is moved by the providers alone."""

    shortest_ms = 0.0

    def __init__(self):
        super().__init__()
        self.cache_bytes = 1
        self.now = 0.0
        self.order = []

    def time(self, program):
        before = self.now
        program.run()
        self.now += 1e-3  # nothing takes no time
        return self.now - before


def bench(*arguments: object) -> Result:
    """`vitfast bench` with arguments, in this process."""
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="vitfast")


def timed_provider(device, name, ms, answer=reference.layer_norm):
    """A provider of layer_norm that takes `ms`, a little more every other time, and gives `answer`."""
    turns = []

    def run(*args):
        turns.append(name)
        device.order.append(name)
        device.now += ms * (1 + 0.01 * (len(turns) % 2))
        return answer(*args)

    return Provider(name, lambda call: functools.partial(run, *call.args, **call.kwargs))


def layer_norm_case():
    """A small case of one op, to be timed by a counted clock."""
    return Case("layer_norm", {"rows": 7, "width": 64}, testing.device(), torch.float32)


def rows_of(device, *providers, rounds=6):
    """Rows of one case, the first provider being the baseline."""
    providers = {provider.name: provider for provider in (timed_provider(device, BASELINE, 2.0), *providers)}
    return {row["provider"]: row for row in kernels.run_case(layer_norm_case(), device, providers, rounds)}


def result(rows, **environment):
    """A result file's content around rows."""
    entry = {"cpu": "a CPU", "threads": 2, "commit": "0" * 40, "torch": "2", "date": "2026-01-01T00:00:00+00:00"}
    return {
        "schema": 3, "kind": "kernels", "environment": entry | environment, "method": {"baseline": BASELINE},
        "roofs": {}, "rows": list(rows), "not_run": [],
    }  # fmt: skip
