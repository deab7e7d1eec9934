"""How long each launch of a forward should take on a GPU that need not be here. A model, no measurement.

A launch takes the longest of three times, plus a constant for starting it:

    math     FLOPs / (peak * SUSTAINED_MATH) / tile efficiency / wave efficiency; SUSTAINED_EIGHT of 8-bit operands
    memory   bytes / (bandwidth * SUSTAINED_MEMORY), each operand and result moved once
    exp      exponentials / (multiprocessors * 16 per clock), in attention only

Tile efficiency is the useful part of the tiles that cover the output; wave efficiency the part of all rounds of tiles
in which multiprocessors have work. The three are taken to overlap perfectly and L2
to serve every reread, so a prediction is a bound from below for these tiles, not for the hardware.
(The roofline of Williams, Waterman, Patterson 2009, with quantisation.)
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from vitfast.diagnostics.chips import (
    CHIPS,
    DTYPES,
    EXP_PER_CLOCK,
    LAUNCH_US,
    SUSTAINED_EIGHT,
    SUSTAINED_MATH,
    SUSTAINED_MEMORY,
    peak_tflops,
)
from vitfast.diagnostics.launches import backward_launches, launches
from vitfast.engine.dtypes import QUANTIZED, dtype_name
from vitfast.models.config import ViTConfig

if TYPE_CHECKING:
    from rich.console import RenderableType


def predict(config: ViTConfig, *, batch: int, chip: str, dtype: str = "bf16", backward: bool = False) -> dict[str, Any]:
    """Predict every launch of the forward from uint8 pixels, and the sum; norms are folded where nothing is quantised.

    Args:
        batch: images. chip: a key of CHIPS. dtype: "bf16", "fp16", "fp32", "fp8" or "int8", or as torch names them.
        backward: instead, the launches of our kernels that its gradients need: those of attention.

    Returns:
        What json.dumps accepts: model, batch, chip, dtype, backward, `predicted` (always True), `assumptions`,
        `launches` (rows as Launch, with bound, time_us and share of the whole), gflop_per_image,
        time_us, images_per_s, and `math_share`: useful FLOP/s over the data sheet's peak in `dtype`.

    Raises:
        ValueError: for an unknown chip or dtype, a batch below 1, or gradients in 8 bits; the message lists what is
            allowed.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, got {chip!r}")
    dtype = dtype_name(dtype)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    card, quantized = CHIPS[chip], QUANTIZED.get(dtype)
    peak = peak_tflops(card, quantized or DTYPES[dtype])
    if peak is None:
        raise ValueError(f"dtype {dtype!r}: {card.name} has no such products")
    if backward and quantized:
        raise ValueError(f"gradients are in {', '.join(DTYPES)}, got dtype {dtype!r}")
    if backward:
        rows = backward_launches(config, batch, card, DTYPES[dtype])
    else:
        rows = launches(config, batch, card, DTYPES.get(dtype, torch.bfloat16), dtype if quantized else "")
    total = sum(launch.count * launch.time_us for launch in rows)
    flops = sum(launch.count * launch.flops for launch in rows)
    return {
        "model": config.name,
        "batch": batch,
        "chip": asdict(card),
        "dtype": dtype,
        "backward": backward,
        "predicted": True,
        "assumptions": {
            "sustained_math": SUSTAINED_MATH,
            "sustained_eight": SUSTAINED_EIGHT,
            "sustained_memory": SUSTAINED_MEMORY,
            "launch_us": LAUNCH_US,
            "exp_per_clock": EXP_PER_CLOCK,
        },
        "launches": [
            {**asdict(launch), "bound": launch.bound, "time_us": launch.time_us,
             "share": launch.count * launch.time_us / total}
            for launch in rows
        ],
        "gflop_per_image": flops / batch / 1e9,
        "time_us": total,
        "images_per_s": batch / total * 1e6,
        "math_share": flops / total / peak / 1e6,
    }  # fmt: skip


