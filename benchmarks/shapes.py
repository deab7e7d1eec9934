"""The shapes at which ops are benchmarked: those of models' forwards, and awkward ones."""

from __future__ import annotations

from collections.abc import Iterator

from vitfast.benchmarks.cases import Dims
from vitfast.engine.dtypes import QUANTIZED
from vitfast.engine.planner import FUSED_MAX_WIDTH
from vitfast.models.config import ViTConfig
from vitfast.ops import SCALE_GROUP, SCALE_GROUPS


def site_dims(config: ViTConfig, batch: int) -> dict[str, tuple[str, Dims]]:
    """Site of a model's forward from uint8 pixels with folded norms -> (op, dims), telling ones first."""
    tokens, width, hidden = config.tokens(), config.width, config.mlp_dim
    rows, inner = batch * tokens, config.heads * config.head_dim

    def product(rows: int, inner: int, width: int, epilogue: str) -> tuple[str, Dims]:
        return "linear", {"rows": rows, "inner": inner, "width": width, "epilogue": epilogue}

    gate = "swiglu" if config.gated else "gelu"
    heads = {"batch": batch, "tokens": tokens, "heads": config.heads, "head_dim": config.head_dim}
    patch = {"image": config.image_size[0], "patch": config.patch_size[0], "width": width, "pixels": "uint8"}
    return {
        "attention": ("attention", heads),
        "fc1": product(rows, width, hidden, f"norm {gate}"),
        "fc2": product(rows, hidden, width, "residual stats"),
        "qkv": product(rows, width, 3 * inner, "norm"),
        "proj": product(rows, inner, width, "residual stats"),
        "patch_embed": ("patch_embed", {"batch": batch, **patch}),
        "norm": ("layer_norm", {"rows": rows, "width": width}),
        "row_stats": ("row_stats", {"rows": rows, "width": width}),
        "head": product(batch, width, max(config.num_classes, config.projection_dim, 1), "bias"),
    }


def quantized_site_dims(config: ViTConfig, batch: int, precision: str) -> dict[str, tuple[str, Dims]]:
    """Site of a block with products in 8 bits ("fp8" or "int8") -> (op, dims), as predictions name them."""
    sites, gate = site_dims(config, batch), "swiglu" if config.gated else "gelu"

    def product(site: str, epilogue: str) -> tuple[str, Dims]:
        return "quantized_linear", {**sites[site][1], "epilogue": epilogue, "precision": precision}

    def quantize(site: str, norm: str) -> tuple[str, Dims]:
        dims = sites[site][1]
        return "quantize", {"rows": dims["rows"], "width": dims["inner"], "norm": norm, "precision": precision}

    quantized = {
        "hidden_fc1": product("fc1", f"{gate} requantize"),
        "hidden_fc2": product("fc2", "groups residual"),
        "quantized_qkv": product("qkv", "bias"),
        "quantized_proj": product("proj", "residual"),
        "quantize_qkv": quantize("qkv", "norm"),
        "quantize_fc1": quantize("fc1", "norm"),
        "quantize_proj": quantize("proj", ""),
    }
    if config.head_dim in SCALE_GROUPS:
        groups = "groups" if config.head_dim == SCALE_GROUP else "heads"
        quantized["mixed_attention"] = "attention", {**sites["attention"][1], "variant": f"to {precision}"}
        quantized["mixed_proj"] = product("proj", f"{groups} residual")
    return quantized


def model_dims(config: ViTConfig, batch: int) -> Iterator[tuple[str, Dims]]:
    """(op, dims) of a forward's sites, then of other forms of the same work, and of attention's backward."""
    sites = site_dims(config, batch)
    yield from sites.values()
    if (config.activation, config.layer_scale, config.heads * config.head_dim) == ("gelu", False, config.width):
        yield "block", {**sites["attention"][1], "width": config.width, "hidden": config.mlp_dim}
    for site, epilogue in (("fc1", "plain"), ("fc1", "gelu"), ("fc2", "residual"), ("qkv", "bias")):
        op, dims = sites[site]
        yield op, {**dims, "epilogue": epilogue}
    yield "patch_embed", {**sites["patch_embed"][1], "pixels": "float"}
    rows = {"rows": batch * config.tokens(), "width": config.width}
    yield "add_layer_norm", rows
    yield "mlp", {**rows, "hidden": config.mlp_dim, "activation": "swiglu" if config.gated else "gelu"}
    if config.width <= FUSED_MAX_WIDTH:
        yield "attention_block", {**sites["attention"][1], "width": config.width}
    yield "attention_backward", sites["attention"][1]
    for precision in QUANTIZED:
        yield from quantized_site_dims(config, batch, precision).values()
        for site, epilogue in (("fc1", "swiglu" if config.gated else "gelu"), ("fc2", "residual")):  # not handed on
            yield "quantized_linear", {**sites[site][1], "epilogue": epilogue, "precision": precision}


def awkward_dims(batch: int) -> Iterator[tuple[str, Dims]]:
    """Shapes that no power of two divides, and the variants of attention and of the activations."""
    base = {"batch": batch, "tokens": 197, "heads": 12, "head_dim": 64}
    for variant in ("bias", "mask", "causal", "rope", "qk-norm rope"):
        yield "attention", {**base, "variant": variant}
    for head_dim in (72, 80, 88, 96, 104, 128):
        yield "attention", {**base, "head_dim": head_dim}
    yield "linear", {"rows": 131, "inner": 577, "width": 1001, "epilogue": "gelu"}
    yield "linear", {"rows": batch, "inner": 768, "width": 1000, "epilogue": "bias"}
    yield "linear", {"rows": batch * 257, "inner": 1536, "width": 4096, "epilogue": "norm swiglu"}
    yield "layer_norm", {"rows": 131, "width": 577}
    yield "mlp", {"rows": batch * 257, "width": 384, "hidden": 1024, "activation": "swiglu"}
