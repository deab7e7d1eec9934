"""`vitfast bench`: measure kernels and models, compare and show results. Arguments in; the work is in benchmarks/."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Container, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from vitfast.benchmarks.device import Device as Measured
    from vitfast.benchmarks.watch import Watch

app = typer.Typer(
    help="Benchmarks: kernels, whole models, comparisons and reports.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


class Grid(str, Enum):
    """What --grid takes."""

    quick = "quick"
    full = "full"


def seconds(text: str) -> float:
    """Seconds of "90", "90s", "8m" or "1h".

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match:
        raise ValueError(f"a time is a number and s, m or h, such as 8m; got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


Models = Annotated[list[str], typer.Option("--model", "-m", help="A timm name; may be repeated.")]
Batches = Annotated[list[int] | None, typer.Option("--batch", "-b", min=1, help="Images; may be repeated.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: the GPU if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="fp32, fp16 or bf16. [default: bf16 on a GPU, else fp32]")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on the CPU, kept on as many cores.")]
Peers = Annotated[list[str] | None, typer.Option("--peer", hidden=True, help="Old name of --provider.")]
Rounds = Annotated[int, typer.Option(min=2, help="Rounds in which all providers take turns.")]
Budget = Annotated[str | None, typer.Option(help="Time for measuring, e.g. 8m; telling cases come first.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Result file. [default: a new one in the results folder]")
]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Also write the rows as CSV.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Also write a page with plots.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the result file that is there; cases that are finished are kept.")
]
Without = Annotated[
    list[str] | None, typer.Option(metavar="OP/BACKEND", help="Backend that must not run; may be repeated.")
]
Roofs = Annotated[bool, typer.Option("--roofs/--no-roofs", help="Measure the device's own roofs, before and after.")]


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
    dtype: Dtype = None,
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
        from vitfast.models.config import NAMED

        _check("--op", op or (), OPS)
        _check("--model", model, NAMED)
        measured, what = opened(device, dtype, threads)
        _withhold(without)
        extra = {path: providers.from_outside(path) for path in _named(provider, peer)}
        batches = batch or [8 if measured.slug == "cpu" else 64]
        cases = module.grid(grid.value, op or (), model, batches, measured.torch_device, what)
        method = {"baseline": providers.BASELINE, "grid": grid.value, "rounds": rounds, "budget": budget}
        file = Results("kernels", measured, method, json_file, resume=resume)
        with _going_on(answer, file, resume) as watch, around(file, measured, what, wanted=roofs):
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
    dtype: Dtype = None,
    threads: Threads = None,
    rounds: Rounds = 15,
    budget: Budget = None,
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

        named = _named(provider, peer)
        _check("--provider", named, model_providers.PROVIDERS)
        measured, what = opened(device, dtype, threads)
        providers = named or model_providers.DEFAULTS[measured.torch_device.type]
        method = {"baseline": model_providers.BASELINE, "rounds": rounds, "budget": budget}
        _withhold(without)
        file = Results("model", measured, method, json_file, resume=resume)
        todo = [(name, size) for name in model for size in batch or [8 if measured.slug == "cpu" else 256]]
        todo = [pair for pair in todo if not module.settled(module.case_name(*pair, what), file.finished, file.died)]
        end = time.perf_counter() + (seconds(budget) if budget else math.inf)
        with _going_on(answer, file, resume) as watch, around(file, measured, what, wanted=roofs):
            for index, (name, size) in enumerate(todo):
                left = end - time.perf_counter()
                if left <= 0:
                    file.add(not_run=[f"{name} batch {size}" for name, size in todo[index:]])
                    break
                rows = module.compare(
                    name, size, measured, what, providers=providers, rounds=rounds, seconds=left, died=file.died,
                    watch=watch, on_rows=file.add,
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

        _check("--op", op or (), module.OPS)
        _check("--model", model, NAMED)
        measured, what = opened(device, dtype, None)
        if measured.torch_device.type != "cuda":
            raise ValueError("no CUDA device is seen here, and Triton kernels are tuned for one")
        ops = op or module.OPS
        cases = kernel_cases.grid("quick", ops, model, batch or [1, 64, 256], measured.torch_device, what)
        _withhold(without)
        method = {"baseline": BASELINE, "sweep": True, "rounds": rounds}
        file = Results("kernels", measured, method, json_file, resume=resume)
        with _going_on(answer, file, resume) as watch:
            choices = module.sweep(
                cases, measured, rounds=rounds, seconds=limit, before=file.rows, finished=file.finished,
                died=file.died, watch=watch, on_rows=functools.partial(_add_case, file),
            )  # fmt: skip
            path = out or module.table_path(measured)
            module.write_table(path, choices, file.content["environment"])
            answer.remarks.append(f"written {path}; proven: {', '.join(choices['proven']) or 'none'}")
        finish(answer, file, None, None)


@app.command(epilog="Example: `vitfast bench smoke --op linear --backend triton`")
def smoke(
    context: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help="Op to try; may be repeated. [default: all]")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend; may be repeated. [default: triton, native]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="At this model's shapes, and without a comparison.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="With --model: images.")] = 256,
    part: Annotated[str, typer.Option(metavar="K/N", help="Every N-th case, from the K-th on.")] = "1/1",
    device: Device = None,
    dtype: Dtype = None,
    without: Without = None,
    resume: Resume = False,
    json_file: JsonFile = None,
) -> None:
    """Launch every op once on a backend, at small shapes, and compare with the reference.

    With --model at that model's shapes, which fills the cache of Triton's compiler. Exit code 1: something was wrong.
    """
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        from vitfast.benchmarks import kernels as kernel_cases
        from vitfast.benchmarks import smoke as module
        from vitfast.benchmarks.result_file import Results
        from vitfast.models.config import NAMED
        from vitfast.ops.registry import BACKENDS

        ops, backends = op or list(module.SMALL), backend or ["triton", "native"]
        _check("--op", ops, module.SMALL)
        _check("--backend", backends, BACKENDS)
        _check("--model", [model] if model else [], NAMED)
        measured, what = opened(device, dtype, None)
        _withhold(without)
        if model:
            cases = kernel_cases.grid("quick", ops, [model], [batch], measured.torch_device, what)
        else:
            cases = [case for name in ops for case in module.cases(name, measured.torch_device, what)]
        cases = _dealt(cases, part)
        method = {"baseline": "", "smoke": True, "model": model}
        file = Results("kernels", measured, method, json_file, resume=resume)
        with _going_on(answer, file, resume) as watch:
            for name in backends:
                done = [row["case"] for row in file.rows if row["provider"] == module.BACKEND_NAMES[name]]
                module.smoke(cases, name, measured, compare=model is None, finished=done, watch=watch, on_rows=file.add)
        wrong = [row for row in file.rows if not row["correct"] and not row.get("absent")]
        answer.code = answer.code or int(bool(wrong))
        answer.text = [f"{row['case']}: {row['provider']}: {row['error']}" for row in file.rows if not row["correct"]]
        answer.text.append(f"{len(file.rows)} launches, {len(wrong)} of them wrong; written {file.path}")


