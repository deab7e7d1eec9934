"""The device layer: the GPU code on a torch.cuda and an NVML that only take notes; on a real GPU if there is one."""

import contextlib
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitfast.benchmarks import device, environment, kernels, roofs, timing
from vitfast.benchmarks.cases import Case
from vitfast.benchmarks.device import CpuDevice, CudaDevice
from vitfast.benchmarks.providers import BASELINE, Provider
from vitfast.benchmarks.watch import ContextLost
from vitfast.engine import clock
from vitfast.ops import reference


class FakeCuda:
    """torch.cuda as far as CudaDevice uses it. Every event of note goes into `log`; a call moves the clock by 2 ms."""

    def __init__(self, refuses=False):
        self.log, self.clock, self.refuses, self.capturing = [], 0.0, refuses, None
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                assert outer.capturing is None
                outer.log.append("record")
                self.at = outer.clock

            def synchronize(self):
                outer.log.append("wait")

            def elapsed_time(self, after):
                return after.at - self.at

        class CUDAGraph:
            def __init__(self):
                self.calls = 0

            def replay(self):
                assert self.calls
                outer.log.append("replay")
                outer.clock += 2.0 * self.calls

        self.Event, self.CUDAGraph = Event, CUDAGraph
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: outer.log.append("side waits"))
        self.allocations = [100, 700]

    def call(self):
        if self.capturing is not None:
            if self.refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            self.capturing.calls += 1
        else:
            self.log.append("call")
            self.clock += 2.0

    def get_device_properties(self, which):
        return SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", L2_cache_size=50 * 2**20, uuid="1234-abcd", major=9, minor=0,
            multi_processor_count=132, total_memory=80 * 2**30,
        )  # fmt: skip

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("main waits"))

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None

    def synchronize(self):
        self.log.append("synchronize")

    def empty_cache(self):
        self.log.append("empty cache")

    def reset_peak_memory_stats(self, which):
        self.log.append("reset peak")

    def memory_allocated(self, which):
        return self.allocations[0]

    def max_memory_allocated(self, which):
        return self.allocations[1]


class NVMLError(Exception):
    pass


def fake_nvml(bits=0x4 | 0x40, **changes):
    """pynvml as far as CudaDevice uses it; asked for this GPU by its UUID."""

    def by_uuid(uuid):
        assert uuid == "GPU-1234-abcd"
        return "handle"

    functions = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1755, 2: 2619}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetPowerUsage": lambda handle: 650_000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetTemperature": lambda handle, kind: 61,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: bits,
    }
    return SimpleNamespace(**(functions | changes))


def cuda_device(nvml=None, **options):
    fake = FakeCuda(**options)
    return CudaDevice(torch.device("cuda", 0), cuda=fake, nvml=nvml or fake_nvml()), fake


def test_calls_are_captured_after_a_warm_up_and_replayed_between_events():
    gpu, fake = cuda_device()
    program = gpu.prepare([fake.call] * 3)
    assert (program.how, program.calls) == ("graph", 3)
    assert fake.log == ["side waits", "call", "main waits", "replay"]
    fake.log.clear()
    assert gpu.time(program) == 6.0
    assert fake.log == ["record", "replay", "record", "wait"]


def test_a_call_that_cannot_be_captured_is_launched_and_says_so():
    gpu, fake = cuda_device(refuses=True)
    program = gpu.prepare([fake.call] * 2)
    assert program.how == "stream"
    assert program.note == "not captured: operation not permitted when stream is capturing"
    assert fake.log[-3:] == ["synchronize", "call", "call"]
    assert gpu.time(program) == 4.0


def test_whole_models_are_not_captured():
    gpu, fake = cuda_device()
    assert gpu.prepare([fake.call], capture=False).how == "stream"
    assert fake.log == ["call"]


