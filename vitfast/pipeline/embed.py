"""The bulk pipeline: find images, decode them ahead of the model, run it.

    engine = vitfast.load("facebook/dinov2-small")
    for result in embed_images(engine, collect(["photos/"])):
        print(result.path, result.status)

`vitfast.pipeline.parquet` writes the results as Parquet and goes on where a run stopped.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vitfast.images.decode import ImageFile, sha256
from vitfast.images.preprocess import Preprocess, memory, resize_and_crop
from vitfast.pipeline.memory import Memory
from vitfast.pipeline.sources.item import Item, file_item
from vitfast.pipeline.stages import Stages, usable_cores

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine
    from vitfast.engine.text import ZeroShot

OK = "ok"

BATCH_SECONDS = 4.0
"""On a CPU batches get smaller until one takes no longer than this: what is under way is lost with a killed run."""
_FIRST_BATCH = 8


class Stamp(NamedTuple):
    """A file as it was read: bytes, modification time in ns where it has one, SHA-256 of the content."""

    size: int
    mtime_ns: int | None
    sha256: bytes


@dataclass
class Result:
    """What became of one image: status "ok" with an embedding (and logits if the model has a head),
    or the reason why not. Arrays are float32 [E] and [classes]. `note` says what was done to an unusual picture
    (see `vitfast.images.decode.ImageFile`), `stamp` which file it was, `size` its height and width upright, `columns`
    what its source says of it besides. `path` is text for an image that is no file (see `Item`)."""

    path: str | Path
    status: str
    embedding: np.ndarray | None = None
    logits: np.ndarray | None = None
    note: str = ""
    stamp: Stamp | None = None
    size: tuple[int, int] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Decoded:
    """An image, uint8 [h, w, 3], on its way to the model; or None, and the result's status says why."""

    result: Result
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Decoder:
    """Reads, decodes and preprocesses files, in any thread."""

    preprocess: Preprocess
    memory: Memory
    exif_orientation: bool
    max_pixels: int | None
    stages: Stages = field(default_factory=Stages)

    def __call__(self, item: Item) -> Decoded:
        """The image, or the reason why there is none, whatever goes wrong: a bad file stops nothing."""
        result = Result(item.path, OK, columns=item.columns)
        try:
            return Decoded(result, self._read(item, result))
        except BaseException as error:  # a panic of a decoder written in Rust is not even an Exception
            reason = " ".join(str(getattr(error, "reason", error)).split())
            if isinstance(error, MemoryError):
                reason = "there is not enough memory to decode and resize it"
            known = isinstance(error, ValueError) and reason
            result.status = reason if known else f"{type(error).__name__}: {reason}".removesuffix(": ")
            return Decoded(result)

    def _read(self, item: Item, result: Result) -> np.ndarray:
        with item.open() as file:
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns if isinstance(item.path, Path) else item.mtime_ns
            with self.stages.at_work("read"):
                result.stamp = Stamp(file.seek(0, os.SEEK_END), mtime_ns, sha256(file))
            with ImageFile(file, item.path, self.exif_orientation, self.max_pixels) as image:
                image.prepare_for(self.preprocess)
                sizes = ((image.height, image.width), (image.width, image.height))  # turned upright or not
                resizing = max(memory(self.preprocess, *size) for size in sizes)
                with self.memory.reserve(image.bytes + resizing):
                    with self.stages.at_work("decode"):
                        picture = image.decode()
                    with self.stages.at_work("resize"):
                        pixels = resize_and_crop(picture, self.preprocess)
                result.note, result.size = image.note, image.size
                return pixels


