"""The settings of the process that every test finds as the one before it did, and a way to change one for a while."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from helpers.scripts import ROOT


def _simd() -> str | None:
    """The SIMD level of the C++ extension, once it is imported."""
    extension = sys.modules.get("vitfast._C")
    return extension and extension.build_info()["simd"]


def _limit_simd(level: str) -> None:
    sys.modules["vitfast._C"].limit_simd(level)


def _keep_on_cores(cores: set[int]) -> None:
    for task in os.listdir("/proc/self/task"):  # threads too, which were moved one by one
        os.sched_setaffinity(int(task), cores)


SETTINGS = {
    "torch's threads": (torch.get_num_threads, torch.set_num_threads),
    "the cores this process may use": (lambda: os.sched_getaffinity(0), _keep_on_cores),
    "the SIMD level": (_simd, _limit_simd),
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "precision of fp32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "TF32 in cuDNN": (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda on: setattr(torch.backends.cudnn, "allow_tf32", on),
    ),
    "nn.MultiheadAttention's fast path": (
        torch.backends.mha.get_fastpath_enabled,
        torch.backends.mha.set_fastpath_enabled,
    ),
    "the working directory": (os.getcwd, os.chdir),
}
"""What -> (read it, set it)."""


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads for torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_since(before: set[threading.Thread], seconds: float = 10) -> list[str]:
    """Names of Python's threads that are not of `before`, and still execute code of this project after some seconds.

    Those that libraries keep for themselves, or a pool for its next task, do not.
    """
    end = time.monotonic() + seconds
    left = [thread for thread in threading.enumerate() if thread not in before and _executes(thread, ROOT)]
    for thread in left:
        thread.join(max(0.0, end - time.monotonic()))
    return [thread.name for thread in left if thread.is_alive()]


def _executes(thread: threading.Thread, folder: Path) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(folder) and "site-packages" not in path.parts:
            return True
        frame = frame.f_back
    return False


def snapshot() -> dict[str, object]:
    """All settings as they are."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def restore(before: dict[str, object]) -> list[str]:
    """Put back what differs from `before`; says what that was."""
    changed = []
    for name, (read, put_back) in SETTINGS.items():
        now = read()
        if now != before[name] and before[name] is not None:
            put_back(before[name])
            changed.append(f"{name}: {before[name]} became {now}")
    return changed
