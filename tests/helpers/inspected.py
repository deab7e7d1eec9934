"""What `vitfast inspect` says of kernels, asked in a process in which Triton compiles."""

import json
from typing import Any

from helpers.scripts import compiling

TENSOR_CORES = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
"""Chip -> the best instruction that it has for products."""


def inspected(arch: str, kernel: str) -> list[dict[str, Any]]:
    """The rows of the report on one file of kernels/ for one chip."""
    return json.loads(compiling("-m", "vitfast", "inspect", "--arch", arch, "--kernel", kernel, "--json"))
