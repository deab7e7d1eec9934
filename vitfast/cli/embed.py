"""`vitfast embed` and `vitfast classify`: images in, a folder of vectors or the likeliest classes out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfast.cli import render
from vitfast.cli.answer import Unfailing, command
from vitfast.cli.options import (
    AllowPickle,
    Arch,
    BatchSize,
    Columns,
    Crop,
    DecodeMemory,
    Device,
    Devices,
    Draft,
    DtypeOption,
    Fps,
    ImageColumn,
    Json,
    MaxPixels,
    Mean,
    Model,
    OutputDtype,
    OutputDtypeName,
    Size,
    Sources,
    Std,
    WeightsKey,
    Workers,
    decode_options,
    load_engine,
    load_options,
    prepared,
)
from vitfast.cli.signals import exit_code

if TYPE_CHECKING:
    from vitfast.pipeline.sources import Item

NAMES_IN_JSON = 1000


class FormatName(str, Enum):
    """What --format takes."""

    parquet = "parquet"
    lance = "lance"


app = typer.Typer(rich_markup_mode="markdown")


@app.command(epilog="Example: `vitfast embed photos/ -m facebook/dinov2-small -o embeddings/`")
def embed(
    context: typer.Context,
    sources: Sources,
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the embeddings.")],
    batch_size: BatchSize = 64,
    device: Device = None,
    devices: Devices = None,
    dtype: DtypeOption = None,
    output_dtype: OutputDtype = OutputDtypeName.float32,
    format_: Annotated[
        FormatName | None,
        typer.Option("--format", help="What rows are stored as. [default: as OUT has them; parquet for a new one]"),
    ] = None,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant", help="Fill up every batch: no image's vector depends on how many others there are."
        ),
    ] = False,
    allow_pickle: AllowPickle = False,
    weights_key: WeightsKey = None,
    arch: Arch = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    crop: Crop = None,
    draft: Draft = False,
    workers: Workers = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Embed again what has another size or time than when it was embedded.")
    ] = False,
    checksum: Annotated[
        bool, typer.Option("--checksum", help="With --refresh: compare contents instead of size and time.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace all that the folder holds.")] = False,
    max_pixels: MaxPixels = None,
    decode_memory: DecodeMemory = None,
    columns: Columns = None,
    image_column: ImageColumn = None,
    fps: Fps = 1.0,
    profile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a page that shows how busy each stage was over time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Embed images into a folder of Parquet files, or a Lance dataset.

    SRC may also be a tar or zip archive, a WebDataset shard, a list of paths or URLs (.txt, .csv, .tsv), a Parquet or
    Arrow file, a video or a URL. One row per image: path, embedding, status and more. The same command again goes on
    where it stopped; bad images are noted in the status column and tried again.
    """
    with command(context, as_json) as answer:
        from vitfast.pipeline.devices import DeviceError, DeviceProcesses, Job, device_names
        from vitfast.pipeline.embed import embed_images
        from vitfast.pipeline.formats import open_folder
        from vitfast.pipeline.identity import Identity
        from vitfast.pipeline.parts import OWN_COLUMNS
        from vitfast.pipeline.sources import find_sources
        from vitfast.pipeline.stages import Stages
        from vitfast.pipeline.timeline import Timeline
        from vitfast.pipeline.writing import Summary, write_rows

        if checksum and not refresh:
            raise ValueError("--checksum goes with --refresh")
        if devices is not None and (device is not None or profile is not None):
            raise ValueError("--devices goes without --device and --profile")
        names = device_names(devices) if devices is not None else []
        carried = columns.split(",") if columns else []
        if own := set(carried) & set(OWN_COLUMNS):
            raise ValueError(f"--columns: {', '.join(sorted(own))} is a column of the folder itself")
        find: dict[str, Any] = {"columns": carried, "image_column": image_column, "fps": fps}
        images = find_sources(sources, **find)
        listing = images.listing
        summary, stages = Summary(), Stages(timeline=None if profile is None else Timeline())
        stopped, lost = None, ""
        kind = None if format_ is None else format_.value
        folder, run = open_folder(out, model, overwrite=overwrite, format=kind), contextlib.ExitStack()
        loading = (device, dtype, allow_pickle, weights_key, arch, prepared(mean, std, size, crop, draft))
        embedding = {
            "batch_size": batch_size, "workers": workers, "batch_invariant": batch_invariant,
            **decode_options(max_pixels, decode_memory),
        }  # fmt: skip
        written = output_dtype.value
        with folder if folder.path.exists() else contextlib.nullcontext(), run:  # made when there is something to write
            todo: Iterable[Item] = folder.todo(images, refresh=refresh, content=checksum)
            total = None
            if images.count is not None and not (names and checksum):  # the processes read contents themselves
                todo = list(todo)
                total = len(todo)
            if names:
                options = load_options(*loading)
                del options["device"]
                job = Job(sources, model, out, overwrite, refresh, checksum, find, options, embedding, written, kind)
                processes = run.enter_context(DeviceProcesses(names, job))
                results, dimension, identity = processes.results(), processes.dimension, processes.identity
            else:
                engine = load_engine(model, *loading)
                results = embed_images(engine, todo, stages=stages, **embedding)
                dimension, identity = engine.config.embedding_dim, Identity.of(engine, output_dtype=written)
            with _progress("embedding", total, stages.advice) as advance:

                def on_result(_: Any) -> None:
                    advance()
                    answer.stopping.check()

                noted: dict[str, Any] = {"on_result": on_result, "summary": summary, "stages": stages}
                try:
                    write_rows(results, folder, dimension, identity, **noted)
                except KeyboardInterrupt as error:
                    stopped = error
                except DeviceError as error:
                    lost = str(error)
            if names:
                processes.note(listing, stages)
                if total is None:
                    folder.skipped, folder.changed = processes.skipped, processes.changed
        if stages.timeline is not None and profile is not None:
            threads = dict.fromkeys(("read", "decode", "resize"), stages.workers)
            remark = f"{summary.done} images, {summary.images_per_second:.1f} img/s; {stages.advice()}"
            Path(profile).write_text(stages.timeline.page(threads, remark), encoding="utf-8")
        summary.skipped, summary.changed = folder.skipped, folder.changed
        summary.failed |= {path: f"cannot be read: {reason}" for path, reason in listing.unreadable.items()}
        answer.code = exit_code(stopped) if stopped else 1 if summary.failed or lost else 0
        answer.json = {
            "model": folder.model,
            "output": str(folder.path),
            "done": summary.done,
            "failed": [{"path": path, "reason": reason} for path, reason in summary.failed.items()],
            "notes": [{"path": path, "note": note} for path, note in summary.notes.items()],
            "skipped": summary.skipped,
            "skipped_changed": summary.changed,
            "left_out": {
                "count": len(listing.left_out),
                "files": [{"path": p, "reason": r} for p, r in list(listing.left_out.items())[:NAMES_IN_JSON]],
            },
            "repaired": summary.repaired,
            "seconds": round(summary.seconds, 3),
            "images_per_second": round(summary.images_per_second, 2),
            "stage_seconds": {name: round(getattr(stages, name), 3) for name in ("decode", "model", "write")},
            "bound": stages.bound if stages.total else None,
            "parts": summary.parts,
            "interrupted": stopped is not None,
            "lost": lost or None,
        }
        answer.text = render.embedding(summary, stages, listing, out, stopped is not None)
        answer.remarks = [lost] if lost else []


