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
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitfast.images.decode import sha256
from vitfast.images.files import InputError, path_text
from vitfast.pipeline.identity import Identity
from vitfast.version import __version__

NAME = "_manifest.json"
"""Hidden from readers of data sets, which pass over what begins with _ or a dot."""


def write(folder: Path, parts: list[Path], model: str, identity: Identity) -> None:
    """Note what the parts of a folder are. Those that have not changed since the last note are not read again.

    Raises:
        OSError: if the folder cannot be written.
    """
    try:
        known = {part["name"]: part for part in read(folder)["parts"]}
    except (InputError, KeyError, TypeError):
        known = {}
    noted = [_entry(part, known.get(part.name)) for part in parts]
    preprocess = json.dumps(identity.preprocess, sort_keys=True)
    content = {
        "version": identity.version,
        "model": model,
        "weights_sha256": identity.weights,
        "preprocess": identity.preprocess,
        "preprocess_sha256": hashlib.sha256(preprocess.encode()).hexdigest(),
        "dtype": identity.dtype,
        "rows": sum(part["rows"] for part in noted),
        "columns": {field.name: str(field.type) for field in _schema(parts)},
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


def _schema(parts: list[Path]) -> pa.Schema:
    return pa.unify_schemas([pq.read_schema(part).remove_metadata() for part in parts])


def _entry(part: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    status = part.stat()
    if known is not None and (known["bytes"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
        return known
    with open(part, "rb") as file:
        digest = sha256(file).hex()
    rows = pq.read_metadata(part).num_rows
    entry = {"name": part.name, "rows": rows, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
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
    there = {part.name: part for part in sorted(Path(folder).glob("part-*.parquet"))}
    found = [f"{name} is missing" for name in noted if name not in there]
    for name, part in there.items():
        if name not in noted:
            found.append(f"{name} is not in the manifest")
            continue
        with open(part, "rb") as file:
            if sha256(file).hex() != noted[name]:
                found.append(f"{name} has another content")
    return found
