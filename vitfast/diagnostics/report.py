"""What an audit found: the report of `vitfast.verify`, as data, JSON and a table."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


ROWS, SENTENCES, WIDTH = 16, 7, 240
"""A printed report has at most so many rows of outputs, findings, notes and facts each, of so many characters."""


class DifferenceError(AssertionError):
    """The outputs differ; the message says which, by how much, and where it began."""


@dataclass(frozen=True)
class Difference:
    """How one tensor differs between before and after, over all batches.

    Attributes:
        name: "output" for a lone tensor, else its place, such as "logits", "[0]" or "a.b[1]".
        shape, dtype: of before's tensor, in the first batch (of after's, where before has none).
        elements: numbers that are finite on both sides; the figures below are about these.
        max_error, mean_error: absolute. relative_error: max_error / largest absolute value.
        relative_rms: RMS(error) / RMS(values).
        cosine_mean, cosine_min: of the vectors along the last axis; None if that has one entry.
        top1_flips, top1_rows: rows of logits whose likeliest class changed, of how many; None for
            other outputs. A flip within tolerance is a tie and does not fail.
        nonfinite: NaN or infinity in before. nonfinite_mismatches: places where the two sides differ in that.
        allowed_rms, allowed_error: bounds on relative_rms and relative_error; None where the oracle rules.
        before_error, before_rms: relative error of before against the oracle; None without an oracle.
            (The errors above are then those of after against the oracle.)
        problems: why it does not pass; empty if it does.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    elements: int = 0
    max_error: float = 0.0
    mean_error: float = 0.0
    relative_error: float = 0.0
    relative_rms: float = 0.0
    cosine_mean: float | None = None
    cosine_min: float | None = None
    top1_flips: int | None = None
    top1_rows: int | None = None
    nonfinite: int = 0
    nonfinite_mismatches: int = 0
    allowed_rms: float | None = None
    allowed_error: float | None = None
    before_error: float | None = None
    before_rms: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether this tensor passes."""
        return not self.problems


@dataclass(frozen=True)
class Blame:
    """The first layer, in the order in which layers finish, whose output is over its tolerance.

    `input` is the worst of what went into it: if that is over its tolerance too, the difference began
    before this layer, in code between it and the layers that finished earlier.
    """

    layer: str
    output: Difference
    input: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """As part of `Report.to_dict`."""
        entering = self.input and _plain(self.input)
        return {"layer": self.layer, "output": _plain(self.output), "input": entering, "text": str(self)}

    def __str__(self) -> str:
        text = f"first layer over its tolerance: {self.layer} ({'; '.join(self.output.problems)})"
        if self.input is None:
            return f"{text}; it takes no tensors"
        if self.input.ok:
            return f"{text}; what goes into it agrees, so the difference begins in it"
        parent = self.layer.rpartition(".")[0] or "the model itself"
        return (
            f"{text}; what goes into it differs already (relative RMS {self.input.relative_rms:.1e}), so the "
            f"difference begins before it, between the layers of {parent}"
        )


@dataclass(frozen=True, repr=False)
class Report:
    """The outcome of an audit. True if every output passes. Prints as a table of at most 40 lines.

    Attributes:
        outputs: one entry per output tensor.
        batches: how many were compared.
        layers: one entry per layer output, in the order in which layers finish, of one batch: the first
            that differs, or else the first. They inform; only `outputs` decide.
        blame: where the difference began, if layers were compared and one is over its tolerance.
        notes: what the reader should know, such as why no layers were compared.
        about: what was compared (`verify_model` fills it).
    """

    outputs: tuple[Difference, ...]
    batches: int
    layers: tuple[Difference, ...] = ()
    blame: Blame | None = None
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all outputs pass, and there is a number in one of them."""
        return any(output.elements for output in self.outputs) and all(output.ok for output in self.outputs)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        table = [_HEAD, *([f"{item.name}  {_shape(item)}", *_numbers(item), _verdict(item)] for item in self.shown())]
        widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        lines = [self.summary(), *self._sentences(), *rows]
        return "\n".join(line.replace("\n", " ").rstrip()[:WIDTH] for line in lines)

    def _repr_html_(self) -> str:
        table = [_HEAD, *([f"{item.name}  {_shape(item)}", *_numbers(item), _verdict(item)] for item in self.shown())]
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table)
        return f"<pre>{html.escape(chr(10).join([self.summary(), *self._sentences()]))}</pre><table>{rows}</table>"

    def summary(self) -> str:
        """The verdict, in one line."""
        bad = sum(not output.ok for output in self.outputs)
        word = "same" if self.ok else f"different, {bad} of {len(self.outputs)} outputs"
        more = len(self.outputs) - ROWS
        shown = f"; the {ROWS} furthest of {len(self.outputs)} outputs are shown, .outputs has all" if more > 0 else ""
        return f"{word}, in {self.batches} batch{'es' * (self.batches != 1)}{shown}"

    def shown(self) -> tuple[Difference, ...]:
        """The outputs that a printed table has: all, if they are few, else the furthest apart, in their order."""
        worst = sorted(self.outputs, key=lambda item: (item.ok, -item.relative_rms))[:ROWS]
        return tuple(item for item in self.outputs if any(item is other for other in worst))

    def _sentences(self) -> list[str]:
        """Facts, findings and notes, the blame before all other findings."""
        findings = self.findings()
        if self.blame is not None and findings:
            findings = [findings[-1], *findings[:-1]]
        parts = ([f"{key}: {value}" for key, value in self.about.items()], findings, [f"note: {n}" for n in self.notes])
        return [line for part in parts for line in _first(part)]

    def raise_if_different(self) -> None:
        """Raise DifferenceError with every problem and the blame, unless the report is ok."""
        if not self.ok:
            raise DifferenceError("\n".join(self.findings()))

    def to_dict(self) -> dict[str, Any]:
        """Everything as a dict that json.dumps accepts, without NaN or infinity; `ok` included."""
        content = {**self.about, "ok": self.ok, "batches": self.batches}
        return content | {
            "outputs": [_plain(output) for output in self.outputs],
            "findings": self.findings(),
            "blame": self.blame and self.blame.to_dict(),
            "layers": [_plain(layer) for layer in self.layers],
            "notes": list(self.notes),
        }

    def findings(self) -> list[str]:
        """Every problem as a sentence, and the blame; empty if the report is ok."""
        if self.ok:
            return []
        findings = [f"{output.name}: {problem}" for output in self.outputs for problem in output.problems]
        if not findings:
            findings.append("there are no numbers in the outputs: nothing was compared")
        return findings + ([str(self.blame)] if self.blame else [])


