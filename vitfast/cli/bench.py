"""`vitfast bench`: measure kernels and models, compare and show results. Arguments in; the work is in benchmarks/."""

from __future__ import annotations

import functools
import math
from collections.abc import Container
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitfast.cli import campaign
from vitfast.cli.bench_options import (
    Batches,
    Budget,
    CsvFile,
    Device,
    Dtype,
    HtmlFile,
    JsonFile,
    Models,
    Peers,
    Resume,
    Roofs,
    Rounds,
    Threads,
    Without,
    check,
    going_on,
    open_here,
    seconds,
    withhold,
)

app = typer.Typer(
    help="Benchmarks: kernels, whole models, comparisons and reports.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


class Grid(str, Enum):
    """What --grid takes."""

    quick = "quick"
    full = "full"


@app.command(epilog="Example: `vitfast bench kernels --op attention --provider mymodule:my_attention`")
def kernels(
    context: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help="Op to run; may be repeated. [default: all]")] = None,
    model: Models = ["vit_base_patch16_224"],  # noqa: B006  (typer copies it)
    batch: Batches = None,
    grid: Annotated[Grid, typer.Option(help="full: all models, batches 1 to 512, awkward shapes.")] = Grid.quick,
    provider: Annotated[
        list[str] | None, typer.Option(help="module:function to run beside the others; may be repeated.")
    ] = None,
    peer: Peers = None,
    slow: Annotated[bool, typer.Option("--slow", help="Also torch.compile and max-autotune.")] = False,
    device: Device = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="As of models; fp8 or int8: products in 8 bits alone. May be repeated. [default: one float]"),
    ] = None,
    threads: Threads = None,
    rounds: Rounds = 20,
    budget: Budget = None,
    roofs: Roofs = True,
    without: Without = None,
    resume: Resume = False,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Time every op at the shapes of a model: our kernels, plain torch and other libraries.

    Every output is checked against float64 first; a wrong one gets no time. Exit code 1: ours, or a provider that you
    name, is wrong.
    """
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        limit = seconds(budget) if budget else math.inf
        from vitfast.benchmarks import kernels as module
        from vitfast.benchmarks import providers
        from vitfast.benchmarks.cases import OPS
        from vitfast.benchmarks.result_file import Results
        from vitfast.benchmarks.roofs import around
        from vitfast.engine.dtypes import DTYPES, QUANTIZED
        from vitfast.models.config import NAMED

        check("--op", op or (), OPS)
        check("--model", model, NAMED)
        measured, usual = open_here(device, None, threads)
        dtypes = dtype or [str(usual).removeprefix("torch.")]
        withhold(without)
        extra = {path: providers.from_outside(path) for path in _named(provider, peer)}
        batches = batch or [8 if measured.slug == "cpu" else 64]
        cases = module.grid_in(dtypes, grid.value, op or (), model, batches, measured.torch_device)
        kinds = [{**DTYPES, **QUANTIZED}[name] for name in dtypes]
        method = {"baseline": providers.BASELINE, "grid": grid.value, "rounds": rounds, "budget": budget}
        file = Results("kernels", measured, method, json_file, resume=resume)
        with going_on(answer, file, resume) as watch, around(file, measured, kinds, wanted=roofs):
            left = module.run(
                cases, measured, rounds=rounds, seconds=limit, slow=slow, extra=extra, finished=file.finished,
                died=file.died, watch=watch, on_rows=functools.partial(_add_case, file),
            )  # fmt: skip
            file.add(not_run=left)
        finish(answer, file, csv_file, html_file, given=extra)


@app.command(epilog="Example: `vitfast bench model -m vit_base_patch16_224 --device cpu --html page.html`")
def model(
    context: typer.Context,
    model: Models = ["vit_base_patch16_224"],  # noqa: B006  (typer copies it)
    batch: Batches = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Provider; may be repeated. [default: those that need no long compiling]")
    ] = None,
    peer: Peers = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="As of `bench kernels`; fp8 or int8: those that multiply in 8 bits, beside bf16.")
    ] = None,
    threads: Threads = None,
    rounds: Rounds = 15,
    budget: Budget = None,
    sites: Annotated[
        bool, typer.Option("--sites", help="Also where the time of our engine's forward goes, on a CPU.")
    ] = False,
    roofs: Roofs = True,
    without: Without = None,
    resume: Resume = False,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    html_file: HtmlFile = None,
) -> None:
    """Time whole models: the engine, timm, torch.compile and other engines, in one interleaved run.

    Logits are checked against timm in fp32 first; a wrong provider gets no time. Exit code 1: ours is wrong.
    """
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        import time

        from vitfast.benchmarks import model as module
        from vitfast.benchmarks import model_providers
        from vitfast.benchmarks.result_file import Results
        from vitfast.benchmarks.roofs import around
        from vitfast.engine.dtypes import QUANTIZED

        named = _named(provider, peer)
        check("--provider", named, model_providers.PROVIDERS)
        quantized = QUANTIZED.get(dtype or "")
        measured, what = open_here(device, "bf16" if quantized else dtype, threads)
        if sites and measured.torch_device.type != "cpu":
            raise ValueError(
                "--sites times ops by the CPU's clock; on a GPU they have not ended when their call returns"
            )
        providers = named or model_providers.defaults(measured.torch_device.type, quantized)
        method = {"baseline": model_providers.BASELINE, "rounds": rounds, "budget": budget}
        if measured.torch_device.type == "cpu":
            method["settle_ms"] = module.SETTLE_MS
        withhold(without)
        file = Results("model", measured, method, json_file, resume=resume)
        todo = [(name, size) for name in model for size in batch or [8 if measured.slug == "cpu" else 256]]
        todo = [pair for pair in todo if not module.settled(module.case_name(*pair, what), file.finished, file.died)]
        end = time.perf_counter() + (seconds(budget) if budget else math.inf)
        kinds = [what, *filter(None, [quantized])]
        with going_on(answer, file, resume) as watch, around(file, measured, kinds, wanted=roofs):
            for index, (name, size) in enumerate(todo):
                left = end - time.perf_counter()
                if left <= 0:
                    file.add(not_run=[f"{name} batch {size}" for name, size in todo[index:]])
                    break
                rows = module.compare(
                    name, size, measured, what, providers=providers, rounds=rounds, seconds=left, sites=sites,
                    died=file.died, watch=watch, on_rows=file.add,
                )  # fmt: skip
                _add_case(file, rows)
        finish(answer, file, csv_file, html_file)


@app.command(epilog="Example: `vitfast bench sweep -m vit_base_patch16_224 --batch 64 --batch 256`")
def sweep(
    context: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help="Op to sweep; may be repeated. [default: all]")] = None,
    model: Models = ["vit_base_patch16_224"],  # noqa: B006  (typer copies it)
    batch: Batches = None,
    device: Device = None,
    dtype: Dtype = None,
    rounds: Rounds = 10,
    budget: Budget = None,
    without: Without = None,
    resume: Resume = False,
    json_file: JsonFile = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Table to write. [default: this GPU's, in kernels/configs]")
    ] = None,
) -> None:
    """Time every config of our Triton kernels and write the table of the best, which the launchers then read.

    Only a config that passed the correctness gate at every shape of its key gets into the table.
    """
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        limit = seconds(budget) if budget else math.inf
        from vitfast.benchmarks import kernels as kernel_cases
        from vitfast.benchmarks import sweep as module
        from vitfast.benchmarks.providers import BASELINE
        from vitfast.benchmarks.result_file import Results
        from vitfast.models.config import NAMED

        check("--op", op or (), module.OPS)
        check("--model", model, NAMED)
        measured, what = open_here(device, dtype, None)
        if measured.torch_device.type != "cuda":
            raise ValueError("no CUDA device is seen here, and Triton kernels are tuned for one")
        ops = op or module.OPS
        cases = kernel_cases.grid("quick", ops, model, batch or [1, 64, 256], measured.torch_device, what)
        withhold(without)
        method = {"baseline": BASELINE, "sweep": True, "rounds": rounds}
        file = Results("kernels", measured, method, json_file, resume=resume)
        with going_on(answer, file, resume) as watch:
            choices = module.sweep(
                cases, measured, rounds=rounds, seconds=limit, before=file.rows, finished=file.finished,
                died=file.died, watch=watch, on_rows=functools.partial(_add_case, file),
            )  # fmt: skip
            path = out or module.table_path(measured)
            module.write_table(path, choices, file.content["environment"])
            answer.remarks.append(f"written {path}; proven: {', '.join(choices['proven']) or 'none'}")
        finish(answer, file, None, None)


for _name, _command, _example in (
    ("smoke", campaign.smoke, "vitfast bench smoke --op linear --backend triton"),
    ("all", campaign.everything, "vitfast bench all --budget 9m --out gpu-results"),
    ("unpack", campaign.unpack, "vitfast bench unpack gpu-results/campaign.json"),
):
    app.command(name=_name, epilog=f"Example: `{_example}`")(_command)


@app.command(epilog="Example: `vitfast bench compare before.json after.json`")
def compare(
    context: typer.Context,
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Result file.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Result file of the same machine.")],
) -> None:
    """Compare two results of one machine: same, faster, slower, each against their noise.

    Exit code 1: something of ours became slower or wrong, or has no result any more.
    """
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        from vitfast.benchmarks import compare as module
        from vitfast.benchmarks.result_file import read

        changes = module.compare(read(before), read(after))
        answer.text = module.render(changes)
        answer.code = int(any(change.regression for change in changes))


@app.command(epilog="Example: `vitfast bench report benchmarks/results/cpu/*.json -o page.html --png plots/`")
def report(
    context: typer.Context,
    results: Annotated[list[Path] | None, typer.Argument(metavar="RESULTS", help="Result files.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page to write.")] = None,
    csv_file: CsvFile = None,
    png: Annotated[Path | None, typer.Option(help="Folder for plots as PNG; needs matplotlib.")] = None,
    update: Annotated[
        list[Path] | None, typer.Option(help="Markdown file whose marked tables are drawn anew; may be repeated.")
    ] = None,
) -> None:
    """Show result files: a page without scripts, CSV, PNG, or Markdown on the terminal if nothing else is asked for."""
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        from vitfast.benchmarks import page
        from vitfast.benchmarks import report as module
        from vitfast.benchmarks.result_file import read, write, write_csv

        contents = [read(path) for path in results or ()]
        if not contents and not update:
            raise ValueError("give result files, or --update")
        lines = []
        for path in update or ():
            write(path, module.redraw(path.read_text()))
            lines.append(f"updated {path}")
        if out:
            write(out, page.page(contents))
            lines.append(f"written {out}")
        if csv_file:
            write_csv(csv_file, contents)
            lines.append(f"written {csv_file}")
        if png:
            from vitfast.benchmarks.png import draw

            lines += [f"written {path}" for path in draw(contents, png)]
        answer.text = lines or [module.markdown(result) for result in contents]


@app.command(epilog="Example: `vitfast bench published --json`")
def published(
    context: typer.Context,
    chip: Annotated[str, typer.Option(help="GPU whose published figures to show.")] = "h100",
    native: Annotated[bool, typer.Option(help="Also predict with the CUDA linear; needs nvcc and a checkout.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What others measured on a GPU, with its source, beside our predictions; and the error of the model that predicts.

    Nothing is measured here. Products are plain ones of cuBLAS and CUTLASS, attention is FlashAttention-3.
    """
    from vitfast.cli.answer import command

    with command(context, json_out) as answer:
        from vitfast.benchmarks import published_figures as module
        from vitfast.diagnostics import native_code

        answer.json = module.compare(chip, native_code.inspect_linear() if native else ())
        answer.text = module.render(answer.json)


