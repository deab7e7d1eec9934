"""A GPU made of its compiled code: Triton's real JIT compiles and launches on CPU tensors, and the PTX is executed.

Launchers, the choice of configs, specialisation, tensor descriptors and the compiler run as they would; the driver's
place is taken by tests/emulation/ptx. Triton must be its compiler here, not its interpreter: without TRITON_INTERPRET
when it is first imported. Unlike `helpers.standin`, whose tensors have no values, kernels give results here.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import triton
from helpers.emulated import COMPILER, ROOT
from helpers.ptx.program import Library, Program
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from vitfast.kernels._compile.case import SHARED_MEMORY_LIMIT
from vitfast.kernels._parts import launch

TENSOR_MAP = 0x7EE5  # kTensorMap of machine.h
# Vector instructions of this machine, but no contraction: what is fused, the PTX says.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)


@functools.cache
def library() -> Library:
    """The executor, compiled when its sources are new."""
    folder = ROOT / "tests" / "emulation"
    sources = [*sorted((folder / "ptx").iterdir()), *sorted(folder.glob("*.h"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + " ".join(COMPILER).encode()).hexdigest()
    built = Path(tempfile.gettempdir()) / f"vitfast-ptx-{os.getuid()}-{digest[:16]}.so"
    if not built.exists():
        making = built.with_suffix(f".{os.getpid()}")
        command = [*COMPILER, *FLAGS, "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", str(folder / "ptx" / "executor.cpp")]
        result = subprocess.run([*command, "-o", str(making)], capture_output=True, text=True, check=False)
        assert result.returncode == 0 and not result.stderr, result.stderr
        making.rename(built)
    return Library(ctypes.CDLL(str(built)))


_COMPILED: dict = {}
"""Hash -> Triton's compiled kernel. The JIT keeps what it compiled beyond a `Device`'s life, and so must this."""


@dataclass
class Launch:
    kernel: str
    hash: str
    grid: tuple[int, ...]
    parameters: bytes
    counts: dict[str, int]


@dataclass
class Device:
    """What was compiled and executed.

    Attributes:
        seed: of the schedules and asynchronous effects; every launch has its own that follows from it.
        launches: in order.
        change: what is done to a kernel's PTX before it is decoded: (name, PTX) -> PTX.
    """

    arch: int
    seed: int = 0
    launches: list[Launch] = field(default_factory=list)
    change: object = staticmethod(lambda name, ptx: ptx)
    _programs: dict = field(default_factory=dict)

    def program(self, key: str) -> Program:
        compiled = _COMPILED[key]
        ptx = self.change(compiled.metadata.name, compiled.asm["ptx"])
        if (found := self._programs.get(ptx)) is None:
            found = self._programs[ptx] = Program(library(), ptx, compiled.metadata.shared)
        return found

    def launch(self, key: str, signature, metadata, grid, args) -> None:
        program = self.program(key)
        parameters, ranges = _arguments(program.kernel, signature, metadata, args)
        counts = program.run(grid, parameters, ranges, self.seed + len(self.launches))
        self.launches.append(Launch(metadata.name, key, tuple(grid), parameters.tobytes(), counts))


def _arguments(kernel, signature, metadata, args):
    """The bytes of the parameters, and the memory that they name."""
    values, ranges = [], []
    descriptions = iter(getattr(metadata, "tensordesc_meta", None) or ())

    def add(kind, value):
        if isinstance(kind, tuple):
            for inner, entry in zip(kind, value, strict=True):
                add(inner, entry)
        elif kind == "constexpr":
            return
        elif kind.startswith("tensordesc"):
            values.append(_tensor_map(value, next(descriptions)))
            values.extend(struct.pack("<i", size) for size in value.shape)
            values.extend(struct.pack("<q", stride) for stride in value.strides)
            ranges.append(span(value.base))
        elif kind.startswith("*"):
            values.append(struct.pack("<Q", 0 if value is None else value.data_ptr()))
            if value is not None:
                ranges.append(span(value))
        elif kind == "fp32":
            values.append(struct.pack("<f", value))
        elif kind in ("i1", "u1", "i32", "u32", "i64", "u64"):
            values.append(int(value).to_bytes(8, "little", signed=value < 0))
        else:
            raise TypeError(f"an argument of type {kind!r} is not known here")

    for kind, value in zip(signature, args, strict=True):
        add(kind, value)
    values += [bytes(8)] * 2  # scratch memory, which no kernel here has
    assert len(values) == len(kernel.parameters), (len(values), list(kernel.parameters))
    size = -(-max(kernel.parameter_bytes, 1) // 64) * 64
    raw = np.zeros(size + 64, np.uint8)
    raw = raw[-raw.ctypes.data % 64 :][:size]
    for (offset, width), value in zip(kernel.parameters.values(), values, strict=True):
        assert not any(value[width:]) or int.from_bytes(value, "little", signed=True) < 0, (width, value)
        raw[offset : offset + width] = np.frombuffer(value[:width].ljust(width, b"\0"), np.uint8)
    return raw, ranges


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor's memory begins and ends, from its first element to its last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensor_map(descriptor: TensorDescriptor, meta) -> bytes:
    """TensorMap of machine.h."""
    assert len(descriptor.shape) == 2 and descriptor.strides[1] == 1 and not meta["fp4_padded"]
    rows, columns = descriptor.shape
    size, (box_rows, box_columns) = descriptor.base.element_size(), meta["block_size"]
    head = (descriptor.base.data_ptr(), rows, columns, descriptor.strides[0] * size)
    return struct.pack("<Qqqqiiiii", *head, size, box_rows, box_columns, meta["swizzle"], TENSOR_MAP).ljust(128, b"\0")


class _Driver:
    """triton.runtime.driver.active, as far as the JIT asks it."""

    def __init__(self, device: Device) -> None:
        self.device = device

        class Launcher:
            def __init__(self, source, metadata):
                self.signature, self.metadata = tuple(source.signature.values()), metadata

            def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
                device.launch(self.metadata.hash, self.signature, self.metadata, (x, y, z), args)

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda index: {
                "max_shared_mem": SHARED_MEMORY_LIMIT[device.arch], "max_num_regs": 65536, "multiprocessor_count": 3,
                "warpSize": 32,
            },
            load_binary=lambda name, binary, shared, index: (None, 1, 128, 0, 1024),
            unload_module=lambda module: None,
        )  # fmt: skip

    def get_current_target(self):
        return GPUTarget("cuda", self.device.arch, 32)

    def get_current_device(self):
        return self.device.arch  # the JIT keeps what it compiled apart by this number

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return divmod(self.device.arch, 10)

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cpu")


def known(made):
    """A compiled kernel, from now on one that can be launched by its hash."""
    return _COMPILED.setdefault(made.metadata.hash, made)


@contextlib.contextmanager
def executing(arch: int = 90, seed: int = 0):
    """Launches on CPU tensors compile for a chip and execute what comes of it; gives the `Device`.

    Raises:
        RuntimeError: if Triton is its interpreter in this process.
    """
    if isinstance(triton.runtime.driver, mock.Mock) or os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 was set when Triton was imported: there is no compiler to execute from")
    device = Device(arch, seed)
    compile_kernel, capability = triton.compile, launch.capability

    def noted(*args, **kwargs):
        made = compile_kernel(*args, **kwargs)
        return known(made)

    def chip(which):
        return divmod(arch, 10)

    active = triton.runtime.driver._active  # None where there is no GPU
    try:
        with contextlib.ExitStack() as stack:
            for module in [module for name, module in sys.modules.items() if name.startswith("vitfast.")]:
                if getattr(module, "capability", None) is capability:
                    stack.enter_context(mock.patch.object(module, "capability", chip))
            # CPU tensors are taken, as in the interpreter.
            stack.enter_context(mock.patch.object(launch, "interpreting", return_value=True))
            stack.enter_context(mock.patch("triton.compiler.compile", noted))
            stack.enter_context(mock.patch("triton.runtime.jit.compile", noted, create=True))
            triton.runtime.driver.set_active(_Driver(device))
            yield device
    finally:
        triton.runtime.driver._active = active
