"""Two results of one machine, row by row: same, faster or slower, each change against the noise of both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_CHANGE = 0.03
"""A change of the median below this is "same", however quiet the rows are: code moves in memory."""

SAME_MACHINE = ("gpu", "cpu", "threads")


@dataclass(frozen=True)
class Change:
    """One case and provider. `change`: of the median, -0.1 for a tenth less time; `noise`: what it must exceed."""

    case: str
    provider: str
    verdict: str
    """same, faster, slower, incorrect (now), fixed, missing (has no time now) or new."""
    before_ms: float | None = None
    after_ms: float | None = None
    change: float | None = None
    noise: float | None = None

    @property
    def regression(self) -> bool:
        """Whether something of ours became worse. Other people's kernels only show how steady the machine is."""
        return self.provider.startswith("vitfast") and self.verdict in ("slower", "incorrect", "missing")


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """One Change per case and provider that has a time in either result.

    The noise of a change is half the p20-to-p80 distance of both rows together: the least change at which the two
    intervals, laid around their medians, no longer meet; but at least LEAST_CHANGE.

    Raises:
        ValueError: if the results are of different machines.
    """
    for name in SAME_MACHINE:
        first, second = (result["environment"].get(name) for result in (before, after))
        if first != second:
            raise ValueError(f"results of different machines cannot be compared: {name} {first!r} and {second!r}")
    old, new = ({(row["case"], row["provider"]): row for row in result["rows"]} for result in (before, after))
    changes = []
    for key in dict.fromkeys((*old, *new)):
        change = _change(key, old.get(key, {}), new.get(key, {}))
        if change:
            changes.append(change)
    return changes


def _change(key: tuple[str, str], old: Mapping[str, Any], new: Mapping[str, Any]) -> Change | None:
    first, second = old.get("median_ms"), new.get("median_ms")
    if first is None and second is None:
        was, now = ("incorrect" in str(row.get("error", "")) for row in (old, new))
        return Change(*key, "incorrect") if now and not was else None
    if second is None:
        wrong = "incorrect" in str(new.get("error", ""))
        return Change(*key, "incorrect" if wrong else "missing", before_ms=first)
    if first is None:
        return Change(*key, "fixed" if old else "new", after_ms=second)
    change = second / first - 1
    noise = max(LEAST_CHANGE, (old["spread"] + new["spread"]) / 2)
    verdict = "same" if abs(change) <= noise else "slower" if change > 0 else "faster"
    return Change(*key, verdict, first, second, change, noise)


def render(changes: Sequence[Change]) -> Any:
    """The changes as a table, and how steady the machine was by the providers that are not ours."""
    from rich.table import Table

    table = Table(title="change of the median; noise: what a change must exceed")
    for column in ("case", "provider", "verdict"):
        table.add_column(column, overflow="fold")
    for column in ("before ms", "after ms", "change", "noise"):
        table.add_column(column, justify="right")
    styles = {"slower": "red", "incorrect": "red", "missing": "yellow", "faster": "green", "fixed": "green"}
    for c in changes:
        times = ("" if ms is None else f"{ms:.4g}" for ms in (c.before_ms, c.after_ms))
        shares = ("" if share is None else f"{share:+.1%}" for share in (c.change, c.noise))
        table.add_row(c.case, c.provider, c.verdict, *times, *shares, style=styles.get(c.verdict))
    others = [c.change for c in changes if c.change is not None and not c.provider.startswith("vitfast")]
    lines: list[Any] = [table]
    if others:
        lines.append(
            f"providers that are not ours moved by {statistics.median(others):+.1%} (median): the machine's own drift"
        )
    regressions = [c for c in changes if c.regression]
    lines.append(f"{len(regressions)} regression(s) of {len(changes)} rows")
    return lines
