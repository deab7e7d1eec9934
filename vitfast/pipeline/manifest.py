"""What an embedding folder holds, in a file beside its parts: `_manifest.json`.

    manifest = read("embeddings/")
    manifest["parts"]  # name, rows, bytes and SHA-256 of each
    differences("embeddings/")  # [] where the folder is as it says

It is written as a whole at the end of a run, an interrupted one included. A run that was killed leaves the one before:
`differences` then names the parts that are not as it says, and the next run writes it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from vitfast.images.decode import sha256
from vitfast.images.files import InputError, path_text
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.layout import files_of
from vitfast.version import __version__

NAME = "_manifest.json"
"""Hidden from readers of data sets, which pass over what begins with _ or a dot."""


def write(
    folder: Path, parts: Mapping[Path, int | None], rows: int, schema: pa.Schema, model: str, identity: Identity
) -> None:
    """Note what the parts of a folder are. Those that have not changed since the last note are not read again.

    Args:
        parts: the files -> how many rows each has, None for one that has none. rows: of all. schema: of the rows.

    Raises:
        OSError: if the folder cannot be written.
    """
    try:
        known = {part["name"]: part for part in read(folder)["parts"]}
    except (InputError, KeyError, TypeError):
        known = {}
    noted = [_entry(folder, part, count, known) for part, count in parts.items()]
    preprocess = json.dumps(identity.preprocess, sort_keys=True)
    content = {
        "version": identity.version,
        "model": model,
        "weights_sha256": identity.weights,
        "preprocess": identity.preprocess,
        "preprocess_sha256": hashlib.sha256(preprocess.encode()).hexdigest(),
        "dtype": identity.dtype,
        "rows": rows,
        "columns": {field.name: str(field.type) for field in schema},
        "parts": noted,
        "written_by": f"vitfast {__version__}",
    }
    hidden = folder / f".{NAME}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(hidden, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, folder / NAME)
    finally:
        hidden.unlink(missing_ok=True)


def _entry(folder: Path, part: Path, rows: int | None, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    status, name = part.stat(), part.relative_to(folder).as_posix()
    before = known.get(name)
    if before is not None and (before["bytes"], before["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
        return before
    with open(part, "rb") as file:
        digest = sha256(file).hex()
    entry = {"name": name, "rows": rows, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {**entry, "sha256": digest}


def read(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    try:
        return json.loads((Path(folder) / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path_text(folder)!r} has no readable {NAME}: {error}") from error


def differences(folder: str | Path) -> list[str]:
    """What of a folder's parts is not as its manifest says: parts that are missing, new or have another content.

    Raises:
        InputError: if it has no manifest.
    """
    noted = {part["name"]: part["sha256"] for part in read(folder)["parts"]}
    there = {part.relative_to(folder).as_posix(): part for part in files_of(folder)}
    found = [f"{name} is missing" for name in noted if name not in there]
    for name, part in there.items():
        if name not in noted:
            found.append(f"{name} is not in the manifest")
            continue
        with open(part, "rb") as file:
            if sha256(file).hex() != noted[name]:
                found.append(f"{name} has another content")
    return found
