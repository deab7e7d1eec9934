"""`vitfast bench smoke`, `all` and `unpack`: a GPU's few minutes, and what came back of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vitfast.cli.bench_options import (
    Device,
    Dtype,
    JsonFile,
    Resume,
    Without,
    check,
    going_on,
    open_here,
    seconds,
    withhold,
)


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
    configs: Annotated[
        bool, typer.Option("--configs", help="Triton's kernels in every config that sweep tries.")
    ] = False,
    part: Annotated[str, typer.Option(metavar="K/N", help="Every N-th launch, from the K-th on.")] = "1/1",
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
        check("--op", ops, module.SMALL)
        check("--backend", backends, BACKENDS)
        check("--model", [model] if model else [], NAMED)
        measured, what = open_here(device, dtype, None)
        withhold(without)
        if model:
            cases = kernel_cases.grid("quick", ops, [model], [batch], measured.torch_device, what)
        else:
            cases = [case for name in ops for case in module.cases(name, measured.torch_device, what)]
        launches = [one for name in backends for one in module.launches(cases, name, measured, swept=configs)]
        method = {"baseline": "", "smoke": True, "model": model}
        file = Results("kernels", measured, method, json_file, resume=resume)
        with going_on(answer, file, resume) as watch:
            done = {(row["case"], row["provider"]) for row in file.rows}
            todo = _dealt(launches, part)
            module.smoke(todo, measured, compare=model is None, finished=done, watch=watch, on_rows=file.add)
        wrong = [row for row in file.rows if not row["correct"] and not row.get("absent")]
        answer.code = answer.code or int(bool(wrong))
        answer.text = [f"{row['case']}: {row['provider']}: {row['error']}" for row in file.rows if not row["correct"]]
        answer.text.append(f"{len(file.rows)} launches, {len(wrong)} of them wrong; written {file.path}")


def everything(
    context: typer.Context,
    budget: Annotated[str, typer.Option(help="Time for everything.")] = "9m",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; one that is there is gone on with.")
    ] = None,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="Only the smoke set, under compute-sanitizer's memcheck and racecheck.")
    ] = False,
    step: Annotated[list[str] | None, typer.Option(help="Only this step; may be repeated. [default: all]")] = None,
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
        from vitfast.benchmarks import campaign, carried, steps
        from vitfast.benchmarks.device import open_device
        from vitfast.benchmarks.environment import ROOT
        from vitfast.benchmarks.result_file import results_folder
        from vitfast.engine.dtypes import resolve_device

        wanted = steps.SANITIZING if sanitize else steps.STEPS
        check("--step", step or (), [one.name for one in wanted])
        limit, where = seconds(budget), resolve_device(device)
        if where.type != "cuda":
            raise ValueError("no CUDA device is seen here; on a CPU use `vitfast bench kernels` and `bench model`")
        folder = out or results_folder() / "campaign"
        said = carried.use(extension, ROOT / "vitfast") if extension else ""
        if said:
            typer.echo(said, err=True)
        failed, unfinished = campaign.Campaign(
            open_device(where), folder, limit, steps=[one for one in wanted if not step or one.name in step],
            say=lambda text: typer.echo(text, err=True), extension=said,
        ).run()  # fmt: skip
        answer.code = int(bool(failed))
        answer.text = [*unfinished, *failed, f"written {folder}"]


def unpack(
    context: typer.Context,
    campaign: Annotated[Path, typer.Argument(metavar="CAMPAIGN", help="campaign.json of `vitfast bench all`.")],
) -> None:
    """Write what a campaign measured as result files, one a step, to be committed; its tuning table, too."""
    from vitfast.cli.answer import command

    with command(context, False) as answer:
        from vitfast.benchmarks import campaign_file

        answer.text = [f"written {path}" for path in campaign_file.unpack(campaign)]


def _dealt(launches: list[Any], part: str) -> list[Any]:
    """Every N-th launch, from the K-th on, by "K/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part is K/N with K from 1 to N, as in 2/4; got {part!r}")
    return launches[int(match[1]) - 1 :: int(match[2])]
