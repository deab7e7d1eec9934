"""Compiles what lies in tests/emulation: GPU kernels for the CPU, with g++ or another host compiler."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vitfast.testing import guarded

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None or os.uname().sysname != "Linux",
    reason=f"there is no C++ compiler {COMPILER[0]!r} on Linux to compile the emulated kernels with",
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to compile CUDA kernels with")


def library(source, folder, macros=(), include=ROOT / "csrc"):
    """tests/emulation/<source>.cpp as a ctypes library; kernels come from `include`."""
    built = folder / f"{source}.so"
    command = [
        *COMPILER,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        "-shared",
        "-fPIC",
    ]
    command += [f"-I{include}", f"-I{ROOT / 'tests' / 'emulation'}", *(f"-D{macro}" for macro in macros)]
    command += [str(ROOT / "tests" / "emulation" / f"{source}.cpp"), "-o", str(built)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return ctypes.CDLL(str(built))


class AttentionParams(ctypes.Structure):
    """AttentionParams of csrc/cuda/attention.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out")]
        + [(f"{t}_{axis}", ctypes.c_int64) for t in "qkv" for axis in ("batch", "token", "head")]
        + [(name, ctypes.c_int) for name in ("queries", "keys", "heads")]
        + [("scale", ctypes.c_float)]
    )


def attention_call(q, k, v, scale=None):
    """What an emulated attention kernel is given: its output to be, parameters, and what memory it may touch."""
    batch, queries, heads, d = q.shape
    out = guarded(torch.full((batch, queries, heads, d), float("nan"), dtype=q.dtype))
    tensors = (q, k, v, out)
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    pointers = [t.data_ptr() for t in tensors]
    params = AttentionParams(*pointers, *strides, queries, k.shape[1], heads, d**-0.5 if scale is None else scale)
    # From a tensor's first element to its last.
    sizes = [2 * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) for t in tensors]
    return out, params, (ctypes.c_void_p * 4)(*pointers), (ctypes.c_int64 * 4)(*sizes)
