"""What several commands of `vitfast bench` share: their options, and how a run begins and is gone on with."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from vitfast.benchmarks.device import Device as Measured
    from vitfast.benchmarks.watch import Watch


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


def check(option: str, given: Any, allowed: Any) -> None:
    """Refuse what an option cannot be.

    Raises:
        ValueError: for the first value that is not among the allowed ones.
    """
    from vitfast.ops.names import did_you_mean

    for name in given:
        if name not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(allowed)}; got {name!r}{did_you_mean(name, allowed)}")


def withhold(without: list[str] | None) -> None:
    """Keep backends from running in this process, as --without names them.

    Raises:
        ValueError: for what is no op and backend.
    """
    from vitfast.ops import registry

    for name in without or ():
        op, _, backend = name.partition("/")
        if op not in registry.OPS or backend not in registry.BACKENDS:
            raise ValueError(f"--without takes an op and a backend, as in linear/native; got {name!r}")
        registry.withheld[op, backend] = f"it must not run here (--without {name})"


@contextlib.contextmanager
def going_on(answer: Any, file: Any, resume: bool) -> Iterator[Watch]:
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


def open_here(device: str | None, dtype: str | None, threads: int | None) -> tuple[Measured, torch.dtype]:
    """The device to measure, threads pinned, and the dtype."""
    from vitfast.benchmarks.device import open_device, pin_threads
    from vitfast.engine.dtypes import resolve_device, resolve_dtype

    where = resolve_device(device)
    if where.type == "cpu":
        pin_threads(threads)
    return open_device(where), resolve_dtype(dtype, where)
