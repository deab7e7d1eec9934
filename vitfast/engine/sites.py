"""The sites of a model's forward at their sizes: the one description that plans, predictions and benchmarks share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vitfast.engine.cases import Case, Dims
from vitfast.engine.dtypes import QUANTIZED
from vitfast.models.config import ViTConfig
from vitfast.models.plan import PRODUCTS, SITES, Site
from vitfast.ops import SCALE_GROUP, SCALE_GROUPS
from vitfast.ops.registry import Spec

HEAD_ROWS = 64
"""Fewest rows on which a head is measured: it may have one output, and with few rows the error it is allowed would be
zero by luck."""


def scales_heads(config: ViTConfig) -> bool:
    """Whether attention of a quantised model can write 8 bits: proj must be able to read a scale for each head."""
    return config.head_dim in SCALE_GROUPS


def folds_norms(config: ViTConfig) -> bool:
    """Whether every norm of the blocks is a LayerNorm before a product, which nothing else reads."""
    special = config.block in ("post", "sandwich") or config.gated_attention or config.double_norm
    return config.norm == "layer_norm" and not special


def fits_in_one(config: ViTConfig, site: Site) -> bool:
    """Whether a site that is half a block in one launch does all that this half of the model's blocks does."""
    special = not config.plain_attention
    if site.op == "mlp":
        special = config.mlp_norm or config.double_norm or not config.fused_activation
    return config.block == "pre" and config.norm == "layer_norm" and not special


def why_not_quantized(config: ViTConfig) -> str:
    """What the model's blocks have that quantised ones do not; "" if nothing."""
    asked = {
        f"norms that are no LayerNorm before a product (norm={config.norm!r}, block={config.block!r})": (
            config.norm != "layer_norm" or config.block != "pre"
        ),
        "a gate on attention (gated_attention)": config.gated_attention,
        "attention in windows (window)": config.window,
        "differential attention (differential)": config.differential,
        "a norm of v (v_norm)": config.v_norm,
        "decomposed relative position": config.relative_position == "decomposed",
        "a norm of what attention gives (attention_norm)": config.attention_norm,
        "a norm of the hidden activations (mlp_norm)": config.mlp_norm,
        "two norms before fc1 (double_norm)": config.double_norm,
        f"the activation {config.activation}": not config.fused_activation,
    }
    return ", ".join(name for name, wanted in asked.items() if wanted)


def attention_variant(config: ViTConfig) -> str:
    """What attention does beside the products, in the words of `vitfast.engine.cases`."""
    biased = config.relative_position in ("shared", "blocks")
    words = {"bias": biased, "qk-norm": config.qk_norm, "rope": config.rope}
    return " ".join(word for word, wanted in words.items() if wanted)


def plan_sites(config: ViTConfig, quantized: torch.dtype | None, skip: frozenset[str]) -> tuple[Site, ...]:
    """The sites that a plan has to choose a backend for; `skip`: the products that are not quantised, by full name."""
    skipped = {name.rpartition(".")[2] for name in skip}

    def wanted(site: Site) -> bool:
        if (site.fused and not fits_in_one(config, site)) or (site.op == "patch_embed" and config.stem):
            return False
        if quantized is None:
            return not site.quantized
        if not site.quantized:
            return not site.optional and (not site.product or site.product in skipped)
        return scales_heads(config) or not {"proj_head_scales"} & {site.name, site.passes_to}

    return tuple(site for site in SITES.values() if wanted(site))


def skipped_products(depth: int, skip_quantize: tuple[str, ...], quantized: torch.dtype | None) -> frozenset[str]:
    """The products that are not quantised, by full name; "fc2" stands for that of every block.

    Raises:
        ValueError: for a name that no product has, or if nothing is quantised.
    """
    if not isinstance(skip_quantize, tuple) or (skip_quantize and not quantized):
        raise ValueError(
            f"skip_quantize is a tuple of products that dtype 'fp8' or 'int8' leaves alone, got {skip_quantize!r}"
        )
    products = {f"blocks.{i}.{product}" for i in range(depth) for product in PRODUCTS}
    names: set[str] = set()
    for asked in skip_quantize:
        matching = {name for name in products if asked in (name, name.rpartition(".")[2])}
        if not matching:
            raise ValueError(
                f"skip_quantize names are {', '.join(PRODUCTS)}, or one in a block from blocks.0 to {depth - 1}, "
                f"got {asked!r}"
            )
        names |= matching
    return frozenset(names)