def add_machine_code(prediction: dict[str, Any]) -> None:
    """Compile each launch's kernel for the chip, and add to the prediction what its machine code says.

    Rows get `occupancy`, as `compiled.compute_occupancy`, and `code_us`, `code_bound` and `tensor_busy`, as
    `code_times.time_by_code`; None where it is not known. `by_code` is the sum (see `code_times.add_whole`). The
    compile case with the launch's config is taken, and with the epilogue nearest to its own. `occupancy_note` says why
    one is not known: Triton is missing or interpreting, or there is no such case.
    """
    from vitfast.diagnostics import code_times, compiled

    major, minor = prediction["chip"]["capability"]
    arch, prediction["occupancy_note"] = f"sm_{major}{minor}", ""
    for row in prediction["launches"]:
        row |= dict.fromkeys(("occupancy", "code_us", "code_bound", "tensor_busy"))
    made_of: dict[Any, dict[str, Any]] = {}
    for row in prediction["launches"]:
        try:
            file, kernel, name, constexprs = _compile_case(row)
            case = compiled.find_case(file, kernel, name, arch, **constexprs)
        except RuntimeError as error:
            prediction["occupancy_note"] = str(error)
            break
        if case is None:
            prediction["occupancy_note"] = f"no compile case of {row['site']}, config {row['config']}, for {arch}"
            continue
        problem = code_times.problem_of(row)
        key = (case.kernel, case.config, str(constexprs), str(problem))
        made = made_of[key] if key in made_of else compiled.inspect_case(case, arch, **problem)
        made_of[key] = made
        row["occupancy"] = made["occupancy"]
        if problem and made["tile_clocks"]:
            row |= code_times.time_by_code(row, case.constexprs, made["tile_clocks"], prediction["chip"])
    code_times.add_whole(prediction)


_LINEAR_CASES = {"bias": "gelu", "norm": "norm_gelu", "residual stats": "residual_stats", "norm swiglu": "norm_swiglu"}
"""Epilogue of a launch -> of its compile case, the nearest that there is; of all others norm_gelu."""


def _compile_case(row: dict[str, Any]) -> tuple[str, str, str, dict[str, Any]]:
    """File, kernel and name of a launch's compile case, and constexprs that it must have."""
    op, name, dims = row["op"], row["config"], row["dims"]
    kind = {"fp8": "fp8e4nv", "int8": "i8"}.get(dims.get("precision", ""), "")
    if op in ("layer_norm", "row_stats"):
        return "layer_norm", op, name, {}
    if op == "patch_embed":
        return op, op, f"{name}_uint8_nhwc_{dims['patch']}", {}
    if op in ("attention_dq", "attention_dkdv"):
        plain = dict.fromkeys(("bias", "mask", "slopes", "softcap", "left", "right", "cu_keys"))
        plain |= {"HEAD_DIM": dims["head_dim"], "GROUP": 1}
        return "attention_backward", op, name, plain | ({"dbias": None} if op == "attention_dq" else {})
    if op == "attention":
        plain = {"HEAD_DIM": dims["head_dim"], "bias": None, "mask": None, "max_out": None}
        in_8_bits = bool(dims.get("variant"))
        return (op, op, f"{name}_in_8_bits", plain) if in_8_bits else (op, op, name, plain | {"out_scale": None})
    if op == "quantize":
        return op, op, f"{name}_{kind}" + ("_norm" if dims["norm"] else ""), {}
    if op == "quantized_linear":
        first, *rest = dims["epilogue"].split()
        scales = first if first in ("groups", "heads") else ""
        epilogue = "_".join([*rest, scales] if scales else [first, *rest])
        return op, op, f"{name}_{kind}_{epilogue}", {}
    epilogue = _LINEAR_CASES.get(dims["epilogue"], "norm_gelu")
    if op == "linear" and "_split" in name:
        epilogue = "part"
    return "linear", op, f"{name}_{epilogue}", {}


