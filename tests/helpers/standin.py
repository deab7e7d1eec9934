"""A stand-in for an NVIDIA GPU: Triton's real JIT compiles and launches, torch's CUDA tensors have no values.

`start()` makes this process believe in one H100, for good: it is for a process of its own, in which Python's start-up
calls it where tests/standin is on the path. Tensors on it are fake (torch's FakeTensorMode): shapes, strides and
addresses without memory. Launchers, the choice of configs, specialisation, tensor descriptors and the compiler run as
they would, and so do planner, engine, graphs and streams; a compiled kernel is launched into nothing, and noted. What
a kernel gives cannot be looked at: every comparison finds it equal. The clock is made up: so much for every op, launch
and event. One thread sees it: torch's fake tensors take no more.

A fault can be planted at each kernel, by its name: see FAULTS.
"""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import safetensors.torch
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

NAME = "stand-in for NVIDIA H100 80GB HBM3"
"""Not a GPU's own name, so that nobody takes its figures for any."""

PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20, total_memory=80 * 2**30,
    uuid="0000", warp_size=32,
)  # fmt: skip
SHARED_MEMORY = 232448
ADDRESS = 2**40
"""Where every allocation begins, aligned as CUDA's allocator aligns."""

FAULTS = ("fails", "dies", "hangs", "no memory", "no capture")
"""What a launch may do: raise an error that is no RuntimeError; kill the context, which shows at the next wait; never
end, so that the next wait never does; find no memory; refuse to be captured."""

OP_MS, LAUNCH_MS, EVENT_MS = 0.005, 0.02, 0.001


@dataclass
class Driver:
    """What was launched and compiled, and the made-up clock.

    `launches`: the kernels' names in order. `specialisations`: of each, its compiled forms -> CPU seconds to compile, 0
    if it was in the cache. `faults`: kernel -> one of FAULTS. `log`: takes a line of JSON for every compiled form.
    """

    launches: list = field(default_factory=list)
    specialisations: dict = field(default_factory=dict)
    faults: dict = field(default_factory=dict)
    log: Path | None = None
    clock_ms: float = 0.0
    capturing: bool = False
    state: str = "alive"

    def launch(self, name):
        """A launch of a kernel, which may do harm."""
        self.touch()
        does = self.faults.get(name)
        if does == "fails":
            raise OutOfResources(SHARED_MEMORY + 1, SHARED_MEMORY, "shared memory, as planted")
        if does == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory, as planted")
        if does == "no capture" and self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing, as planted")
        if does in ("dies", "hangs"):
            self.state = does
        self.launches.append(name)
        self.clock_ms += LAUNCH_MS

    def touch(self):
        """What every call on a dead context gives."""
        if self.state == "dies":
            raise RuntimeError("CUDA error: an illegal memory access was encountered, as planted")

    def wait(self):
        """Wait for all that was launched."""
        if self.state == "hangs":
            time.sleep(10**6)
        self.touch()

    def compiled(self, name, key, seconds):
        """A specialisation that is there now."""
        self.specialisations.setdefault(name, {})[key] = seconds
        if self.log is not None:
            line = json.dumps({"step": _step(), "kernel": name, "form": key, "seconds": seconds, "pid": os.getpid()})
            with self.log.open("a") as file:  # one write: processes do not cut each other's lines
                file.write(line + "\n")


def _step():
    """The part of a campaign that this process is: its result file is named so, or the folder that has it."""
    if "--json" not in sys.argv[:-1]:
        return Path(sys.argv[0]).stem
    path = Path(sys.argv[sys.argv.index("--json") + 1])
    return path.stem if path.parent.name.startswith("vitfast-bench-") else path.parent.name


class _Triton:
    """triton.runtime.driver.active, as far as the JIT asks it."""

    def __init__(self, driver, shared):
        class Launcher:
            def __init__(self, source, metadata):
                self.name = metadata.name

            def __call__(self, *args):
                driver.launch(self.name)

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": shared, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
            },
            load_binary=lambda name, binary, shared, device: (1, 1, 128, 0, 1024),
            unload_module=lambda module: None,
        )  # fmt: skip

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return (9, 0)

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


class _Generator:
    """A GPU's generator, of numbers that nobody can look at."""

    def __init__(self, device=None):
        self.device = device

    def manual_seed(self, seed):
        """None stands for the default one, which fake tensors never ask."""


def _cuda(driver):
    """torch.cuda, as far as vitfast and its benchmarks use it: name -> what it is here."""

    class Stream:
        def __init__(self, device=None, **options):
            pass

        def wait_stream(self, other):
            driver.touch()

        def wait_event(self, event):
            driver.touch()

        def synchronize(self):
            driver.wait()

    class Event:
        def __init__(self, enable_timing=False, blocking=False):
            self.at = 0.0

        def record(self, stream=None):
            driver.touch()
            driver.clock_ms += EVENT_MS
            self.at = driver.clock_ms

        def synchronize(self):
            driver.wait()

        def elapsed_time(self, after):
            return after.at - self.at

    class CUDAGraph:
        ms = None

        def replay(self):
            assert self.ms is not None, "replayed before it was captured"
            driver.touch()
            driver.clock_ms += self.ms

    @contextlib.contextmanager
    def graph(made, **options):
        begun, driver.capturing = driver.clock_ms, True
        try:
            yield
            made.ms = driver.clock_ms - begun
        finally:
            driver.clock_ms, driver.capturing = begun, False

    stream = Stream()
    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: PROPERTIES.name,
        "synchronize": lambda device=None: driver.wait(), "device_of": lambda tensor: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(), "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph,
        "graph": graph, "graph_pool_handle": lambda: (0, 1), "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream, "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: driver.capturing, "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0, "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None, "memory_snapshot": lambda pool=None: [], "set_sync_debug_mode": lambda mode: None,
        "memory_stats": lambda device=None: defaultdict(int),
    }  # fmt: skip


def _nvml(refused):
    """pynvml, as far as benchmarks/device.py asks it; what it is to refuse, it does, as in a virtual machine."""

    class NVMLError(Exception):
        pass

    answers = {
        "nvmlInit": None, "nvmlDeviceGetHandleByUUID": "handle", "nvmlSystemGetDriverVersion": "580.0",
        "nvmlDeviceGetClockInfo": 1755, "nvmlDeviceGetMaxClockInfo": 1980, "nvmlDeviceGetPowerUsage": 650_000,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000, "nvmlDeviceGetTemperature": 60,
        "nvmlDeviceGetCurrentClocksEventReasons": 0,
    }  # fmt: skip
    assert set(refused) <= answers.keys(), refused

    def function(name):
        def answer(*args):
            if name in refused:
                raise NVMLError(f"{name}: not supported, as planted")
            return answers[name]

        return answer

    module = ModuleType("pynvml")
    constants = {"NVMLError": NVMLError, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0}
    vars(module).update(constants, **{name: function(name) for name in answers})
    return module


def _address(tensor):
    return ADDRESS + tensor.storage_offset() * tensor.element_size()


_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""


def _register_guard():
    """Give torch a guard of CUDA devices that does nothing: a CPU build has none, and without one cannot index."""
    folder = Path(tempfile.gettempdir()) / f"vitfast-standin-{torch.__version__}-{os.getuid()}"
    library = folder / "guard.so"
    if not library.is_file():
        folder.mkdir(exist_ok=True)
        part, source, torch_folder = folder / f"{os.getpid()}.so", folder / f"{os.getpid()}.cpp", Path(torch.__file__)
        source.write_text(_GUARD)
        include, found = (torch_folder.parent / name for name in ("include", "lib"))
        compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC"]
        subprocess.run([*compiler, f"-I{include}", source, "-o", part, f"-L{found}", "-lc10"], check=True)
        os.replace(part, library)
    ctypes.CDLL(str(library))


def _gradients(outputs, inputs, grad_outputs=None):
    """torch.autograd.grad, whose engine wants a device: of our own ops what they launch, of others the shapes alone."""
    if "vitfast" in outputs.grad_fn.name():
        outputs.grad_fn.apply(grad_outputs, None)
    return tuple(torch.empty_like(given) for given in inputs)


