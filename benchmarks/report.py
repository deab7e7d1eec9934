"""Result files as Markdown, and the tables of README.md kept equal to them.

    python -m benchmarks.report benchmarks/results/cpu/....json     # print a table
    python -m benchmarks.report --update README.md                  # redraw its marked tables

A marked table stands between `<!-- results: PATH -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(result: dict[str, Any]) -> str:
    """A table of a result's rows, and a line on where they come from."""
    lines = ["| case | runs | median ms | p20–p80 | img/s | times as fast as timm |", "|---|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        if not row["correct"]:
            lines.append(f"| {row['case']} | {row['peer']} | {row['error']} | | | |")
            continue
        times = f"{row['median_ms']:.0f} | {row['p20_ms']:.0f}–{row['p80_ms']:.0f} | {row['images_per_s']:.1f}"
        lines.append(f"| {row['case']} | {row['peer']} | {times} | {row['ratio']:.2f} |")
    entry = result["environment"]
    where = entry.get("gpu") or f"{entry['cpu']}, {entry['threads']} threads"
    lines.append("")
    lines.append(f"{where}; torch {entry['torch']}; commit {entry['commit'][:9]}, {entry['date'][:10]}.")
    return "\n".join(lines) + "\n"


def redraw(text: str) -> str:
    """The text with every marked table drawn anew from its result file."""

    def table(match: re.Match[str]) -> str:
        return match[1] + markdown(json.loads((ROOT / match[2]).read_text())) + match[3]

    return MARKED.sub(table, text)


def main() -> None:
    """Print tables, or update files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--update", nargs="*", type=Path, default=[])
    args = parser.parse_args()
    for path in args.results:
        print(markdown(json.loads(path.read_text())))
    for path in args.update:
        path.write_text(redraw(path.read_text()))


if __name__ == "__main__":
    main()
