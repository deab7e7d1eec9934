"""The bulk pipeline: find images, decode them ahead of the model, run it.

    engine = vitfast.load("facebook/dinov2-small")
    for result in embed_images(engine, collect(["photos/"])):
        print(result.path, result.status)

`vitfast.pipeline.parquet` writes the results as Parquet and goes on where a run stopped.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitfast.images.decode import open_image
from vitfast.images.preprocess import Preprocess, resize_and_crop

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

OK = "ok"


@dataclass
class Result:
    """What became of one image: status "ok" with an embedding (and logits if the model has a head),
    or the reason why not. Arrays are float32 [E] and [classes]."""

    path: Path
    status: str
    embedding: np.ndarray | None = None
    logits: np.ndarray | None = None


def embed_images(
    engine: Engine,
    paths: Iterable[str | Path],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    exif_orientation: bool = True,
) -> Iterator[Result]:
    """Embed image files, in the order given, each with its own status: a bad one stops nothing.

    Threads read, decode and preprocess about a batch ahead of the model. Breaking off the iteration
    stops them.

    Args:
        engine: from `vitfast.load`.
        paths: image files; consumed as needed.
        batch_size: images per run of the model.
        workers: decoding threads; the number of usable CPU cores by default.
        exif_orientation: see `vitfast.images.decode.open_image`.

    Raises:
        ValueError: if batch_size or workers is below 1, or the engine knows no preprocessing.
    """
    workers = _usable_cores() if workers is None else workers
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
    if engine.preprocess is None:
        raise ValueError("the checkpoint does not say how its images are preprocessed, so files cannot be embedded")
    return _pipeline(engine, engine.preprocess, paths, batch_size, workers, exif_orientation)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode(path: Path, preprocess: Preprocess, exif_orientation: bool) -> np.ndarray | str:
    """The image, uint8 [h, w, 3], or the reason why there is none."""
    try:
        return resize_and_crop(open_image(path, exif_orientation=exif_orientation), preprocess)
    except ValueError as error:
        return getattr(error, "reason", str(error))


def _pipeline(
    engine: Engine, preprocess: Preprocess, paths: Iterable[str | Path], batch_size: int, workers: int, exif: bool
) -> Iterator[Result]:
    with ThreadPoolExecutor(workers, thread_name_prefix="vitfast-decode") as pool:
        waiting: deque[tuple[Path, Future[np.ndarray | str]]] = deque()
        taken: deque[list[tuple[Path, np.ndarray | str]]] = deque()  # batches whose results are to be given

        def batches_of_images() -> Iterator[list[np.ndarray]]:
            for batch in _batches(_decoded(pool, waiting, paths, preprocess, exif, batch_size + workers), batch_size):
                taken.append(batch)
                if images := _images(batch):
                    yield images

        try:
            for output in engine.stream(batches_of_images(), preprocessed=True):
                while not _images(taken[0]):
                    yield from _results(taken.popleft(), None)
                yield from _results(taken.popleft(), output)
            while taken:
                yield from _results(taken.popleft(), None)
        finally:
            for _, future in waiting:
                future.cancel()


def _decoded(
    pool: ThreadPoolExecutor,
    waiting: deque[tuple[Path, Future[np.ndarray | str]]],
    paths: Iterable[str | Path],
    preprocess: Preprocess,
    exif: bool,
    ahead: int,
) -> Iterator[tuple[Path, np.ndarray | str]]:
    """(path, image or reason) in order, with at most `ahead` images decoded or being decoded."""
    for path in map(Path, paths):
        waiting.append((path, pool.submit(_decode, path, preprocess, exif)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _batches(
    items: Iterable[tuple[Path, np.ndarray | str]], batch_size: int
) -> Iterator[list[tuple[Path, np.ndarray | str]]]:
    """Runs of items with `batch_size` images each; the reasons between them ride along, up to as many."""
    batch: list[tuple[Path, np.ndarray | str]] = []
    good = 0
    for item in items:
        batch.append(item)
        good += not isinstance(item[1], str)
        if good == batch_size or len(batch) == 2 * batch_size:
            yield batch
            batch, good = [], 0
    if batch:
        yield batch


def _images(batch: list[tuple[Path, np.ndarray | str]]) -> list[np.ndarray]:
    return [image for _, image in batch if not isinstance(image, str)]


def _results(batch: list[tuple[Path, np.ndarray | str]], output: Any) -> Iterator[Result]:
    embeddings = logits = None
    if output is not None:
        embeddings = output.embedding.float().numpy()
        logits = None if output.logits is None else output.logits.float().numpy()
    row = 0
    for path, image in batch:
        if isinstance(image, str):
            yield Result(path, image)
            continue
        assert embeddings is not None
        embedding = embeddings[row]
        if np.isfinite(embedding).all():
            yield Result(path, OK, embedding, None if logits is None else logits[row])
        else:
            yield Result(path, "the model's output is not finite (try another dtype)")
        row += 1


@dataclass
class Classified:
    """The likeliest classes of one image, best first: dicts of "index", "label" and "probability" (0..1; the value
    itself under "value" for a model that regresses). Empty where status is not "ok"."""

    path: Path
    status: str
    classes: list[dict[str, Any]]


def classify_images(
    engine: Engine, paths: Iterable[str | Path], *, k: int = 5, batch_size: int = 64, workers: int | None = None
) -> Iterator[Classified]:
    """The k likeliest classes (or all, if there are fewer) of each image, in the order given.

    Probabilities are the softmax over all classes, but of each class by itself (sigmoid) where the model's
    `problem_type` is multi_label_classification, or it has one class only, as transformers' pipeline has it. Labels are
    the engine's; without any, the class index stands for itself. Arguments and errors are those of `embed_images`.

    Raises:
        ValueError: if the model has no classification head, or k is below 1.
    """
    if not engine.config.num_classes:
        raise ValueError("the model has no classification head; `embed` works with it, `classify` does not")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    results = embed_images(engine, paths, batch_size=batch_size, workers=workers)
    return (
        Classified(r.path, r.status, _top_classes(r.logits, k, engine.labels, engine.problem_type)) for r in results
    )


def _top_classes(
    logits: np.ndarray | None, k: int, labels: Sequence[str] | None, problem_type: str | None
) -> list[dict[str, Any]]:
    if logits is None:
        return []
    name, scores = _scores(logits.astype(np.float64), problem_type)
    best = np.argsort(-scores, kind="stable")[:k]
    return [{"index": int(i), "label": labels[i] if labels else str(i), name: float(scores[i])} for i in best]


def _scores(logits: np.ndarray, problem_type: str | None) -> tuple[str, np.ndarray]:
    """What the logits of one image say of its classes, and what that is called."""
    if problem_type == "regression":
        return "value", logits
    if problem_type == "multi_label_classification" or len(logits) == 1:
        return "probability", 1 / (1 + np.exp(-np.clip(logits, -700, None)))
    weights = np.exp(logits - logits.max())
    return "probability", weights / weights.sum()
