"""The bulk pipeline: find images, decode them ahead of the model, run it, write Parquet.

    paths = collect(["photos/"])
    folder = EmbeddingFolder("embeddings", model="facebook/dinov2-small")
    engine = vitfast.load("facebook/dinov2-small")
    summary = write_parquet(embed_images(engine, folder.remaining(paths)), folder, engine)

The folder is a Parquet data set: read it with `pyarrow.parquet.read_table("embeddings")`, pandas,
DuckDB or Ray Data. It has one row per image: `path` (absolute), `embedding` (fixed-size list of
float32, null for a bad image) and `status` ("ok", or why not). It is written in parts, each of which
appears complete or not at all; the same call on the same folder goes on where the last one stopped.
"""

from __future__ import annotations

import glob
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitfast.images import FORMATS, Preprocess, open_image, resize_and_crop

if TYPE_CHECKING:
    from vitfast.engine import Engine

OK = "ok"
PART_ROWS, PART_SECONDS = 4096, 60.0
"""A part is written when it has this many rows, or is this old: what a killed run can lose."""

_ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
_MODEL, _PREPROCESS = b"vitfast.model", b"vitfast.preprocess"


class InputError(ValueError):
    """Sources or an output folder that cannot be used; the message names them and says why."""


@dataclass
class Result:
    """What became of one image: status "ok" with an embedding (and logits if the model has a head),
    or the reason why not. Arrays are float32 [E] and [classes]."""

    path: Path
    status: str
    embedding: np.ndarray | None = None
    logits: np.ndarray | None = None


@dataclass
class Summary:
    """What a run did. `failed` maps path to reason; `skipped` were done before; seconds is wall-clock
    time from the first image to the last part; parts are the files written."""

    done: int = 0
    skipped: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def path_text(path: str | Path) -> str:
    """A path as text that any file or terminal takes: bytes that are not UTF-8 are written as backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def collect(sources: Sequence[str | Path]) -> list[Path]:
    """The image files that sources name, as absolute paths, sorted, each once.

    A file is taken whatever its name. A folder is searched with its subfolders (symbolic links to
    folders are not followed) for the endings of `vitfast.images.FORMATS`; names that begin with a
    dot are left out. Anything else is a glob pattern (** for any depth) and must match files.

    Raises:
        InputError: if a source does not exist or holds no images, or a folder cannot be read.
    """
    found: set[str] = set()
    for source in (os.fspath(source) for source in sources):
        if os.path.isdir(source):
            files = list(_images_below(source))
            if not files:
                raise InputError(f"no images in folder {path_text(source)!r} (looked for {', '.join(_ENDINGS)})")
        elif os.path.exists(source):
            files = [source]
        elif glob.has_magic(source):
            files = [path for path in glob.iglob(source, recursive=True) if not os.path.isdir(path)]
            if not files:
                raise InputError(f"no files match the pattern {path_text(source)!r}")
        else:
            raise InputError(f"no such file or folder: {path_text(source)!r}")
        found.update(map(os.path.abspath, files))
    return [Path(path) for path in sorted(found)]


def _images_below(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read folder {path_text(error.filename)!r}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, n) for n in files if n.lower().endswith(_ENDINGS) and not n.startswith("."))


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
        exif_orientation: see `vitfast.images.open_image`.

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


class EmbeddingFolder:
    """A folder of Parquet parts with the embeddings of one model. Opening it needs no model.

    Args:
        folder: created if missing.
        model: hub id or path of the model; a path is made absolute, so that it means the same everywhere.

    Attributes:
        done: paths, as text, that have an embedding already.

    Raises:
        InputError: if the folder cannot be created or written, holds a part that cannot be read, or
            holds embeddings of another model.
    """

    def __init__(self, folder: str | Path, model: str | Path) -> None:
        self.path = Path(folder)
        self.model = os.path.abspath(model) if os.path.exists(model) else os.fspath(model)
        self.done: set[str] = set()
        self._failed: dict[Path, set[str]] = {}
        self._preprocess: dict[Path, str] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"output folder {path_text(folder)!r} cannot be written: {reason}") from error
        for part in sorted(self.path.glob("part-*.parquet")):
            self._read(part)

    def _read(self, part: Path) -> None:
        try:
            table = pq.read_table(part, columns=["path", "status"])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path_text(part)!r} is not a readable part of an embedding folder: {error}") from error
        metadata = table.schema.metadata or {}
        model = metadata.get(_MODEL, b"").decode()
        if model != self.model:
            raise InputError(
                f"output folder {path_text(self.path)!r} holds embeddings of {model or 'an unknown model'!r}, "
                f"not of {self.model!r}: choose another folder"
            )
        self._preprocess[part] = metadata.get(_PREPROCESS, b"").decode()
        ok = pc.equal(table["status"], OK)
        self.done.update(table["path"].filter(ok).to_pylist())
        if failed := set(table["path"].filter(pc.invert(ok)).to_pylist()):
            self._failed[part] = failed

    def remaining(self, paths: Iterable[Path]) -> list[Path]:
        """The paths that have no embedding yet; images that failed before are tried again."""
        return [path for path in paths if path_text(path) not in self.done]

    def check_preprocess(self, preprocess: str) -> None:
        """Raise InputError if the folder's embeddings were made with other preprocessing."""
        for part, other in self._preprocess.items():
            if other != preprocess:
                raise InputError(f"{path_text(part)!r} was made with preprocessing {other}, not {preprocess}")

    def write_part(self, results: Sequence[Result], dimension: int, preprocess: str) -> Path:
        """Write one part: under a hidden name first, then renamed, so that it appears complete."""
        schema = pa.schema(
            [("path", pa.string()), ("embedding", pa.list_(pa.float32(), dimension)), ("status", pa.string())],
            metadata={_MODEL: self.model, _PREPROCESS: preprocess},
        )
        good = np.array([r.embedding is not None for r in results])
        rows = np.zeros((len(results), dimension), np.float32)
        for row, result in zip(rows, results, strict=True):
            if result.embedding is not None:
                row[:] = result.embedding
        embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), dimension, mask=pa.array(~good))
        texts = [path_text(r.path) for r in results]
        table = pa.table([pa.array(texts), embeddings, pa.array([r.status for r in results])], schema=schema)
        part = self.path / f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
        _write_whole(table, part)
        self.done.update(text for text, ok in zip(texts, good, strict=True) if ok)
        return part

    def drop_retried(self, retried: set[str]) -> None:
        """Take rows of earlier failures out of old parts, for paths that have a newer row."""
        for part, failed in self._failed.items():
            if gone := {path for path in failed if path in retried or path in self.done}:
                table = pq.read_table(part)
                stale = pc.and_(pc.is_in(table["path"], pa.array(sorted(gone))), pc.not_equal(table["status"], OK))
                kept = table.filter(pc.invert(stale))
                if kept.num_rows:
                    _write_whole(kept, part)
                else:
                    part.unlink()


