"""Embedding folders of given vectors."""

import numpy as np
from helpers.photos import FakeEngine

from vitfast.pipeline.embed import OK, Result
from vitfast.pipeline.identity import Identity
from vitfast.pipeline.parquet import EmbeddingFolder


def folder_of(vectors, out, names=None, rows=7, columns=None, output_dtype="float32"):
    """An embedding folder that holds these vectors, in parts of a few rows; `columns`: name -> a value for each."""
    engine = FakeEngine()
    folder = EmbeddingFolder(out, "m")
    names = names or [f"/{number:04d}.png" for number in range(len(vectors))]
    results = [Result(name, OK, np.asarray(v, np.float32)) for name, v in zip(names, vectors, strict=True)]
    for name, values in (columns or {}).items():
        for result, value in zip(results, values, strict=True):
            result.columns = {**result.columns, name: value}
    with folder:
        for start in range(0, len(results), rows):
            part = results[start : start + rows]
            folder.write_part(folder.new_part(), part, len(vectors[0]), Identity.of(engine, output_dtype=output_dtype))
    return out
