"""Bars of whole-model results as PNG, for a README. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitfast.benchmarks.result_file import commit, machine, number
from vitfast.benchmarks.svg import style_of


def draw(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """One picture per case of each result, named after kind and case; their paths.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plots as PNG need matplotlib: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        styles = style_of(list(dict.fromkeys(row["provider"] for row in result["rows"])))
        for case in dict.fromkeys(row["case"] for row in result["rows"] if row["correct"]):
            rows = [row for row in result["rows"] if row["case"] == case and row["correct"]][::-1]
            figure = Figure(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
            axes = figure.subplots()
            medians = [row["median_ms"] for row in rows]
            below = [row["median_ms"] - row["p20_ms"] for row in rows]
            above = [row["p80_ms"] - row["median_ms"] for row in rows]
            names, colours = [row["provider"] for row in rows], [styles[row["provider"]][0] for row in rows]
            whiskers = {"elinewidth": 1, "capsize": 3}
            drawn = axes.barh(names, medians, xerr=[below, above], color=colours, error_kw=whiskers)
            labels = [f"{number(row['median_ms'])} ms" for row in rows]
            axes.bar_label(drawn, labels, padding=6)
            axes.margins(x=0.18)
            axes.spines[["top", "right"]].set_visible(False)
            entry = result["environment"]
            axes.set_title(case, loc="left")
            axes.set_xlabel(f"median ms, p20 to p80; {machine(entry)}, commit {commit(entry)}")
            paths.append(folder / f"{result['kind']}-{case.replace(' ', '-')}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths
