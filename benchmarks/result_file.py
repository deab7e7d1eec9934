"""Result files: what is in one, written whole and as soon as there is something; and the table for a person.

Schema 3, one JSON object:

    schema       3; older ones are read: 2 called a row's provider its peer, 1 had only name, environment and rows
    kind         "kernels", "model", "serve", or "pipeline", whose rows are those of `vitfast.benchmarks.pipeline`
    environment  commit, date, hardware, driver, versions, settings (`vitfast.benchmarks.environment`)
    method       how it was measured: rounds, baseline, the command's arguments
    roofs        what this very device reached on a large product and a large copy (`vitfast.benchmarks.roofs`)
    rows         one per case and provider: case, provider, correct, and either error or
                 median_ms, p20_ms, p80_ms, spread, noisy, rounds, ratio, timed_by, clocks, ...;
                 configs: those of the Triton kernels of ours that one call launches, in order;
                 sites: where the time of a forward goes, if that was asked for (`vitfast.benchmarks.site_times`)
    not_run      cases that there was no time for
    finished     cases whose rows are all there; a run that goes on leaves them alone

A row with `died` is of a provider that took its whole process with it, or hung: `error` says how. One with
`provisional` was timed alone, before the rounds in which all providers take turns.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitfast.benchmarks.device import Device
from vitfast.benchmarks.environment import ROOT, environment
from vitfast.benchmarks.timing import NOISY

SCHEMA = 3

COLUMNS = {
    "kernels": ("provider", "median_ms", "range", "tflops", "gb_per_s", "roof_share", "ratio", "notes"),
    "model": ("provider", "median_ms", "range", "images_per_s", "roof_share", "ratio", "cosine", "notes"),
    "serve": ("case", "provider", "median_ms", "p99_ms", "images_per_s", "refused", "mean_batch", "notes"),
}
"""What is shown of a row: its fields, or what `cells` makes of them."""

HEADINGS = {
    "median_ms": "ms", "p99_ms": "p99", "range": "p20–p80", "tflops": "TFLOP/s", "gb_per_s": "GB/s",
    "roof_share": "of roof", "images_per_s": "img/s", "mean_batch": "batch", "gflop_per_s": "GFLOP/s",
    "page_faults": "faults", "of_forward": "share", "gflop": "GFLOP",
}  # fmt: skip

SITE_COLUMNS = ("site", "calls", "median_ms", "of_forward", "gflop", "gflop_per_s", "roof_share", "page_faults")
"""What is shown of a site's row (see `vitfast.benchmarks.site_times`)."""

FORWARD = "forward"
"""What stands in place of a site for all of them together."""