@app.command(
    epilog="Example: `vitfast classify cat.jpg dog.jpg -m google/vit-base-patch16-224 --topk 3`, "
    '`vitfast classify cat.jpg -m openai/clip-vit-base-patch16 --labels "a cat,a dog"`'
)
def classify(
    context: typer.Context,
    sources: Sources,
    model: Model,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Classes to print for each image.")] = 5,
    labels: Annotated[
        str | None,
        typer.Option(metavar="TEXT,TEXT", help="Classes in words, for a CLIP or SigLIP with its text tower."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="With --labels: a text with {} for the label; may be repeated. [default: a photo of {}.]"),
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: DtypeOption = None,
    allow_pickle: AllowPickle = False,
    weights_key: WeightsKey = None,
    arch: Arch = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    crop: Crop = None,
    draft: Draft = False,
    workers: Workers = None,
    max_pixels: MaxPixels = None,
    decode_memory: DecodeMemory = None,
    image_column: ImageColumn = None,
    fps: Fps = 1.0,
    as_json: Json = False,
) -> None:
    """Print the likeliest classes of each image."""
    with command(context, as_json) as answer:
        from vitfast.images.files import path_text
        from vitfast.pipeline.embed import classify_images
        from vitfast.pipeline.sources import find_sources

        images = find_sources(sources, image_column=image_column, fps=fps)
        listing = images.listing
        engine = load_engine(
            model, device, dtype, allow_pickle, weights_key, arch, prepared(mean, std, size, crop, draft)
        )
        options = decode_options(max_pixels, decode_memory)
        if template and labels is None:
            raise ValueError("--template goes with --labels")
        named = [label.strip() for label in (labels or "").split(",") if label.strip()]
        if labels is not None:
            options["classes"] = engine.zero_shot(named, **({"templates": template} if template else {}))
        rows, stopped = [], None
        with _progress("classifying", images.count) as advance:
            try:
                for row in classify_images(engine, images, k=topk, batch_size=batch_size, workers=workers, **options):
                    rows.append(row)
                    advance()
                    answer.stopping.check()
            except KeyboardInterrupt as error:
                stopped = error
        failed = listing.unreadable or any(row.status != "ok" for row in rows)
        answer.code = exit_code(stopped) if stopped else int(bool(failed))
        answer.json = [{"path": path_text(r.path), "status": r.status, "classes": r.classes} for r in rows]
        answer.text = [line for row in rows for line in render.classes(row)]
        answer.remarks = render.remarks({path_text(r.path): r.note for r in rows if r.note}, listing)
        if stopped:
            of = f" of {images.count}" if images.count else ""
            answer.remarks.append(f"interrupted after {len(rows)}{of} images")


@contextlib.contextmanager
def _progress(what: str, total: int | None, remark: Callable[[], str] = lambda: "") -> Iterator[Callable[[], None]]:
    """A progress bar with img/s and the time left on stderr, where that is a terminal. Gives what advances it.

    Args:
        total: how many images there are, None where that is not known before they are read.
        remark: what stands at the end of the line, asked each time that it is drawn.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Any:
            from rich.text import Text

            return Text(f"{task.completed / task.elapsed if task.elapsed else 0:.1f} img/s")

    class Remark(ProgressColumn):
        def render(self, task: Any) -> Any:
            from rich.text import Text

            return Text(remark(), no_wrap=True, overflow="ellipsis")

    terminal: Any = Unfailing(sys.__stderr__)
    console = Console(file=terminal)
    numbers = (kind(table_column=Column(no_wrap=True)) for kind in (MofNCompleteColumn, Speed, TimeRemainingColumn))
    columns = (TextColumn(what), BarColumn(), *numbers, Remark())  # which alone is cut short on a narrow terminal
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
