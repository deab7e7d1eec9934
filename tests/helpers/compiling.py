"""Kernels compiled in a process of its own, where Triton is not the interpreter."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import vitfast

PACKAGE = Path(vitfast.__file__).parent


def run_python(*arguments: object, **environment: str) -> str:
    """Run Python in a fresh process in which Triton compiles; gives its stdout."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=env, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_code(code: str, **environment: str) -> str:
    return run_python("-c", textwrap.dedent(code), **environment)


BEST = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
