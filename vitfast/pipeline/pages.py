"""Pages that show what a folder of embeddings holds: a contact sheet of an answer, a map of the whole. Each is one file
that needs nothing else, no network included."""

from __future__ import annotations

import colorsys
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitfast.pipeline.by_key import name_of
from vitfast.pipeline.search import Match

_STYLE = """
:root{color-scheme:light dark}
body{margin:0;font:14px/1.4 system-ui,sans-serif}
header{padding:12px 16px;border-bottom:1px solid #8884}
h1{font-size:16px;margin:0;overflow-wrap:anywhere}
h2{font-size:14px;margin:16px 16px 0}
p{margin:4px 0 0;opacity:.75}
.sheet{display:grid;gap:12px;padding:16px;grid-template-columns:repeat(auto-fill,minmax(160px,1fr))}
figure{margin:0;padding:8px;border:1px solid #8884;border-radius:6px}
figure.query{outline:2px solid #2a7de1}
.box{height:160px;display:flex;align-items:center;justify-content:center;opacity:.9}
.box img{max-width:100%;max-height:160px}
figcaption{margin-top:6px;overflow-wrap:anywhere;font-size:12px}
figcaption b{font-variant-numeric:tabular-nums}
"""


def _page(title: str, body: str, style: str = "") -> str:
    icon = '<link rel="icon" href="data:,">'  # else a browser asks for one
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{icon}'
    return (
        f"<!doctype html><html lang=en><head>{head}<title>{html.escape(title)}</title><style>{_STYLE}{style}</style>"
        f"</head><body>{body}</body></html>\n"
    )


def contact_sheet(query: str, remark: str, matches: Sequence[Match], thumbnails: Mapping[str, str]) -> str:
    """A page with the pictures of an answer, best first.

    Args:
        query: a key that has a thumbnail is shown first; a sentence stands in the title.
        remark: a line below it. thumbnails: key -> data URL; the others are shown by name.
    """
    figures = [_figure(query, "query", thumbnails, "query")] if query in thumbnails else []
    figures += [_figure(match.path, f"{match.similarity:.4f}", thumbnails) for match in matches]
    return _page(f"Similar to {name_of(query)}", f"{_header(query, remark)}<div class=sheet>{''.join(figures)}</div>")


GROUPS_SHOWN, OF_A_GROUP = 200, 24
"""How many groups a page has, and how many images each."""


def groups_page(title: str, groups: Sequence[Sequence[Match]], thumbnails: Mapping[str, str]) -> str:
    """A page with the pictures of groups, each beginning with the image that the others are compared with.

    Args:
        groups: of them the first GROUPS_SHOWN are shown, OF_A_GROUP of each. thumbnails: key -> data URL.
    """
    parts = []
    for first, *others in groups[:GROUPS_SHOWN]:
        figures = [_figure(first.path, "first", thumbnails, "query")]
        figures += [_figure(m.path, f"{m.similarity:.4f}", thumbnails) for m in others[: OF_A_GROUP - 1]]
        more = f", {OF_A_GROUP} shown" if len(others) >= OF_A_GROUP else ""
        parts.append(f"<h2>{len(others) + 1} images{more}</h2><div class=sheet>{''.join(figures)}</div>")
    remark = f"{len(groups)} groups" + (f", {GROUPS_SHOWN} shown" if len(groups) > GROUPS_SHOWN else "")
    return _page(title, _header(title, remark) + "".join(parts))


def _header(title: str, remark: str) -> str:
    return f"<header><h1>{html.escape(title)}</h1><p>{html.escape(remark)}</p></header>"


def _figure(key: str, score: str, thumbnails: Mapping[str, str], kind: str = "") -> str:
    picture = f'<img src="{thumbnails[key]}" alt="">' if key in thumbnails else "cannot be read"
    caption = f"<b>{score}</b> {html.escape(name_of(key))}"
    return (
        f'<figure class="{kind}" title="{html.escape(key)}"><div class=box>{picture}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def principal_axes(vectors: np.ndarray, block: int = 16384) -> tuple[np.ndarray, list[float]]:
    """Vectors [N, E] on the two axes along which they differ most: float32 [N, 2], and the axes' shares of variance."""
    mean = vectors.mean(0, dtype=np.float64)
    covariance = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(vectors), block):
        centred = vectors[start : start + block] - mean
        covariance += centred.T @ centred
    values, axes = np.linalg.eigh(covariance)
    axes = axes[:, ::-1][:, :2]
    axes *= np.where(axes[np.abs(axes).argmax(0), range(axes.shape[1])] < 0, -1, 1)  # a sign that stays the same
    points = np.zeros((len(vectors), 2), np.float32)
    for start in range(0, len(vectors), block):
        points[start : start + block, : axes.shape[1]] = (vectors[start : start + block] - mean) @ axes
    shares = values[::-1][:2] / max(values.sum(), 1e-30)
    return points, [float(share) for share in shares]


def _colours(count: int) -> list[str]:
    hues = (colorsys.hls_to_rgb((0.61 + i * 0.618034) % 1, 0.5, 0.65) for i in range(count))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in hues]


_GREY = "#888888"
MOST_GROUPS = 20
"""Values of a column that have a colour of their own: the most frequent ones."""


