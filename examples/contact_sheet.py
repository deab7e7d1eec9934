"""A picture of nearest neighbours: each photo beside the photos whose embeddings are closest to its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

INK, SOFT, FAINT, CARD, PAPER, ACCENT = "#1f2328", "#59636e", "#d8dee4", "#f6f8fa", "#ffffff", "#0969da"
MARGIN, GUTTER, PADDING = 48, 24, 18
QUERY, NEIGHBOUR, GAP, BEFORE_NEIGHBOURS = 176, 148, 16, 44
"""Sides of the thumbnails and the spaces between them, in pixels."""
NAME_SIZE, SCORE_SIZE = 16, 18


@dataclass(frozen=True)
class Neighbours:
    """For each of n photos the indices [n, k] of its nearest others and their cosine similarities [n, k]."""

    index: np.ndarray
    similarity: np.ndarray

    def mutual(self, i: int) -> bool:
        """Whether photo i and its nearest neighbour have each other as nearest neighbour."""
        return bool(self.index[self.index[i, 0], 0] == i)


def nearest(embeddings: np.ndarray, k: int = 3) -> Neighbours:
    """The k nearest other rows of each row of [n, E], by cosine similarity, nearest first."""
    if not 1 <= k < len(embeddings):
        raise ValueError(f"k must be between 1 and {len(embeddings) - 1} (one less than the photos), got {k}")
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    index = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return Neighbours(index, np.take_along_axis(cosine, index, axis=1))


def draw_sheet(
    photos: Sequence[Path],
    neighbours: Neighbours,
    *,
    title: str,
    caption: Sequence[str],
    credit: str = "",
    queries: Sequence[int] | None = None,
    columns: int = 2,
) -> Image.Image:
    """One card per query photo (all by default): the photo, then its nearest neighbours left to right.

    Under each neighbour stand its cosine similarity, as a number and as a bar from 0 to 1, and its
    name. Nearest neighbours that choose each other are framed. Thumbnails show the central square,
    which is what a model with centre crop sees.
    """
    queries = range(len(photos)) if queries is None else queries
    rows = -(-len(queries) // columns)
    k = neighbours.index.shape[1]
    card_width = 2 * PADDING + QUERY + BEFORE_NEIGHBOURS + k * NEIGHBOUR + (k - 1) * GAP
    card_height = 2 * PADDING + QUERY + 9 + NAME_SIZE + 6
    header = MARGIN + 44 + 14 + 26 * len(caption) + 22
    width = 2 * MARGIN + columns * card_width + (columns - 1) * GUTTER
    height = header + rows * (card_height + GUTTER) + NAME_SIZE + MARGIN // 2
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), title, INK, font=_font(36))
    for i, line in enumerate(caption):
        draw.text((MARGIN, MARGIN + 50 + 26 * i), line, SOFT, font=_font(19))
    for cell, query in enumerate(queries):
        row, column = divmod(cell, columns)
        left = MARGIN + column * (card_width + GUTTER)
        top = header + row * (card_height + GUTTER)
        draw.rounded_rectangle((left, top, left + card_width, top + card_height), 12, CARD, FAINT)
        _draw_card(sheet, draw, (left + PADDING, top + PADDING), photos, neighbours, query)
    draw.text((MARGIN, height - NAME_SIZE - MARGIN // 2), credit, SOFT, font=_font(NAME_SIZE))
    return sheet


def with_256_colours(sheet: Image.Image) -> Image.Image:
    """A palette version, a quarter of the size as a PNG; the sheet's own plain colours stay exact."""
    plain = [ImageColor.getrgb(colour) for colour in (PAPER, CARD, INK, SOFT, FAINT, ACCENT)]
    photos = sheet.quantize(256 - len(plain), method=Image.Quantize.FASTOCTREE)
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for colour in plain for channel in colour] + photos.getpalette())
    reduced = sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    index, pixels = np.array(reduced), np.asarray(sheet)
    for i, colour in enumerate(plain):  # Pillow's search is approximate and would tint the paper
        index[(pixels == colour).all(axis=-1)] = i
    exact = Image.fromarray(index)
    exact.putpalette(reduced.getpalette())
    return exact


def _draw_card(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    photos: Sequence[Path],
    neighbours: Neighbours,
    query: int,
) -> None:
    x, y = corner
    mutual = neighbours.mutual(query)
    _paste(sheet, draw, photos[query], (x, y), QUERY, mutual)
    _name(draw, (x, y + QUERY + 9), QUERY, photos[query], INK)
    x += QUERY
    middle = y + NEIGHBOUR // 2
    draw.line((x + 12, middle, x + 30, middle), SOFT, 2)
    draw.polygon([(x + 34, middle), (x + 26, middle - 5), (x + 26, middle + 5)], SOFT)
    x += BEFORE_NEIGHBOURS
    pairs = zip(neighbours.index[query], neighbours.similarity[query], strict=True)
    for rank, (other, similarity) in enumerate(pairs):
        framed = mutual and rank == 0
        _paste(sheet, draw, photos[other], (x, y), NEIGHBOUR, framed)
        score = f"{similarity:.3f}"
        below = y + NEIGHBOUR + 8
        draw.text((x, below), score, ACCENT if framed else INK, font=_font(SCORE_SIZE))
        start = x + 56
        draw.rounded_rectangle((start, below + 7, x + NEIGHBOUR, below + 13), 3, FAINT)
        end = start + round((NEIGHBOUR - 56) * max(float(similarity), 0.0))
        draw.rounded_rectangle((start, below + 7, end, below + 13), 3, ACCENT if framed else SOFT)
        _name(draw, (x, below + 29), NEIGHBOUR, photos[other], SOFT)
        x += NEIGHBOUR + GAP


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, photo: Path, corner: tuple[int, int], side: int, framed: bool
) -> None:
    """Paste the photo's central square with rounded corners."""
    with Image.open(photo) as image:
        thumbnail = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), 32, 255)
    sheet.paste(thumbnail, corner, mask.resize((side, side), Image.Resampling.LANCZOS))
    if framed:
        x, y = corner
        draw.rounded_rectangle((x - 4, y - 4, x + side + 3, y + side + 3), 11, None, ACCENT, 4)


def _name(draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, photo: Path, fill: str) -> None:
    """Write the photo's file name, without underscores, shortened until it fits the width."""
    font, text = _font(NAME_SIZE), photo.stem.replace("_", " ")
    shown = text
    while len(text) > 1 and draw.textlength(shown, font=font) > width:
        text = text[:-1]
        shown = text.rstrip() + "…"
    draw.text(corner, shown, fill, font=font)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
