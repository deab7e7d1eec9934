"""Predictions beside measurements: what result files of a GPU say about the launches of `vitfast.predict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitfast.benchmarks.result_file import read, results_folder
from vitfast.benchmarks.shapes import site_dims
from vitfast.config import ViTConfig

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn", "int8": "int8"}
"""A prediction's dtype -> that of result rows."""


def results_of(chip: str) -> list[tuple[Path, dict[str, Any]]]:
    """The result files of a chip ("h100": the folders whose name has that word), the oldest first."""
    folders = (folder for folder in results_folder().glob("*/") if chip in folder.name.split("-"))
    found = [(path, read(path)) for folder in folders for path in folder.glob("*.json")]
    return sorted(found, key=lambda pair: pair[1]["environment"]["date"])


def add_measured(
    prediction: dict[str, Any], config: ViTConfig, results: Sequence[tuple[Path, Mapping[str, Any]]]
) -> None:
    """Add to a prediction what was measured, the newest result counting.

    Adds measured_us (median of our Triton kernel at the launch's very shape) to launches, and to the whole
    measured_images_per_s (of the engine) with measured_in, the name of its file.
    """
    dtype, batch = DTYPES[prediction["dtype"]], prediction["batch"]
    sites = site_dims(config, batch)
    for path, result in results:
        for row in _ours(result, dtype):
            if result["kind"] == "model" and (row.get("model"), row.get("batch")) == (config.name, batch):
                prediction["measured_images_per_s"], prediction["measured_in"] = row["images_per_s"], path.name
            for launch in prediction["launches"]:
                if "op" in row and (row["op"], row["dims"]) == sites.get(launch["site"]):
                    launch["measured_us"] = row["median_ms"] * 1e3


def _ours(result: Mapping[str, Any], dtype: str) -> Iterator[Mapping[str, Any]]:
    """Rows of our kernels or engine that were right, in one dtype."""
    for row in result["rows"]:
        ours = row["peer"] == "vitfast triton" if "op" in row else row["peer"].startswith("vitfast")
        if row["correct"] and ours and row.get("dtype") == dtype:
            yield row
