"""`torch.ops.vitfast.*`: the ops as torch sees them, with schemas and fakes for torch.compile.

Each takes the first able backend in default order. attention can be differentiated (once, on the
Triton backend); a backward through any other raises, as torch does for an op without a gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from vitfast.ops import checks, heads, reference
from vitfast.ops.reference import STATS_TILE
from vitfast.ops.registry import Backend, BackendError, Spec, choose


def _fresh(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """A custom op may not return (a view of) an input; reference ops can for identity cases."""
    if any(t is not None and t.data_ptr() == result.data_ptr() for t in inputs):
        return result.clone()
    return result


@custom_op("vitfast::patch_embed", mutates_args=())
def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    patch_size: Sequence[int],
    channels_last: bool,
) -> Tensor:
    call = choose(checks.patch_embed_spec(images, weight)).call
    size = (patch_size[0], patch_size[1])
    return call(images, weight, bias, position, prefix, patch_size=size, channels_last=channels_last)


@patch_embed.register_fake
def _(images, weight, bias, position, prefix, patch_size, channels_last):
    height, width = images.shape[1:3] if channels_last else images.shape[2:4]
    tokens = (height // patch_size[0]) * (width // patch_size[1])
    if prefix is not None:
        tokens = tokens + prefix.shape[0]
    return weight.new_empty(images.shape[0], tokens, weight.shape[0])


@custom_op("vitfast::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    return choose(Spec.of("layer_norm", x, width=x.shape[-1])).call(x, weight, bias, eps)


@layer_norm.register_fake
def _(x, weight, bias, eps=1e-6):
    return x.new_empty(x.shape)


@custom_op("vitfast::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return choose(Spec.of("add_layer_norm", x, width=x.shape[-1])).call(x, residual, weight, bias, eps)


@add_layer_norm.register_fake
def _(x, residual, weight, bias, eps=1e-6):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def empty_stats(x: Tensor) -> Tensor:
    """What `row_stats` of x gives, uninitialised."""
    return x.new_empty((x.numel() // x.shape[-1], -(-x.shape[-1] // STATS_TILE), 2), dtype=torch.float32)


@custom_op("vitfast::row_stats", mutates_args=())
def row_stats(x: Tensor) -> Tensor:
    return choose(Spec.of("row_stats", x, width=x.shape[-1])).call(x)


@row_stats.register_fake
def _(x):
    return empty_stats(x)


@custom_op("vitfast::quantize", mutates_args=())
def quantize(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return choose(checks.quantize_spec(x, dtype)).call(x, norm_weight, norm_bias, eps, dtype=dtype)


@quantize.register_fake
def _(x, norm_weight, norm_bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@custom_op("vitfast::resample", mutates_args=())
def resample(images: Tensor, first: Tensor, weights: Tensor, axis: int) -> Tensor:
    return choose(Spec.of("resample", images)).call(images, first, weights, axis=axis)


@resample.register_fake
def _(images, first, weights, axis):
    return images.new_empty([first.shape[0] if i == axis else size for i, size in enumerate(images.shape)])


# attention is defined piece by piece, because its autograd depends on the backend: torch's own
# function brings its gradient with it, our kernels need a forward that also saves statistics.
# Its options have no defaults: the dispatcher would leave those that equal theirs away.
_OPTIONS = {"bias": None, "mask": None, "slopes": None, "softcap": 0.0, "left": None, "right": None, "offset": 0,
            "scale": None, "cu_queries": None, "cu_keys": None, "max_queries": 0, "max_keys": 0}  # fmt: skip
_SCHEMA = (
    "Tensor? bias, Tensor? mask, Tensor? slopes, float softcap, SymInt? left, SymInt? right, SymInt offset, "
    "float? scale, Tensor? cu_queries, Tensor? cu_keys, SymInt max_queries, SymInt max_keys"
)
_ALL_OPTIONS = _OPTIONS | heads.OPTIONS  # the gradient's ops have the first only
_ALL_SCHEMA = (
    f"Tensor q, Tensor k, Tensor v, {_SCHEMA}, Tensor? cos, Tensor? sin, bool interleaved, Tensor? q_weight, "
    "Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, float norm_eps, bool rms"
)
_library = torch.library.Library("vitfast", "FRAGMENT")
_library.define(f"attention({_ALL_SCHEMA}, str backend) -> Tensor")
_library.define(f"attention_quantize({_ALL_SCHEMA}, ScalarType dtype, str backend) -> (Tensor, Tensor)")


def _entry(q, k, options, backend, quantize=None) -> Backend:
    known = ("slopes", "softcap", "left", "right", "offset", "cu_queries", "cos", "q_weight")
    spec = {name: value for name, value in _keywords(options).items() if name in known}
    return choose(checks.attention_spec(q, k, **spec, quantize=quantize), backend)


def _keywords(options) -> dict[str, Any]:
    """The options by name, without those that say nothing: a backend need not know them."""
    named = zip(_ALL_OPTIONS.items(), options, strict=False)
    return {name: value for (name, none), value in named if isinstance(value, Tensor) or value != none}


def _attention(q, k, v, *options) -> Tensor:
    *asked, backend = options
    return _fresh(_entry(q, k, asked, backend).call(q, k, v, **_keywords(asked)), q, k, v)


def _attention_autograd(q, k, v, *options) -> Tensor:
    *asked, backend = options
    tensors = (option for option in asked if isinstance(option, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *tensors)):
        entry = _entry(q, k, asked, backend)
        if entry.name == "torch":
            return reference.attention(q, k, v, **_keywords(asked))
        if entry.name == "triton":
            scores, last = asked[: len(_OPTIONS)], asked[len(_OPTIONS) :]
            q, k = reference.prepare_heads(q, k, **dict(zip(heads.OPTIONS, last, strict=True)))
            return torch.ops.vitfast.attention_forward(q, k, v, *scores)[0]
        raise BackendError(f"backend {entry.name!r} has no gradient of attention; the backends torch and triton have")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.vitfast.attention(q, k, v, *asked, backend)


def _attention_autocast(q, k, v, *options) -> Tensor:
    """q, k, v in autocast's dtype, as torch's own attention; a bias keeps its own, so that no bit of it is lost."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        q, k, v = (t.to(dtype) if t.dtype in checks.FLOATS else t for t in (q, k, v))
        return torch.ops.vitfast.attention(q, k, v, *options)


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention", _attention_autograd, "Autograd")
_library.impl("attention", _attention_autocast, "AutocastCPU")
_library.impl("attention", _attention_autocast, "AutocastCUDA")


