"""The registry of kernel cases: for every op its inputs, FLOPs, reference and shapes.

A case is an op at one shape. `Op.inputs` makes random arguments (never zeros, which run faster), `Op.flops`
counts two per multiply-add that the result needs, `Op.reference` is plain PyTorch (`upcast=True`: the float64
oracle, else the baseline of the accuracy rule). To add an op, write those three and a line in OPS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.ops import fold_norm, reference
from vitfast.ops.registry import Spec, device_capability

Dims = Mapping[str, Any]
STATS_EPS = 1e-6


@dataclass(frozen=True)
class Call:
    """Arguments of one call. `batched`: positions and names of those that have the rows or images as axis 0."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    batched: tuple[int | str, ...] = (0,)

    def part(self, rows: slice) -> Call:
        """The same call on some of the rows or images."""
        args = tuple(a[rows] if i in self.batched else a for i, a in enumerate(self.args))
        kwargs = {name: a[rows] if name in self.batched else a for name, a in self.kwargs.items()}
        return Call(args, kwargs, self.batched)


class Maker:
    """Random tensors of one device and dtype, from one seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of standard deviation `scale`."""
        values = torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return values.mul_(scale).to(self.dtype)

    def pixels(self, *shape: int) -> Tensor:
        """uint8 pixels."""
        return torch.randint(0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8)

    def mask(self, *shape: int) -> Tensor:
        """Bools, nine in ten of them True."""
        return torch.rand(*shape, generator=self.generator, device=self.device) < 0.9


@dataclass(frozen=True)
class Op:
    """How one op is benchmarked. `spec` gives the registry the names of sizes that it knows."""

    inputs: Callable[[Dims, Maker], Call]
    flops: Callable[[Dims], int]
    reference: Callable[..., Any]
    spec: Callable[[Dims], dict[str, int]]
    backend_op: str = ""
    """The op whose backends run it, if it has another name."""


@dataclass(frozen=True)
class Case:
    """An op at one shape, dtype and device."""

    op: str
    dims: Dims
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """E.g. "linear rows 1576 inner 768 width 3072 gelu"."""
        sizes = (value if isinstance(value, str) else f"{name} {value}" for name, value in self.dims.items())
        return " ".join([self.op, *(part for part in sizes if part)])

    @property
    def spec(self) -> Spec:
        """What the registry needs to know."""
        op = OPS[self.op].backend_op or self.op
        features = ("causal",) if self.dims.get("variant") == "causal" else ()
        sizes = OPS[self.op].spec(self.dims)
        return Spec(op, self.device.type, self.dtype, device_capability(self.device), sizes, features)

    @property
    def flops(self) -> int:
        """FLOPs that the result needs; padding and recomputation do not count."""
        return OPS[self.op].flops(self.dims)

    @property
    def size(self) -> int:
        """Rows or images."""
        return self.dims.get("rows") or self.dims["batch"]

    def inputs(self, seed: int = 0) -> Call:
        """Arguments, random from a seed."""
        return OPS[self.op].inputs(self.dims, Maker(self.device, self.dtype, seed))