def _apply(module, function, recurse=True):
    """torch.nn.Module._apply, which would swap a fake tensor of one device for that of another in place, and cannot."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(function(value.detach()), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = function(value)
    return module


class _Tensors(FakeTensorMode):
    """Fake tensors that say something where a program asks for a number: equal, true, one."""

    def __init__(self, driver):
        super().__init__()
        self._driver = driver

    def __deepcopy__(self, memo):
        """There is one, of a model's copy too."""
        return self

    def dispatch(self, func, types, args=(), kwargs=None):
        """As FakeTensorMode, but for what needs values, and for vitfast's own ops, which launch their kernels."""
        aten = torch.ops.aten
        if func in (aten._local_scalar_dense.default, aten.item.default):
            self._driver.wait()
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if func is aten.equal.default:
            self._driver.wait()
            return True
        if func is aten._pin_memory.default:
            return args[0]
        if func is aten.is_pinned.default:
            return False
        if func.namespace == "vitfast":
            with self:
                return _implementation(func)(*args, **(kwargs or {}))
        if self._driver.state != "alive" and any(getattr(a, "is_cuda", False) for a in args):
            self._driver.touch()
        self._driver.clock_ms += OP_MS
        return super().dispatch(func, types, args, kwargs or {})


def _implementation(func):
    """What a GPU would run of `torch.ops.vitfast`, where fake tensors would only be given a shape."""
    from vitfast.ops import library

    name = func.name().removeprefix("vitfast::").partition(".")[0]
    return getattr(library, f"_{name}", None) or getattr(library, name)._init_fn


def _save_file(*args, **kwargs):
    """safetensors.torch.save_file, which would read memory that is not there."""
    raise RuntimeError("tensors on the stand-in have no values that could be written to a file")


def start(*, faults=(), refused=(), log=None, shared=SHARED_MEMORY, limit_s=None, only=""):
    """Make this process believe in one H100, for good; gives its `Driver`.

    Args:
        faults: kernel -> one of FAULTS. refused: functions of NVML that give an error. log: see `Driver`.
        shared: bytes of shared memory a block has. only: a pattern of the command lines that faults are planted in.
        limit_s: how long a contestant may take before it counts as hung, where it is not what benchmarks/watch.py says.
    """
    planted = re.search(only, " ".join(sys.orig_argv))
    driver = Driver(faults=dict(faults) if planted else {}, log=Path(log) if log else None)
    assert set(driver.faults.values()) <= set(FAULTS), driver.faults
    compile_kernel, hits = triton.compile, []

    def timed(*args, **kwargs):
        before = sum(os.times()[:4])  # of child processes, too: the assembler is one
        made = compile_kernel(*args, **kwargs)
        seconds = 0.0 if hits.pop() else sum(os.times()[:4]) - before
        driver.compiled(made.metadata.name, made.metadata.hash, seconds)
        return made

    def listen(*, cache_hit, **others):
        hits.append(cache_hit)

    from vitfast.benchmarks import watch
    from vitfast.models.checkpoints import source

    watch.LIMIT_S, watch.LAUNCH_LIMIT_S = limit_s or watch.LIMIT_S, limit_s or watch.LAUNCH_LIMIT_S
    source._unreadable = lambda tensor: ""  # which are otherwise plain tensors, for good reasons
    _register_guard()
    for name, value in _cuda(driver).items():
        setattr(torch.cuda, name, value)
    sys.modules["pynvml"] = _nvml(refused if planted else ())
    FakeTensor.data_ptr = _address
    safetensors.torch.save_file = _save_file
    torch.autograd.grad, torch.Generator, torch.nn.Module._apply = _gradients, _Generator, _apply
    triton.compiler.compile = timed  # where the JIT looks it up
    triton.knobs.compilation.listener = listen
    triton.knobs.runtime.interpret = False
    triton.runtime.driver.set_active(_Triton(driver, shared))
    _Tensors(driver).__enter__()
    return driver