@app.command(name="all", epilog="Example: `vitfast bench all --budget 9m --out gpu-results`")
def everything(
    context: typer.Context,
    budget: Annotated[str, typer.Option(help="Time for everything.")] = "9m",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; one that is there is gone on with.")
    ] = None,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="Only the smoke set, under compute-sanitizer's memcheck and racecheck.")
    ] = False,
    extension: Annotated[
        Path | None, typer.Option(help="Folder of `make gpu-package`: its C++ extension is used where it fits.")
    ] = None,
    device: Device = None,
) -> None:
    """Measure what is worth knowing about a GPU, the most telling first, and stop when the time is up.

    Exit code 1: a step failed or something was wrong. Running out of time is no failure; a second call goes on.
    """
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        from vitfast.benchmarks import campaign, carried
        from vitfast.benchmarks.device import open_device
        from vitfast.benchmarks.environment import ROOT
        from vitfast.benchmarks.result_file import results_folder
        from vitfast.engine.dtypes import resolve_device

        limit, where = seconds(budget), resolve_device(device)
        if where.type != "cuda":
            raise ValueError("no CUDA device is seen here; on a CPU use `vitfast bench kernels` and `bench model`")
        folder = out or results_folder() / "campaign"
        said = carried.use(extension, ROOT / "vitfast") if extension else ""
        if said:
            typer.echo(said, err=True)
        failed, unfinished = campaign.Campaign(
            open_device(where), folder, limit, steps=campaign.SANITIZING if sanitize else campaign.STEPS,
            say=lambda text: typer.echo(text, err=True), extension=said,
        ).run()  # fmt: skip
        answer.code = int(bool(failed))
        answer.text = [*unfinished, *failed, f"written {folder}"]


