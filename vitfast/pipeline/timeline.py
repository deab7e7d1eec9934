"""How busy every stage of a run was over time, as a page."""

from __future__ import annotations

import contextlib
import html
import math
import threading
import time
from collections.abc import Iterator, Mapping

import numpy as np

STAGES = ("read", "decode", "resize", "model", "write")
_BINS = 600
_COLOURS = dict(zip(STAGES, ("#7a8793", "#2a7de1", "#17a398", "#e1662a", "#9a4fd1"), strict=True))


class Timeline:
    """Seconds that threads spent on each stage, in bins of time that grow with the run.

    Attributes:
        width: seconds of a bin. busy: stage -> seconds in each bin, all threads together, float64 [bins].
    """

    def __init__(self) -> None:
        self.width = 0.02
        self.busy = {stage: np.zeros(_BINS) for stage in STAGES}
        self._origin: float | None = None
        self._end = 0.0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def spent(self, stage: str) -> Iterator[None]:
        """Count the time of a block, in any thread."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, started, time.perf_counter())

    def add(self, stage: str, started: float, ended: float) -> None:
        """Count a stretch of time, by `time.perf_counter`."""
        with self._lock:
            self._origin = started if self._origin is None else self._origin
            begin, end = max(started - self._origin, 0.0), max(ended - self._origin, 0.0)
            while end >= _BINS * self.width:
                self.width *= 2
                for name, bins in self.busy.items():
                    self.busy[name] = np.concatenate([bins.reshape(-1, 2).sum(1), np.zeros(_BINS // 2)])
            self._end = max(self._end, end)
            edges = self.width * np.arange(int(begin / self.width), int(end / self.width) + 2)
            inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
            first = int(begin / self.width)
            self.busy[stage][first : first + len(inside)] += np.maximum(inside, 0.0)

    @property
    def seconds(self) -> float:
        """From the first stretch's beginning to the last one's end."""
        return self._end

    def shares(self, threads: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Stage -> how busy its threads were in each bin of the run, 0 to 1; `threads`: how many each has, else 1."""
        count = max(int(np.ceil(self._end / self.width)), 1)
        return {
            stage: np.clip(bins[:count] / (self.width * threads.get(stage, 1)), 0, 1)
            for stage, bins in self.busy.items()
        }

    def page(self, threads: Mapping[str, int], remark: str) -> str:
        """A page with a curve for each stage."""
        left, width, height, gap = 190, 860, 70, 26
        rows, total = [], self.seconds or 1.0
        for number, (stage, share) in enumerate(self.shares(threads).items()):
            top = 20 + number * (height + gap)
            steps = np.repeat(share, 2)
            at = np.repeat(np.minimum(np.arange(len(share) + 1) * self.width / total, 1), 2)[1:-1]
            points = " ".join(
                f"{left + width * x:.1f},{top + height * (1 - y):.1f}" for x, y in zip(at, steps, strict=True)
            )
            mean = self.busy[stage].sum() / (total * threads.get(stage, 1))
            of = f"{threads[stage]} threads" if threads.get(stage, 1) > 1 else "1 thread"
            rows.append(
                f'<text x="{left - 12}" y="{top + 30}" text-anchor="end" font-weight="600">{stage}</text>'
                f'<text x="{left - 12}" y="{top + 48}" text-anchor="end" opacity=".7">{of}, {mean:.0%} busy</text>'
                f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#8881"/>'
                f'<polygon fill="{_COLOURS[stage]}" '
                f'points="{left},{top + height} {points} {left + width},{top + height}"/>'
            )
        bottom = 20 + len(STAGES) * (height + gap)
        for tick in _ticks(total):
            x = left + width * tick / total
            rows.append(f'<text x="{x:.1f}" y="{bottom}" text-anchor="middle" opacity=".7">{tick:g} s</text>')
        picture = f'<div><svg viewBox="0 0 {left + width + 40} {bottom + 16}" role=img>{"".join(rows)}</svg></div>'
        return (
            '<!doctype html><html lang=en><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            "<title>Timeline of a run</title><style>:root{color-scheme:light dark}body{font:14px system-ui,sans-serif;"
            "margin:16px}h1{font-size:20px}div{overflow-x:auto}svg{max-width:1100px;min-width:800px;width:100%;"
            "font:12px system-ui,sans-serif}svg text{fill:currentColor}"
            f"</style></head><body><h1>How busy each stage was</h1><p>{html.escape(remark)}</p>{picture}"
            "</body></html>\n"
        )


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 to `end`, three to ten of them."""
    power = 10.0 ** math.floor(math.log10(end))
    step = next(step for step in (0.1 * power, 0.2 * power, 0.5 * power, power, 2 * power) if end / step < 9)
    return [round(number * step, 9) for number in range(int(end / step + 1e-9) + 1)]
