"""The torch side of the CUDA kernels: what checks arguments and launches, compiled where torch has no CUDA."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
from helpers.emulated import COMPILER, needs_compiler
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = [*sorted((CSRC / "cuda").glob("*_op.cpp")), CSRC / "ops.cpp"]
HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")

pytestmark = [
    pytest.mark.full,
    needs_compiler,
    pytest.mark.skipif(not (HEADERS / "cuda_runtime_api.h").is_file(), reason=f"no CUDA headers in {HEADERS}"),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_warnings(source, tmp_path):
    """Optimised, since only then does the compiler see what is read before it is there, or after it is gone.

    A CPU-only torch has the headers of CUDA too, but for one that a build of torch makes.
    """
    made = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    made.parent.mkdir(parents=True)
    made.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    command = [*COMPILER, "-std=c++20", "-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-DVITFAST_CUDA"]
    command += ["-DTORCH_EXTENSION_NAME=_C", '-DVITFAST_CXX_FLAGS=""', '-DVITFAST_CUDA_STATE="90a"']
    headers = (*include_paths(), HEADERS, tmp_path, sysconfig.get_paths()["include"])
    command += [part for path in headers for part in ("-isystem", str(path))]
    command += ["-c", str(source), "-o", str(tmp_path / "compiled.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