def test_short_programs_are_repeated_in_one_graph():
    gpu, fake = cuda_device()
    gpu.shortest_ms = 20.0
    program = timing.program(gpu, [fake.call] * 3)
    assert program.calls == 12  # 4 times round the 3 copies: 24 ms
    times, telemetry = timing.time_interleaved({"a": program}, gpu, rounds=4)
    assert times == {"a": [2.0] * 4}
    assert timing.clocks(telemetry) == {
        "sm_clock_mhz": 1755, "power_w": 650.0, "temperature_c": 61, "throttled_by": ["power cap", "thermal, hardware"],
    }  # fmt: skip


def test_a_case_on_a_gpu_from_gate_to_row():
    """The whole way of a kernel through the GPU's layer, its arithmetic done on the CPU while it is "captured"."""
    gpu, fake = cuda_device()
    gpu.cache_bytes = 10**4

    def layer_norm(*args):
        fake.call()
        return reference.layer_norm(*args)

    providers = {
        name: Provider(name, lambda call: functools.partial(layer_norm, *call.args)) for name in (BASELINE, "other")
    }
    case = Case("layer_norm", {"rows": 7, "width": 64}, torch.device("cpu"), torch.float32)
    rows = kernels.run_case(case, gpu, providers, rounds=3)
    for row in rows:
        assert row["correct"] and row["timed_by"] == "graph" and row["cold"], row
        assert row["median_ms"] == 2.0 and row["ratio"] == 1.0  # per call, though a graph holds several
        assert row["sm_clock_mhz"] == 1755 and row["throttled_by"] == ["power cap", "thermal, hardware"]
    assert fake.log[-1] == "empty cache"


def test_facts_of_a_gpu():
    facts = cuda_device()[0].facts()
    assert (facts["gpu"], facts["capability"], facts["driver"]) == ("NVIDIA H100 80GB HBM3", "9.0", "580.1")
    assert facts["power_limit_w"] == 700 and facts["max_sm_clock_mhz"] == 1980
    assert facts["idle"]["sm_clock_mhz"] == 1755
    assert cuda_device()[0].slug == "nvidia-h100-80gb-hbm3"


def test_old_drivers_name_the_reasons_otherwise():
    nvml = fake_nvml(
        nvmlDeviceGetCurrentClocksEventReasons=None, nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x80
    )
    assert cuda_device(nvml)[0].telemetry()["throttled_by"] == ["power brake"]


def test_without_nvml_it_says_why(monkeypatch):
    def refuse():
        raise NVMLError("driver not loaded")

    gpu, _ = cuda_device(fake_nvml(nvmlInit=refuse))
    assert gpu.telemetry() == {}
    assert gpu.facts()["nvml"] == "unavailable: driver not loaded"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = CudaDevice(torch.device("cuda", 0), cuda=FakeCuda())
    assert "pip install nvidia-ml-py" in gpu.facts()["nvml"]


def test_peak_memory_is_that_of_the_call():
    gpu, fake = cuda_device()
    assert (gpu.allocated(), gpu.peak_memory(fake.call)) == (100, 700)
    assert fake.log == ["synchronize", "reset peak", "call", "synchronize"]
    gpu.release()
    assert fake.log[-1] == "empty cache"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="this system keeps no high-water mark")