def render(prediction: dict[str, Any]) -> list[RenderableType]:
    """The prediction as tables for a person, with what was measured beside it where there is something."""
    from rich import box
    from rich.table import Table

    chip, rows = prediction["chip"], prediction["launches"]

    def table(title: str, columns: dict[str, Callable[[dict[str, Any]], str]], texts: Container[str]) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for name in columns:
            made.add_column(name, justify="left" if name in texts else "right", overflow="fold")
        for row in rows:
            made.add_row(*(cell(row) for cell in columns.values()))
        return made

    def blocks(row: dict[str, Any]) -> str:
        return str(row["occupancy"]["blocks_per_sm"]) if row.get("occupancy") else "?"

    launched: dict[str, Callable[[dict[str, Any]], str]] = {
        "launch": lambda row: row["site"],
        "times": lambda row: str(row["count"]),
        "GFLOP": lambda row: f"{row['flops'] / 1e9:.1f}",
        "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
        "bound": lambda row: row["bound"],
        "µs": lambda row: f"{row['time_us']:.1f}",
        "share": lambda row: f"{row['share']:.1%}",
    }
    if any(row.get("code_us") for row in rows):
        launched["µs by code"] = lambda row: f"{row['code_us']:.1f}" if row["code_us"] else ""
        launched["bound by"] = lambda row: row["code_bound"] or ""
        launched["products busy"] = lambda row: f"{row['tensor_busy']:.0%}" if row["tensor_busy"] else ""
    if "by_native" in prediction:
        launched["µs native"] = lambda row: f"{row['native_us']:.1f}" if "native_us" in row else ""
    if any("measured_us" in row for row in rows):
        launched["measured µs"] = lambda row: f"{row['measured_us']:.1f}" if "measured_us" in row else ""
    why: dict[str, Callable[[dict[str, Any]], str]] = {
        "launch": lambda row: row["site"],
        "config": lambda row: row["config"],
        "tile": lambda row: f"{row['tile_efficiency']:.0%}",
        "wave": lambda row: f"{row['wave_efficiency']:.0%}",
        "blocks an SM": blocks,
        "math µs": lambda row: f"{row['math_us']:.1f}",
        "memory µs": lambda row: f"{row['memory_us']:.1f}",
        "exp µs": lambda row: f"{row['exp_us']:.1f}",
    }

    backward = prediction["backward"]

    def rate(part: dict[str, Any]) -> str:
        return f"{part['time_us'] / 1e3:.2f} ms" + ("" if backward else f", {part['images_per_s']:,.0f} img/s")

    whole = f"{prediction['model']} batch {prediction['batch']} {prediction['dtype']} on {chip['name']}"
    if backward:
        whole = f"gradients of attention in {whole}"
    lines: list[Any] = [
        table(f"predicted, not measured: {whole}", launched, ("launch", "bound")),
        "",
        table("what each launch takes at least", why, ("launch", "config")),
        "",
        f"predicted: {rate(prediction)}; {prediction['gflop_per_image']:.1f} GFLOP an image; "
        f"{prediction['math_share']:.0%} of the data sheet's peak ({chip['source']})",
    ]
    if any(row.get("code_us") for row in rows):
        lines.append(
            f"predicted by the machine code of {prediction['by_code']['launches_by_code']} of {len(rows)} launches: "
            f"{rate(prediction['by_code'])}"
        )
    if native := prediction.get("by_native"):
        lines.append(f"predicted with the CUDA linear for its products: {rate(native)}")
    if errors := prediction.get("errors"):
        names = {"flat": "flat", "code": "by code", "native": "with the CUDA linear"}
        known = {title: errors[name] for name, title in names.items() if name in errors}
        off = (f"{title} {e['median']:.2f} ({e['p10']:.2f} to {e['p90']:.2f})" for title, e in known.items())
        bars = ((title, e["images_per_s"]) for title, e in known.items())
        lines.append(
            f"error of the models, predicted over measured (by others, cuBLAS, {errors['band']}; median, p10 to p90): "
            f"{', '.join(off)}"
        )
        lines.append(
            "img/s if a forward is off as those products are: "
            + ", ".join(f"{title} {r['median']:,.0f} ({r['p10']:,.0f} to {r['p90']:,.0f})" for title, r in bars)
        )
    if "measured_images_per_s" in prediction:
        lines.append(
            f"measured: {prediction['measured_images_per_s']:,.0f} img/s ({prediction['measured_in']}), "
            f"{prediction['measured_images_per_s'] / prediction['images_per_s']:.0%} of what is predicted"
        )
    if note := prediction.get("occupancy_note"):
        lines.append(f"blocks an SM are not all known: {note}")
    return lines
