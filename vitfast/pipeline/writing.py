"""From results to rows: written as they come, and kept whatever ends the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from vitfast.images.files import path_text
from vitfast.pipeline.embed import OK, Result
from vitfast.pipeline.folder import Folder
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.stages import Stages

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

PART_SECONDS = 5.0
"""Rows are written when they are this old: what a killed run can lose, with the batches under way (see
`vitfast.pipeline.embed.BATCH_SECONDS`)."""

FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass
class Summary:
    """What a run did. `failed` maps path to reason, `notes` path to what was done to an unusual picture; `skipped` were
    done before, and `changed` of them have changed since; `repaired` doubled rows were taken out; seconds is wall-clock
    time from the first image to the last row; parts are the files written, or the dataset."""

    done: int = 0
    skipped: int = 0
    changed: list[str] = field(default_factory=list)
    repaired: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def write_parquet(
    results: Iterable[Result],
    folder: Folder,
    engine: Engine,
    *,
    exif_orientation: bool = True,
    output_dtype: str = "float32",
    on_result: Callable[[Result], None] | None = None,
    summary: Summary | None = None,
    stages: Stages | None = None,
) -> Summary:
    """Write results as they come; what was done is kept even if the iteration breaks off.

    Every PART_SECONDS what has come since is written, at the latest.

    Args:
        results: from `embed_images`.
        folder: where to, of any format; locked meanwhile.
        engine: the model, for the width of the embedding and the identity noted with the rows.
        exif_orientation: as given to `embed_images`.
        output_dtype: of the vectors as they are written, "float32" or "float16".
        on_result: called after each result, for a progress bar.
        summary: filled in as the run goes, so that it can be read after an interruption.
        stages: as given to `embed_images`; the time of writing is added to it.

    Raises:
        InputError: if another process writes the folder, or its rows were made with other weights, preprocessing,
            dtype or version.
        OutputError: if rows cannot be written, the disk being full for example; earlier rows are kept.
        ValueError: if the engine knows no preprocessing, or output_dtype is another.
    """
    identity = Identity.of(engine, exif_orientation, output_dtype)
    return write_rows(
        results, folder, engine.config.embedding_dim, identity, on_result=on_result, summary=summary, stages=stages
    )


def write_rows(
    results: Iterable[Result],
    folder: Folder,
    dimension: int,
    identity: Identity,
    *,
    on_result: Callable[[Result], None] | None = None,
    summary: Summary | None = None,
    stages: Stages | None = None,
) -> Summary:
    """As `write_parquet`, where the model is in another process: of it there are the width of its embeddings and its
    identity.
    """
    summary = Summary() if summary is None else summary
    stages = Stages() if stages is None else stages
    rows: dict[str, Result] = {}
    started = written = time.perf_counter()

    def flush() -> None:
        nonlocal written
        if rows:
            with stages.spent("write"):
                name = folder.add(list(rows.values()), dimension, identity)
            if name not in summary.parts:
                summary.parts.append(name)
            rows.clear()
        written = time.perf_counter()

    with folder:
        folder.check(identity)
        summary.repaired = folder.repaired
        try:
            for result in results:
                text = path_text(result.path)
                if identity.output_dtype == "float16":
                    _refuse_overflow(result)
                rows[text] = replace(result, logits=None)
                if result.status == OK:
                    summary.done += 1
                else:
                    summary.failed[text] = result.status
                if result.note:
                    summary.notes[text] = result.note
                if on_result is not None:
                    on_result(result)
                if len(rows) >= folder.room or time.perf_counter() - written >= PART_SECONDS:
                    flush()
        finally:
            try:
                flush()
                folder.note(identity)
            except KeyboardInterrupt:  # it came in the last moment
                flush()
                folder.note(identity)
                raise
            summary.seconds = time.perf_counter() - started
            summary.images_per_second = (summary.done + len(summary.failed)) / max(summary.seconds, 1e-9)
    return summary


def _refuse_overflow(result: Result) -> None:
    """A vector that float16 cannot hold is none."""
    if result.embedding is not None and (largest := float(np.abs(result.embedding).max())) > FLOAT16_MAX:
        result.status = f"the embedding does not fit float16: it has {largest:.4g}, allowed is {FLOAT16_MAX:.0f}"
        result.embedding = None