def test_peak_memory_of_a_cpu_is_what_the_process_grew_by():
    cpu, size = CpuDevice(), 2**27
    before = cpu.allocated()
    assert 0.9 * size < cpu.peak_memory(lambda: torch.ones(size // 4)) - before < 2 * size
    assert cpu.peak_memory(lambda: torch.ones(4)) - before < size // 2  # the mark was set back


def test_cpu_times_by_the_wall_clock():
    cpu = CpuDevice()
    program = cpu.prepare([lambda: None] * 3)
    assert (program.how, program.calls) == ("wall", 3)
    assert 0 < cpu.time(program) < 1000
    assert cpu.cache_bytes >= 2**15
    assert cpu.telemetry().keys() == ({"instruction_tflops"} if device.instruction_tflops() else set())


def test_a_cpus_rates_are_medians_of_loops_and_of_rounds(monkeypatch):
    given = iter([{"float32": rate * 1e12, "int8": 4e12} for rate in (1, 5, 2, 3, 9, 4, 6, 7, 8)])
    monkeypatch.setitem(sys.modules, "vitfast._C", SimpleNamespace(product_roofs=lambda: next(given)))
    samples = [{"instruction_tflops": device.instruction_tflops(loops=3)} for _ in range(3)]
    assert samples[0] == {"instruction_tflops": {"float32": 2.0, "int8": 4.0}}
    assert timing.clocks(samples) == {"instruction_tflops": {"float32": 4.0, "int8": 4.0}}
    monkeypatch.setitem(sys.modules, "vitfast._C", None)  # not built
    assert device.instruction_tflops() == {} == CpuDevice().telemetry()


def test_threads_are_pinned_to_distinct_cores(monkeypatch):
    moved = {}
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda task: {0, 1, 2, 3})
    monkeypatch.setattr(device.os, "sched_setaffinity", moved.__setitem__)
    monkeypatch.setattr(device, "_sibling_rank", lambda cpu: cpu % 2)
    assert device.pin_threads(2) == [0, 2]
    assert torch.get_num_threads() == 2
    assert device.pin_threads(3) == [0, 1, 2]
    assert all(cores == [0, 1, 2] for cores in moved.values()) and moved
    with pytest.raises(ValueError, match=r"at most 4.* got 5"):
        device.pin_threads(5)


def test_environment_is_complete():
    entry = environment.environment(CpuDevice())
    assert {"commit", "dirty", "cpu", "threads", "torch", "python", "packages", "settings", "load", "cores"} <= set(
        entry
    )
    assert not any("PATH" in name or "HOME" in name for name in entry["variables"])


def test_roofs_of_the_cpu(monkeypatch):
    monkeypatch.setitem(roofs.SIDES, "cpu", 256)
    monkeypatch.setitem(roofs.COPY_BYTES, "cpu", 2**20)
    found = roofs.measure(CpuDevice(), [torch.float32, torch.int8], rounds=2)
    assert found["tflops"].keys() == {"float32", "int8"} and all(rate > 0 for rate in found["tflops"].values())
    assert found["copy_gb_per_s"] > 0 and not found["refused"]
    faster = {**found, "tflops": {"float32": 1e6}, "copy_gb_per_s": 0.0}
    best = roofs.better(found, faster)
    assert best["tflops"]["float32"] == 1e6 and best["copy_gb_per_s"] == found["copy_gb_per_s"]
    assert best["before"] is found and best["after"] is faster
    slower = {**found, "copy_gb_per_s": found["copy_gb_per_s"] * 0.8}
    assert roofs.drift(roofs.better(found, slower)) == pytest.approx(0.2)
    assert roofs.drift(found) is None


def test_nvml_may_refuse_any_query():
    """As a virtual machine does: the row says what is missing, and has the rest."""
    for name in [name for name in vars(fake_nvml()) if name.startswith("nvmlDeviceGet") and "Handle" not in name]:

        def refuse(*args, name=name):
            raise NVMLError(f"{name}: not supported")

        nvml = fake_nvml(**{name: refuse})
        gpu, _ = cuda_device(nvml)
        facts, clocks = gpu.facts(), timing.clocks([gpu.telemetry()] * 3)
        assert facts["driver"] == "580.1" and facts["gpu"]
        refused = facts.get("nvml_refused", {}) | facts["idle"].get("nvml_refused", {})
        assert list(refused.values()) == [f"{name}: not supported"] * len(refused) and refused, name
        assert len(clocks) + ("nvml_refused" not in clocks) == 4 + ("nvml_refused" not in facts["idle"])


def test_a_program_that_fails_leaves_the_others_their_times():
    gpu, fake = cuda_device()
    gpu.shortest_ms, turns, failed = 0.0, [], {}

    def tired():
        fake.call()
        if len(turns) > 4:
            raise RuntimeError("an illegal memory access was encountered")

    programs = {"a": gpu.prepare([fake.call], capture=False), "b": gpu.prepare([tired], capture=False)}
    times, _ = timing.time_interleaved(programs, gpu, rounds=5, before=turns.append, failed=failed)
    assert list(times) == ["a"] and len(times["a"]) == 5 and "illegal" in str(failed["b"])
    with pytest.raises(RuntimeError, match="illegal"):
        timing.time_interleaved(programs, gpu, rounds=5, before=turns.append)


def test_a_dead_context_names_what_killed_it():
    gpu, fake = cuda_device()
    gpu.cache_bytes = 10**4

    def synchronize():
        if fake.log.count("kill"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    fake.synchronize = synchronize

    def kill(*args):
        fake.log.append("kill")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    right = functools.partial(Provider, build=lambda call: functools.partial(reference.layer_norm, *call.args))
    providers = {BASELINE: right(BASELINE), "bad": Provider("bad", lambda call: kill), "after": right("after")}
    case = Case("layer_norm", {"rows": 7, "width": 64}, torch.device("cpu"), torch.float32)
    with pytest.raises(ContextLost) as lost:
        kernels.run_case(case, gpu, providers, rounds=3)
    row = lost.value.row
    assert (row["provider"], row["died"], row["correct"]) == ("bad", True, False)
    assert "illegal memory access" in row["error"] and "context is dead" in row["error"]


def test_the_planner_replays_graphs_behind_a_cold_cache(monkeypatch):
    fake = FakeCuda()
    fake.device, fake.log = lambda device: contextlib.nullcontext(), []
    fake.Stream, graph = lambda device: SimpleNamespace(wait_stream=lambda other: None), fake.graph
    fake.graph = lambda made, stream, capture_error_mode: graph(made)
    cuda, flushed = torch.device("cuda"), SimpleNamespace(zero_=lambda: fake.log.append("flush"))
    monkeypatch.setattr(clock.torch, "empty", lambda *args, **options: flushed)
    run = clock.captured(fake.call, cuda, cuda=fake)
    assert fake.log == ["call", "main waits"]  # the warm-up: captured calls do not run
    assert clock.time_calls([run, run], cuda, rounds=3, cuda=fake) == [2.0, 2.0]
    assert fake.log[4:9] == ["flush", "record", "replay", "record", "wait"]
    fake.refuses = True
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: operation not permitted"):
        clock.captured(fake.call, cuda, cuda=fake)
    assert fake.log[-1] == "synchronize" and clock.capture_lock.acquire(blocking=False)
    clock.capture_lock.release()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.gpu
@pytest.mark.device
@needs_gpu
def test_gpu_graph_and_events():
    gpu = device.open_device(torch.device("cuda", 0))
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    program = gpu.prepare([lambda: x @ x] * 8)
    assert program.how == "graph"
    times = [gpu.time(program) for _ in range(5)]
    assert 0 < 2 * 4096**3 * 8 / min(times) / 1e9 < 20_000  # TFLOP/s that a GPU can have
    assert gpu.prepare([lambda: x.sum().item()]).how == "stream"
    assert gpu.time(program) > 0  # a failed capture leaves the device usable


@pytest.mark.gpu
@pytest.mark.device
@needs_gpu
def test_gpu_roofs_and_telemetry():
    gpu = device.open_device(torch.device("cuda", 0))
    found = roofs.measure(gpu, [torch.bfloat16], rounds=3)
    assert found["tflops"]["bfloat16"] > found["tflops"]["float32"]
    assert found["copy_gb_per_s"] > 100
    assert gpu.peak_memory(lambda: torch.empty(2**24, device="cuda")) - gpu.allocated() >= 2**26
