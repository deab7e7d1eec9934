"""Plots as SVG text, by hand: bars of one case and a roofline. Hovering shows a <title>; there is no script.

Colours are those of Okabe and Ito (2002), which colour-blind readers can tell apart; in the roofline each provider
also has a shape of its own. Text and lines take the page's colours by CSS classes, so that a dark page works.
The roofline is that of Williams, Waterman, Patterson 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

from vitfast.benchmarks.result_file import number, product_roofs

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")
SHAPES = ("circle", "square", "diamond", "triangle", "cross")
GREY = "#8a8f98"

LABEL, BAR, ROW = 210, 430, 24

Styles: TypeAlias = "Mapping[str, tuple[str, str]]"
"""Provider -> (colour, shape)."""


def style_of(providers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Provider -> (colour, shape). What is ours comes first, the plain libraries are grey."""
    ours = sorted(name for name in providers if name.startswith("vitfast"))
    grey = [name for name in providers if name in ("torch eager", "timm eager")]
    rest = [name for name in providers if name not in ours and name not in grey]
    styles = dict.fromkeys(grey, (GREY, "circle"))
    for i, name in enumerate([*ours, *rest]):
        styles[name] = (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)])
    return styles


def bars(rows: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str]]) -> str:
    """One bar per provider of a case: the median, a whisker from p20 to p80, milliseconds and the ratio.

    A wrong provider has no bar, only the word; an absent one is left out.
    """
    shown = [row for row in rows if row["correct"] or str(row.get("error", "")).startswith("incorrect")]
    longest = max((row["p80_ms"] for row in shown if row["correct"]), default=1.0)
    width, height = LABEL + BAR + 190, ROW * len(shown) + 4
    parts = [f'<svg class="bars" viewBox="0 0 {width} {height}" width="{width}" role="img">']
    for i, row in enumerate(shown):
        y = i * ROW + 2
        middle = y + ROW / 2 - 1
        parts.append(f'<text class="label" x="{LABEL - 8}" y="{middle + 4:.1f}">{escape(row["provider"])}</text>')
        if not row["correct"]:
            title = escape(row["error"])
            parts.append(f'<text class="wrong" x="{LABEL}" y="{middle + 4:.1f}">incorrect<title>{title}</title></text>')
            continue
        end, low, high = (LABEL + BAR * row[name] / longest for name in ("median_ms", "p20_ms", "p80_ms"))
        ratio = "" if row.get("ratio") is None else f"  {row['ratio']:.2f}×"
        text = f"{number(row['median_ms'])} ms{ratio}"
        title = escape(
            f"{row['case']}\n{row['provider']}: median {number(row['median_ms'])} ms, "
            f"p20 {number(row['p20_ms'])}, p80 {number(row['p80_ms'])}"
        )
        parts += [
            f'<g><title>{title}</title><rect x="{LABEL}" y="{y + 2}" width="{end - LABEL:.1f}" height="{ROW - 6}" '
            f'rx="2" fill="{styles[row["provider"]][0]}"/>',
            f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 4:.1f}v8'
            f'M{high:.1f} {middle - 4:.1f}v8"/></g>',
            f'<text class="value" x="{max(end, high) + 8:.1f}" y="{middle + 4:.1f}">{text}</text>',
        ]
    return "\n".join([*parts, "</svg>"])


def roofline(rows: Sequence[Mapping[str, Any]], roofs: Mapping[str, Any], styles: Mapping[str, tuple[str, str]]) -> str:
    """TFLOP/s over FLOPs per byte, both logarithmic, under the roofs measured in the same run; "" without points."""
    points = [row for row in rows if row["correct"] and row.get("flops") and row.get("bytes")]
    roof_of = product_roofs(roofs)
    if not points or not roofs.get("copy_gb_per_s"):
        return ""
    bandwidth = roofs["copy_gb_per_s"] / 1e3  # TB/s: TFLOP/s at one FLOP a byte
    tops = {dtype: roof_of[dtype] for dtype in sorted({row["dtype"] for row in points}) if dtype in roof_of}
    intensities = [row["flops"] / row["bytes"] for row in points]
    ridge = [top / bandwidth for top in tops.values()]
    x = _Axis(min(intensities + ridge) / 4, max(intensities + ridge) * 4, 70, 720)
    rates = [row["tflops"] for row in points]
    y = _Axis(min(rates) / 2, max([*rates, *tops.values()]) * 1.6, 390, 20)
    parts = ['<svg class="roofline" viewBox="0 0 920 440" width="920" role="img">']
    parts += [
        f'<path class="grid" d="M{x.at(tick):.1f} 20V390"/>'
        f'<text class="tick" x="{x.at(tick):.1f}" y="408" text-anchor="middle">{tick:g}</text>'
        for tick in x.ticks()
    ]
    parts += [
        f'<path class="grid" d="M70 {y.at(tick):.1f}H720"/>'
        f'<text class="tick" x="62" y="{y.at(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in y.ticks()
    ]
    measured = f"roofs as measured: {number(roofs['copy_gb_per_s'])} GB/s, and TFLOP/s by dtype"
    parts.append(f'<text class="tick" x="395" y="430" text-anchor="middle">FLOP per byte ({measured})</text>')
    parts.append('<text class="tick" x="14" y="205" text-anchor="middle" transform="rotate(-90 14 205)">TFLOP/s</text>')
    free = 0.0  # labels stand right of the plot, where no point is, none on another
    for dtype, top in sorted(tops.items(), key=lambda item: -item[1]):
        start = max(x.low, y.low / bandwidth)
        corner = top / bandwidth
        parts.append(
            f'<path class="roof" d="M{x.at(start):.1f} {y.at(bandwidth * start):.1f}L{x.at(corner):.1f} '
            f'{y.at(top):.1f}H{x.at(x.high):.1f}"/>'
        )
        label = max(free, y.at(top) + 4)
        free = label + 15
        parts.append(f'<text class="tick" x="728" y="{label:.1f}">{dtype}: {number(top)}</text>')
    for row in points:
        title = escape(
            f"{row['case']}\n{row['provider']}: {number(row['tflops'])} TFLOP/s, {row['gb_per_s']:,.0f} GB/s"
        )
        colour, shape = styles[row["provider"]]
        parts.append(_mark(x.at(row["flops"] / row["bytes"]), y.at(row["tflops"]), colour, shape, title))
    return "\n".join([*parts, "</svg>"])


