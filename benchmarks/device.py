"""How a device is timed: a thin layer with one body for CUDA and one for the CPU.

What is timed is a `Program`: a few calls in a row, on a GPU as one CUDA graph where they can be captured.
Nothing else in this folder knows about events, graphs, threads or NVML.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitfast.benchmarks.watch import ContextLost

CallList = Sequence[Callable[[], Any]]

CLOCK_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons that mean: slower than the clock that was asked for."""


@dataclass(frozen=True)
class Program:
    """Calls to be timed together. `how`: "graph" (replayed), "stream" (launched one by one) or "wall" (CPU).

    `output` gives what the last call gave in the last run. `note`: why it is no graph, where it is not.
    """

    run: Callable[[], Any]
    calls: int
    how: str
    output: Callable[[], Any]
    note: str = ""


class _Loop:
    """The calls one after the other; the last output is kept."""

    def __init__(self, calls: CallList) -> None:
        self._calls, self._output = calls, None

    def __call__(self) -> None:
        for call in self._calls:
            self._output = call()

    def output(self) -> Any:
        return self._output


class Device:
    """What the harness asks of a device. `cache_bytes`: of its last cache before memory."""

    slug: str
    torch_device: torch.device
    cache_bytes: int
    shortest_ms: float
    """A program is made at least this long, so that starting and stopping the clock is nothing beside it."""

    def prepare(self, calls: CallList, *, capture: bool = True) -> Program:
        """Make a program of calls, and run it once. `capture`: as a CUDA graph where that is possible."""
        raise NotImplementedError

    def time(self, program: Program) -> float:
        """Milliseconds of one run of a program."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def check(self) -> None:
        """Look whether the device still works, after something failed on it.

        Raises:
            ContextLost: if it does not.
        """

    def telemetry(self) -> dict[str, Any]:
        """Clocks, power, temperature and reasons for throttling at this moment; empty where unknown."""
        return {}

    def allocated(self) -> int | None:
        """Bytes in use now: of tensors on a GPU, of the whole process on a CPU; None where nobody counts them."""
        return None

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        """The most bytes that were in use during a call."""
        call()
        return None

    def release(self) -> None:
        """Give memory back that nothing uses any more."""
        gc.collect()

    def facts(self) -> dict[str, Any]:
        """What does not change during a run, for the environment of a result."""
        return {}


class CpuDevice(Device):
    """The CPU, by the wall clock, this process kept on as many cores as torch has threads."""

    slug = "cpu"
    shortest_ms = 5.0

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.cache_bytes = _cpu_cache_bytes()

    def prepare(self, calls: CallList, *, capture: bool = True) -> Program:
        """The calls in a loop."""
        loop = _Loop(calls)
        loop()
        return Program(loop, len(calls), "wall", loop.output)

    def time(self, program: Program) -> float:
        """By `time.perf_counter`."""
        start = time.perf_counter()
        program.run()
        return (time.perf_counter() - start) * 1e3

    def allocated(self) -> int | None:
        """Resident memory, after the allocator has given back what it kept of earlier work. Linux only."""
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        return _process_bytes("VmRSS")

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        """The most resident memory, by the kernel's high-water mark."""
        if (mark := Path("/proc/self/clear_refs")).is_file():
            mark.write_text("5")  # sets the mark back to what is resident now
        call()
        return _process_bytes("VmHWM")

    def facts(self) -> dict[str, Any]:
        """The cores this process may use, and how busy the machine is."""
        return {"cores": sorted(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "cache_bytes": self.cache_bytes}

    def telemetry(self) -> dict[str, Any]:
        """instruction_tflops: see `instruction_tflops`; nothing where there is none."""
        return {"instruction_tflops": rates} if (rates := instruction_tflops()) else {}


def instruction_tflops(loops: int = 9) -> dict[str, float]:
    """TFLOP/s by dtype that the CPU's own product instructions reach at this moment, on torch's threads, in loops that
    stay in registers; nothing without the C++ extension. They fall with the clock and with what others take of a core.

    Args:
        loops: of which the median is taken; one of every dtype takes 2 to 6 ms.
    """
    try:
        extension = importlib.import_module("vitfast._C")
    except ImportError:
        return {}
    rates = [extension.product_roofs() for _ in range(loops)]
    return {dtype: statistics.median(rate[dtype] for rate in rates) / 1e12 for dtype in rates[0]}


class CudaDevice(Device):
    """A CUDA GPU, by events around the replay of a graph.

    Args:
        cuda, nvml: torch.cuda and pynvml; tests pass others.
    """

    shortest_ms = 1.0

    def __init__(self, device: torch.device, *, cuda: Any = torch.cuda, nvml: Any = None) -> None:
        self.torch_device = device
        self._cuda = cuda
        self._properties = cuda.get_device_properties(device)
        self.slug = re.sub(r"[^a-z0-9]+", "-", self._properties.name.lower()).strip("-")
        self.cache_bytes = self._properties.L2_cache_size
        self._nvml = nvml
        self._handle, self._no_nvml = self._open_nvml()

    def prepare(self, calls: CallList, *, capture: bool = True) -> Program:
        """Capture the calls as a graph; those that cannot be captured are launched one by one, and that is noted."""
        loop = _Loop(calls)
        if not capture:
            loop()
            return Program(loop, len(calls), "stream", loop.output)
        stream = self._cuda.Stream()
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            for call in dict.fromkeys(calls):  # compile and fill caches outside the capture
                call()
        self._cuda.current_stream().wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        try:
            with self._cuda.graph(graph):
                loop()
        except Exception as error:  # a library's own, too
            self._cuda.synchronize()
            loop()
            why = (str(error).splitlines() or [type(error).__name__])[0]
            return Program(loop, len(calls), "stream", loop.output, f"not captured: {why}")
        graph.replay()
        return Program(graph.replay, len(calls), "graph", loop.output)  # the replay writes where the capture did

    def time(self, program: Program) -> float:
        """By events on the stream, so that the CPU's own time does not count."""
        before, after = (self._cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        program.run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        self._cuda.synchronize()

    def check(self) -> None:
        """By waiting for it: every call on a dead context fails."""
        try:
            self._cuda.synchronize()
        except Exception as error:  # RuntimeError, or AcceleratorError where torch has it
            raise ContextLost(f"the GPU's context is dead: {(str(error).splitlines() or [''])[0]}") from error

    def allocated(self) -> int | None:
        """By torch's allocator: what CUDA itself takes is not included."""
        return self._cuda.memory_allocated(self.torch_device)

    def release(self) -> None:
        """Collect garbage, graphs and their pools among it, and empty torch's cache."""
        super().release()
        self._cuda.empty_cache()

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        """By torch's allocator."""
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats(self.torch_device)
        call()
        self._cuda.synchronize()
        return self._cuda.max_memory_allocated(self.torch_device)

    def telemetry(self) -> dict[str, Any]:
        """By NVML, as far as it answers: a virtual machine may be refused any of these. `nvml_refused`: what was."""
        if self._handle is None:
            return {}

        def throttled_by(nvml: Any, handle: Any) -> list[str]:
            reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
            reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons  # its name before driver 535
            bits = reasons(handle)
            return [name for bit, name in CLOCK_REASONS.items() if bits & bit]

        return self._asked(
            {
                "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
                "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
                "throttled_by": throttled_by,
            }
        )

    def _asked(self, queries: Mapping[str, Callable[[Any, Any], Any]]) -> dict[str, Any]:
        """What NVML answers to each query; those that it refuses are named, with its reason."""
        answers: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for name, query in queries.items():
            try:
                answers[name] = query(self._nvml, self._handle)
            except (self._nvml.NVMLError, AttributeError) as error:  # or an NVML too old to know the question
                refused[name] = str(error)
        return answers | ({"nvml_refused": refused} if refused else {})

    def facts(self) -> dict[str, Any]:
        """Name, size, driver, and the clocks and power it may use at most."""
        facts = {
            "gpu": self._properties.name,
            "capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "memory_bytes": self._properties.total_memory,
            "cache_bytes": self.cache_bytes,
            "cuda": torch.version.cuda,
        }
        if self._handle is None:
            return facts | {"nvml": self._no_nvml}
        asked = self._asked(
            {
                "driver": lambda nvml, gpu: str(nvml.nvmlSystemGetDriverVersion()),
                "power_limit_w": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
                "max_sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
            }
        )
        return facts | asked | {"idle": self.telemetry()}

    def _open_nvml(self) -> tuple[Any, str]:
        """This GPU in NVML, which does not number devices as CUDA does; or None and why not."""
        try:
            self._nvml = self._nvml or importlib.import_module("pynvml")
        except ImportError as error:
            return None, f"unavailable: {error}; pip install nvidia-ml-py"
        try:
            self._nvml.nvmlInit()
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{self._properties.uuid}"), ""
        except self._nvml.NVMLError as error:
            return None, f"unavailable: {error}"


def open_device(device: torch.device) -> Device:
    """The layer for a torch device. Products of fp32 are set to full precision: TF32 would spoil the oracle."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()


def pin_threads(threads: int | None) -> list[int]:
    """Give torch this many threads (its own choice if None) and keep the process on as many cores; those cores.

    One hardware thread of each core first. Threads that exist already are moved too.

    Raises:
        ValueError: if fewer cores may be used.
    """
    allowed = sorted(os.sched_getaffinity(0))
    wanted = threads or min(torch.get_num_threads(), len(allowed))
    if wanted > len(allowed):
        raise ValueError(f"threads must be at most {len(allowed)}, the CPUs this process may use, got {wanted}")
    torch.set_num_threads(wanted)
    cores = sorted(sorted(allowed, key=lambda cpu: (_sibling_rank(cpu), cpu))[:wanted])
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), cores)
    return cores


def _sibling_rank(cpu: int) -> int:
    """0 for the first hardware thread of a core, 1 for the second."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    if not path.is_file():
        return 0
    first = [int(part.split("-")[0]) for part in path.read_text().strip().split(",")]
    return sum(other < cpu for other in first)


def _process_bytes(name: str) -> int | None:
    """A size of this process in /proc/self/status, which has kB."""
    status = Path("/proc/self/status")
    match = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    return int(match[1]) * 1024 if match else None


@functools.cache
def _cpu_cache_bytes() -> int:
    """Size of the last-level cache, as the kernel reports it; 64 MiB where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 * 2**20)