def map_page(
    title: str,
    remark: str,
    keys: Sequence[str],
    points: np.ndarray,
    thumbnails: Mapping[str, str],
    groups: Sequence[Any] | None = None,
) -> str:
    """A page with a point for every image, that can be moved and zoomed; pictures where there is room for them.

    Args:
        points: [N, 2]. thumbnails: of some or all keys, as data URLs. groups: a value for each image, to colour it by.
    """
    low, high = points.min(0), points.max(0)
    scaled = (points - low) / np.maximum((high - low).max(), 1e-30)
    texts = ["none" if group is None else str(group) for group in groups] if groups is not None else [""] * len(keys)
    names, counts = np.unique(np.array(texts, object), return_counts=True)
    frequent = [str(name) for name in names[np.argsort(-counts, kind="stable")][:MOST_GROUPS]]
    number = {name: i for i, name in enumerate(frequent)}
    hues = iter(_colours(len(frequent)))
    colours = [_GREY if name == "none" else next(hues) for name in frequent]
    data = {
        "names": [name_of(key) for key in keys],
        "x": [round(float(x), 5) for x in scaled[:, 0]],
        "y": [round(float(1 - y), 5) for y in scaled[:, 1]],
        "group": [number.get(text, -1) for text in texts],
        "groups": frequent,
        "colours": colours,
        "pictures": {i: thumbnails[key] for i, key in enumerate(keys) if key in thumbnails},
    }
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in zip(frequent, colours, strict=True)
        if groups is not None
    )
    if len(names) > MOST_GROUPS:
        legend += f'<span><i style="background:{_GREY}"></i>{len(names) - MOST_GROUPS} others</span>'
    content = json.dumps(data).replace("<", "\\u003c")  # so that no name ends the script
    body = (
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(remark)}</p><div class=legend>{legend}</div></header>"
        "<main><canvas></canvas><div id=tip hidden></div></main>"
        f'<script type="application/json" id=data>{content}</script><script>{_SCRIPT}</script>'
    )
    return _page(title, body, _MAP_STYLE)


_MAP_STYLE = """
html,body{height:100%}body{display:flex;flex-direction:column}
main{flex:1;position:relative;min-height:0}canvas{position:absolute;inset:0;width:100%;height:100%;cursor:grab}
#tip{position:absolute;pointer-events:none;background:Canvas;border:1px solid #8888;border-radius:6px;padding:6px;
max-width:200px;font-size:12px;overflow-wrap:anywhere}#tip img{display:block;max-width:180px;max-height:180px}
.legend span{margin-right:12px;white-space:nowrap}.legend i{display:inline-block;width:10px;height:10px;
border-radius:5px;margin-right:4px}
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.querySelector("canvas"), tip = document.getElementById("tip");
const context = canvas.getContext("2d"), images = new Map();
for (const [i, url] of Object.entries(data.pictures)) {
  const image = new Image();
  image.onload = draw;
  image.src = url;
  images.set(Number(i), image);
}
let scale = 1, left = 0, top_ = 0, fitted = false;
const colour = i => data.group[i] < 0 ? "#888888" : data.colours[data.group[i]];
const at = i => [left + data.x[i] * scale, top_ + data.y[i] * scale];
function fit() {
  const box = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
  canvas.width = box.width * ratio; canvas.height = box.height * ratio;
  if (!fitted) {
    scale = Math.max(Math.min(box.width, box.height) - 80, 50);
    left = (box.width - scale) / 2; top_ = (box.height - scale) / 2; fitted = true;
  }
  draw();
}
let waiting = false;
function draw() { if (!waiting) { waiting = true; requestAnimationFrame(paint); } }
function paint() {
  waiting = false;
  const ratio = devicePixelRatio || 1, width = canvas.width / ratio, height = canvas.height / ratio;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const side = Math.min(96, Math.max(20, scale / 16)), taken = new Set();
  const pictures = [];
  for (let i = 0; i < data.x.length; i++) {
    const [x, y] = at(i);
    if (x < -side || y < -side || x > width + side || y > height + side) continue;
    context.fillStyle = colour(i);
    context.beginPath(); context.arc(x, y, 3, 0, 7); context.fill();
    const image = images.get(i), cell = Math.round(x / side) + ":" + Math.round(y / side);
    if (!image || !image.complete || !image.naturalWidth || taken.has(cell)) continue;
    taken.add(cell);
    pictures.push([i, x, y]);
  }
  for (const [i, x, y] of pictures) {
    const image = images.get(i), fit = side / Math.max(image.naturalWidth, image.naturalHeight);
    const w = image.naturalWidth * fit, h = image.naturalHeight * fit;
    context.drawImage(image, x - w / 2, y - h / 2, w, h);
    context.strokeStyle = colour(i); context.lineWidth = 2; context.strokeRect(x - w / 2, y - h / 2, w, h);
  }
}
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const factor = Math.exp(-event.deltaY / 400), x = event.offsetX, y = event.offsetY;
  left = x - (x - left) * factor; top_ = y - (y - top_) * factor; scale *= factor; draw();
}, {passive: false});
let held = null;
canvas.addEventListener("pointerdown", event => { held = [event.clientX, event.clientY]; });
addEventListener("pointerup", () => { held = null; });
canvas.addEventListener("pointermove", event => {
  if (held) {
    left += event.clientX - held[0]; top_ += event.clientY - held[1]; held = [event.clientX, event.clientY]; draw();
    return;
  }
  let best = -1, least = 400;
  for (let i = 0; i < data.x.length; i++) {
    const [x, y] = at(i), distance = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
    if (distance < least) { least = distance; best = i; }
  }
  tip.hidden = best < 0;
  if (best < 0) return;
  tip.replaceChildren();
  const image = images.get(best);
  if (image) tip.append(image.cloneNode());
  const group = data.group[best] >= 0 && data.groups[data.group[best]];
  tip.append(data.names[best] + (group ? " (" + group + ")" : ""));
  tip.style.left = Math.min(event.offsetX + 14, canvas.clientWidth - 210) + "px";
  tip.style.top = Math.min(event.offsetY + 14, canvas.clientHeight - 220) + "px";
});
addEventListener("resize", fit);
fit();
"""
