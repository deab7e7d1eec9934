"""The sites of the forward as a planner sees them: which there are, what each asks of its op, arguments to try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitfast.models.config import ViTConfig
from vitfast.models.plan import HIDDEN_SITES, MIXED_SITES, PRODUCTS, QUANTIZED_SITES, SITES
from vitfast.ops import SCALE_GROUP, SCALE_GROUPS, reference
from vitfast.ops.registry import Spec, device_capability

LINEAR_SITES = ("qkv", "proj", "fc1", "fc2", "head")
QUANTIZED_PRODUCTS = tuple(site for site in QUANTIZED_SITES if site not in ("quantize", "mixed_attention"))
FUSED_SITES = {"attention_block": ("qkv", "attention", "proj"), "mlp": ("fc1", "fc2")}
"""A site that is half a block in one op -> the sites that do the same."""
OPTIONAL_SITES = (*FUSED_SITES, "row_stats", *HIDDEN_SITES, *MIXED_SITES)
"""Sites that a forward can do without: others take the place of the fused ones, fc1 and fc2 that of the hidden ones,
attention, quantize and proj that of the mixed ones, layer_norm that of row_stats."""


@dataclass(frozen=True)
class Call:
    """One site's op at its shapes, with arguments to check and time it on."""

    op: str
    spec: Spec
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def scales_heads(config: ViTConfig) -> bool:
    """Whether attention of a quantised model can write 8 bits: proj must be able to read a scale for each head."""
    return config.head_dim in SCALE_GROUPS


def plan_sites(config: ViTConfig, quantized: torch.dtype | None, keep: frozenset[str]) -> tuple[str, ...]:
    """The sites that a plan has to choose a backend for."""
    if quantized is None:
        return SITES
    kept = {name.rpartition(".")[2] for name in keep}
    plain = [site for site in SITES if site not in OPTIONAL_SITES and (site not in PRODUCTS or site in kept)]
    return (*plain, *(site for site in QUANTIZED_SITES if site not in MIXED_SITES or scales_heads(config)))


def kept_products(depth: int, keep: tuple[str, ...], quantized: torch.dtype | None) -> frozenset[str]:
    """The products that are not quantised, by full name; "fc2" stands for that of every block.

    Raises:
        ValueError: for a name that no product has, or if nothing is quantised.
    """
    if not isinstance(keep, tuple) or (keep and not quantized):
        raise ValueError(f"keep is a tuple of products that dtype 'fp8' or 'int8' leaves alone, got {keep!r}")
    products = {f"blocks.{i}.{site}" for i in range(depth) for site in PRODUCTS}
    names: set[str] = set()
    for asked in keep:
        found = {name for name in products if asked in (name, name.rpartition(".")[2])}
        if not found:
            sites = ", ".join(PRODUCTS)
            raise ValueError(f"keep names are {sites}, or one in a block from blocks.0 to {depth - 1}, got {asked!r}")
        names |= found
    return frozenset(names)


def site_dtype(site: str, dtype: torch.dtype, quantized: torch.dtype | None) -> torch.dtype:
    """The dtype that backends are asked about: a quantised site's own, else the model's."""
    if site not in QUANTIZED_SITES:
        return dtype
    assert quantized is not None, f"{site} is a site of quantised models"
    return quantized


def site_spec(config: ViTConfig, site: str, batch: int, device: torch.device, dtype: torch.dtype) -> Spec:
    """The registry's description of one site at a batch size."""
    place = site.removeprefix("quantized_").removeprefix("hidden_").removeprefix("mixed_")
    op = "linear" if site in LINEAR_SITES else "quantized_linear" if site in QUANTIZED_PRODUCTS else place
    tokens, c, f = config.tokens(), config.width, config.mlp_dim
    hd, up = config.heads * config.head_dim, 2 * f if config.gated else f
    rows = batch * tokens
    dims = {
        "patch_embed": {"width": c, "patch": config.in_channels * config.patch_size[0] * config.patch_size[1]},
        "layer_norm": {"width": c},
        "row_stats": {"width": c},
        "qkv": {"rows": rows, "inner": c, "width": 3 * hd},
        "attention": {"head_dim": config.head_dim, "queries": tokens, "keys": tokens},
        "proj": {"rows": rows, "inner": hd, "width": c},
        "attention_block": {"tokens": tokens, "width": c, "head_dim": config.head_dim},
        "fc1": {"rows": rows, "inner": c, "width": up},
        "fc2": {"rows": rows, "inner": f, "width": c},
        "mlp": {"rows": rows, "width": c, "hidden": up},
        "head": {"rows": batch, "inner": c, "width": max(config.num_classes, config.projection_dim, 1)},
        "quantize": {"rows": rows, "width": max(c, hd, f)},
    }[place]
    features: tuple[str, ...] = ()
    if site in HIDDEN_SITES or (site == "mixed_proj" and config.head_dim == SCALE_GROUP):
        features = ("scale groups",)
    elif site == "mixed_proj":
        features = (f"scale groups of {config.head_dim}",)
    elif site == "mixed_attention":
        features, dtype = (f"{str(dtype).removeprefix('torch.')} output",), torch.bfloat16
    features += ("swiglu",) if config.gated and site in ("quantized_fc1", "hidden_fc1") else ()
    return Spec(op, device.type, dtype, device_capability(device), dims, features)