def latency(rows: Sequence[Mapping[str, Any]], styles: Styles) -> str:
    """Median and p99 in ms over offered requests a second, both logarithmic; "" where nothing was offered at rates."""
    points = [row for row in rows if row["correct"] and "offered_per_s" in row and "flooded" not in row["case"]]
    if not points:
        return ""
    rates, times = [row["offered_per_s"] for row in points], [row[key] for row in points for key in QUANTILES]
    x = _Axis(min(rates) / 1.1, max(rates) * 1.1, 70, 880)
    y = _Axis(min(times) / 1.3, max(times) * 1.3, 390, 20)
    parts = ['<svg class="latency" viewBox="0 0 920 440" width="920" role="img">']
    for tick in x.ticks():
        parts.append(f'<path class="grid" d="M{x.at(tick):.1f} 20V390"/>')
        parts.append(f'<text class="tick" x="{x.at(tick):.1f}" y="408" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M70 {y.at(tick):.1f}H880"/>')
        parts.append(f'<text class="tick" x="62" y="{y.at(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append('<text class="tick" x="475" y="430" text-anchor="middle">requests offered a second</text>')
    parts.append('<text class="tick" x="14" y="205" text-anchor="middle" transform="rotate(-90 14 205)">ms</text>')
    for name, (colour, shape) in styles.items():
        mine = sorted((row for row in points if row["provider"] == name), key=lambda row: row["offered_per_s"])
        for key, dashes in QUANTILES.items():
            at = [(x.at(row["offered_per_s"]), y.at(row[key])) for row in mine]
            line = "L".join(f"{across:.1f} {down:.1f}" for across, down in at)
            if len(at) > 1:
                parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
            for row, (across, down) in zip(mine, at, strict=True):
                what = f"{name}: {number(row['offered_per_s'])}/s, {key.removesuffix('_ms')} {number(row[key])} ms"
                parts.append(_mark(across, down, colour, shape, escape(what)))
                if row.get("knee"):
                    parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="10" fill="none" stroke="{colour}"/>')
    return "\n".join([*parts, "</svg>"])


QUANTILES = {"median_ms": "", "p99_ms": ' stroke-dasharray="6 4"'}
"""What is drawn of latency, and how its line is dashed."""


def legend(providers: Sequence[str], styles: Mapping[str, tuple[str, str]]) -> str:
    """Colour, shape and name of each provider."""
    items = (
        f'<span class="key"><svg width="14" height="14">{_mark(7, 7, *styles[name], "")}</svg> {escape(name)}</span>'
        for name in providers
    )
    return f'<p class="legend">{" ".join(items)}</p>'


class _Axis:
    """A logarithmic axis from `low` to `high`, drawn from one pixel to another."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high, self._first, self._last = low, high, first, last

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._first + share * (self._last - self._first)

    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 in between if there are few."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1,) if len(exponents) > 4 else (1, 2, 5)
        return [s * 10.0**e for e in exponents for s in steps if self.low <= s * 10.0**e <= self.high]


def _mark(x: float, y: float, colour: str, shape: str, title: str) -> str:
    r = 5
    paths = {
        "circle": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}Z",
        "diamond": f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}Z",
        "triangle": f"M{x:.1f} {y - r:.1f}l{r + 1} {2 * r}h{-2 * r - 2}Z",
        "cross": f"M{x - 2:.1f} {y - r:.1f}h4v{r - 2}h{r - 2}v4h{2 - r}v{r - 2}h-4v{2 - r}h{2 - r}v-4h{r - 2}Z",
    }
    return f'<path class="mark" fill="{colour}" d="{paths[shape]}"><title>{title}</title></path>'
