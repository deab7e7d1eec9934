"""Results as one self-contained HTML page: plots, tables and the environment. No script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from vitfast.benchmarks import svg
from vitfast.benchmarks.result_file import COLUMNS, HEADINGS, SITE_COLUMNS, cells, commit, machine, site_cells
from vitfast.benchmarks.roofs import drift
from vitfast.engine.planner import GPU_SECONDS

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --paper: #fff; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #3a424b; --paper: #14181d; --wrong: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.4rem 0 .2rem; }
p.soft, td.soft { color: var(--soft); }
svg { max-width: 100%; height: auto; font: 13px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .tick { fill: var(--soft); } svg .label { text-anchor: end; }
svg .wrong { fill: var(--wrong); }
svg .grid { stroke: var(--line); fill: none; } svg .roof { stroke: var(--ink); stroke-width: 2; fill: none; }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .mark { stroke: var(--paper); stroke-width: 1; }
.legend .key { margin-right: 1rem; white-space: nowrap; } .legend svg { vertical-align: -2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: right; vertical-align: top; }
td.text, th.text { text-align: left; }
summary { cursor: pointer; margin-top: 1rem; }
"""

TEXT = ("case", "provider", "notes", "name", "value", "state", "why", "error", "site")


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page of one or several results."""
    return _document([_section(result) for result in results])


def _document(parts: Sequence[str]) -> str:
    title, body = "vitfast benchmarks", "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def campaign_page(content: Mapping[str, Any]) -> str:
    """The page of a campaign (`benchmarks/campaign_file.py`): how its steps went, then what each measured."""
    steps = content["steps"]
    rows = [(name, step["state"], f"{step['seconds']:.0f} s", step.get("why", "")) for name, step in steps.items()]
    culprits = [(name, *(c[key] for key in TEXT_OF_CULPRIT)) for name, step in steps.items() for c in step["culprits"]]
    parts = ["<h2>Steps</h2>", _table(("name", "state", "seconds", "why"), rows)]
    if culprits:
        parts += ["<h2>What failed or was wrong</h2>", _table(("name", *TEXT_OF_CULPRIT), culprits)]
    for step in steps.values():
        if failed := (step.get("answer") or {}).get("failed"):
            named = [(test["name"], test["message"]) for test in failed]
            parts += ["<h2>Tests that failed</h2>", _table(("name", "value"), named)]
    plans = [(name, *_plan(row)) for name, step in steps.items() for row in _rows(step) if "plan_s" in row]
    if plans:
        said = f"What measuring cost when it was done; at most {GPU_SECONDS:.0f} s, and the measurement it is in then."
        columns = ("name", "case", "provider", "seconds", "value")
        parts += ["<h2>Plans</h2>", f'<p class="soft">{said}</p>', _table(columns, plans)]
    return _document(parts + [_section(step["result"]) for step in steps.values() if step.get("result")])


TEXT_OF_CULPRIT = ("case", "provider", "error")


def _rows(step: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (step.get("result") or {}).get("rows", ())


def _plan(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row says about the plan of its engine."""
    choices = ", ".join(f"{site}: {backend}" for site, backend in row["plan"].items())
    return row["case"], row["provider"], f"{row['plan_s']:.1f} s", choices


def _section(result: Mapping[str, Any]) -> str:
    if result["kind"] not in COLUMNS:
        raise ValueError(f"there is no page for results of kind {result['kind']!r}, only for {', '.join(COLUMNS)}")
    rows = result["rows"]
    timed = list(dict.fromkeys(row["provider"] for row in rows if row["correct"]))
    styles = svg.style_of(timed)
    entry = result["environment"]
    made = f"torch {entry['torch']}; commit {commit(entry)}; {entry['date']}"
    parts = [
        f"<h2>{escape(result['kind'])} on {escape(machine(entry))}</h2>",
        f'<p class="soft">{escape(made)}</p>',
    ]
    if roofline := svg.roofline(rows, result["roofs"], styles):
        parts += ["<h3>Roofline</h3>", svg.legend(timed, styles), roofline]
    if moved := drift(result["roofs"]):
        parts.append(f'<p class="soft">The roofs, measured before and after the run, differ by up to {moved:.0%}.</p>')
    if result["kind"] == "serve":
        parts += _served(rows, timed, styles)
        shown: list[str] = []
    else:
        baseline = escape(str(result["method"].get("baseline")))
        parts.append(f'<p class="soft">Bars: median ms, whiskers p20 to p80. ×: times as fast as {baseline}.</p>')
        shown = list(dict.fromkeys(row["case"] for row in rows))
    for case in shown:
        mine = [row for row in rows if row["case"] == case]
        parts += [f"<h3>{escape(case)}</h3>", svg.bars(mine, styles)]
    columns = tuple(dict.fromkeys(("case", *COLUMNS[result["kind"]])))
    parts.append(_details("All rows", _table(columns, [cells(row, columns) for row in rows])))
    for row in (row for row in rows if "sites" in row):
        title = f"Where the time of a forward goes: {row['case']}, {row['provider']}"
        parts.append(_details(title, _table(SITE_COLUMNS, site_cells(row["sites"]))))
    if result["not_run"]:
        parts.append(f"<p>No time for: {escape('; '.join(result['not_run']))}</p>")
    facts = {**_flat(entry), **_flat(result["method"], "method "), **_flat(result["roofs"], "roof ")}
    parts.append(_details("Environment", _table(("name", "value"), facts.items())))
    return "\n".join(parts)


def _served(rows: Sequence[Mapping[str, Any]], timed: Sequence[str], styles: svg.Styles) -> list[str]:
    """How long requests waited at each rate, and in words what else was found."""
    parts = []
    if curve := svg.latency(rows, styles):
        said = "Median (solid) and p99 (dashed) of answered requests by offered load; a ring is the knee."
        parts += [svg.legend(timed, styles), curve, f'<p class="soft">{said}</p>']
    lines = []
    for row in rows:
        if not row["correct"]:
            lines.append(f"{row['case']}, {row['provider']}: {row['error']}")
        elif "engine_ratio" in row:
            lines.append(f"{row['provider']}, saturated: {row['engine_ratio']:.2f} of the engine's rate in batches")
        elif "added_ms" in row:
            lines.append(f"{row['provider']}, idle: {row['added_ms']:.2f} ms beyond the engine alone")
        elif "flooded" in row["case"]:
            waited = f"p99 of those answered {row['p99_ms']:.0f} ms"
            lines.append(f"{row['provider']}, {row['case']}: {row['refused']} of {row['sent']} refused, {waited}")
    return [*parts, "<ul>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by spaces."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _details(title: str, body: str) -> str:
    return f'<details><summary>{escape(title)}</summary><div class="scroll">{body}</div></details>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    kind = ['class="text"' if name in TEXT else "" for name in columns]
    head = "".join(f"<th {k}>{escape(HEADINGS.get(name, name))}</th>" for k, name in zip(kind, columns, strict=True))
    lines = (
        "<tr>" + "".join(f"<td {k}>{_cell(value)}</td>" for k, value in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))
