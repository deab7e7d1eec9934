"""Result files as Markdown, and the tables of README.md kept equal to them.

A marked table stands between `<!-- results: PATH -->` and `<!-- end -->`; `vitfast bench report --update README.md`
redraws it.
"""

from __future__ import annotations

import re
from typing import Any

from vitfast.benchmarks.environment import ROOT
from vitfast.benchmarks.result_file import commit, machine, number, read

MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

RATES = {"model": ("images_per_s", "img/s", "timm"), "kernels": ("tflops", "TFLOP/s", "torch")}


def markdown(result: dict[str, Any]) -> str:
    """A table of a result's rows, and a line on where they come from. Providers that did not run are left out.

    Raises:
        ValueError: for results of a kind that has no such table.
    """
    if result["kind"] not in RATES:
        raise ValueError(f"results of kind {result['kind']!r} are no table in Markdown, only {', '.join(RATES)}")
    field, unit, baseline = RATES[result["kind"]]
    lines = [
        f"| case | provider | median ms | p20–p80 | {unit} | times as fast as {baseline} |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if row["correct"]:
            times = f"{number(row['median_ms'])} | {number(row['p20_ms'])}–{number(row['p80_ms'])}"
            rates = f"{number(row[field])} | {row['ratio']:.2f}"
            lines.append(f"| {row['case']} | {row['provider']} | {times} | {rates} |")
        elif str(row.get("error", "")).startswith("incorrect"):
            lines.append(f"| {row['case']} | {row['provider']} | incorrect | | | |")
    entry = result["environment"]
    lines.append("")
    lines.append(f"{machine(entry)}; torch {entry['torch']}; commit {commit(entry)}, {entry['date'][:10]}.")
    return "\n".join(lines) + "\n"


def redraw(text: str) -> str:
    """The text with every marked table drawn anew from its result file."""

    def table(match: re.Match[str]) -> str:
        return match[1] + markdown(read(ROOT / match[2])) + match[3]

    return MARKED.sub(table, text)