def nbytes(*values: Any) -> int:
    """Bytes of all tensors among the values, each counted once."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, (list, tuple, dict)):
            total += nbytes(*(value.values() if isinstance(value, dict) else value))
    return total


def _patch_embed(d: Dims, make: Maker) -> Call:
    side, patch, width = d["image"], d["patch"], d["width"]
    inner, grid = 3 * patch * patch, (side // patch) ** 2
    uint8 = d["pixels"] == "uint8"
    images = make.pixels(d["batch"], side, side, 3) if uint8 else make.normal(d["batch"], 3, side, side)
    weight = make.normal(width, inner, scale=inner**-0.5 / (64 if uint8 else 1))
    args = (images, weight, make.normal(width), make.normal(grid, width), make.normal(1, width))
    return Call(args, {"patch_size": (patch, patch), "channels_last": uint8})


def _layer_norm(d: Dims, make: Maker) -> Call:
    width = d["width"]
    return Call((make.normal(d["rows"], width), make.normal(width), make.normal(width), STATS_EPS))


def _add_layer_norm(d: Dims, make: Maker) -> Call:
    rows, width = d["rows"], d["width"]
    x, residual = make.normal(rows, width), make.normal(rows, width)
    return Call((x, residual, make.normal(width), make.normal(width), STATS_EPS), batched=(0, 1))


def _row_stats(d: Dims, make: Maker) -> Call:
    return Call((make.normal(d["rows"], d["width"]),))


EPILOGUES = ("plain", "bias", "gelu", "residual", "residual stats", "norm", "norm gelu", "norm swiglu")
"""plain: the bare product, which the others can be compared with. All others have a bias. residual comes with
LayerScale. stats: row statistics of the output. norm: LayerNorm of x, folded. swiglu: `width` is that of the output."""


def _linear(d: Dims, make: Maker) -> Call:
    rows, inner, epilogue = d["rows"], d["inner"], d["epilogue"].split()
    width = d["width"] * (2 if "swiglu" in epilogue else 1)
    x, weight = make.normal(rows, inner), make.normal(width, inner, scale=inner**-0.5)
    if epilogue == ["plain"]:
        return Call((x, weight))
    bias = make.normal(width)
    kwargs: dict[str, Any] = {}
    batched: list[int | str] = [0]
    if "norm" in epilogue:
        weight, weight_sum, bias = fold_norm(weight, bias, make.normal(inner), make.normal(inner))
        kwargs |= {"row_stats": reference.row_stats(x), "weight_sum": weight_sum}
        batched.append("row_stats")
    if "residual" in epilogue:
        kwargs |= {"residual": make.normal(rows, width), "layer_scale": make.normal(width)}
        batched.append("residual")
    if activation := {"gelu", "swiglu"} & set(epilogue):
        kwargs["activation"] = activation.pop()
    if "stats" in epilogue:
        kwargs["stats"] = True
    return Call((x, weight, bias), kwargs, tuple(batched))


def _attention(d: Dims, make: Maker) -> Call:
    batch, tokens, heads, head_dim = (d[name] for name in ("batch", "tokens", "heads", "head_dim"))
    qkv = make.normal(batch, tokens, 3, heads, head_dim)
    kwargs: dict[str, Any] = {}
    if d.get("variant") == "bias":
        kwargs["bias"] = make.normal(1, heads, tokens, tokens)
    if d.get("variant") == "mask":
        kwargs["mask"] = make.mask(1, 1, tokens, tokens)
    if d.get("variant") == "causal":
        kwargs["causal"] = True
    return Call(tuple(qkv.unbind(2)), kwargs, (0, 1, 2))


def backend_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an op as its backends take them: causal is a window without keys to the right."""
    return {"right" if name == "causal" else name: 0 if name == "causal" else a for name, a in options.items()}


def _reference_attention(q: Tensor, k: Tensor, v: Tensor, *, upcast: bool = False, **options: Any) -> Tensor:
    return reference.attention(q, k, v, upcast=upcast, **backend_options(options))


def _attention_products(d: Dims) -> int:
    """FLOPs of one of attention's products."""
    tokens = d["tokens"]
    pairs = tokens * (tokens + 1) // 2 if d.get("variant") == "causal" else tokens * tokens
    return 2 * d["batch"] * d["heads"] * pairs * d["head_dim"]


def _attention_backward(d: Dims, make: Maker) -> Call:
    call = _attention(d, make)
    gradient = make.normal(d["batch"], d["tokens"], d["heads"], d["head_dim"])
    return Call((*call.args, gradient), call.kwargs, (0, 1, 2, 3))


