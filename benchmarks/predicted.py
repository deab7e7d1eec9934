"""Predictions beside measurements: what result files of a GPU say about predicted launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitfast.benchmarks.result_file import read, results_folder
from vitfast.engine.dtypes import QUANTIZED
from vitfast.models.config import ViTConfig

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn", "int8": "int8"}
"""A prediction's dtype -> that of result rows."""


def results_of(chip: str) -> list[tuple[Path, dict[str, Any]]]:
    """The result files of a chip ("h100": the folders whose name has that word), the oldest first."""
    folders = (folder for folder in results_folder().glob("*/") if chip in folder.name.split("-"))
    results = [(path, read(path)) for folder in folders for path in folder.glob("*.json")]
    return sorted(results, key=lambda pair: pair[1]["environment"]["date"])


def add_measured(
    prediction: dict[str, Any], config: ViTConfig, results: Sequence[tuple[Path, Mapping[str, Any]]]
) -> None:
    """Add to a prediction what was measured, the newest result counting.

    Adds measured_us (median of our Triton kernel at the launch's very shape) to launches, and to the whole
    measured_images_per_s (of the engine) with measured_in, the name of its file.
    """
    precision, batch = prediction["dtype"], prediction["batch"]
    for path, result in results:
        for row in filter(_ours, result["rows"]):
            if "op" in row:
                for launch in prediction["launches"]:
                    in_8_bits = "precision" in launch["dims"]
                    dtype = DTYPES[precision if in_8_bits or precision not in QUANTIZED else "bf16"]
                    if (row["op"], row["dims"], row["dtype"]) == (launch["op"], launch["dims"], dtype):
                        launch["measured_us"] = row["median_ms"] * 1e3
            elif (row["model"], row["batch"], row["dtype"]) == (config.name, batch, DTYPES[precision]):
                prediction["measured_images_per_s"], prediction["measured_in"] = row["images_per_s"], path.name


def _ours(row: Mapping[str, Any]) -> bool:
    """Whether a row is of our Triton kernels or our engine, and was right."""
    ours = row["provider"] == "vitfast triton" if "op" in row else row["provider"].startswith("vitfast")
    return ours and row["correct"]
