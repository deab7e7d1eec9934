"""`vitfast bench serve`: a server under load. Arguments in; the work is in benchmarks/serve.py."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from vitfast.cli.bench import finish
from vitfast.cli.bench_options import CsvFile, Device, Dtype, HtmlFile, JsonFile, Threads, open_here, seconds

app = typer.Typer()


@app.command(epilog="Example: `vitfast bench serve -m vit_small_patch16_224 --html page.html`")
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A timm name, for random weights; or a folder or hub id.")
    ] = "vit_tiny_patch16_224",
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="API=URL", help="Another server of the same model: vitfast, openai, infinity, litserve."),
    ] = None,
    connections: Annotated[int, typer.Option(min=1, help="Connections at the rates and in the flood.")] = 200,
    each: Annotated[str, typer.Option("--seconds", metavar="TIME", help="Each measurement takes so long.")] = "10s",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which engine and servers take turns.")] = 3,
    overload: Annotated[float, typer.Option(min=0, help="The flood, by what the server sustains; 0 for none.")] = 4.0,
    overload_seconds: Annotated[str, typer.Option(metavar="TIME", help="The flood takes so long.")] = "60s",
    max_queue_wait: Annotated[str, typer.Option(metavar="TIME", help="As the server is told.")] = "2s",
    max_batch: Annotated[int, typer.Option(min=1, help="As the server is told.")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Measure `vitfast serve` over HTTP: one request at a time, saturated, at rising rates, and in a flood.

    Every answer is compared with the engine's own. The engine alone takes turns with the server, and so do the peers.
    Exit code 1: an answer of ours was wrong, or a request was lost.
    """
    from vitfast.cli.answer import command
    from vitfast.cli.serve import seconds as duration

    with command(context, False) as answer:
        from vitfast.benchmarks import serve as module
        from vitfast.benchmarks import servers
        from vitfast.benchmarks.result_file import Results
        from vitfast.engine.load import load

        peers = dict(_peer(text) for text in peer or ())
        lasting, flood = seconds(each), seconds(overload_seconds)
        measured, what = open_here(device, dtype, threads)
        name = str(what).removeprefix("torch.")
        method = {
            "connections": connections, "seconds": lasting, "rounds": rounds, "max_batch": max_batch,
            "overload": overload, "overload_seconds": flood, "max_queue_wait": max_queue_wait,
        }  # fmt: skip
        file = Results("serve", measured, method, json_file)
        with tempfile.TemporaryDirectory() as folder:
            known = Path(model).exists() or "/" in model
            source = model if known else servers.random_model(model, Path(folder))
            engine = load(source, device=str(measured.torch_device), dtype=name)
            options = ["--device", str(measured.torch_device), "--dtype", name]
            options += ["--max-queue-wait", max_queue_wait, "--max-batch", str(max_batch)]
            shown = Path(model).name if known else model
            with servers.started(shown, source, options) as ours:
                measuring = [ours, *(servers.Served(api, url, shown, servers.APIS[api]) for api, url in peers.items())]
                module.run(
                    measuring, engine, servers.pictures(), batch=max_batch, connections=connections, rounds=rounds,
                    seconds=lasting, overload=overload, overload_seconds=flood,
                    max_queue_wait=duration(max_queue_wait), on_rows=file.add,
                )  # fmt: skip
        finish(answer, file, csv_file, html_file)
        failed = [row for row in file.rows if row["provider"] == ours.name and not row["correct"]]
        answer.text += [f"{row['case']}: {row['error']}" for row in failed]
        answer.code = answer.code or int(bool(failed))


def _peer(text: str) -> tuple[str, str]:
    from vitfast.benchmarks.servers import APIS

    api, equals, url = text.partition("=")
    if not equals or api not in APIS or not url.startswith("http://"):
        raise ValueError(f"--peer is API=URL with API one of {', '.join(APIS)} and a URL of http, got {text!r}")
    return api, url.rstrip("/")