@app.command(epilog="Example: `vitfast bench cost result.json --price 2.50 --devices 8`")
def cost(
    context: typer.Context,
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS", help="Result files of models or pipelines.")],
    price: Annotated[float, typer.Option(metavar="DOLLARS", help="Of one device, an hour.")],
    devices: Annotated[int, typer.Option(min=1, help="Side by side; taken for so many times one.")] = 1,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Calculate images an hour and dollars a million from measured rates. Nothing is measured here."""
    from vitfast.cli.answer import command

    with command(context, json_out) as answer:
        from vitfast.benchmarks import cost as module
        from vitfast.benchmarks.result_file import read

        answer.json = [row for path in results for row in module.costs(read(path), price, devices)]
        answer.text = module.render(answer.json, price)


def _named(providers: list[str] | None, peers: list[str] | None) -> list[str]:
    """The providers asked for, those by the option's old name among them."""
    if peers:
        typer.echo("--peer is now --provider; the old name goes with the release after the next", err=True)
    return [*(providers or ()), *(peers or ())]


def _add_case(file: Any, rows: list[dict[str, Any]]) -> None:
    """The rows of a finished case."""
    file.add(rows, finished=sorted({*file.finished, *(row["case"] for row in rows)}))


def finish(answer: Any, file: Any, csv_file: Path | None, html_file: Path | None, given: Container[str] = ()) -> None:
    """The table and the files of a run, and its exit code: 1 if ours or one of the providers `given` was wrong."""
    from vitfast.benchmarks.page import page
    from vitfast.benchmarks.result_file import table, write, write_csv

    lines = [f"written {file.path}"]
    if csv_file:
        write_csv(csv_file, [file.content])
        lines.append(f"written {csv_file}")
    if html_file:
        write(html_file, page([file.content]))
        lines.append(f"written {html_file}")
    wrong = sorted({row["provider"] for row in file.rows if str(row.get("error", "")).startswith("incorrect")})
    if wrong:
        lines.append(f"wrong: {', '.join(wrong)}")
    ours = any(provider.startswith("vitfast") or provider in given for provider in wrong)
    answer.code = answer.code or int(ours)
    answer.text = [*table(file.content), *lines]