def site_dims(
    config: ViTConfig, site: Site, batch: int, *, precision: str = "", folded: bool = False, layer_scale: bool = True
) -> Dims:
    """The sizes of a site's op, as `vitfast.engine.cases.OPS` reads them, in a forward from uint8 pixels.

    Args:
        precision: "fp8" or "int8", of a quantised site.
        folded: with norms folded into the products, as Triton's five launches have them.
        layer_scale: whether residuals come with LayerScale.
    """
    tokens, width = config.tokens(), config.width
    rows = batch * tokens
    if site.op in ("linear", "quantized_linear"):
        weight_rows, k = _weight_shape(config, site)
        gated = config.fused_activation == "swiglu" and "activation" in site.features
        dims = {
            "M": rows if site.product else batch, "K": k, "N": weight_rows // (2 if gated else 1),
            "epilogue": _epilogue(config, site, folded=folded, layer_scale=layer_scale),
        }  # fmt: skip
        return dims | ({"precision": precision} if site.quantized else {})
    heads = {"batch": batch, "tokens": tokens, "heads": config.heads, "head_dim": config.attention_dim}
    if site.op == "attention":
        variant = " ".join(filter(None, (f"to {precision}" if site.quantized else "", attention_variant(config))))
        return heads | ({"variant": variant} if variant else {})
    if site.op == "attention_block":
        return {**heads, "width": width}
    if site.op == "mlp":
        return {"rows": rows, "width": width, "hidden": config.mlp_dim, "activation": config.activation}
    if site.op == "quantize":
        return {"rows": rows, "width": width, "norm": "norm", "precision": precision}
    if site.op == "patch_embed":
        return _patch_dims(config, batch)
    return {"rows": rows, "width": width}


def _weight_shape(config: ViTConfig, site: Site) -> tuple[int, int]:
    """Rows and columns of the weight that a product reads."""
    shapes = config.weight_shapes()
    if site.product:
        return shapes[f"blocks.0.{site.product}.weight"][0]  # type: ignore[return-value]
    heads = [shapes[f"{name}.weight"][0] for name in ("head", "projection") if f"{name}.weight" in shapes]
    return max(heads, default=(1, config.width))  # type: ignore[return-value]


def _epilogue(config: ViTConfig, site: Site, *, folded: bool, layer_scale: bool) -> str:
    """What a product does besides multiplying, in the words of `vitfast.engine.cases.EPILOGUES`."""
    groups = "groups" if config.head_dim == SCALE_GROUP else "heads"
    words = {
        "norm": "norm" if folded else "",
        "stats": "stats" if folded else "",
        "activation": config.fused_activation,
        "residual": "residual" if layer_scale else "add",
        "requantize": "requantize",
        "group scales": "groups",
        "head scales": groups,
    }
    return " ".join(words[feature] for feature in site.features if words[feature]) or "bias"


def _patch_dims(config: ViTConfig, batch: int) -> Dims:
    (height, width), (patch_height, patch_width) = config.image_size, config.patch_size
    dims = {"batch": batch, "image": height, "patch": patch_height, "width": config.width, "pixels": "uint8"}
    others: dict[str, Any] = {
        "image_width": (width, height), "patch_width": (patch_width, patch_height),
        "channels": (config.in_channels, 3), "prefix": (config.prefix_tokens, 1),
    }  # fmt: skip
    return dims | {name: value for name, (value, default) in others.items() if value != default}


def site_case(
    config: ViTConfig,
    site: Site,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    quantized: torch.dtype | None = None,
) -> Case:
    """A site as a plan measures it: norms unfolded, LayerScale where the model has it.

    Args:
        dtype: the model's. quantized: that of a quantised site's products.
    """
    precision = next((name for name, kind in QUANTIZED.items() if kind == quantized), "")
    dims = site_dims(config, site, batch, precision=precision, layer_scale=config.layer_scale)
    if site.name == "head":
        dims = {**dims, "M": max(batch, HEAD_ROWS)}
    return Case(site.op, dims, device, dtype)


def site_spec(
    config: ViTConfig,
    site: Site,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    quantized: torch.dtype | None = None,
) -> Spec:
    """What backends are asked about a site: the spec of its `site_case`, of the widest rows that it is called on."""
    spec = site_case(config, site, batch, device, dtype, quantized).spec
    if site.op == "layer_norm":
        spread = ((config.attention_norm, config.heads * config.head_dim), (config.mlp_norm, config.mlp_dim))
        widest = max(config.width, *(width for wanted, width in spread if wanted), 0)
        return replace(spec, dims={**spec.dims, "width": widest})
    if site.op != "quantize":
        return spec
    widest = max(config.width, config.heads * config.head_dim, config.mlp_dim)
    return replace(spec, dims={**spec.dims, "width": widest})
