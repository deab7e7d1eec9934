"""CUDA graphs of a runner's forward: one per (batch bucket, image size and dtype), all in one memory pool.

A batch is copied into its bucket's static input, the graph is replayed, and the outputs are copied out:
the next replay of any graph of the pool may overwrite them. Graphs of different engines share nothing, so
engines run side by side; one engine's replays take turns, in whichever threads and on whichever streams.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitfast.engine.clock import capture_lock
from vitfast.engine.runner import Runner
from vitfast.models.output import Output
from vitfast.models.positions import Positions

MAX_GRAPHS = 16
"""Graphs that an engine keeps; the least recently used goes first."""


@dataclass(frozen=True)
class _Graph:
    """A captured forward, and what it reads and writes, kept for as long as it can be replayed."""

    graph: Any
    images: Tensor
    positions: Positions
    output: Output


class Graphs:
    """The graphs of one engine.

    Args:
        runner: whose forward is captured.
        buckets: batch sizes to capture for; a larger batch runs in pieces.
        cuda: torch.cuda; tests pass another.
    """

    def __init__(self, runner: Runner, buckets: tuple[int, ...], *, cuda: Any = torch.cuda) -> None:
        if not buckets or any(b < 1 for b in buckets):
            raise ValueError(f"buckets must be positive batch sizes, got {buckets}")
        self._runner, self._cuda = runner, cuda
        self._buckets = sorted(buckets)
        self._captured: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = cuda.graph_pool_handle()
        # A stream of this engine's own for warm-up and capture: torch's default one for captures belongs to
        # whichever device captured first, and cuBLAS keeps a workspace for each stream.
        self._stream: Any = cuda.Stream(runner.device)
        self._done: Any = cuda.Event()

    def __call__(self, images: Tensor, out: Output) -> None:
        """Run any number of images and write their outputs, all on the current stream."""
        largest = self._buckets[-1]
        with self._lock, self._cuda.device(self._runner.device):
            stream = self._cuda.current_stream()
            stream.wait_event(self._done)  # the last replay may have been on another stream
            try:
                for first in range(0, images.shape[0], largest):
                    piece = slice(first, first + largest)
                    self._replay(images[piece], out[piece])
            finally:
                self._done.record(stream)

    def memory(self) -> int:
        """Bytes of the static inputs and of the pool, which holds outputs and everything in between."""
        with self._lock:
            if not self._captured:
                return 0
            inputs = sum(graph.images.nbytes for graph in self._captured.values())
            return inputs + sum(segment["total_size"] for segment in self._cuda.memory_snapshot(self._pool))

    def _replay(self, images: Tensor, out: Output) -> None:
        batch = images.shape[0]
        bucket = next(b for b in self._buckets if b >= batch)
        key = (bucket, images.shape[1:], images.dtype)
        if key not in self._captured:
            self._captured[key] = self._capture(images, bucket)
            while len(self._captured) > MAX_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        captured.images[:batch].copy_(images, non_blocking=True)
        captured.graph.replay()
        out.copy_(captured.output[:batch])

    def _capture(self, images: Tensor, bucket: int) -> _Graph:
        cuda, current = self._cuda, self._cuda.current_stream()
        with capture_lock:
            self._stream.wait_stream(current)
            with cuda.stream(self._stream):
                # Allocated on this stream, so that freed memory is not given out on one that has not waited.
                static = images.new_zeros(bucket, *images.shape[1:])
                positions = self._runner.position(self._runner.size(static))
                self._runner.forward(static, positions)  # compiles kernels and fills caches outside the capture
            current.wait_stream(self._stream)
            graph = cuda.CUDAGraph()
            # "thread_local": what other threads do, allocate or pin memory, does not break the capture.
            with cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = self._runner.forward(static, positions)
        return _Graph(graph, static, positions, output)
