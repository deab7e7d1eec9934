"""The pipeline on a Ray cluster: tasks read and decode, actors hold the model, the caller writes the folder.

    from vitfast.pipeline import ray_data

    ray_data.embed(["s3://bucket/shards/*.tar"], "facebook/dinov2-small", "embeddings", actors=(1, 8), gpus=1)

It is the folder of `vitfast embed`, with its manifest: either goes on where the other stopped. Sources and the model
must be there on every machine (a shared file system, URLs), the folder on the caller's alone. Ray repeats what a worker
that died was doing, and since the caller alone writes, with the folder's lock, no image has two rows. Needs
`pip install 'vitfast[ray]'`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vitfast.images.files import ImageListing, InputError
from vitfast.pipeline.embed import Decoded, Decoder, Result, images_of, results_of
from vitfast.pipeline.folder import Known
from vitfast.pipeline.formats import open_folder
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.memory import LEAST, Memory, default_limit
from vitfast.pipeline.sources import Item, find_sources
from vitfast.pipeline.sources.item import file_item
from vitfast.pipeline.stages import usable_cores
from vitfast.pipeline.writing import Summary, write_rows

if TYPE_CHECKING:
    from vitfast.images.preprocess import Preprocess

FILES_A_TASK = (64, 4096)
"""A task reads at least and at most so many files, and of many files a few thousandths; or one archive or table."""
_TASKS = 4096


@dataclass
class Listing:
    """What a task says of a container beside its images: how many were done before, which of these have changed since,
    what was left out, and why."""

    skipped: int = 0
    changed: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """How actors load the model, what its embeddings must be, and how many images each run has, if always so many."""

    source: str
    load: dict[str, Any]
    exif_orientation: bool
    output_dtype: str
    images: int | None = None

    def made(self) -> tuple[Any, Identity]:
        """The engine, and the identity of its embeddings."""
        from vitfast.engine.load import load

        engine = load(self.source, **self.load)
        return engine, Identity.of(engine, self.exif_orientation, self.output_dtype)


def embed(
    sources: Sequence[str | Path],
    model: str,
    out: str | Path,
    *,
    actors: int | tuple[int, int] = 1,
    gpus: float = 0.0,
    cpus: float = 1.0,
    batch_size: int = 64,
    batch_invariant: bool = False,
    overwrite: bool = False,
    refresh: bool = False,
    content: bool = False,
    format: str | None = None,
    columns: Sequence[str] = (),
    image_column: str | None = None,
    fps: float = 1.0,
    load: dict[str, Any] | None = None,
    exif_orientation: bool = True,
    max_pixels: int | None = None,
    decode_memory: int | None = None,
    output_dtype: str = "float32",
    on_result: Callable[[Result], None] | None = None,
    summary: Summary | None = None,
) -> Summary:
    """Embed images into a folder, on the cluster that `ray.init` has been called for, or else on this machine.

    Images that have an embedding in the folder are left out, by key.

    Args:
        sources, columns, image_column, fps: as of `vitfast.pipeline.sources.find_sources`.
        model: hub id or path, the same on every machine.
        out: the folder. overwrite: replace all that it holds. format: as of `vitfast.pipeline.formats.open_folder`.
        refresh, content: as of `vitfast.pipeline.folder.Folder.remaining`.
        actors: how many hold the model: a number, or the fewest and the most, between which Ray chooses by load.
        gpus, cpus: what an actor takes of the cluster; with GPUs no CPU, so that these decode.
        batch_size: images per run of the model. batch_invariant: as of `embed_images`.
        load: further arguments of `vitfast.load`.
        exif_orientation, max_pixels, decode_memory: as of `embed_images`; the memory is one task's.
        output_dtype, on_result, summary: as of `vitfast.pipeline.parquet.write_parquet`.

    Raises:
        ImportError: without Ray Data; the message says how to get it.
        ValueError: if a number is below 1 or actors are out of order, or the model knows no preprocessing.
        InputError, OutputError: as `write_parquet`.
        ray.exceptions.RayError: what Ray raises of a task that cannot be done.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ImportError(f"this needs Ray Data ({error}): pip install 'vitfast[ray]'") from error
    least, most = (actors, actors) if isinstance(actors, int) else actors
    if not 1 <= least <= most or batch_size < 1:
        raise ValueError(
            f"actors and batch_size must be at least 1, and actors in order, got {actors} and {batch_size}"
        )
    summary = Summary() if summary is None else summary
    find: dict[str, Any] = {"columns": columns, "image_column": image_column, "fps": fps}
    images = find_sources(sources, **find)
    folder = open_folder(out, model, overwrite=overwrite, format=format)
    how = Model(folder.model, load or {}, exif_orientation, output_dtype, batch_size if batch_invariant else None)
    needs = {"num_gpus": gpus, "num_cpus": 0 if gpus else cpus}
    with folder:
        known = folder.known(refresh=refresh, content=content)
        files = [item.path for item in known.left(map(file_item, images.listing.images), folder)]
        summary.skipped, summary.changed = folder.skipped, folder.changed
        preprocess, dimension, identity = ray.get(ray.remote(**needs)(_described).remote(how))
        folder.check(identity)
        tables: Iterable[pa.Table] = ()
        if units := [*_parts(files), *images.containers]:
            reading = {
                "decoding": (preprocess, decode_memory, exif_orientation, max_pixels), "find": find, "rows": batch_size,
                "known": ray.put(known),
            }  # fmt: skip
            data = ray.data.from_items([pickle.dumps(unit) for unit in units], override_num_blocks=len(units))
            data = data.map_batches(_read, batch_size=1, batch_format="pyarrow", fn_kwargs=reading, num_cpus=1)
            data = data.map_batches(
                Embedder,
                batch_size=batch_size,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
                fn_constructor_kwargs={"model": how, "expected": identity},
                **needs,
            )
            tables = data.iter_batches(batch_size=None, batch_format="pyarrow")
        results = _results(tables, images.listing, summary)
        write_rows(results, folder, dimension, identity, on_result=on_result, summary=summary)
    summary.failed |= {path: f"cannot be read: {reason}" for path, reason in images.listing.unreadable.items()}
    return summary


