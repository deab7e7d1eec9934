"""How the planner times calls: on a GPU by replaying CUDA graphs behind a cold L2 cache, as an engine runs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

capture_lock = threading.Lock()
"""One capture at a time in the process: beginning one synchronises the device, which would break another's."""

FLUSH_BYTES = 256 * 2**20
"""What is written between two timings: more than any L2 cache holds."""


def captured(call: Callable[[], Any], device: torch.device, *, cuda: Any = torch.cuda) -> Callable[[], Any]:
    """A call as it is timed: on a GPU the replay of a graph, so that neither Python nor launch gaps count.

    Args:
        cuda: torch.cuda; tests pass another.

    Raises:
        RuntimeError: if the call cannot be captured; an engine could not run it either.
    """
    if device.type != "cuda":
        return call
    with capture_lock, cuda.device(device):
        stream = cuda.Stream(device)
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            call()  # compiles and fills caches outside the capture
        cuda.current_stream().wait_stream(stream)
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                output = call()
        except Exception as error:
            cuda.synchronize()
            raise RuntimeError(f"it cannot be captured in a CUDA graph: {error}") from error

    def replay(kept: Any = output) -> None:  # the graph writes into what the capture made
        graph.replay()

    return replay


def time_calls(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    rounds: int = 10,
    seconds: float = 2.0,
    *,
    cuda: Any = torch.cuda,
) -> list[float]:
    """Median milliseconds of each call, in interleaved rounds, with a cold L2 cache on a GPU.

    Args:
        seconds: no round is begun after so long, but for the first three.
        cuda: torch.cuda; tests pass another.
    """
    times: list[list[float]] = [[] for _ in calls]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for call in calls:
        call()
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begun > seconds:
            break
        for i, call in enumerate(calls):
            if flush is None:
                start = time.perf_counter()
                call()
                times[i].append((time.perf_counter() - start) * 1e3)
            else:
                flush.zero_()  # takes longer than the launches after it, which are queued meanwhile
                before, after = (cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                call()
                after.record()
                after.synchronize()
                times[i].append(before.elapsed_time(after))
    return [sorted(t)[len(t) // 2] for t in times]
