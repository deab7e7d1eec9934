"""Python run in a process of its own, at the repository's root."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _run(arguments: Sequence[str | Path], environment: Mapping[str, str]) -> str:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def python(code: str, **environment: str) -> str:
    """Run code with the tests' own environment and what is added to it; its stdout, stripped."""
    return _run(("-c", code), os.environ | environment).strip()


def compiling(*arguments: str | Path, **environment: str) -> str:
    """Run Python where Triton is its compiler, not its interpreter; its stdout."""
    outer = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return _run(arguments, outer | environment)


def compiling_code(code: str, **environment: str) -> str:
    """The same of code, which may be indented."""
    return compiling("-c", textwrap.dedent(code), **environment)
