"""The shapes at which ops are benchmarked: those of models' forwards, and awkward ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vitfast.benchmarks.cases import Dims
from vitfast.engine.dtypes import QUANTIZED
from vitfast.engine.planner import FUSED_MAX_WIDTH
from vitfast.engine.sites import scales_heads, site_dims
from vitfast.models.config import ViTConfig
from vitfast.models.plan import SITES

PHOTO = (375, 500)
"""Height and width of the usual picture of ImageNet."""


def model_dims(config: ViTConfig, batch: int) -> Iterator[tuple[str, Dims]]:
    """(op, dims), telling ones first: bare products, a forward, other forms of its sites, 8 bits, a resize, backward,
    a block."""

    def at(site: str, precision: str = "", **changes: Any) -> tuple[str, Dims]:
        entry = SITES[site]
        return entry.op, {**site_dims(config, entry, batch, precision=precision, folded=True), **changes}

    heads, gate = at("attention")[1], config.activation
    for site in ("fc1", "fc2", "qkv", "proj"):  # the bare products, which the library's own stand beside
        yield at(site, epilogue="plain")
    for site in ("attention", "fc1", "fc2", "qkv", "proj", "patch_embed", "layer_norm", "row_stats", "head"):
        yield at(site)
    for site, epilogue in (("fc1", "gelu"), ("fc2", "residual"), ("qkv", "bias")):
        yield at(site, epilogue=epilogue)
    yield at("patch_embed", pixels="float")
    yield "add_layer_norm", at("layer_norm")[1]
    yield at("mlp")
    if config.width <= FUSED_MAX_WIDTH:
        yield at("attention_block")
    for precision in QUANTIZED:
        for site in ("fc1_requantize", "fc2_group_scales", "quantized_qkv", "quantized_proj"):
            yield at(site, precision)
        yield at("quantize", precision)
        yield at("quantize", precision, width=config.heads * config.head_dim, norm="")  # before proj
        if scales_heads(config):
            yield from (at("attention_quantize", precision), at("proj_head_scales", precision))
        for site, epilogue in (("quantized_fc1", gate), ("quantized_fc2", "residual")):  # not handed on in 8 bits
            yield at(site, precision, epilogue=epilogue)
    rows = config.image_size[0]
    photo, columns = {"batch": batch, "height": PHOTO[0]}, rows * PHOTO[1] // PHOTO[0]
    yield "resample", {**photo, "width": PHOTO[1], "axis": "columns", "out": columns}
    yield "resample", {**photo, "width": columns, "axis": "rows", "out": rows}
    yield "attention_backward", heads
    if (config.activation, config.layer_scale, config.heads * config.head_dim) == ("gelu", False, config.width):
        yield "block", {**heads, "width": config.width, "hidden": config.mlp_dim}  # the costliest: it is planned, too


def awkward_dims(batch: int) -> Iterator[tuple[str, Dims]]:
    """Shapes that no power of two divides, and the variants of attention and of the activations."""
    base = {"batch": batch, "tokens": 197, "heads": 12, "head_dim": 64}
    for variant in ("bias", "mask", "causal", "rope", "qk-norm rope"):
        yield "attention", {**base, "variant": variant}
    for head_dim in (72, 80, 88, 96, 104, 128):
        yield "attention", {**base, "head_dim": head_dim}
    yield "linear", {"M": 131, "K": 577, "N": 1001, "epilogue": "gelu"}
    yield "linear", {"M": batch, "K": 768, "N": 1000, "epilogue": "bias"}
    yield "linear", {"M": batch * 257, "K": 1536, "N": 4096, "epilogue": "norm swiglu"}
    yield "layer_norm", {"rows": 131, "width": 577}
    yield "mlp", {"rows": batch * 257, "width": 384, "hidden": 1024, "activation": "swiglu"}
