"""A model that is served: bytes in, a row for each image out, by way of decoding threads and a batcher."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vitfast.images.decode import ImageError
from vitfast.pipeline.embed import OK, Decoder
from vitfast.pipeline.memory import Memory
from vitfast.pipeline.sources.item import Item
from vitfast.pipeline.stages import usable_cores
from vitfast.serving.batching import Batcher, Entry, Row
from vitfast.serving.limits import Limits
from vitfast.serving.metrics import Metrics

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

MAX_BATCH = {"cpu": 16}
"""Images of a batch at most, by the kind of device: on a CPU more gain nothing, and whoever comes then waits longer."""
MAX_BATCH_ELSEWHERE = 64


class Decoding:
    """The threads that decode, shared by all models.

    Args:
        workers: how many. memory: bytes that they may take together (see `vitfast.pipeline.memory`).
    """

    def __init__(self, workers: int | None = None, memory: int | None = None) -> None:
        self.workers = usable_cores() if workers is None else workers
        self.memory = Memory(memory)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="vitfast-decode")
        self._lock = threading.Lock()
        self._pending = 0
        self._seconds = 0.0  # of one image, in the mean of late

    def submit(self, decode: Callable[[], None]) -> None:
        """Have something decoded; `decode` must not raise."""
        with self._lock:
            self._pending += 1
        self._pool.submit(self._timed, decode)

    def _timed(self, decode: Callable[[], None]) -> None:
        started = time.perf_counter()
        decode()
        seconds = time.perf_counter() - started
        with self._lock:
            self._pending -= 1
            self._seconds += 0.1 * (seconds - self._seconds)

    def predicted_wait(self) -> float:
        """Seconds until a thread would turn to an image that came now."""
        with self._lock:
            return max(0, self._pending + 1 - self.workers) * self._seconds / self.workers

    def close(self) -> None:
        """End the threads when they have done what they have."""
        self._pool.shutdown()


class ServedModel:
    """An engine under a name.

    Args:
        name: what clients call it.
        engine: from `vitfast.load`. It is run by one thread from here on.
        limits, decoding, metrics: of the server.
        max_batch: images of a batch at most.

    Raises:
        ValueError: if the engine knows no preprocessing.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        limits: Limits,
        decoding: Decoding,
        metrics: Metrics,
        *,
        max_batch: int | None = None,
    ) -> None:
        if engine.preprocess is None:
            raise ValueError(f"{name}: the checkpoint does not say how its images are preprocessed, so none are served")
        self.name, self.engine = name, engine
        self.max_batch = max_batch or MAX_BATCH.get(engine.device.type, MAX_BATCH_ELSEWHERE)
        self._decoding, self._metrics = decoding, metrics
        self._decoder = Decoder(engine.preprocess, decoding.memory, True, limits.max_pixels)
        self._shape = (*engine.preprocess.size, 3)
        self.embedding_size = 0
        self.batcher = Batcher(
            self._run, max_batch=self.max_batch, max_wait=limits.max_wait, observe=metrics.batches(name)
        )
        metrics.watch_queue(name, lambda: self.batcher.waiting)

    @property
    def classes(self) -> int:
        """Of the model's head; 0 without one."""
        return self.engine.config.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the model sees."""
        return self._shape[0], self._shape[1]

    @property
    def image_bytes(self) -> int:
        """Of one decoded image."""
        return int(np.prod(self._shape))

    def warm_up(self) -> None:
        """Run a batch of every size there may be, twice: kernels are built, and how long each takes is known."""
        size = 1
        while True:
            for _ in range(2):
                started = time.perf_counter()
                embeddings, _ = self._run(np.zeros((size, *self._shape), np.uint8))
                seconds = time.perf_counter() - started
            self.batcher.times.note(size, seconds)
            self.embedding_size = embeddings.shape[1]
            if size == self.max_batch:
                return
            size = min(2 * size, self.max_batch)

    def _run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        output = self.engine(torch.from_numpy(images), preprocessed=True)
        logits = None if output.logits is None else output.logits.float().cpu().numpy()
        return output.embedding.float().cpu().numpy(), logits

    def predicted_wait(self) -> float:
        """Seconds that an image would wait that came now: decoding and the model work side by side."""
        return max(self._decoding.predicted_wait(), self.batcher.predicted_wait())

    def submit(self, items: Sequence[Item]) -> list[Future[Row]]:
        """Decode and run images. A future raises ImageError for an image that cannot be used."""
        entries = [self.batcher.expect() for _ in items]
        for item, entry in zip(items, entries, strict=True):
            self._decoding.submit(lambda item=item, entry=entry: self._decode(item, entry))  # type: ignore[misc]
        return [entry.future for entry in entries]

    def _decode(self, item: Item, entry: Entry) -> None:
        if entry.future.cancelled():  # the client is gone
            self.batcher.fail(entry, ImageError(item.path, "cancelled"))
            return
        started = time.perf_counter()
        decoded = self._decoder(item)
        self._metrics.stage(self.name, "decode", time.perf_counter() - started)
        if decoded.image is None:
            self.batcher.fail(entry, ImageError(item.path, decoded.result.status))
        else:
            assert decoded.result.status == OK
            self.batcher.put(entry, decoded.image)

    def close(self) -> None:
        """Finish what has been submitted, and end the thread."""
        self.batcher.close()


def served_names(models: Sequence[str]) -> dict[str, str]:
    """What each model is called by clients -> what it is loaded from: NAME=MODEL, a hub id, or a path's last part.

    Raises:
        ValueError: if two have one name, or a name is empty.
    """
    names: dict[str, str] = {}
    for text in models:
        name, equals, source = text.partition("=")
        if not equals:
            name, source = (Path(text).name if Path(text).exists() else text), text
        if not name or not source:
            raise ValueError(f"a model is NAME=MODEL, a hub id or a path, got {text!r}")
        if name in names:
            raise ValueError(f"two models would be called {name!r}: give one another name with NAME=MODEL")
        names[name] = source
    return names
