"""The `vitfast` command: arguments in, one answer out. The work is done elsewhere, imported on use.

Exit codes: 0 all went well; 1 some images failed, outputs differ, or the operation failed; 2 arguments or inputs that
cannot be used; 128 and the signal's number (130, 143, 129) after SIGINT, SIGTERM or SIGHUP. With --json, stdout holds
exactly one JSON document, an error being {"error": ...}; everything else goes to stderr.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfast.cli import bench, bench_serve, models, render, search, serve
from vitfast.cli.answer import Unfailing, command, run
from vitfast.cli.options import (
    AllowPickle,
    Arch,
    BackendName,
    BatchSize,
    Columns,
    Crop,
    DecodeMemory,
    Device,
    DtypeOption,
    Fps,
    ImageColumn,
    Json,
    MaxPixels,
    Mean,
    Model,
    Size,
    Sources,
    Std,
    WeightsKey,
    Workers,
    decode_options,
    dtype_name,
    load_engine,
    prepared,
)
from vitfast.cli.signals import exit_code
from vitfast.version import __version__

if TYPE_CHECKING:
    from vitfast.pipeline.sources import Item

NAMES_IN_JSON = 1000


class App(typer.Typer):
    """A Typer app that ends without a traceback where nothing can be written."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command that the arguments name."""
        return run(lambda: super(App, self).__call__(*args, **kwargs))


