"""Cases: an op at one shape, with arguments to try it on. Planner, predictions, doctor and benchmarks describe it so.

`Op.inputs` makes random arguments (never zeros, which run faster), `Op.flops` counts two per multiply-add that the
result needs, `Op.reference` is plain PyTorch (`upcast=True`: the float64 oracle, else the baseline of the accuracy
rule). To add an op, write those three and a line in OPS. The shapes of a model's forward are in sites.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitfast.engine.dtypes import QUANTIZED
from vitfast.images.pillow_resize import taps
from vitfast.models.config import ACTIVATIONS
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
    """How one op is tried. `spec` gives the sizes by which the registry states limits."""

    inputs: Callable[[Dims, Maker], Call]
    flops: Callable[[Dims], int]
    reference: Callable[..., Any]
    spec: Callable[[Dims], dict[str, int]]
    backend_op: str = ""
    """The op whose backends run it, if it has another name."""
    dtype: torch.dtype | None = None
    """What it computes in, if that is always the same."""


@dataclass(frozen=True)
class Case:
    """An op at one shape, dtype (of the activations; a quantised product's operands have another) and device."""

    op: str
    dims: Dims
    device: torch.device
    dtype: torch.dtype
    table: ClassVar[Mapping[str, Op]]
    """The ops that there are cases of."""

    @property
    def name(self) -> str:
        """E.g. "linear rows 1576 inner 768 width 3072 gelu"."""
        sizes = (value if isinstance(value, str) else f"{name} {value}" for name, value in self.dims.items())
        return " ".join([self.op, *(part for part in sizes if part)])

    @property
    def operand_dtype(self) -> torch.dtype:
        """What the op computes in: 8 bits for the quantised ops and for pixels."""
        return self.table[self.op].dtype or QUANTIZED.get(self.dims.get("precision", ""), self.dtype)

    @property
    def spec(self) -> Spec:
        """What the registry needs to know."""
        op = self.table[self.op].backend_op or self.op
        parts = (*self.dims.get("variant", "").split(), *self.dims.get("epilogue", "").split())
        known = reference.FEATURES.get(op, ())  # every linear has SwiGLU: there it is no feature
        features = tuple(dict.fromkeys(FEATURES[part] for part in parts if FEATURES.get(part) in known))
        sizes = self.table[self.op].spec(self.dims)
        return Spec(op, self.device.type, self.operand_dtype, device_capability(self.device), sizes, features)

    @property
    def flops(self) -> int:
        """FLOPs that the result needs; padding and recomputation do not count."""
        return self.table[self.op].flops(self.dims)

    @property
    def size(self) -> int:
        """Rows or images."""
        return next(self.dims[name] for name in ("M", "rows", "batch") if name in self.dims)

    def inputs(self, seed: int = 0) -> Call:
        """Arguments, random from a seed."""
        return self.table[self.op].inputs(self.dims, Maker(self.device, self.dtype, seed))


def _patch_sizes(d: Dims) -> tuple[tuple[int, int], tuple[int, int], int, int]:
    """(height, width) of images and of patches, channels and patches an image; what is not given is square and RGB."""
    height, patch_height = d["image"], d["patch"]
    width, patch_width = d.get("image_width", height), d.get("patch_width", patch_height)
    patches = (height // patch_height) * (width // patch_width)
    return (height, width), (patch_height, patch_width), d.get("channels", 3), patches


def _patch_inner(d: Dims) -> int:
    _, patch, channels, _ = _patch_sizes(d)
    return channels * patch[0] * patch[1]


def _patch_embed(d: Dims, make: Maker) -> Call:
    size, patch, channels, patches = _patch_sizes(d)
    inner, width = _patch_inner(d), d["width"]
    uint8 = d["pixels"] == "uint8"
    images = make.pixels(d["batch"], *size, channels) if uint8 else make.normal(d["batch"], channels, *size)
    weight = make.normal(width, inner, scale=inner**-0.5 / (64 if uint8 else 1))
    prefix = make.normal(d.get("prefix", 1), width) if d.get("prefix", 1) else None
    args = (images, weight, make.normal(width), make.normal(patches, width), prefix)
    return Call(args, {"patch_size": patch, "channels_last": uint8})


def _layer_norm(d: Dims, make: Maker) -> Call:
    width = d["width"]
    return Call((make.normal(d["rows"], width), make.normal(width), make.normal(width), STATS_EPS))


def _add_layer_norm(d: Dims, make: Maker) -> Call:
    rows, width = d["rows"], d["width"]
    x, residual = make.normal(rows, width), make.normal(rows, width)
    return Call((x, residual, make.normal(width), make.normal(width), STATS_EPS), batched=(0, 1))


def _row_stats(d: Dims, make: Maker) -> Call:
    return Call((make.normal(d["rows"], d["width"]),))


def _weight_rows(d: Dims) -> int:
    """Rows of a product's weight: gate and up projection if the activation is gated."""
    gated = "swiglu" in (*d.get("epilogue", "").split(), d.get("activation"))
    return (d["hidden"] if "hidden" in d else d["N"]) * (2 if gated else 1)


EPILOGUES = ("plain", "bias", "gelu", "residual", "residual stats", "norm", "norm gelu", "norm swiglu")
"""plain: the bare product, which the others can be compared with. All others have a bias. residual comes with
LayerScale, add is a residual without. stats: row statistics of the output. norm: LayerNorm of x, folded. swiglu:
N is that of the output. The model's other activations can stand for gelu."""


def _epilogue(parts: list[str], make: Maker, rows: int, width: int) -> dict[str, Any]:
    """Residual, LayerScale and activation."""
    kwargs: dict[str, Any] = {}
    if {"residual", "add"} & set(parts):
        kwargs["residual"] = make.normal(rows, width)
    if "residual" in parts:
        kwargs["layer_scale"] = make.normal(width)
    if activation := set(ACTIVATIONS) & set(parts):
        kwargs["activation"] = activation.pop()
    return kwargs


def _linear(d: Dims, make: Maker) -> Call:
    m, k, epilogue, n = d["M"], d["K"], d["epilogue"].split(), _weight_rows(d)
    x, weight = make.normal(m, k), make.normal(n, k, scale=k**-0.5)
    if epilogue == ["plain"]:
        return Call((x, weight))
    bias = make.normal(n)
    kwargs = _epilogue(epilogue, make, m, d["N"])
    batched: list[int | str] = [0, "residual"]
    if "norm" in epilogue:
        weight, weight_sum, bias = fold_norm(weight, bias, make.normal(k), make.normal(k))
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
        kwargs["quantize"] = QUANTIZED[variant[variant.index("to") + 1]]
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


def _mlp(d: Dims, make: Maker) -> Call:
    rows, width, hidden = d["rows"], d["width"], d["hidden"]
    up = _weight_rows(d)
    fc1 = (make.normal(up, width, scale=width**-0.5), make.normal(up))
    fc2 = (make.normal(width, hidden, scale=hidden**-0.5), make.normal(width))
    kwargs = {"activation": d["activation"], "residual": make.normal(rows, width), "layer_scale": make.normal(width)}
    return Call((make.normal(rows, width), *fc1, *fc2), kwargs, (0, "residual"))


def _quantize(d: Dims, make: Maker) -> Call:
    width, dtype = d["width"], QUANTIZED[d["precision"]]
    affine = (make.normal(width), make.normal(width), STATS_EPS) if d["norm"] else ()
    return Call((make.normal(d["rows"], width), *affine), {"dtype": dtype})


def _quantized_linear(d: Dims, make: Maker) -> Call:
    m, k, epilogue, dtype = d["M"], d["K"], d["epilogue"].split(), QUANTIZED[d["precision"]]
    n = _weight_rows(d)
    x, x_scale = reference.quantize(make.normal(m, k), dtype=dtype)
    for word, group in {"groups": reference.SCALE_GROUP, "heads": 64}.items():
        if word in epilogue:
            x_scale = x_scale.unsqueeze(1) * make.normal(m, -(-k // group)).float().abs()
    weight = reference.quantize(make.normal(n, k, scale=k**-0.5), dtype=dtype)
    kwargs = {**_epilogue(epilogue, make, m, d["N"]), "dtype": make.dtype}
    if "requantize" in epilogue:
        kwargs["requantize"] = True
    return Call((x, x_scale, *weight, make.normal(n)), kwargs, (0, 1, "residual"))


def _resample_axis(d: Dims) -> tuple[int, tuple[Tensor, Tensor]]:
    """The axis that "axis" names, and `first` and `weights` for it."""
    tables = taps(d["height" if d["axis"] == "rows" else "width"], d["out"], "bicubic")
    return 1 if d["axis"] == "rows" else 2, (torch.from_numpy(tables[0]), torch.from_numpy(tables[1]))


def _resample(d: Dims, make: Maker) -> Call:
    axis, tables = _resample_axis(d)
    images = make.pixels(d["batch"], d["height"], d["width"], 3)
    return Call((images, *(table.to(make.device) for table in tables)), {"axis": axis})


def _resample_work(d: Dims) -> int:
    across = d["width" if d["axis"] == "rows" else "height"]
    return 2 * d["batch"] * across * 3 * _resample_axis(d)[1][1].numel()


def _sizes(*names: str) -> Callable[[Dims], dict[str, int]]:
    return lambda d: {name: d[name] for name in names}


def _attention_spec(d: Dims) -> dict[str, int]:
    return {"head_dim": d["head_dim"], "queries": d["tokens"], "keys": d["tokens"]}


def _linear_spec(d: Dims) -> dict[str, int]:
    return {"M": d["M"], "K": d["K"], "N": _weight_rows(d)}


def _linear_work(d: Dims) -> int:
    return 2 * d["M"] * d["K"] * _weight_rows(d)


OPS: dict[str, Op] = {
    "patch_embed": Op(
        _patch_embed,
        lambda d: 2 * d["batch"] * _patch_sizes(d)[3] * _patch_inner(d) * d["width"],
        reference.patch_embed,
        lambda d: {"width": d["width"], "patch": _patch_inner(d)},
    ),
    "layer_norm": Op(_layer_norm, lambda d: 0, reference.layer_norm, _sizes("width")),
    "add_layer_norm": Op(_add_layer_norm, lambda d: 0, reference.add_layer_norm, _sizes("width")),
    "row_stats": Op(_row_stats, lambda d: 0, reference.row_stats, _sizes("width")),
    "linear": Op(_linear, _linear_work, reference.linear, _linear_spec),
    "attention": Op(_attention, lambda d: 2 * _attention_products(d), _reference_attention, _attention_spec),
    "attention_block": Op(
        _attention_block,
        _attention_block_work,
        reference.attention_block,
        _sizes("tokens", "width", "head_dim"),
    ),
    "mlp": Op(
        _mlp,
        lambda d: 2 * d["rows"] * d["width"] * (_weight_rows(d) + d["hidden"]),
        reference.mlp,
        lambda d: {"rows": d["rows"], "width": d["width"], "hidden": _weight_rows(d)},
    ),
    "quantize": Op(_quantize, lambda d: 0, reference.quantize, _sizes("rows", "width")),
    "quantized_linear": Op(_quantized_linear, _linear_work, reference.quantized_linear, _linear_spec),
    "resample": Op(_resample, _resample_work, reference.resample, _sizes(), dtype=torch.uint8),
}

Case.table = OPS
