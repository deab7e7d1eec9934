"""What rows become on their way out: JSON, raw float32 or Arrow."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitfast.serving.limits import Refusal
from vitfast.serving.model import Row

JSON = "application/json"
RAW = "application/octet-stream"
ARROW = "application/vnd.apache.arrow.stream"


def json_bytes(content: Any) -> bytes:
    """JSON in ASCII: a client may have sent half a surrogate pair, which no other encoding could repeat."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def accepted(header: str, *known: str) -> str:
    """Which of the formats an Accept header asks for; JSON where it leaves that open.

    Args:
        known: the formats there are; all three if none is given.

    Raises:
        Refusal: 406 if it allows none of them.
    """
    known = known or (JSON, RAW, ARROW)
    kinds = [part.partition(";")[0].strip().lower() for part in header.split(",")]
    for kind in kinds:
        if kind in known:
            return kind
        if kind in ("", "*/*", "application/*"):
            return JSON
    raise Refusal(406, f"answers come as {' or '.join(known)}", "not_acceptable")


def embeddings(rows: Sequence[Row], model: str, encoding: str) -> dict[str, Any]:
    """In OpenAI's shape; `encoding` is float or base64 (of little-endian float32)."""

    def encoded(row: Row) -> Any:
        if encoding == "base64":
            return base64.b64encode(row.embedding.astype("<f4").tobytes()).decode()
        return row.embedding.tolist()

    data = [{"object": "embedding", "index": i, "embedding": encoded(row)} for i, row in enumerate(rows)]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


def raw(rows: Sequence[Row]) -> tuple[bytes, dict[str, str]]:
    """Little-endian float32 [N, E] or [N, rows, columns, C], one after another, and a header that says the shape."""
    matrix = np.stack([row.embedding for row in rows]).astype("<f4")
    return matrix.tobytes(), {"X-Shape": ",".join(map(str, matrix.shape)), "X-Dtype": "float32"}


def dense(rows: Sequence[Row], model: str) -> dict[str, Any]:
    """Features of patches: their shape, and little-endian float32 in base64."""
    data = [
        {
            "object": "features",
            "index": i,
            "shape": list(row.embedding.shape),
            "features": base64.b64encode(row.embedding.astype("<f4").tobytes()).decode(),
        }
        for i, row in enumerate(rows)
    ]
    return {"object": "list", "data": data, "model": model}


def arrow(rows: Sequence[Row]) -> bytes:
    """An Arrow IPC stream of one table: `index`, and `embedding` as a list of fixed size."""
    import pyarrow as pa

    matrix = np.stack([row.embedding for row in rows]).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
    table = pa.table({"index": pa.array(np.arange(len(rows), dtype=np.int32)), "embedding": lists})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def similarity(rows: Sequence[Row]) -> list[list[float]]:
    """Cosines [N, N]; those with a vector of zeros are 0."""
    matrix = np.stack([row.embedding for row in rows]).astype(np.float64)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    unit = np.divide(matrix, lengths, out=np.zeros_like(matrix), where=lengths > 0)
    return (unit @ unit.T).clip(-1, 1).tolist()
