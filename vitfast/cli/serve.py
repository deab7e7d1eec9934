"""`vitfast serve`: models behind HTTP."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer

from vitfast.cli.answer import command
from vitfast.cli.options import (
    AllowPickle,
    Arch,
    Crop,
    DecodeMemory,
    Device,
    DtypeOption,
    Json,
    MaxPixels,
    Mean,
    Size,
    Std,
    WeightsKey,
    decode_options,
    load_options,
    prepared,
)

app = typer.Typer(rich_markup_mode="markdown")


def seconds(text: str) -> float:
    """What --max-wait and its like take: "5ms", "2s" or "2".

    Raises:
        typer.BadParameter: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|)", str(text).strip())
    if not match or not float(match[1]) > 0:
        raise typer.BadParameter(f"expected a time like 5ms or 2s, got {text!r}")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def _duration(flag: str, what: str) -> Any:
    return typer.Option(flag, parser=seconds, metavar="TIME", help=what)


@app.command(epilog="Example: `vitfast serve facebook/dinov2-small vit=./my-vit --port 8000`")
def serve(
    context: typer.Context,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Hub ids, model directories or weight files; NAME=MODEL.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="VITFAST_API_KEY", help="A key that clients must show; may be repeated."),
    ] = None,
    max_wait: Annotated[Any, _duration("--max-wait", "How long an image waits to share a batch.")] = "5ms",
    max_queue_wait: Annotated[Any, _duration("--max-queue-wait", "Requests that would wait longer get 429.")] = "2s",
    request_timeout: Annotated[Any, _duration("--request-timeout", "For an answer.")] = "60s",
    body_timeout: Annotated[Any, _duration("--body-timeout", "For a request's body to come.")] = "30s",
    drain_timeout: Annotated[Any, _duration("--drain-timeout", "For what is under way after SIGTERM.")] = "30s",
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Images of a batch at most. [default: 64, on a CPU 16]")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Images of a request at most.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, metavar="MIB", help="Size of a request at most.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, metavar="MIB", help="Size of all waiting requests at most.")] = 512,
    device: Device = None,
    dtype: DtypeOption = None,
    allow_pickle: AllowPickle = False,
    weights_key: WeightsKey = None,
    arch: Arch = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    crop: Crop = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, each with the models; GPUs are dealt out in turn.")
    ] = 1,
    decode_threads: Annotated[
        int | None, typer.Option(min=1, help="Of a process. [default: one per CPU core, shared out among processes]")
    ] = None,
    max_pixels: MaxPixels = 50_000_000,
    decode_memory: DecodeMemory = None,
    as_json: Json = False,
) -> None:
    """Serve models over HTTP: embeddings, classes and similarities of images, and of texts where a model knows them.

    SIGTERM or Ctrl-C ends it in order: what has been taken is answered, what is new is refused with 503. SIGHUP loads
    the models anew while the old ones go on.
    """
    with command(context, as_json) as answer:
        from vitfast.serving import workers as several
        from vitfast.serving.app import require
        from vitfast.serving.limits import MIB, Limits
        from vitfast.serving.model import served_names
        from vitfast.serving.server import log_to, run
        from vitfast.serving.settings import Settings

        require()
        limits = Limits(
            max_body=max_body * MIB,
            max_images=max_images,
            max_pixels=max_pixels or Limits.max_pixels,
            max_queue_bytes=max_queue * MIB,
            max_wait=max_wait,
            max_queue_wait=max_queue_wait,
            request_timeout=request_timeout,
            body_timeout=body_timeout,
            drain_timeout=drain_timeout,
        )
        log_to(sys.stderr)
        settings = Settings(
            served_names(models),
            load_options(device, dtype, allow_pickle, weights_key, arch, prepared(mean, std, size, crop)),
            limits,
            api_keys=tuple(api_key or ()),
            max_batch=max_batch,
            decode_threads=decode_threads,
            decode_memory=decode_options(limits.max_pixels, decode_memory)["decode_memory"],
        )
        answer.json = {"models": list(settings.models)}
        if workers > 1:
            several.run(settings, host, port, workers)
            answer.json["workers"] = workers
            answer.text = f"{workers} workers have ended"
        else:
            service = settings.service()
            run(service, host, port)
            answer.json["requests"] = service.requests
            answer.text = f"answered {service.requests} requests"