@app.command(epilog="Example: `vitfast bench unpack gpu-results/campaign.json`")
def unpack(
    context: typer.Context,
    campaign: Annotated[Path, typer.Argument(metavar="CAMPAIGN", help="campaign.json of `vitfast bench all`.")],
) -> None:
    """Write what a campaign measured as result files, one a step, to be committed; its tuning table, too."""
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        from vitfast.benchmarks import campaign_file

        answer.text = [f"written {path}" for path in campaign_file.unpack(campaign)]


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
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What others measured on a GPU, with its source, beside our predictions; and the error of the model that predicts.

    Nothing is measured here. Products are plain ones of cuBLAS and CUTLASS, attention is FlashAttention-3.
    """
    from vitfast.cli.answer import command

    with command(context, json_out) as answer:
        from vitfast.benchmarks import published_figures as module

        answer.json = module.compare(chip)
        answer.text = module.render(answer.json)


def _check(option: str, given: Any, allowed: Any) -> None:
    from vitfast.ops.names import did_you_mean

    for name in given:
        if name not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(allowed)}; got {name!r}{did_you_mean(name, allowed)}")


def _named(providers: list[str] | None, peers: list[str] | None) -> list[str]:
    """The providers asked for, those by the option's old name among them."""
    if peers:
        typer.echo("--peer is now --provider; the old name goes with the release after the next", err=True)
    return [*(providers or ()), *(peers or ())]


def _dealt(cases: list[Any], part: str) -> list[Any]:
    """Every N-th case, from the K-th on, by "K/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part is K/N with K from 1 to N, as in 2/4; got {part!r}")
    return cases[int(match[1]) - 1 :: int(match[2])]


def _withhold(without: list[str] | None) -> None:
    """Keep backends from running in this process, as --without names them."""
    from vitfast.ops import registry

    for name in without or ():
        op, _, backend = name.partition("/")
        if op not in registry.OPS or backend not in registry.BACKENDS:
            raise ValueError(f"--without takes an op and a backend, as in linear/native; got {name!r}")
        registry.withheld[op, backend] = f"it must not run here (--without {name})"


@contextlib.contextmanager
def _going_on(answer: Any, file: Any, resume: bool) -> Iterator[Watch]:
    """A watch beside the result file; a dead GPU context leaves the row of what killed it, and an exit code of its own.

    Only a run that can be gone on with has a watch: it is for the process that would begin the next.
    """
    from vitfast.benchmarks.watch import CONTEXT_LOST, ContextLost, Watch

    if resume:
        file.add()  # whoever puts a culprit's row into it finds it there
    try:
        yield Watch(file.path.with_suffix(".now") if resume else None)
    except ContextLost as error:
        if error.row:
            file.add([error.row])
        answer.remarks.append(f"{error}; --resume goes on with what is left")
        answer.code = CONTEXT_LOST


def _add_case(file: Any, rows: list[dict[str, Any]]) -> None:
    """The rows of a finished case."""
    file.add(rows, finished=sorted({*file.finished, *(row["case"] for row in rows)}))


def opened(device: str | None, dtype: str | None, threads: int | None) -> tuple[Measured, torch.dtype]:
    """The device to measure, threads pinned, and the dtype."""
    from vitfast.benchmarks.device import open_device, pin_threads
    from vitfast.engine.dtypes import resolve_device, resolve_dtype

    where = resolve_device(device)
    if where.type == "cpu":
        pin_threads(threads)
    return open_device(where), resolve_dtype(dtype, where)


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
