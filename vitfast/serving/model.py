"""A model that is served: images and texts in, a row for each out, by way of decoding threads and batchers."""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from vitfast.images.decode import ImageError
from vitfast.pipeline.embed import OK, Decoder
from vitfast.pipeline.memory import Memory
from vitfast.pipeline.sources.item import Item
from vitfast.pipeline.stages import usable_cores
from vitfast.serving.batching import Alone, Batcher, Entry
from vitfast.serving.limits import Limits
from vitfast.serving.metrics import Metrics

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

log = logging.getLogger("vitfast.serving")

MAX_BATCH = {"cpu": 16}
"""Images of a batch at most, by the kind of device: on a CPU more gain nothing, and whoever comes then waits longer."""
MAX_BATCH_ELSEWHERE = 64
_TEXTS = 4096
"""Texts whose embeddings are remembered."""


class Decoding:
    """The threads that decode, shared by all models.

    Args:
        threads: how many. memory: bytes that they may take together (see `vitfast.pipeline.memory`).
    """

    def __init__(self, threads: int | None = None, memory: int | None = None) -> None:
        self.threads = usable_cores() if threads is None else threads
        self.memory = Memory(memory)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="vitfast-decode")
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
            return max(0, self._pending + 1 - self.threads) * self._seconds / self.threads

    def close(self) -> None:
        """End the threads when they have done what they have."""
        self._pool.shutdown()


class Row(NamedTuple):
    """What the model says of one image or text: float32 [E], and of an image [classes] if it has a head.

    Of an image whose patches are wanted it is their features, float32 [rows, columns, C].
    """

    embedding: np.ndarray
    logits: np.ndarray | None = None


Input: TypeAlias = "Item | str"
"""An image as its bytes, or a text."""