@torch.library.register_fake("vitfast::attention")
def _(q, k, v, *options):
    return q.new_empty(q.shape)


def _attention_quantize(q, k, v, *options) -> tuple[Tensor, Tensor]:
    *asked, dtype, backend = options
    return _entry(q, k, asked, backend, dtype).call(q, k, v, **_keywords(asked), quantize=dtype)


def _refuse_gradient(q, k, v, *options) -> tuple[Tensor, Tensor]:
    """Rounding to 8 bits has none: a result that silently stopped it would be worse than none."""
    tensors = (option for option in options if isinstance(option, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *tensors)):
        raise NotImplementedError("attention: there is no gradient with quantize")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.vitfast.attention_quantize(q, k, v, *options)


_library.impl("attention_quantize", _attention_quantize, "CompositeExplicitAutograd")
_library.impl("attention_quantize", _refuse_gradient, "Autograd")


@torch.library.register_fake("vitfast::attention_quantize")
def _(q, k, v, *options):
    return q.new_empty(q.shape, dtype=options[-2]), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _kernel_file(name: str) -> Any:
    return importlib.import_module(f"vitfast.kernels.{name}")


@custom_op(
    "vitfast::attention_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_SCHEMA}) -> (Tensor, Tensor)",
)
def attention_forward(q, k, v, *options):
    """The Triton kernel, with what its backward needs: out and stats, see kernels/attention.py."""
    _entry(q, k, options, "triton")  # raises with the reasons where it cannot run
    return _kernel_file("attention").attention_forward(q, k, v, **dict(zip(_OPTIONS, options, strict=True)))


@attention_forward.register_fake
def _(q, k, v, *options):
    return q.new_empty(q.shape), q.new_empty((2, q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@custom_op(
    "vitfast::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, {_SCHEMA}, bool bias_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(dout, q, k, v, out, stats, *options):
    """dq, dk, dv and dbias; the last is empty unless bias_grad (a custom op cannot return None)."""
    if dout.shape[-1] > 1 and dout.stride(-1) != 1:  # sum() and mean() give expanded gradients
        dout = dout.contiguous()
    named = dict(zip((*_OPTIONS, "bias_grad"), options, strict=True))
    dq, dk, dv, dbias = _kernel_file("attention_backward").attention_backward(dout, q, k, v, out, stats, **named)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@attention_backward.register_fake
def _(dout, q, k, v, out, stats, bias, *options):
    dbias = bias.new_empty(bias.shape) if options[-1] else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save_attention(ctx, inputs, output) -> None:
    q, k, v, *options = inputs
    out, stats = output
    ctx.mark_non_differentiable(stats)
    tensors = [option if isinstance(option, Tensor) else None for option in options]
    ctx.save_for_backward(q, k, v, out, stats, *tensors)
    ctx.options = [None if isinstance(option, Tensor) else option for option in options]


def _differentiate_attention(ctx, dout, _) -> tuple[Tensor | None, ...]:
    inputs, tensors = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    options = [number if tensor is None else tensor for number, tensor in zip(ctx.options, tensors, strict=True)]
    bias_grad = ctx.needs_input_grad[3]
    if ctx.needs_input_grad[5]:
        raise NotImplementedError("attention: the Triton kernels have no gradient of the slopes")
    *grads, dbias = torch.ops.vitfast.attention_backward(dout, *inputs, *options, bias_grad)
    return *grads, dbias if bias_grad else None, *[None] * (len(options) - 1)


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError("attention: the Triton kernels have no second derivative; the backend torch has")


attention_forward.register_autograd(_differentiate_attention, setup_context=_save_attention)
attention_backward.register_autograd(_refuse_second_derivative)