def embed_images(
    engine: Engine,
    paths: Iterable[str | Path | Item],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    exif_orientation: bool = True,
    max_pixels: int | None = None,
    decode_memory: int | None = None,
    batch_invariant: bool = False,
    stages: Stages | None = None,
) -> Iterator[Result]:
    """Embed image files, in the order given, each with its own status: a bad one stops nothing.

    Threads read, decode and preprocess about a batch ahead of the model. Breaking off the iteration
    stops them.

    Args:
        engine: from `vitfast.load`.
        paths: image files, or items of `vitfast.pipeline.sources`; consumed as needed.
        batch_size: images per run of the model, at most: fewer where memory is short, and on a CPU where a run would
            take too long.
        workers: decoding threads; the number of usable CPU cores by default.
        exif_orientation, max_pixels: see `vitfast.images.decode.open_image`.
        decode_memory: bytes that decoding and resizing may take, all threads together; by default a quarter of the
            memory there is, 4 GiB at most. A picture that needs more is refused; others wait for each other.
        batch_invariant: fill every batch up to `batch_size` with copies, so that all runs of the model have one shape
            and an image's embedding does not depend on how many others there are; on a CPU, too.
        stages: filled in as the run goes: where its time goes.

    Raises:
        ValueError: if a number is below 1, or the engine knows no preprocessing.
    """
    workers = usable_cores() if workers is None else workers
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
    for name, value in (("max_pixels", max_pixels), ("decode_memory", decode_memory)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if engine.preprocess is None:
        raise ValueError("the checkpoint does not say how its images are preprocessed, so files cannot be embedded")
    stages = Stages() if stages is None else stages
    decoder = Decoder(engine.preprocess, Memory(decode_memory), exif_orientation, max_pixels, stages)
    stages.workers = workers
    return _pipeline(engine, decoder, paths, batch_size, stages, fixed=batch_invariant)


def _pipeline(
    engine: Engine,
    decoder: Decoder,
    paths: Iterable[str | Path | Item],
    batch_size: int,
    stages: Stages,
    *,
    fixed: bool,
) -> Iterator[Result]:
    pool = ThreadPoolExecutor(stages.workers, thread_name_prefix="vitfast-decode")
    taken: deque[list[Decoded]] = deque()  # batches whose results are to be given
    again: deque[Decoded] = deque()  # of batches for which memory was short
    ahead, broken = _decoded(pool, decoder, paths, batch_size + stages.workers, stages), False
    most = batch_size
    size = min(batch_size, _FIRST_BATCH) if engine.device.type == "cpu" and not fixed else batch_size

    def limit() -> int:
        return size

    def items() -> Iterator[Decoded]:
        nonlocal broken
        while again:
            yield again.popleft()
        try:
            while item := next(ahead, None):  # `yield from` would end it with this generator
                yield item
        except Exception:
            broken = True
            raise

    def batches_of_images() -> Iterator[list[np.ndarray]]:
        nonlocal size
        for batch in _batches(items(), limit):
            taken.append(batch)
            if images := images_of(batch):
                started = time.perf_counter()
                yield images + images[:1] * (batch_size - len(images)) if fixed else images
                now = time.perf_counter()
                seconds = now - started  # on a GPU only that of handing it over
                if stages.timeline is not None:
                    stages.timeline.add("model", started, now)
                if not fixed:
                    size = max(1, min(most, 2 * size, int(len(images) * BATCH_SECONDS / max(seconds, 1e-9))))

    def outputs() -> Iterator[Any]:
        """Of all batches; one that does not fit into memory comes again in halves, and no later one is larger."""
        nonlocal most, size
        while True:
            try:
                yield from engine.stream(batches_of_images(), preprocessed=True)
                return
            except Exception as error:
                from vitfast.engine.planner import out_of_memory

                images = next(filter(None, map(images_of, taken)), [])
                if broken or fixed or len(images) < 2 or not out_of_memory(error):
                    raise
                most = size = stages.fitting = len(images) // 2
            again.extendleft(item for batch in reversed(taken) for item in reversed(batch))
            taken.clear()

    wait = True
    try:
        for output in outputs():
            while not images_of(taken[0]):
                yield from results_of(taken.popleft(), None)
            yield from results_of(taken.popleft(), output)
        while taken:
            yield from results_of(taken.popleft(), None)
    except KeyboardInterrupt:
        wait = False  # a thread may hang in a file system that does not answer; what is done is to be written now
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


def _decoded(
    pool: ThreadPoolExecutor, decoder: Decoder, paths: Iterable[str | Path | Item], ahead: int, stages: Stages
) -> Iterator[Decoded]:
    """Images or reasons in order, with at most `ahead` images decoded or being decoded.

    Fewer where their sources hold them in memory: together no more than decoding may take.
    """
    waiting: deque[tuple[Future[Decoded], int]] = deque()
    held = 0
    for path in paths:
        item = path if isinstance(path, Item) else file_item(path)
        waiting.append((pool.submit(decoder, item), item.held))
        held += item.held
        while len(waiting) > ahead or (waiting and held > decoder.memory.limit):
            done, size = waiting.popleft()
            held -= size
            with stages.spent("decode"):
                decoded = done.result()
            yield decoded
    while waiting:
        with stages.spent("decode"):
            decoded = waiting.popleft()[0].result()
        yield decoded


def _batches(items: Iterable[Decoded], size: Callable[[], int]) -> Iterator[list[Decoded]]:
    """Runs of items with `size()` images each; the reasons between them ride along, up to as many."""
    batch: list[Decoded] = []
    good = 0
    for item in items:
        batch.append(item)
        good += item.image is not None
        if good >= size() or len(batch) >= 2 * size():
            yield batch
            batch, good = [], 0
    if batch:
        yield batch


def images_of(batch: list[Decoded]) -> list[np.ndarray]:
    """The images of a batch that could be decoded."""
    return [item.image for item in batch if item.image is not None]


def results_of(batch: list[Decoded], output: Any) -> Iterator[Result]:
    """What became of a batch, by the model's output for its images; None where there were none."""
    embeddings = logits = None
    if output is not None:
        embeddings = output.embedding.float().numpy()
        logits = None if output.logits is None else output.logits.float().numpy()
    row = 0
    for item in batch:
        if item.image is not None:
            assert embeddings is not None
            if np.isfinite(embeddings[row]).all():
                item.result.embedding = embeddings[row]
                item.result.logits = None if logits is None else logits[row]
            else:
                item.result.status = "the model's output is not finite (try another dtype)"
            row += 1
        yield item.result


@dataclass
class Classified:
    """The likeliest classes of one image, best first: dicts of "index", "label" and "probability" (0..1; the value
    itself under "value" for a model that regresses). Empty where status is not "ok"."""

    path: str | Path
    status: str
    classes: list[dict[str, Any]]
    note: str = ""


def classify_images(
    engine: Engine, paths: Iterable[str | Path | Item], *, k: int = 5, classes: ZeroShot | None = None, **options: Any
) -> Iterator[Classified]:
    """The k likeliest classes (or all, if there are fewer) of each image, in the order given.

    Probabilities are the softmax over all classes, but of each class by itself (sigmoid) where the model's
    `problem_type` is multi_label_classification, or it has one class only, as transformers' pipeline has it. Labels are
    the engine's; without any, the class index stands for itself. Options and errors are those of `embed_images`.

    Args:
        classes: what `engine.zero_shot(labels)` made of texts, in place of the model's own classifier.

    Raises:
        ValueError: if the model has no classification head and there are no `classes`, or k is below 1.
    """
    if classes is None and not engine.config.num_classes:
        raise ValueError(
            "the model has no classification head: `embed` works with it, and `classify` with --labels if it is a CLIP "
            "or SigLIP with its text tower"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    results = embed_images(engine, paths, **options)
    labels: Sequence[str] | None = engine.labels if classes is None else classes.labels
    problem_type = engine.problem_type if classes is None else classes.problem_type

    import torch

    def logits(result: Result) -> np.ndarray | None:
        if classes is None or result.embedding is None:
            return result.logits
        return classes(torch.from_numpy(result.embedding)[None])[0].cpu().numpy()

    return (Classified(r.path, r.status, top_classes(logits(r), k, labels, problem_type), r.note) for r in results)


def top_classes(
    logits: np.ndarray | None, k: int, labels: Sequence[str] | None, problem_type: str | None
) -> list[dict[str, Any]]:
    """The k likeliest classes by logits [classes], as in `Classified.classes`; none where there are no logits."""
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