class Results:
    """A result file in the making: rows come in, and the file is whole after every `add`.

    Args:
        resume: go on with the file at `path`, if there is one.
    """

    def __init__(
        self, kind: str, device: Device, method: dict[str, Any], path: Path | None = None, *, resume: bool = False
    ) -> None:
        entry = environment(device)
        self.path = path or _default_path(kind, device, entry)
        self.content: dict[str, Any] = {"schema": SCHEMA, "kind": kind, "environment": entry, "method": method}
        self.content |= {"roofs": {}, "rows": [], "not_run": [], "finished": []}
        if resume and self.path.is_file():
            self.content |= read(self.path) | {"method": method, "not_run": []}

    @property
    def finished(self) -> frozenset[str]:
        """Cases whose rows are all there."""
        return frozenset(self.content["finished"])

    @property
    def died(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(case, provider) -> the row of what took its process with it."""
        return {(row["case"], row["provider"]): row for row in self.rows if row.get("died")}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return self.content["rows"]

    def add(self, rows: Sequence[dict[str, Any]] = (), **content: Any) -> None:
        """Take rows, in place of those of the same case and provider; replace other parts, and write the file."""
        place = {(row["case"], row["provider"]): at for at, row in enumerate(self.rows)}
        for row in rows:
            key = (row["case"], row["provider"])
            if key in place:
                self.rows[place[key]] = row
            else:
                place[key] = len(self.rows)
                self.rows.append(row)
        self.content |= content
        _add_roof_share(self.rows, self.content["roofs"])
        for sites in (row["sites"] for row in self.rows if "sites" in row):
            _add_site_shares(sites, self.content["roofs"].get("instruction_tflops", {}))
        write(self.path, json.dumps(self.content, indent=1) + "\n")


def results_folder() -> Path:
    """benchmarks/results in a checkout; vitfast-results in the current folder of an installed package's user."""
    checkout = (ROOT / "pyproject.toml").is_file()
    return ROOT / "benchmarks" / "results" if checkout else Path("vitfast-results")


def _default_path(kind: str, device: Device, entry: dict[str, Any]) -> Path:
    name = f"{entry['date'][:10]}-{(entry['commit'] or 'nocommit')[:9]}-{kind}"
    folder = results_folder() / device.slug
    taken = {path.stem for path in folder.glob(f"{name}*.json")}
    number = next(n for n in range(1, 1000) if (name if n == 1 else f"{name}-{n}") not in taken)
    return folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")


def write(path: Path, text: str, *, part: Path | None = None) -> None:
    """Write a file in one step, so that nobody ever sees half of it.

    Args:
        part: where it stands until it is whole, on the same disk; by default beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = part or path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """A result file of any schema, with what later schemas added filled in.

    Raises:
        ValueError: if it is none, or of a schema that this version does not know.
    """
    try:
        result = json.loads(path.read_text())
        schema, rows = result["schema"], result["rows"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result file: {type(error).__name__}: {error}") from None
    if schema not in range(1, SCHEMA + 1):
        raise ValueError(f"{path} has schema {schema}; this version reads 1 to {SCHEMA}")
    if schema == 1:
        result |= {"kind": result["name"], "method": {}, "roofs": {}, "not_run": []}
        for row in rows:
            if row["correct"]:
                row["spread"] = (row["p80_ms"] - row["p20_ms"]) / row["median_ms"]
                row["noisy"] = row["spread"] > NOISY
    result.setdefault("finished", [])
    if schema < 3:
        result["rows"] = [_renamed(row) for row in rows]
    return result


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a schema before 3, with the names of today."""
    new = {"provider" if name == "peer" else name: value for name, value in row.items()}
    if new.get("op") in ("linear", "quantized_linear"):
        sizes = {"rows": "M", "inner": "K", "width": "N"}
        new["dims"] = {sizes.get(name, name): value for name, value in new["dims"].items()}
    return new


def machine(entry: dict[str, Any]) -> str:
    """The device of an environment, in words."""
    return entry.get("gpu") or f"{entry['cpu']}, {entry['threads']} threads"


def commit(entry: dict[str, Any]) -> str:
    """The commit of an environment, in short, and whether there were changes."""
    return (entry["commit"] or "unknown")[:9] + (" with changes" if entry.get("dirty") else "")


def write_csv(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """The rows of results as one table, with device, commit and date; nested values as JSON."""
    rows = []
    for result in results:
        entry = result["environment"]
        origin = {"device": machine(entry), "commit": entry["commit"], "date": entry["date"]}
        for row in result["rows"]:
            flat = {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()}
            rows.append(origin | flat)
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _add_roof_share(rows: Sequence[dict[str, Any]], roofs: dict[str, Any]) -> None:
    """`roof_share`: the time that the measured roofs allow, by the time taken. Above 1: served from a cache.

    For a kernel the longer of its product at the product's roof and its bytes at the copy's; for a whole model, whose
    bytes depend on how it is cut into kernels, the product alone: its share of this device's own matrix rate. A row's
    own roof, measured between its rounds, goes before that of the file.
    """
    if not roofs:
        return
    products = product_roofs(roofs)
    for row in rows:
        product = {**products, **row.get("instruction_tflops", {})}.get(row.get("dtype", ""))
        if "median_ms" not in row or "flops" not in row or (row["flops"] and not product):
            continue
        floors = {"memory": row.get("bytes", 0) / roofs["copy_gb_per_s"] / 1e6}
        if row["flops"]:
            floors["product"] = row["flops"] / product / 1e9
        row["roof_bound"] = max(floors, key=lambda kind: floors[kind])
        row["roof_share"] = floors[row["roof_bound"]] / row["median_ms"]


def product_roofs(roofs: Mapping[str, Any]) -> dict[str, float]:
    """TFLOP/s by dtype that a product is held against: of a CPU's own instruction where that is known, which no product
    can pass, else of the large product."""
    return {**roofs.get("tflops", {}), **roofs.get("instruction_tflops", {})}


def _add_site_shares(sites: Sequence[dict[str, Any]], roofs: Mapping[str, float]) -> None:
    """`roof_share`: the time that the machine's own instructions allow for a site's FLOPs, by the time taken; of the
    forward that of all its sites. Left out where a dtype has no such roof.

    Args:
        sites: rows of `vitfast.benchmarks.site_times`. roofs: TFLOP/s by dtype, where the forward's row has none.
    """
    forward = next(site for site in sites if site["site"] == FORWARD)
    roofs = forward.get("instruction_tflops", roofs)
    floors: list[float] = []
    products = [site for site in sites if "dtype" in site]
    for site in products:
        if roof := roofs.get(site["dtype"]):
            floors.append(site["flops"] / roof / 1e9)
            site["roof_share"] = floors[-1] / site["median_ms"]
    if floors and len(floors) == len(products):
        forward["roof_share"] = sum(floors) / forward["median_ms"]


def notes(row: dict[str, Any]) -> str:
    """What a reader must know about a row, in a few words."""
    if not row["correct"]:
        return row.get("error", "")
    throttled = row.get("throttled_by") or []
    remarks = [
        "8 bits" if row.get("eight_bit") else "",
        f"noisy: ±{row['spread'] / 2:.0%}" if row.get("noisy") else "",
        f"throttled: {', '.join(throttled)}" if throttled else "",
        "warm cache" if row.get("cold") is False else "",
        f"{row['engine_ratio']:.2f} of the engine's rate" if "engine_ratio" in row else "",
        f"{row['added_ms']:.2f} ms beyond the engine" if "added_ms" in row else "",
        "the knee" if row.get("knee") else "",
        row.get("note", ""),
    ]
    return "; ".join(part for part in remarks if part)


def table(result: dict[str, Any]) -> list[Any]:
    """Rows for a person, a table for each case, numbers to three digits; below, who did not run and why."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    absent: dict[str, dict[str, None]] = {}
    by = "model" if result["kind"] == "serve" else "case"  # each rate is a case of its own, of one row
    for title in dict.fromkeys(row[by] for row in result["rows"]):
        part = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in COLUMNS[result["kind"]]:
            text = name in ("case", "provider", "notes")
            part.add_column(
                HEADINGS.get(name, name), justify="left" if text else "right", overflow="fold",
                min_width=14 if name == "provider" else None,
            )  # fmt: skip
        for row in (row for row in result["rows"] if row[by] == title):
            if not row["correct"] and not row.get("error", "").startswith("incorrect"):
                absent.setdefault(row.get("error", ""), {})[row["provider"]] = None
                continue
            style = "red" if not row["correct"] else "yellow" if row.get("noisy") else None
            part.add_row(*map(Text, cells(row, COLUMNS[result["kind"]])), style=style)
        shown.append(part)
        shown += [_site_table(row) for row in result["rows"] if row[by] == title and "sites" in row]
    if baseline := result["method"].get("baseline"):
        shown.append(f"ratio: times as fast as {baseline}")
    shown += [f"did not run: {', '.join(providers)}: {why}" for why, providers in absent.items()]
    return shown + [f"no time for: {name}" for name in result["not_run"]]


def _site_table(row: dict[str, Any]) -> Any:
    """Where the time of a forward goes."""
    from rich import box
    from rich.table import Table

    part = Table(title=f"{row['provider']}, by site", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in SITE_COLUMNS:
        part.add_column(
            HEADINGS.get(name, name.replace("_", " ")), justify="left" if name == "site" else "right",
            overflow="fold", min_width=14 if name == "site" else None,
        )  # fmt: skip
    for line in site_cells(row["sites"]):
        part.add_row(*line)
    return part


def site_cells(sites: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Text of SITE_COLUMNS, a line for each row of `vitfast.benchmarks.site_times`."""
    forward = next(site["median_ms"] for site in sites if site["site"] == FORWARD)
    lines = []
    for site in sites:
        made = {**site, "of_forward": f"{site['median_ms'] / forward:.1%}"}
        made["gflop"] = site["flops"] / 1e9 if "flops" in site else None
        lines.append([_text(name, made.get(name)) for name in SITE_COLUMNS])
    return lines


def cells(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Text of a row's fields, numbers to three digits."""
    made = {**row, "notes": notes(row)}
    if row["correct"]:
        made["range"] = f"{number(row['p20_ms'])}–{number(row['p80_ms'])}"
    return [_text(name, made.get(name)) for name in columns]


def _text(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0%}" if name == "roof_share" else f"{value:.5f}" if name == "cosine" else number(value)
    return "" if value is None else str(value)


def number(value: float) -> str:
    """Three digits, no exponent."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"