class ServedModel:
    """An engine under a name.

    Args:
        name: what clients call it.
        engine: from `vitfast.load`. It is run by one thread alone from here on (see `Alone`).
        limits, decoding, metrics: of the server.
        max_batch: inputs of a batch at most.

    Attributes:
        has_text: it embeds texts, too; known after `warm_up`.
        users: requests that are at work on it, counted by whoever answers them.

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
        self.name, self.engine, self.preprocess = name, engine, engine.preprocess
        self.max_batch = max_batch or MAX_BATCH.get(engine.device.type, MAX_BATCH_ELSEWHERE)
        self._limits, self._decoding, self._metrics = limits, decoding, metrics
        self._decoder = Decoder(engine.preprocess, decoding.memory, True, limits.max_pixels)
        self._shape = (*engine.preprocess.size, 3)
        self._thread = Alone("vitfast-model")
        self._texts: OrderedDict[str, Row] = OrderedDict()
        self._texts_lock = threading.Lock()
        self.embedding_size = 0
        self.has_text = False
        self.users = 0
        self.batcher = self._batcher(self._run, "image")
        self._text_batcher = self._batcher(self._run_texts, "text")
        self._dense_batcher = self._batcher(self._run_dense, "dense")
        self._dense_batcher.times = self.batcher.times  # it is the same work
        self.watch()

    def _batcher(self, run: Callable[[list[Any]], Sequence[Any]], kind: str) -> Batcher:
        def alone(given: list[Any]) -> Sequence[Any]:
            return self._thread.do(run, given)

        return Batcher(
            alone,
            max_batch=self.max_batch,
            max_wait=self._limits.max_wait,
            observe=self._metrics.batches(self.name, kind),
            name=f"vitfast-{kind}-batches",
        )

    def watch(self) -> None:
        """Have the metrics tell of this model's queues under its name."""
        for kind, batcher in zip(("image", "text", "dense"), self._batchers, strict=True):
            self._metrics.watch_queue(self.name, kind, batcher)

    @property
    def _batchers(self) -> tuple[Batcher, ...]:
        return self.batcher, self._text_batcher, self._dense_batcher

    @property
    def classes(self) -> int:
        """Of the model's head; 0 without one."""
        return self.engine.config.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the model sees."""
        return self._shape[0], self._shape[1]

    def bytes_of(self, given: Input, dense: bool) -> int:
        """That an input takes while it waits, and its answer if that is large."""
        if isinstance(given, str):
            return 4 * len(given)
        rows, columns = self.engine.config.grid(self.image_size) if dense else (0, 0)
        return math.prod(self._shape) + 4 * rows * columns * self.engine.config.width

    def warm_up(self) -> None:
        """Run a batch of every size there may be, twice: kernels are built, and how long each takes is known."""
        self._thread.do(self._warm_up)

    def _warm_up(self) -> None:
        row = self._warm(self.batcher, self._run, np.zeros(self._shape, np.uint8))
        self.embedding_size = len(row.embedding)
        try:
            self._run_texts(["a photo"])
        except ValueError as error:
            log.info("%s is served for images alone: %s", self.name, error)
            return
        self._warm(self._text_batcher, self._run_texts, "a photo")
        self.has_text = True

    def _warm(self, batcher: Batcher, run: Callable[[list[Any]], list[Row]], given: Any) -> Row:
        size = 1
        while True:
            for _ in range(2):
                started = time.perf_counter()
                rows = run([given] * size)
                seconds = time.perf_counter() - started
            batcher.times.note(size, seconds)
            if size == self.max_batch:
                return rows[0]
            size = min(2 * size, self.max_batch)

    def _run(self, images: list[np.ndarray]) -> list[Row]:
        output = self.engine(torch.from_numpy(np.stack(images)), preprocessed=True)
        embeddings = output.embedding.float().cpu().numpy()
        logits = [None] * len(images) if output.logits is None else output.logits.float().cpu().numpy()
        return [Row(*row) for row in zip(embeddings, logits, strict=True)]

    def _run_dense(self, images: list[np.ndarray]) -> list[Row]:
        output = self.engine(torch.from_numpy(np.stack(images)), preprocessed=True, layers=[-1], reshape=True)
        assert output.layers is not None
        return [Row(row) for row in output.layers[0].permute(0, 2, 3, 1).float().contiguous().cpu().numpy()]

    def _run_texts(self, texts: list[str]) -> list[Row]:
        return [Row(embedding) for embedding in self.engine.text(texts).float().cpu().numpy()]

    def predicted_wait(self) -> float:
        """Seconds that an image would wait that came now: decoding and the model work side by side."""
        at_model = sum(batcher.predicted_wait() for batcher in self._batchers)
        return max(self._decoding.predicted_wait(), at_model)

    def submit(self, inputs: Sequence[Input], *, dense: bool = False) -> list[Future[Row]]:
        """Decode and run inputs. A future raises ImageError for an image that cannot be used.

        Args:
            dense: give the features of the images' patches.

        Texts that came of late are remembered: labels come again and again.
        """
        futures: list[Future[Row]] = []
        starts: list[Callable[[], None]] = []  # after all are announced, so that a batch waits for the whole request
        for given in inputs:
            if not isinstance(given, str):
                batcher = self._dense_batcher if dense else self.batcher
                entry = batcher.expect()
                decode = functools.partial(self._decode, given, entry, batcher)
                starts.append(functools.partial(self._decoding.submit, decode))
            elif (known := self._remembered(given)) is not None:
                futures.append(_done(known))
                continue
            else:
                entry = self._text_batcher.expect()
                entry.future.add_done_callback(functools.partial(self._remember, given))
                starts.append(functools.partial(self._text_batcher.put, entry, given))
            futures.append(entry.future)
        for start in starts:
            start()
        return futures

    def _remembered(self, text: str) -> Row | None:
        with self._texts_lock:
            if text in self._texts:
                self._texts.move_to_end(text)
            return self._texts.get(text)

    def _remember(self, text: str, future: Future[Row]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        row = Row(future.result().embedding.copy())  # which is a view of its whole batch
        with self._texts_lock:
            self._texts[text] = row
            if len(self._texts) > _TEXTS:
                self._texts.popitem(last=False)

    def _decode(self, item: Item, entry: Entry, batcher: Batcher) -> None:
        if entry.future.cancelled():  # the client is gone
            batcher.fail(entry, ImageError(item.path, "cancelled"))
            return
        started = time.perf_counter()
        decoded = self._decoder(item)
        self._metrics.stage(self.name, "image", "decode", time.perf_counter() - started)
        if decoded.image is None:
            batcher.fail(entry, ImageError(item.path, decoded.result.status))
        else:
            assert decoded.result.status == OK
            batcher.put(entry, decoded.image)

    def close(self) -> None:
        """Finish what has been submitted, and end the threads."""
        for batcher in self._batchers:
            batcher.close()
        self._thread.close()


def _done(row: Row) -> Future[Row]:
    future: Future[Row] = Future()
    future.set_result(row)
    return future


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
