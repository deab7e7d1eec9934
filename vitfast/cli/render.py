"""What embed and classify print: lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vitfast.cli.answer import escaped

if TYPE_CHECKING:
    from vitfast.images.files import ImageListing
    from vitfast.pipeline.embed import Classified
    from vitfast.pipeline.stages import Stages
    from vitfast.pipeline.writing import Summary

FAILURES_SHOWN = 20
NAMES_SHOWN = 5


def embedding(summary: Summary, stages: Stages, listing: ImageListing, out: str, interrupted: bool) -> list[str]:
    """What a run of `embed` did: failures by name, remarks, one line of numbers."""
    lines = [f"failed: {escaped(path)}: {reason}" for path, reason in list(summary.failed.items())[:FAILURES_SHOWN]]
    if len(summary.failed) > FAILURES_SHOWN:
        lines.append(f"... and {len(summary.failed) - FAILURES_SHOWN} more; see the status column in {escaped(out)}")
    lines += remarks(summary.notes, listing)
    if summary.repaired:
        lines.append(f"repaired: {summary.repaired} rows of images that had another, newer or better one")
    skipped = f"{summary.skipped} skipped (done before)"
    if summary.changed:
        lines.append(_named("changed since they were embedded, and skipped (--refresh embeds them)", summary.changed))
    lines.append(
        f"{summary.done} done, {len(summary.failed)} failed, {skipped}, "
        f"{summary.images_per_second:.1f} img/s -> {escaped(out)}"
    )
    if advice := stages.advice():
        lines.append(advice)
    if interrupted:
        lines.append("interrupted; the same command goes on from here")
    return lines


def remarks(notes: Mapping[str, str], listing: ImageListing) -> list[str]:
    """What was done to unusual pictures, and what was left out: one line for each kind, with the first names."""
    lines = [_named(f"note: {note}", paths) for note, paths in _by_text(notes).items()]
    return lines + [_named(f"left out: {reason}", paths) for reason, paths in _by_text(listing.left_out).items()]


def classes(row: Classified) -> list[str]:
    """One image's classes, or why there are none."""
    from vitfast.images.files import path_text

    name = escaped(path_text(row.path))
    if row.status != "ok":
        return [f"{name}: failed: {row.status}"]
    shown = [f"{c['probability']:7.2%}" if "probability" in c else f"{c['value']:10.4g}" for c in row.classes]
    return [name, *(f"  {score}  {c['label']}" for score, c in zip(shown, row.classes, strict=True))]


def _by_text(texts: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path, text in texts.items():
        groups.setdefault(text, []).append(path)
    return groups


def _named(what: str, paths: list[str]) -> str:
    names = ", ".join(escaped(path) for path in paths[:NAMES_SHOWN])
    more = f", and {len(paths) - NAMES_SHOWN} more" if len(paths) > NAMES_SHOWN else ""
    return f"{what}: {len(paths)} file{'s' * (len(paths) != 1)}: {names}{more}"
