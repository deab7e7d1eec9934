"""Compiles what lies in tests/emulation: GPU kernels for the CPU, with g++ or another host compiler."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None or os.uname().sysname != "Linux",
    reason=f"there is no C++ compiler {COMPILER[0]!r} on Linux to compile the emulated kernels with",
)


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
