"""The registry of kernel cases: for every op its inputs, FLOPs, reference and shapes.

A case is an op at one shape. `Op.inputs` makes random arguments (never zeros, which run faster), `Op.flops`
counts two per multiply-add that the result needs, `Op.reference` is plain PyTorch (`upcast=True`: the float64
oracle, else the baseline of the accuracy rule). To add an op, write those three and a line in OPS; the shapes are in
shapes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitfast.engine.dtypes import QUANTIZED
from vitfast.ops import fold_norm, reference
from vitfast.ops.registry import Spec, device_capability

Dims = Mapping[str, Any]
FEATURES = {
    **{"causal": "causal", "groups": "scale groups", "requantize": "scale groups", "heads": "scale groups of 64"},
    **{name: f"{str(dtype).removeprefix('torch.')} output" for name, dtype in QUANTIZED.items()},
    **{name: name for name in ("swiglu", "rope", "qk-norm")},
}
"""Of a case's variant or epilogue -> the name in backends' `features`, where it asks for one."""
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
    """An op at one shape, dtype (of the activations; a quantised product's operands have another) and device."""

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
    def operand_dtype(self) -> torch.dtype:
        """What the op computes in: 8 bits for the quantised ops."""
        return QUANTIZED.get(self.dims.get("precision", ""), self.dtype)

    @property
    def spec(self) -> Spec:
        """What the registry needs to know."""
        op = OPS[self.op].backend_op or self.op
        parts = (*self.dims.get("variant", "").split(), *self.dims.get("epilogue", "").split())
        known = reference.FEATURES.get(op, ())  # every linear has SwiGLU: there it is no feature
        features = tuple(dict.fromkeys(FEATURES[part] for part in parts if FEATURES.get(part) in known))
        sizes = OPS[self.op].spec(self.dims)
        return Spec(op, self.device.type, self.operand_dtype, device_capability(self.device), sizes, features)

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


def _epilogue(parts: list[str], make: Maker, rows: int, width: int) -> dict[str, Any]:
    """Residual with LayerScale, and activation."""
    kwargs: dict[str, Any] = {}
    if "residual" in parts:
        kwargs |= {"residual": make.normal(rows, width), "layer_scale": make.normal(width)}
    if activation := {"gelu", "swiglu"} & set(parts):
        kwargs["activation"] = activation.pop()
    return kwargs


def _linear(d: Dims, make: Maker) -> Call:
    rows, inner, epilogue = d["rows"], d["inner"], d["epilogue"].split()
    width = d["width"] * (2 if "swiglu" in epilogue else 1)
    x, weight = make.normal(rows, inner), make.normal(width, inner, scale=inner**-0.5)
    if epilogue == ["plain"]:
        return Call((x, weight))
    bias = make.normal(width)
    kwargs = _epilogue(epilogue, make, rows, width)
    batched: list[int | str] = [0, "residual"]
    if "norm" in epilogue:
        weight, weight_sum, bias = fold_norm(weight, bias, make.normal(inner), make.normal(inner))
        kwargs |= {"row_stats": reference.row_stats(x), "weight_sum": weight_sum}
        batched.append("row_stats")
    if "stats" in epilogue:
        kwargs["stats"] = True
    return Call((x, weight, bias), kwargs, tuple(batched))


def _attention(d: Dims, make: Maker) -> Call:
    batch, tokens, heads, head_dim = (d[name] for name in ("batch", "tokens", "heads", "head_dim"))
    qkv = make.normal(batch, tokens, 3, heads, head_dim)
    kwargs: dict[str, Any] = {}
    variant = d.get("variant", "").split()
    if "bias" in variant:
        kwargs["bias"] = make.normal(1, heads, tokens, tokens)
    if "mask" in variant:
        kwargs["mask"] = make.mask(1, 1, tokens, tokens)
    if "causal" in variant:
        kwargs["causal"] = True
    if "qk-norm" in variant:
        kwargs |= {"q_weight": make.normal(head_dim), "k_weight": make.normal(head_dim)}
    if "rope" in variant:  # all tokens but the first, as after a class token
        angle = make.normal(tokens - 1, head_dim // 2, scale=3.0).repeat(1, 2)
        kwargs |= {"cos": angle.cos(), "sin": angle.sin()}
    if "to" in variant:
        kwargs["quantize"] = QUANTIZED[variant[1]]
    return Call(tuple(qkv.unbind(2)), kwargs, (0, 1, 2))


def backend_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an op as its backends take them: causal is a window without keys to the right."""
    return {"right" if name == "causal" else name: 0 if name == "causal" else a for name, a in options.items()}


def _reference_attention(q: Tensor, k: Tensor, v: Tensor, *, upcast: bool = False, **options: Any) -> Any:
    return reference.attention(q, k, v, upcast=upcast, **backend_options(options))


def _attention_products(d: Dims) -> int:
    """FLOPs of one of attention's products."""
    tokens = d["tokens"]
    pairs = tokens * (tokens + 1) // 2 if d.get("variant") == "causal" else tokens * tokens
    return 2 * d["batch"] * d["heads"] * pairs * d["head_dim"]


def _attention_block(d: Dims, make: Maker) -> Call:
    width, heads = d["width"], d["heads"]
    inner = heads * d["head_dim"]
    x, qkv = make.normal(d["batch"], d["tokens"], width), make.normal(3 * inner, width, scale=width**-0.5)
    proj = (make.normal(width, inner, scale=inner**-0.5), make.normal(width))
    qkv, weight_sum, bias = fold_norm(qkv, make.normal(3 * inner), make.normal(width), make.normal(width))
    epilogue = {"residual": make.normal(*x.shape), "layer_scale": make.normal(width)}
    return Call((x, qkv, bias, *proj), {"heads": heads, "weight_sum": weight_sum, **epilogue}, (0, "residual"))


def _attention_block_work(d: Dims) -> int:
    products = 8 * d["batch"] * d["tokens"] * d["width"] * d["heads"] * d["head_dim"]
    return products + 2 * _attention_products(d)


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


def _quantize(d: Dims, make: Maker) -> Call:
    width, dtype = d["width"], QUANTIZED[d["precision"]]
    affine = (make.normal(width), make.normal(width), STATS_EPS) if d["norm"] else ()
    return Call((make.normal(d["rows"], width), *affine), {"dtype": dtype})


def _quantized_linear(d: Dims, make: Maker) -> Call:
    rows, inner, epilogue, dtype = d["rows"], d["inner"], d["epilogue"].split(), QUANTIZED[d["precision"]]
    width = d["width"] * (2 if "swiglu" in epilogue else 1)
    x, x_scale = reference.quantize(make.normal(rows, inner), dtype=dtype)
    for word, group in {"groups": reference.SCALE_GROUP, "heads": 64}.items():
        if word in epilogue:
            x_scale = x_scale[:, None] * make.normal(rows, -(-inner // group)).float().abs()
    weight = reference.quantize(make.normal(width, inner, scale=inner**-0.5), dtype=dtype)
    kwargs = {**_epilogue(epilogue, make, rows, width), "dtype": make.dtype}
    if "requantize" in epilogue:
        kwargs["requantize"] = True
    return Call((x, x_scale, *weight, make.normal(width)), kwargs, (0, 1, "residual"))


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
    """A pre-norm transformer block in plain PyTorch, op by op; weights by the names of `vitfast.models.config`."""

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
    "attention_block": Op(
        _attention_block,
        _attention_block_work,
        reference.attention_block,
        _keep("tokens", "width", "head_dim"),
    ),
    "mlp": Op(
        _mlp,
        lambda d: 2 * d["rows"] * d["width"] * d["hidden"] * (3 if d["activation"] == "swiglu" else 2),
        reference.mlp,
        _keep("rows", "width", "hidden"),
    ),
    "quantize": Op(_quantize, lambda d: 0, reference.quantize, _keep("rows", "width")),
    "quantized_linear": Op(
        _quantized_linear, _linear_work, reference.quantized_linear, _keep("rows", "inner", "width")
    ),
    "block": Op(_block, _block_work, block, lambda d: {}),
}


def gate_size(case: Case) -> int:
    """Rows or images that the float64 oracle is asked for: all, or at least two and as many as take it a second."""
    cost = max(case.flops, 1) / case.size
    elements = math.prod(v for k, v in case.dims.items() if k in ("width", "tokens", "heads", "head_dim"))
    return min(case.size, max(2, int(min(2e10 / cost, 4e6 / elements))))
