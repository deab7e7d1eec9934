"""What embedding costs, calculated from result files: images an hour, and dollars a million images.

    vitfast bench cost benchmarks/results/cpu/2026-11-28-faa350650-model.json --price 0.05 --devices 4

A calculation, not a measurement: N devices are taken for N times one, and nothing is added for reading, storage or what
stands idle. Rates are those of the files; what a device costs an hour is the reader's to say, for there are no prices
here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitfast.benchmarks.result_file import machine

if TYPE_CHECKING:
    from rich.table import Table

ALONE, WHOLE = "the model alone", "decoded, embedded and written"
"""What was measured: an upper bound of a pipeline's rate, or that rate."""


def costs(result: Mapping[str, Any], price: float, devices: int = 1) -> list[dict[str, Any]]:
    """What the rates of a result file come to, a row each, those of ours that were right.

    Args:
        result: a file of kind "model" or "pipeline", as `result_file.read` gives it.
        price: of one device, dollars an hour. devices: how many work side by side.

    Returns:
        case, provider, machine, measured (ALONE or WHOLE), images_per_s of one device, devices, images_per_hour of all,
        hours_per_million, dollars_per_million.

    Raises:
        ValueError: if the price is not positive, there is no device, or the file has no rates.
    """
    if not 0 < price < math.inf or devices < 1:
        raise ValueError(f"price must be positive and devices at least 1, got {price} and {devices}")
    rates = list(_rates(result))
    if not rates:
        raise ValueError(f"a result file of kind {result['kind']!r} with no rate of ours has nothing to calculate with")
    return [
        {
            **rate,
            "machine": machine(result["environment"]),
            "devices": devices,
            "images_per_hour": rate["images_per_s"] * 3600 * devices,
            "hours_per_million": 1e6 / (rate["images_per_s"] * 3600 * devices),
            "dollars_per_million": 1e6 / (rate["images_per_s"] * 3600) * price,
        }
        for rate in rates
    ]


def _rates(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    if result["kind"] == "model":
        return [
            {"case": row["case"], "provider": row["provider"], "measured": ALONE, "images_per_s": row["images_per_s"]}
            for row in result["rows"]
            if row["provider"].startswith("vitfast") and row.get("correct") and "images_per_s" in row
        ]
    if result["kind"] == "pipeline":
        return [
            {
                "case": row["case"],
                "provider": "vitfast",
                "measured": what,
                "images_per_s": row["images_per_second"][stage],
            }
            for row in result["rows"]
            for what, stage in ((WHOLE, "pipeline"), (ALONE, "model"))
        ]
    return []


def render(rows: Sequence[Mapping[str, Any]], price: float) -> Table:
    """The rows as a table that says what it is."""
    from rich import box
    from rich.table import Table

    devices = rows[0]["devices"]
    title = f"calculated from measured img/s of one device: {devices} x {price:g} dollars an hour, {devices} taken for "
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title=f"{title}{devices} times one")
    table.title_justify = "left"
    for name in ("case", "provider", "measured", "device"):
        table.add_column(name)
    for name in ("img/s", "images an hour", "hours a million", "dollars a million"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["case"],
            row["provider"],
            row["measured"],
            row["machine"],
            f"{row['images_per_s']:.1f}",
            f"{row['images_per_hour']:,.0f}",
            f"{row['hours_per_million']:,.2f}",
            f"{row['dollars_per_million']:,.2f}",
        )
    return table