def _write_whole(table: pa.Table, part: Path) -> None:
    hidden = part.with_name(f".{part.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        pq.write_table(table, hidden)
        os.replace(hidden, part)
    finally:
        hidden.unlink(missing_ok=True)


def write_parquet(
    results: Iterable[Result],
    folder: EmbeddingFolder,
    engine: Engine,
    *,
    exif_orientation: bool = True,
    on_result: Callable[[Result], None] | None = None,
    summary: Summary | None = None,
) -> Summary:
    """Write results as they come; what was done is kept even if the iteration breaks off.

    Args:
        results: from `embed_images`.
        folder: where to.
        engine: the model, for the width of the embedding and the preprocessing noted in the parts.
        exif_orientation: as given to `embed_images`.
        on_result: called after each result, for a progress bar.
        summary: filled in as the run goes, so that it can be read after an interruption.

    Raises:
        InputError: if the folder's older parts were made with other preprocessing.
    """
    summary = Summary() if summary is None else summary
    dimension = engine.config.projection_dim or engine.config.width
    described = json.dumps({**asdict(engine.preprocess), "exif_orientation": exif_orientation}, sort_keys=True)
    folder.check_preprocess(described)
    started = part_started = time.perf_counter()
    rows: list[Result] = []
    written: set[str] = set()

    def flush() -> None:
        nonlocal rows, part_started
        if rows:
            summary.parts.append(path_text(folder.write_part(rows, dimension, described)))
            written.update(path_text(row.path) for row in rows)
        rows, part_started = [], time.perf_counter()

    try:
        for result in results:
            rows.append(Result(result.path, result.status, result.embedding))
            if result.status == OK:
                summary.done += 1
            else:
                summary.failed[path_text(result.path)] = result.status
            if on_result is not None:
                on_result(result)
            if len(rows) >= PART_ROWS or time.perf_counter() - part_started >= PART_SECONDS:
                flush()
    finally:
        flush()
        folder.drop_retried(written)
        summary.seconds = time.perf_counter() - started
        summary.images_per_second = (summary.done + len(summary.failed)) / max(summary.seconds, 1e-9)
    return summary


@dataclass
class Classified:
    """The likeliest classes of one image, best first: dicts of "index", "label" and "probability"
    (softmax over all classes, 0..1). Empty where status is not "ok"."""

    path: Path
    status: str
    classes: list[dict[str, Any]]


def classify_images(
    engine: Engine, paths: Iterable[str | Path], *, k: int = 5, batch_size: int = 64, workers: int | None = None
) -> Iterator[Classified]:
    """The k likeliest classes (or all, if there are fewer) of each image, in the order given.

    Labels are the engine's; without any, the class index stands for itself. Arguments and errors
    are those of `embed_images`.

    Raises:
        ValueError: if the model has no classification head, or k is below 1.
    """
    if not engine.config.num_classes:
        raise ValueError("the model has no classification head; `embed` works with it, `classify` does not")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    results = embed_images(engine, paths, batch_size=batch_size, workers=workers)
    return (Classified(r.path, r.status, _top_classes(r.logits, k, engine.labels)) for r in results)


def _top_classes(logits: np.ndarray | None, k: int, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    if logits is None:
        return []
    weights = np.exp(logits.astype(np.float64) - logits.max())
    best = np.argsort(-weights, kind="stable")[:k]
    return [
        {"index": int(i), "label": labels[i] if labels else str(i), "probability": float(weights[i] / weights.sum())}
        for i in best
    ]