def site_call(config: ViTConfig, site: str, batch: int, device: torch.device, dtype: torch.dtype) -> Call:
    """Random arguments of one site's real shapes, scaled so that activations stay near 1."""
    generator = torch.Generator(device).manual_seed(0)

    made_in = torch.bfloat16 if site in QUANTIZED_SITES else dtype

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(made_in)

    spec = site_spec(config, site, batch, device, dtype)
    tokens, c = config.tokens(), config.width

    def product(inner: int, width: int, **kwargs: Any) -> Call:
        # A head may have one output: with few rows the error it is allowed would be zero by luck.
        x = random(batch, tokens, inner) if site != "head" else random(max(batch, 64), inner)
        args = (x, random(width, inner, scale=inner**-0.5), random(width))
        return Call("linear", spec, args, kwargs)

    inner, width = spec.dims.get("inner", 0), spec.dims.get("width", 0)
    if site == "patch_embed":
        (height, breadth), (rows, columns) = config.image_size, config.grid(config.image_size)
        pixels = torch.randint(
            0, 256, (batch, height, breadth, config.in_channels), generator=generator, device=device, dtype=torch.uint8
        )
        prefix = random(config.prefix_tokens, c) if config.prefix_tokens else None
        position = random(rows * columns, c)
        patch = spec.dims["patch"]
        weight = random(c, patch, scale=1 / (64 * patch**0.5))
        kwargs = {"patch_size": config.patch_size, "channels_last": True}
        return Call(site, spec, (pixels, weight, random(c), position, prefix), kwargs)
    if site == "layer_norm":
        return Call(site, spec, (random(batch, tokens, c), random(c), random(c), config.norm_eps), {})
    if site == "row_stats":
        return Call(site, spec, (random(batch, tokens, c),), {})
    if spec.op == "attention":
        qkv = random(batch, tokens, 3, config.heads, config.head_dim)
        return Call(spec.op, spec, tuple(qkv.unbind(2)), {} if site == "attention" else {"quantize": dtype})
    if site == "attention_block":
        hd = config.heads * config.head_dim
        weights = (random(3 * hd, c, scale=c**-0.5), random(3 * hd), random(c, hd, scale=hd**-0.5), random(c))
        kwargs = {"heads": config.heads, "residual": random(batch, tokens, c)}
        return Call(site, spec, (random(batch, tokens, c), *weights), kwargs)
    if site == "mlp":
        up = spec.dims["hidden"]
        weights = (random(up, c, scale=c**-0.5), random(up), random(c, config.mlp_dim, scale=c**-0.5), random(c))
        kwargs = {"activation": config.activation, "residual": random(batch, tokens, c)}
        return Call(site, spec, (random(batch, tokens, c), *weights), kwargs)
    if site in QUANTIZED_SITES:
        return _quantized_call(config, site, spec, random)
    if site == "fc1":
        return product(inner, width, activation=config.activation)
    if site in ("proj", "fc2"):
        return product(inner, width, residual=random(batch, tokens, c))
    return product(inner, width)


def _quantized_call(config: ViTConfig, site: str, spec: Spec, random: Callable[..., Tensor]) -> Call:
    """`site_call` of a quantised site; `random` makes bf16."""
    c, rows = config.width, spec.dims["rows"]
    if site == "quantize":
        args = (random(rows, c), random(c), random(c), config.norm_eps)
        return Call(site, spec, args, {"dtype": spec.dtype})
    inner, width = spec.dims["inner"], spec.dims["width"]
    x = reference.quantize(random(rows, inner), dtype=spec.dtype)
    if site in ("hidden_fc2", "mixed_proj"):
        groups = config.heads if site == "mixed_proj" else -(-inner // SCALE_GROUP)
        x = (x[0], x[1][:, None] * torch.rand(rows, groups, device=x[1].device))
    weight = reference.quantize(random(width, inner, scale=inner**-0.5), dtype=spec.dtype)
    kwargs: dict[str, Any] = {"activation": config.activation} if site.endswith("fc1") else {}
    if site == "hidden_fc1":
        kwargs["requantize"] = True
    if site.endswith(("proj", "fc2")):
        kwargs["residual"] = random(rows, width)
    return Call(spec.op, spec, (*x, *weight, random(width)), kwargs)