def _described(model: Model) -> tuple[Preprocess, int, Identity]:
    """What the caller needs to know of a model that it does not load."""
    engine, identity = model.made()
    return engine.preprocess, engine.config.embedding_dim, identity


def _parts(files: Sequence[str | Path]) -> Iterator[list[str | Path]]:
    """Files, a task's worth each."""
    least, most = FILES_A_TASK
    size = min(max(len(files) // _TASKS, least), most)
    return ([*files[start : start + size]] for start in range(0, len(files), size))


def _read(
    units: pa.Table, *, decoding: tuple[Any, ...], find: dict[str, Any], rows: int, known: Any
) -> Iterator[pa.Table]:
    """A task: the images of files or of a container, decoded, as tables of at most so many rows.

    Args:
        units: pickled lists of files, or names of containers. decoding: preprocessing, memory, EXIF and pixel limit.
        find: as of `find_sources`. known: a reference to what says which are left to do.
    """
    preprocess, memory, exif_orientation, max_pixels = decoding
    memory = max(default_limit() // usable_cores(), LEAST) if memory is None else memory  # a core has one task
    decoder = Decoder(preprocess, Memory(memory), exif_orientation, max_pixels)
    for unit in units["item"].to_pylist():
        listing, batch = Listing(), list[Decoded]()
        for item in _items(pickle.loads(unit), find, known, listing):
            batch.append(decoder(item))
            if len(batch) == rows:
                yield _table(batch)
                batch = []
        yield _table(batch, listing)


def _fetched(known: Any) -> Known:
    import ray

    return ray.get(known)


def _items(unit: list[str | Path] | str, find: dict[str, Any], known: Any, listing: Listing) -> Iterator[Item]:
    if isinstance(unit, list):
        yield from map(file_item, unit)
        return
    try:
        images = find_sources([unit], **find)
    except InputError as error:  # it is not there on this machine
        listing.unreadable[unit] = str(error)
        return
    yield from _fetched(known).left(images, listing)
    listing.left_out, listing.unreadable = images.listing.left_out, images.listing.unreadable


def _table(batch: Sequence[Decoded], listing: Listing | None = None) -> pa.Table:
    messages = [pickle.dumps(message) for message in (*(one.result for one in batch), *([listing] if listing else []))]
    pixels = [None if one.image is None else one.image.tobytes() for one in batch] + [None] * (listing is not None)
    return pa.table({"message": pa.array(messages, pa.large_binary()), "pixels": pa.array(pixels, pa.large_binary())})


class Embedder:
    """An actor: it has the model, and gives each image its embedding.

    Args:
        model: what it loads. expected: what the embeddings of all actors must be.

    Raises:
        InputError: if its embeddings are others: another version of vitfast or of the model's files on its machine.
    """

    def __init__(self, model: Model, expected: Identity) -> None:
        self.engine, identity = model.made()
        if differences := identity.differences(expected):
            raise InputError(f"a worker does not make the embeddings of the others: {'; '.join(differences)}")
        self.images = model.images

    def __call__(self, table: pa.Table) -> pa.Table:
        """Messages and pixels as `_read` gives them; messages with embeddings."""
        messages = [pickle.loads(message) for message in table["message"].to_pylist()]
        shape = (*self.engine.preprocess.size, 3)
        batch = [
            Decoded(message, None if pixels is None else np.frombuffer(pixels, np.uint8).reshape(shape))
            for message, pixels in zip(messages, table["pixels"].to_pylist(), strict=True)
            if isinstance(message, Result)
        ]
        images = images_of(batch)
        if images and self.images is not None:
            images += images[:1] * (self.images - len(images))
        output = next(iter(self.engine.stream([images], preprocessed=True))) if images else None
        results = [replace(result, logits=None) for result in results_of(batch, output)]
        listings = [message for message in messages if isinstance(message, Listing)]
        return pa.table({"message": pa.array(map(pickle.dumps, (*results, *listings)), pa.large_binary())})


def _results(tables: Iterable[pa.Table], listing: ImageListing, summary: Summary) -> Iterator[Result]:
    """The results in the messages of actors; what tasks say besides goes into listing and summary."""
    for table in tables:
        for message in map(pickle.loads, table["message"].to_pylist()):
            if isinstance(message, Listing):
                summary.skipped += message.skipped
                summary.changed += message.changed
                listing.left_out |= message.left_out
                listing.unreadable |= message.unreadable
            else:
                yield message
