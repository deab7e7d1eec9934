"""Batch after batch at a steady pace: what `Engine.stream` does.

On a GPU two batches are under way, each in a lane of its own: pixels go through pinned memory and an upload
stream, the forward runs on the current stream, results come back on a download stream. So the upload of one
batch and the download of another hide behind the computation, and the host waits only for the result that
it gives next. Lanes keep their buffers: once the largest batch has been seen, no memory is pinned and none
is allocated on the device (but by the resizing of images of other sizes).

A lane is free again when its result has been waited for. That wait implies that its upload and its
computation are over, so the buffers need no other protection from reuse.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vitfast.engine.isolation import isolated
from vitfast.engine.runner import Runner
from vitfast.models.output import Output

Batch: TypeAlias = "Tensor | Sequence[np.ndarray]"
"""What `Engine.__call__` takes, or images uint8 [H, W, C] of one size, to be stacked."""

LANES = 2
"""Batches under way on a GPU."""


class CpuLane:
    """A batch on the CPU: computed when it is started.

    Args:
        run: an engine, called on a batch. tokens: whether they are part of the output.
    """

    def __init__(self, run: Callable[[Tensor], Output], *, tokens: bool) -> None:
        self._run, self._tokens = run, tokens
        self._output: Output | None = None

    def start(self, batch: Batch) -> None:
        """Run a batch."""
        if not isinstance(batch, Tensor):
            _shape_of_list(batch)
            batch = torch.from_numpy(np.stack(batch))
        output = self._run(batch)
        self._output = output if self._tokens else Output(None, output.embedding, output.logits)

    def finish(self) -> Output:
        """The output of the batch that was started."""
        output, self._output = self._output, None
        assert output is not None
        return output

    def synchronize(self) -> None:
        """Nothing is ever left under way."""


class GpuLane:
    """A batch on its way through a GPU, and its buffers.

    Args:
        runner: checks and prepares batches. run_into: computes prepared images, and writes where it is told.
        upload, download: streams, shared by the lanes of one run.
        cuda: torch.cuda; tests pass another.
    """

    def __init__(
        self,
        runner: Runner,
        run_into: Callable[[Tensor, Output], None],
        upload: Any,
        download: Any,
        *,
        preprocessed: bool,
        tokens: bool,
        cuda: Any = torch.cuda,
    ) -> None:
        self._runner, self._run_into, self._cuda = runner, run_into, cuda
        self._preprocessed, self._tokens = preprocessed, tokens
        self._upload, self._download = upload, download
        self._uploaded, self._computed = cuda.Event(), cuda.Event()
        self._returned = cuda.Event(blocking=True)  # a waiting host leaves its core to the decoding threads
        self._batch = 0
        self._pinned: Tensor | None = None  # pixels in pinned memory, and on the device
        self._pixels: Tensor | None = None
        self._output: Output | None = None  # results on the device, and in pinned memory
        self._result: Output | None = None

    def memory(self) -> tuple[int, int]:
        """Bytes of the buffers on the device, and in pinned memory."""
        device = [self._pixels, *(self._output.tensors() if self._output else ())]
        pinned = [self._pinned, *(self._result.tensors() if self._result else ())]
        return sum(t.nbytes for t in device if t is not None), sum(t.nbytes for t in pinned if t is not None)

    @isolated
    def start(self, batch: Batch) -> None:
        """Send a batch on its way; returns before it has arrived."""
        runner, cuda = self._runner, self._cuda
        with cuda.device(runner.device):
            stream = cuda.current_stream()
            images = runner.prepare(self._send(batch, stream), self._preprocessed)
            output, result = self._room_for_results(images.shape[0], runner.size(images))
            self._run_into(images, output)
            self._computed.record(stream)
            with cuda.stream(self._download):
                self._download.wait_event(self._computed)
                result.copy_(output)
                self._returned.record(self._download)
            self._batch = images.shape[0]

    @isolated
    def finish(self) -> Output:
        """Wait for the batch that was started; its output, the caller's own, in ordinary memory."""
        self._returned.synchronize()
        assert self._result is not None
        return self._result[: self._batch].clone()

    def synchronize(self) -> None:
        """Wait for whatever is under way, so that the buffers may go."""
        self._upload.synchronize()
        self._returned.synchronize()

    def _send(self, batch: Batch, stream: Any) -> Tensor:
        """The batch on the device, there by the time that the current stream reads it."""
        runner = self._runner
        if isinstance(batch, Tensor):
            runner.check(batch.shape, batch.dtype)
            if batch.device.type == "cuda":
                return batch.to(runner.device, non_blocking=True)
            shape, dtype = tuple(batch.shape), torch.uint8 if batch.dtype == torch.uint8 else runner.dtype
        else:
            shape, dtype = _shape_of_list(batch), torch.uint8
            runner.check(shape, dtype)
        pinned, pixels = self._room_for_pixels(shape, dtype, stream)
        if not isinstance(batch, Tensor):
            np.stack(batch, out=pinned.numpy())
        elif batch.dtype == dtype and batch.is_pinned():
            pinned = batch
        else:
            pinned.copy_(batch)
        with self._cuda.stream(self._upload):
            pixels.copy_(pinned, non_blocking=True)
            self._uploaded.record(self._upload)
        stream.wait_event(self._uploaded)
        return pixels

    def _room_for_pixels(self, shape: Sequence[int], dtype: torch.dtype, stream: Any) -> tuple[Tensor, Tensor]:
        """The pinned and the device buffer of a batch's pixels, made anew if it does not fit."""
        batch, device = shape[0], self._runner.device
        if not _fits(self._pixels, batch, shape[1:], dtype):
            self._pinned = torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=True)
            self._pixels = torch.empty(tuple(shape), dtype=dtype, device=device)
            self._upload.wait_stream(stream)  # which may still be at work in the memory it has just been given
        assert self._pinned is not None and self._pixels is not None
        return self._pinned[:batch], self._pixels[:batch]

    def _room_for_results(self, batch: int, size: tuple[int, int]) -> tuple[Output, Output]:
        """The device and the pinned buffers of a batch's outputs, made anew if they do not fit."""
        runner = self._runner
        tokens = self._output.tokens if self._output else None
        enough = self._output is not None and self._output.embedding.shape[0] >= batch
        if not enough or (tokens is not None and tokens.shape[1] != runner.config.tokens(size)):
            self._output = runner.outputs(batch, size, tokens=self._tokens)
            self._result = runner.outputs(batch, size, tokens=self._tokens, pinned=True)
        assert self._output is not None and self._result is not None
        return self._output[:batch], self._result[:batch]