app = App(
    help="Vision Transformer inference on fused kernels.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
bench.app.add_typer(bench_serve.app)
app.add_typer(bench.app, name="bench")
app.add_typer(search.app)
app.add_typer(models.app)
app.add_typer(serve.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitfast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Vision Transformer inference on fused kernels."""
    context.obj = debug


@app.command(epilog="Example: `vitfast embed photos/ -m facebook/dinov2-small -o embeddings/`")
def embed(
    context: typer.Context,
    sources: Sources,
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the Parquet parts.")],
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
    """Embed images into a folder of Parquet files.

    SRC may also be a tar or zip archive, a WebDataset shard, a list of paths or URLs (.txt, .csv, .tsv), a Parquet or
    Arrow file, a video or a URL. One row per image: path, embedding, status and more. The same command again goes on
    where it stopped; bad images are noted in the status column and tried again.
    """
    with command(context, as_json) as answer:
        from vitfast.pipeline.embed import embed_images
        from vitfast.pipeline.parquet import EmbeddingFolder, Summary, write_parquet
        from vitfast.pipeline.parts import OWN_COLUMNS
        from vitfast.pipeline.sources import find_sources
        from vitfast.pipeline.stages import Stages
        from vitfast.pipeline.timeline import Timeline

        if checksum and not refresh:
            raise ValueError("--checksum goes with --refresh")
        carried = columns.split(",") if columns else []
        if own := set(carried) & set(OWN_COLUMNS):
            raise ValueError(f"--columns: {', '.join(sorted(own))} is a column of the folder itself")
        images = find_sources(sources, columns=carried, image_column=image_column, fps=fps)
        listing = images.listing
        summary, stages, stopped = Summary(), Stages(timeline=None if profile is None else Timeline()), None
        folder = EmbeddingFolder(out, model, overwrite=overwrite)
        with folder if folder.path.exists() else contextlib.nullcontext():  # made when there is something to write
            todo: Iterable[Item] = folder.todo(images, refresh=refresh, content=checksum)
            total = None
            if images.count is not None:
                todo = list(todo)
                total = len(todo)
            engine = load_engine(model, device, dtype, allow_pickle, weights_key, arch, prepared(mean, std, size, crop))
            with _progress("embedding", total) as advance:

                def on_result(_: Any) -> None:
                    advance()
                    answer.stopping.check()

                options = decode_options(max_pixels, decode_memory)
                results = embed_images(engine, todo, batch_size=batch_size, workers=workers, stages=stages, **options)
                try:
                    write_parquet(results, folder, engine, on_result=on_result, summary=summary, stages=stages)
                except KeyboardInterrupt as error:
                    stopped = error
        if stages.timeline is not None and profile is not None:
            threads = dict.fromkeys(("read", "decode", "resize"), stages.workers)
            remark = f"{summary.done} images, {summary.images_per_second:.1f} img/s; {stages.advice()}"
            Path(profile).write_text(stages.timeline.page(threads, remark), encoding="utf-8")
        summary.skipped, summary.changed = folder.skipped, folder.changed
        summary.failed |= {path: f"cannot be read: {reason}" for path, reason in listing.unreadable.items()}
        answer.code = exit_code(stopped) if stopped else 1 if summary.failed else 0
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
        }
        answer.text = render.embedding(summary, stages, listing, out, stopped is not None)


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
        engine = load_engine(model, device, dtype, allow_pickle, weights_key, arch, prepared(mean, std, size, crop))
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


@app.command(epilog="Example: `vitfast doctor --json`")
def doctor(
    context: typer.Context,
    plan: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Show which backend runs each part of this model, and why.")
    ] = None,
    device: Device = None,
    dtype: DtypeOption = None,
    allow_pickle: AllowPickle = False,
    weights_key: WeightsKey = None,
    as_json: Json = False,
) -> None:
    """Show what would run here, and every reason why not."""
    with command(context, as_json) as answer:
        from vitfast.diagnostics import doctor as module

        if plan is not None:
            options: dict[str, Any] = {"allow_pickle": allow_pickle, "weights_key": weights_key}
            answer.json = module.plan(plan, device=device, dtype=dtype, **options)
            answer.text = module.render_plan(answer.json)
            return
        if device or dtype or allow_pickle or weights_key:
            raise ValueError("--device, --dtype, --allow-pickle and --weights-key go with --plan MODEL")
        answer.json = module.report()
        answer.text = module.render(answer.json)


@app.command(
    epilog="Example: `vitfast inspect --arch sm_90 --kernel linear`, `vitfast inspect -m vit_base_patch16_224`"
)
def inspect(
    context: typer.Context,
    arch: Annotated[
        list[str] | None, typer.Option(help="Architecture to compile for, e.g. sm_90; may be repeated.")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Kernel to compile, e.g. linear; may be repeated. [default: all]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Predict this model's forward instead of compiling.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="With --model: images.")] = 256,
    chip: Annotated[str, typer.Option(help="With --model: a100, l40s, h100, h200 or b200.")] = "h100",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", parser=dtype_name, metavar="[fp32|fp16|bf16|fp8|int8]", help="With --model: what to compute in."
        ),
    ] = "bf16",
    native: Annotated[
        bool,
        typer.Option(
            help="The CUDA linear and attention for Hopper, compiled by nvcc (from a checkout); with --model: "
            "predict with that linear."
        ),
    ] = False,
    backward: Annotated[
        bool, typer.Option(help="With --model: predict the gradients of its attention instead of its forward.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Report registers, spills and shared memory of the compiled kernels; or predict a model's time. Needs no GPU.

    A prediction stands beside what result files of that GPU say, where there are any.
    """
    with command(context, as_json) as answer:
        if native:
            from vitfast.diagnostics import native_attention, native_code

            if arch or kernel or backward:
                raise ValueError("--native has kernels for sm_90: it goes without --arch, --kernel and --backward")
            rows = native_code.inspect_linear()
            if model is None:
                scores = native_attention.inspect_attention()
                answer.json = [*rows, *scores]
                answer.text = [native_code.render(rows), "", native_attention.render(scores)]
                return
        if backward and model is None:
            raise ValueError("--backward goes with --model")
        if model is None:
            from vitfast.diagnostics import compiled as compiled

            options: dict[str, Any] = {"archs": arch} if arch else {}
            answer.json = compiled.inspect(**options, kernels=kernel or None)
            answer.text = compiled.render(answer.json)
            return
        if arch or kernel:
            raise ValueError("--arch and --kernel compile kernels, --model predicts: give one or the other")
        from vitfast.diagnostics import predict
        from vitfast.models.config import NAMED
        from vitfast.ops.names import did_you_mean

        if model not in NAMED:
            near = did_you_mean(model, NAMED)
            raise ValueError(f"--model must be one of {', '.join(NAMED)}, got {model!r}{near}")
        from vitfast.benchmarks import predicted, published_figures

        answer.json = predict.predict(NAMED[model], batch=batch, chip=chip, dtype=dtype, backward=backward)
        predict.add_machine_code(answer.json)
        if native:
            native_code.add_native(answer.json, rows)
        if not backward:
            published_figures.add_errors(answer.json)
            predicted.add_measured(answer.json, NAMED[model], predicted.results_of(chip))
        answer.text = predict.render(answer.json)


@app.command(epilog="Example: `vitfast verify facebook/dinov2-small --dtype bf16 --images photos/`")
def verify(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, model directory or .safetensors file.")],
    against: Annotated[
        str, typer.Option(help="`torch`: plain PyTorch ops in fp32; or another model that should give the same.")
    ] = "torch",
    images: Annotated[
        list[str] | None,
        typer.Option(help="Image file, folder or quoted glob pattern; may be repeated. [default: random images]"),
    ] = None,
    device: Device = None,
    dtype: DtypeOption = None,
    allow_pickle: AllowPickle = False,
    weights_key: WeightsKey = None,
    backend: Annotated[BackendName, typer.Option(help="What runs MODEL.")] = BackendName.auto,
    as_json: Json = False,
) -> None:
    """Check that a model's outputs are those of plain PyTorch.

    In all but fp32 they may be at most twice as far from fp32 as PyTorch's own in that dtype. Exit code
    0: the same; 1: different; 2: the model or the images cannot be used.
    """
    with command(context, as_json) as answer:
        from vitfast.diagnostics.verify import render, verify_model

        report = verify_model(
            model,
            against=against,
            images=images or (),
            device=device,
            dtype=dtype,
            backend=backend.value,
            allow_pickle=allow_pickle,
            weights_key=weights_key,
        )
        answer.code = 0 if report.ok else 1
        answer.json = report.to_dict()
        answer.text = render(report)


@contextlib.contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar with img/s on stderr, where that is a terminal. Gives the function that advances it.

    Args:
        total: how many images there are, None where that is not known before they are read.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Any:
            from rich.text import Text

            return Text(f"{task.completed / task.elapsed if task.elapsed else 0:.1f} img/s")

    terminal: Any = Unfailing(sys.__stderr__)
    console = Console(file=terminal)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
