"""A stand-in for an NVIDIA GPU: Triton's real JIT compiles and launches, torch's CUDA tensors have no values.

`installed()` makes this process believe in one H100. Tensors on it are fake (torch's FakeTensorMode): shapes, strides
and addresses without memory. Launchers, the choice of configs, specialisation, tensor descriptors and the compiler run
as they would; the compiled kernel is launched into nothing, and noted. What a kernel gives cannot be looked at.

Every launch goes through `Driver.launch`, where a fault can be planted: `faults[kernel's name] = exception to raise`.
"""

import contextlib
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20,
    total_memory=80 * 2**30, uuid="0000", warp_size=32,
)  # fmt: skip
SHARED_MEMORY = 232448
ADDRESS = 2**40
"""Where every allocation begins, aligned as CUDA's allocator aligns."""


@dataclass
class Driver:
    """What was launched and compiled.

    `launches`: the kernels' names in order. `specialisations`: of each, its compiled forms -> seconds to compile.
    """

    launches: list = field(default_factory=list)
    specialisations: dict = field(default_factory=dict)
    faults: dict = field(default_factory=dict)

    def launch(self, name, key):
        if error := self.faults.get(name):
            raise error
        self.launches.append(name)
        self.specialisations.setdefault(name, {}).setdefault(key, 0.0)


class _Triton:
    """triton.runtime.driver.active, as far as the JIT asks it."""

    def __init__(self, driver):
        class Launcher:
            def __init__(self, source, metadata):
                self.name = metadata.name
                self.key = metadata.hash

            def __call__(self, *args):
                driver.launch(self.name, self.key)

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED_MEMORY, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
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


def _address(tensor):
    return ADDRESS + tensor.storage_offset() * tensor.element_size()


_plain_index = FakeTensor.__getitem__


def _index(tensor, index):
    """Integers, slices and None without torch's indexing, whose guard of the device a CPU build does not have."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return _plain_index(tensor, index)
    axis = 0
    for at, part in enumerate(parts):
        if part is Ellipsis:
            axis = tensor.dim() - sum(later is not None for later in parts[at + 1 :])
        elif part is None:
            tensor, axis = tensor.unsqueeze(axis), axis + 1
        elif isinstance(part, slice):
            tensor, axis = torch.ops.aten.slice(tensor, axis, part.start, part.stop, part.step or 1), axis + 1
        else:
            tensor = tensor.select(axis, part)
    return tensor


@contextlib.contextmanager
def installed():
    """One H100 that is not there; gives its `Driver`. Compiling is timed by kernel."""
    driver = Driver()
    interpreting, triton.knobs.runtime.interpret = triton.knobs.runtime.interpret, False
    compile_kernel = triton.compile

    def timed(*args, **kwargs):
        begun = time.perf_counter()
        made = compile_kernel(*args, **kwargs)
        driver.specialisations.setdefault(made.metadata.name, {})[made.metadata.hash] = time.perf_counter() - begun
        return made

    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES, "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: PROPERTIES.name, "synchronize": lambda device=None: None,
        "device_of": lambda tensor: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
    }  # fmt: skip
    active = triton.runtime.driver._active  # None where there is no GPU
    try:
        with contextlib.ExitStack() as stack:
            for name, value in cuda.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address, create=True))
            stack.enter_context(mock.patch.object(FakeTensor, "__getitem__", _index))
            stack.enter_context(mock.patch("triton.compiler.compile", timed))
            stack.enter_context(mock.patch("triton.runtime.jit.compile", timed, create=True))
            stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
            triton.runtime.driver.set_active(_Triton(driver))
            stack.enter_context(FakeTensorMode())
            yield driver
    finally:
        triton.runtime.driver._active = active
        triton.knobs.runtime.interpret = interpreting