def _fits(buffer: Tensor | None, batch: int, shape: Sequence[int], dtype: torch.dtype) -> bool:
    return (
        buffer is not None and buffer.shape[0] >= batch and buffer.shape[1:] == tuple(shape) and buffer.dtype == dtype
    )


def _shape_of_list(images: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Shape of the batch of images given one by one; np.stack sees to it that they agree.

    Raises:
        ValueError: if there are none, or one is not uint8 [H, W, C].
    """
    if not len(images):
        raise ValueError("a batch given as a list must have at least one image")
    for image in images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
            given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"a batch given as a list must have arrays uint8 [H, W, C], got {given}")
    return len(images), *images[0].shape


def run(lanes: Sequence[CpuLane] | Sequence[GpuLane], batches: Iterable[Batch]) -> Iterator[Output]:
    """Start batches in the lanes, one after another, and give their outputs in order.

    What goes wrong, in a batch or in `batches` itself, is raised after the outputs of the batches before it.
    """
    under_way: deque[CpuLane | GpuLane] = deque()
    failed: Exception | None = None
    source = iter(batches)
    try:
        for index in itertools.count():
            if len(under_way) == len(lanes):
                yield under_way.popleft().finish()
            lane = lanes[index % len(lanes)]
            try:
                _start(lane, next(source), index)
            except StopIteration:
                break
            except Exception as error:
                failed = error
                break
            under_way.append(lane)
        while under_way:
            yield under_way.popleft().finish()
        if failed is not None:
            raise failed
    finally:
        for lane in lanes:
            lane.synchronize()


def _start(lane: CpuLane | GpuLane, batch: Batch, index: int) -> None:
    try:
        lane.start(batch)
    except ValueError as error:
        raise ValueError(f"batch {index}: {error}") from error