_HEAD = ["output", "max error", "mean", "rel. RMS", "bound", "cosine", "top-1", ""]


def _first(sentences: list[str]) -> list[str]:
    more = len(sentences) - SENTENCES + 1
    return sentences if more <= 1 else [*sentences[: SENTENCES - 1], f"... and {more} more"]


def _shape(item: Difference) -> str:
    return f"{'×'.join(map(str, item.shape))} {item.dtype}"


def _verdict(item: Difference) -> str:
    return "same" if item.ok else "differs"


def _plain(difference: Difference) -> dict[str, Any]:
    values = asdict(difference) | {"shape": list(difference.shape), "problems": list(difference.problems)}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return finite | {"ok": difference.ok}


def render(report: Report) -> RenderableType:
    """A report for the terminal: a table of the outputs, every finding, and the verdict. Fits 80 columns."""
    from rich import box
    from rich.console import Group
    from rich.table import Column, Table
    from rich.text import Text

    facts = [Text(f"{key}: {value}") for key, value in report.about.items()]
    oracle = any(item.before_rms is not None for item in report.outputs)
    table = Table(Column("output", overflow="fold"), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("max error", "mean", "rel. RMS", "before" if oracle else "allowed", "cosine", "top-1", ""):
        table.add_column(column, no_wrap=True)
    for item in report.shown():
        name = Text(f"{item.name}\n{_shape(item)}")
        verdict = Text(_verdict(item), style="green" if item.ok else "bold red")
        table.add_row(name, *_numbers(item), verdict)
    notes = [Text(line) for line in _first([f"note: {note}" for note in report.notes])]
    findings = [Text(line, style="red") for line in _first(report.findings())]
    verdict = Text(report.summary(), style="green" if report.ok else "bold red")
    return Group(*facts, table, *notes, *findings, verdict)


def _numbers(item: Difference) -> list[str]:
    """Six cells of the table; empty where nothing could be compared. The cosine is the least one."""
    if not item.elements:
        return [""] * 6
    bound = item.allowed_rms if item.before_rms is None else item.before_rms
    cosine = "" if item.cosine_min is None else f"{item.cosine_min:.6f}"
    top1 = "" if item.top1_rows is None else f"{item.top1_rows - (item.top1_flips or 0)}/{item.top1_rows}"
    errors = [item.max_error, item.mean_error, item.relative_rms]
    return [*(f"{error:.1e}" for error in errors), "" if bound is None else f"{bound:.1e}", cosine, top1]