def gradients(attention: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward of an attention function: (q, k, v, gradient of the output) -> dq, dk, dv."""

    def run(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            out = attention(*leaves, **kwargs)
            return torch.autograd.grad(out, leaves, gradient.to(out.dtype))

    return run


def _mlp(d: Dims, make: Maker) -> Call:
    rows, width, hidden = d["rows"], d["width"], d["hidden"]
    up = hidden * (2 if d["activation"] == "swiglu" else 1)
    fc1 = (make.normal(up, width, scale=width**-0.5), make.normal(up))
    fc2 = (make.normal(width, hidden, scale=hidden**-0.5), make.normal(width))
    kwargs = {"activation": d["activation"], "residual": make.normal(rows, width), "layer_scale": make.normal(width)}
    return Call((make.normal(rows, width), *fc1, *fc2), kwargs, (0, "residual"))


def _block(d: Dims, make: Maker) -> Call:
    width, hidden = d["width"], d["hidden"]
    weights: dict[str, Tensor] = {}
    for name, rows, inner in (
        ("qkv", 3 * width, width),
        ("proj", width, width),
        ("fc1", hidden, width),
        ("fc2", width, hidden),
    ):
        weights |= {f"{name}.weight": make.normal(rows, inner, scale=inner**-0.5), f"{name}.bias": make.normal(rows)}
    for name in ("norm1", "norm2"):
        weights |= {f"{name}.weight": make.normal(width), f"{name}.bias": make.normal(width)}
    return Call((make.normal(d["batch"], d["tokens"], width), weights), {"heads": d["heads"]})


def block(x: Tensor, weights: Mapping[str, Tensor], *, heads: int, upcast: bool = False) -> Tensor:
    """A pre-norm transformer block in plain PyTorch, op by op; weights by the names of `vitfast.config`."""

    def of(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    linear: Any = reference.linear
    batch, tokens, width = x.shape
    h = reference.layer_norm(x, *of("norm1"), STATS_EPS, upcast=upcast)
    q, k, v = linear(h, *of("qkv"), upcast=upcast).view(batch, tokens, 3, heads, width // heads).unbind(2)
    mixed = reference.attention(q, k, v, upcast=upcast).view(batch, tokens, width)
    x = linear(mixed, *of("proj"), residual=x, upcast=upcast)
    h = reference.layer_norm(x, *of("norm2"), STATS_EPS, upcast=upcast)
    h = linear(h, *of("fc1"), activation="gelu", upcast=upcast)
    return linear(h, *of("fc2"), residual=x, upcast=upcast)


def _block_work(d: Dims) -> int:
    rows, width = d["batch"] * d["tokens"], d["width"]
    return 2 * rows * width * (4 * width + 2 * d["hidden"]) + 4 * rows * d["tokens"] * width


def _keep(*names: str) -> Callable[[Dims], dict[str, int]]:
    return lambda d: {name: d[name] for name in names}


def _attention_spec(d: Dims) -> dict[str, int]:
    return {"head_dim": d["head_dim"], "queries": d["tokens"], "keys": d["tokens"]}


def _linear_work(d: Dims) -> int:
    return 2 * d["rows"] * d["inner"] * d["width"] * (2 if "swiglu" in d["epilogue"] else 1)


OPS: dict[str, Op] = {
    "patch_embed": Op(
        _patch_embed,
        lambda d: 2 * d["batch"] * (d["image"] // d["patch"]) ** 2 * 3 * d["patch"] ** 2 * d["width"],
        reference.patch_embed,
        lambda d: {"width": d["width"], "patch": 3 * d["patch"] ** 2},
    ),
    "layer_norm": Op(_layer_norm, lambda d: 0, reference.layer_norm, _keep("width")),
    "add_layer_norm": Op(_add_layer_norm, lambda d: 0, reference.add_layer_norm, _keep("width")),
    "row_stats": Op(_row_stats, lambda d: 0, reference.row_stats, _keep("width")),
    "linear": Op(_linear, _linear_work, reference.linear, _keep("rows", "inner", "width")),
    "attention": Op(_attention, lambda d: 2 * _attention_products(d), _reference_attention, _attention_spec),
    # Forward and backward: 2 products forward, 4 for the gradients; computing the scores twice does not count.
    "attention_backward": Op(
        _attention_backward,
        lambda d: 6 * _attention_products(d),
        lambda *args, upcast=False, **kwargs: gradients(_reference_attention)(*args, upcast=upcast, **kwargs),
        _attention_spec,
        backend_op="attention",
    ),
    "mlp": Op(
        _mlp,
        lambda d: 2 * d["rows"] * d["width"] * d["hidden"] * (3 if d["activation"] == "swiglu" else 2),
        reference.mlp,
        _keep("rows", "width", "hidden"),
    ),
    "block": Op(_block, _block_work, block, lambda d: {}),
}


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
    yield "attention_backward", sites["attention"][1]


def awkward_dims(batch: int) -> Iterator[tuple[str, Dims]]:
    """Shapes that no power of two divides, and the variants of attention and of the activations."""
    base = {"batch": batch, "tokens": 197, "heads": 12, "head_dim": 64}
    for variant in ("bias", "mask", "causal"):
        yield "attention", {**base, "variant": variant}
    for head_dim in (72, 80, 88, 96, 104, 128):
        yield "attention", {**base, "head_dim": head_dim}
    yield "linear", {"rows": 131, "inner": 577, "width": 1001, "epilogue": "gelu"}
    yield "linear", {"rows": batch, "inner": 768, "width": 1000, "epilogue": "bias"}
    yield "linear", {"rows": batch * 257, "inner": 1536, "width": 4096, "epilogue": "norm swiglu"}
    yield "layer_norm", {"rows": 131, "width": 577}
    yield "mlp", {"rows": batch * 257, "width": 384, "hidden": 1024, "activation": "swiglu"}


def gate_size(case: Case) -> int:
    """Rows or images that the float64 oracle is asked for: all, or at least two and as many as take it a second."""
    cost = max(case.flops, 1) / case.size
    elements = math.prod(v for k, v in case.dims.items() if k in ("width", "tokens", "heads", "head_dim"))
    return min(case.size, max(2, int(min(2e10 / cost, 4e6 / elements))))
