"""The CPU ops compile with clang, on x86 and elsewhere: zig is a clang that has every target."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers.scripts import ROOT

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no clang: pip install ziglang"),
]

INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = (
    "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unused-const-variable",
    *(f"-isystem{folder}" for folder in (INCLUDE, INCLUDE / "torch/csrc/api/include", sysconfig.get_path("include"))),
    "-DTORCH_EXTENSION_NAME=_C", '-DVITFAST_CXX_FLAGS=""', '-DVITFAST_CUDA_STATE=""',
)  # fmt: skip
SOURCES = [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "x86_64-linux-gnu"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_clang_compiles(source, target, tmp_path):
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *FLAGS, "-c", "-o", tmp_path / "it.o", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
