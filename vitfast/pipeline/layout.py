"""Which files of a folder hold its rows, by the format they are stored in."""

from __future__ import annotations

from pathlib import Path

PARTS = "part-*.parquet"
_LANCE = ("_versions/*.manifest", "data/*", "_deletions/*")


def format_of(folder: str | Path) -> str | None:
    """What a folder's rows are stored as, "parquet" or "lance", by its files; None if it holds neither."""
    if next(Path(folder).glob(_LANCE[0]), None) is not None:
        return "lance"
    return "parquet" if next(Path(folder).glob(PARTS), None) is not None else None


def files_of(folder: str | Path) -> list[Path]:
    """The files that an embedding folder's rows are in; of Parquet parts in the order of the rows."""
    patterns = _LANCE if format_of(folder) == "lance" else (PARTS,)
    return sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
