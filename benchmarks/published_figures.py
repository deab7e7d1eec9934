"""What others have measured on a GPU, kept with its source, and how far our predictions are from it.

Tables lie in published/<chip>.json. A product there is a plain one, of cuBLAS or CUTLASS: that the model of
`vitfast.diagnostics` predicts its time is the model's own test, which no kernel of ours has part in but by its tiles.
Attention there is FlashAttention's, and stands beside ours.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitfast.diagnostics.chips import CHIPS
from vitfast.diagnostics.launches import launches_of
from vitfast.diagnostics.native_code import add_native
from vitfast.diagnostics.predict import add_machine_code

if TYPE_CHECKING:
    from rich.console import RenderableType

FOLDER = Path(__file__).parent / "published"
SIZES = {"M >= 8192": 8192, "1024 <= M < 8192": 1024, "M < 1024": 1}
"""Bands of M -> the least M, the largest first."""


def tables(chip: str) -> dict[str, Any]:
    """The tables of a chip: device, source, license; gemm and attention, rows as dicts, `us` measured; errors, those of
    `compare` as they last were.

    Raises:
        ValueError: for a chip that has none, with those that have.
    """
    path = FOLDER / f"{chip}.json"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("*.json")))
        raise ValueError(f"no published figures of {chip!r}; there are some of {known}")
    content = json.loads(path.read_text())
    for name in ("gemm", "attention"):
        columns = content.pop(f"{name}_columns")
        content[name] = [dict(zip(columns, row, strict=True)) for row in content[name]]
    return content


MODELS = ("flat", "code", "native")
"""Predictions: by a flat share of the peak, by the machine code of our Triton kernel, by that of our CUDA kernel."""


def compare(chip: str = "h100", native: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The tables with predictions beside them, and the models' error.

    Args:
        native: what `native_code.inspect_linear` gives, for predictions with that kernel too.

    Returns:
        What `tables` has; rows also flat_us, code_us and native_us, the predictions of MODELS: the second is None where
        there is no such kernel, or Triton does not compile here, the third in 8 bits and where tiles do not fill the
        chip. `errors`, for bf16 products, by model and band of M: count, median, p10 and p90 of predicted over
        measured.

    Raises:
        ValueError: as `tables`.
    """
    result, card = tables(chip), CHIPS[chip]
    rows = [*result["gemm"], *result["attention"]]
    parts = [launches_of(*_case(row), card, torch.bfloat16) for row in rows]
    prediction: dict[str, Any] = {
        "chip": asdict(card),
        "batch": 1,
        "launches": [{**asdict(part), "time_us": part.time_us} for launches in parts for part in launches],
    }
    add_machine_code(prediction)
    if native:
        add_native(prediction, native)
    predicted = iter(prediction["launches"])
    for row, launches in zip(rows, parts, strict=True):
        found = [next(predicted) for _ in launches]
        row["flat_us"] = sum(launch["time_us"] for launch in found)
        row["code_us"] = (
            sum(launch["code_us"] or launch["time_us"] for launch in found) if found[0]["code_us"] else None
        )
        row["native_us"] = found[0].get("native_us")
    result["errors"] = errors(result["gemm"])
    return result


def add_errors(prediction: dict[str, Any]) -> None:
    """Add to a prediction in bf16, as `errors`, how far the models were off where others have measured such products.

    For the band of its launches' largest M: band; and for each of MODELS that predicted it: count, median, p10 and p90
    of predicted over measured, and images_per_s, the same three of a forward that is off by as much as a whole.
    Nothing is added for a chip without tables.
    """
    chip = next(name for name, card in CHIPS.items() if card.name == prediction["chip"]["name"])
    rows = [row["dims"]["M"] for row in prediction["launches"] if row["op"] == "linear"]
    if prediction["dtype"] != "bf16" or not rows or not (FOLDER / f"{chip}.json").is_file():
        return
    band = next(name for name, least in SIZES.items() if max(rows) >= least)
    wholes = {"flat": prediction, "code": prediction.get("by_code"), "native": prediction.get("by_native")}
    prediction["errors"] = {"band": band}
    for model, bands in tables(chip)["errors"].items():
        if (whole := wholes[model]) and band in bands:
            ratios = {name: bands[band][name] for name in ("median", "p10", "p90")}
            corrected = {name: whole["images_per_s"] * ratio for name, ratio in ratios.items()}
            prediction["errors"][model] = {**bands[band], "images_per_s": corrected}


def errors(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of bf16 products: predicted over measured, by model and band of M."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    products = [row for row in rows if row["dtype"] == "bfloat16"]
    for model in MODELS:
        upper = float("inf")
        for band, least in SIZES.items():
            ratios = sorted(
                us / row["us"] for row in products if least <= row["M"] < upper and (us := row.get(f"{model}_us"))
            )
            upper = least
            if len(ratios) > 1:
                tenths = statistics.quantiles(ratios, n=10, method="inclusive")
                found.setdefault(model, {})[band] = {
                    "count": len(ratios), "median": statistics.median(ratios), "p10": tenths[0], "p90": tenths[-1],
                }  # fmt: skip
    return found


def render(result: dict[str, Any], least_rows: int = 8192) -> list[RenderableType]:
    """The error of both models, and products of at least `least_rows` rows and attention beside our predictions."""
    from rich import box
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        for name in columns:
            made.add_column(name, justify="right")
        return made

    def us(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    summary = table("predicted over measured, bf16 products", "model", "sizes", "products", "median", "p10", "p90")
    for model, bands in result["errors"].items():
        for band, e in bands.items():
            summary.add_row(model, band, str(e["count"]), *(f"{e[name]:.2f}" for name in ("median", "p10", "p90")))
    products = table("products, µs", "dtype", "M", "K", "N", "measured", "flat", "by code", "CUDA")
    for row in result["gemm"]:
        if row["M"] >= least_rows:
            values = (us(row.get(name)) for name in ("us", "flat_us", "code_us", "native_us"))
            products.add_row(row["dtype"], *(str(row[name]) for name in "MKN"), *values)
    columns = ("batch", "N", "H", "D", "measured", "flat", "by code")
    attention = table("attention, µs: FlashAttention measured, ours predicted", *columns)
    for row in result["attention"]:
        values = (us(row[name]) for name in ("us", "flat_us", "code_us"))
        attention.add_row(*(str(row[name]) for name in ("batch", "tokens", "heads", "head_dim")), *values)
    note = f"measured by others on {result['device']}: {result['source']} ({result['license']}); ours are predictions"
    return [summary, "", products, "", attention, "", note]


def _case(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The op and sizes of a row."""
    if "tokens" in row:
        return "attention", {name: row[name] for name in ("batch", "tokens", "heads", "head_dim")}
    dims = {name: row[name] for name in "MKN"}
    if row["dtype"] == "fp8":
        return "quantized_linear", {**dims, "epilogue": "bias", "precision": "fp8"}
    return "linear", {**dims, "epilogue": "bias"}
