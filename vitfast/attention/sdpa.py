"""Drop-in attention: torch's `scaled_dot_product_attention`, on vitfast's kernels where they are able.

A call takes one of two routes. "triton" runs `torch.ops.vitfast.attention`; "torch" hands the very
same arguments to torch's own op, so that the result, or the error, is torch's. `explain` says which
route a call takes and gives every reason why it is not "triton"; `attention_backend` forces one.

The decision reads devices, dtypes, shapes, strides and Python scalars only, never a tensor's values:
it costs no synchronisation, and torch.compile takes it once, while tracing.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vitfast import ops
from vitfast.ops import BackendError, QKNorm, Rope, Spec, checks, heads
from vitfast.ops.names import did_you_mean
from vitfast.ops.registry import backend, candidates, device_capability

__all__ = ["Route", "attention_backend", "explain", "scaled_dot_product_attention"]

CHOICES = ("auto", "torch", "triton")

_backend = "auto"
"""The choice in force: the last entry of _entered. torch.compile guards on this name and traces again when it
changes, which it cannot do for a contextvar (an error) or a thread-local (a stale choice)."""
_entered: list[list[str]] = []
_lock = threading.Lock()


@dataclass(frozen=True)
class Route:
    """Which implementation a call takes.

    Attributes:
        backend: "triton" or "torch".
        reasons: every reason why it is not "triton"; empty if it is.
    """

    backend: str
    reasons: tuple[str, ...] = ()


@contextlib.contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Choose the route of all attention calls of the process while the context is open.

    Args:
        name: "auto": the kernels on a GPU for which a shipped table says that they are right and
            faster there, else torch. "torch": torch's own op. "triton": the kernels wherever they
            can run the call, else `BackendError`.

    Like torch's `sdpa_kernel` it holds for all threads; where contexts overlap, the one entered last
    and still open counts. Open it around compiled code, not inside.

    Raises:
        ValueError: if there is no such choice.
    """
    if name not in CHOICES:
        raise ValueError(f"attention backend must be one of {CHOICES}, got {name!r}{did_you_mean(name, CHOICES)}")
    entry = [name]  # a list, to be told from the others by identity
    with _lock:
        _entered.append(entry)
        _choose_last()
    try:
        yield
    finally:
        with _lock:
            _entered[:] = [other for other in _entered if other is not entry]
            _choose_last()


def _choose_last() -> None:
    global _backend
    _backend = _entered[-1][0] if _entered else "auto"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query keyᵀ * scale + attn_mask) value: `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: [..., H, L, E]. key: [..., H, S, E]. value: [..., H, S, Ev].
        attn_mask: bool (True where a key may be seen) or float (added to the scores), broadcastable
            to [..., H, L, S].
        dropout_p: probability of a weight being dropped, whether in training or not.
        is_causal: query i sees keys 0..i (aligned at the top left).
        scale: 1 / sqrt(E) by default.
        enable_gqa: key and value may have fewer heads, each serving a run of query heads.

    Returns:
        [..., H, L, Ev] in query's dtype, with the strides that torch's fused ops give: those of query,
        gaps closed. A query that may see no key gives zeros. The kernels write [B, L, H, E]; where query
        lies otherwise in memory (contiguous [B, H, L, E]), the result is copied once.

    Raises:
        BackendError: if `attention_backend("triton")` is in force and the kernels cannot run the call.
        Exception: for invalid arguments, whatever torch's op raises.
    """
    route = _route(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if route.backend == "torch":
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    return _attend(query, key, value, attn_mask, is_causal, scale)


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rope: Rope | None,
    qk_norm: QKNorm | None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor | None:
    """Attention whose kernel norms and rotates query and key as it loads them; None where it does not.

    For integrations. Where torch comes first, the kernels cannot run the call or a gradient is wanted, there is
    nothing to fuse: the caller prepares query and key as its model does and calls `scaled_dot_product_attention`.
    Arguments as there, with four axes; key and value may have fewer heads.
    """
    if torch_first(query) or (rope is None and qk_norm is None):
        return None
    asked = heads.options(rope, qk_norm)
    tensors = [t for t in (query, key, value, attn_mask, *asked.values()) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if _why_not(query, key, value, attn_mask, 0.0, is_causal, scale, True) or query.ndim != 4:
        return None
    if not all(_is_plain(t) for t in tensors) or _autocast_dtype(query) != query.dtype:
        return None
    if checks.why_not_heads(query.transpose(1, 2), key.transpose(1, 2), **asked):
        return None
    return _attend(query, key, value, attn_mask, is_causal, scale, rope, qk_norm)


def torch_first(query: Tensor) -> str:
    """Why torch's op comes before the kernels for this query, whatever they can do; "" if it does not."""
    return _torch_first(query.device.type if isinstance(query, Tensor) else "")


def _torch_first(device: str) -> str:
    if _backend == "torch":
        return "attention_backend('torch') is in force"
    if _backend == "auto" and device and not _kernels_first(device):
        return f"no measurement says that the kernels are right and faster on this {device}"
    return ""


def usual_route(device: torch.device, dtype: torch.dtype) -> Route:
    """The route of calls on this device in this dtype, as far as these decide it; computes nothing, raises nothing.

    Where "triton" is forced and cannot run there, the reasons say why such calls raise.
    """
    reason = _torch_first(device.type)
    reasons = (reason,) if reason else _registry_reasons(str(device), dtype)[0]
    return Route("torch" if reasons and _backend != "triton" else "triton", reasons)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Route:
    """The route that `scaled_dot_product_attention` takes for these arguments, and why; computes nothing.

    Raises:
        BackendError: as the call itself would.
    """
    route = _route(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if route.backend == "torch":  # the call needs no more than one reason; a reader wants all
        more = _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return Route("torch", tuple(dict.fromkeys([*route.reasons, *more])))
    return route


def _route(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> Route:
    if reason := torch_first(query):
        return Route("torch", (reason,))
    reasons = _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not reasons:
        return Route("triton")
    if _backend == "triton":
        raise BackendError(f"backend 'triton' cannot run this attention call: {'; '.join(reasons)}")
    return Route("torch", tuple(reasons))


def constant_when_traced(function: Any) -> Any:
    """What torch.compiler.assume_constant_result does, without its import of torch._dynamo and so of triton."""
    function._dynamo_marked_constant = True
    return function


@constant_when_traced
def _kernels_first(device: str) -> bool:
    """Whether the registry's default order has the kernels before torch's op on this type of device."""
    capability = device_capability(torch.device(device))
    able, _ = candidates(Spec("attention", device, torch.float16, capability, {"head_dim": 64}))
    return bool(able) and able[0].name == "triton"


@constant_when_traced
def _registry_reasons(device: str, dtype: torch.dtype) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Why the kernels would not run on this device in this dtype, and the head dims (low, high) they take."""
    entry = backend("attention", "triton")
    spec = Spec("attention", device.split(":")[0], dtype, device_capability(torch.device(device)))
    return tuple(entry.why_not(spec)), entry.limits.get("head_dim", (0, 0))


def _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> list[str]:
    """Every reason why the kernels do not take a call; also where torch's op would refuse it."""
    named = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        named["attn_mask"] = attn_mask
    for name, tensor in named.items():
        if not _is_plain(tensor):
            return [f"{name} is a {type(tensor).__name__}, not a plain tensor"]
        if tensor.layout != torch.strided or tensor.is_nested:
            return [f"{name} is not a dense tensor"]
    reasons = [
        f"{name} is on {t.device}, query on {query.device}" for name, t in named.items() if t.device != query.device
    ]
    if torch._C._are_functorch_transforms_active():
        reasons.append("a transform of torch.func (vmap, grad, jvp, ...) is active")
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation is active")
    if type(dropout_p) not in (int, float) or dropout_p != 0:
        reasons.append(f"dropout_p is {dropout_p}; the kernels have no dropout")
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        reasons.append(f"is_causal and enable_gqa must be bool, got {is_causal!r} and {enable_gqa!r}")
    if scale is not None and not (type(scale) in (int, float) and math.isfinite(scale)):
        reasons.append(f"scale is {scale!r}, not a finite number")
    reasons += _why_not_dtypes(query, key, value, attn_mask)
    if not 2 <= query.ndim <= 4 or key.ndim != query.ndim or value.ndim != query.ndim:
        return [
            *reasons,
            f"query, key and value have {query.ndim}, {key.ndim} and {value.ndim} axes; taken are 2 to 4, alike",
        ]
    return reasons + _why_not_shapes(query, key, value, attn_mask, is_causal, enable_gqa)


def _is_plain(tensor: object) -> bool:
    """Whether this is a tensor, or what stands for one while a model is traced, and not a subclass with a
    meaning of its own."""
    kind = type(tensor)
    return kind in (Tensor, torch.nn.Parameter) or kind.__module__.startswith("torch._subclasses.")


def _why_not_dtypes(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> list[str]:
    """Reasons that lie in dtypes (as autocast leaves them), device or head dim."""
    dtypes = [_autocast_dtype(tensor) for tensor in (query, key, value)]
    missing, (low, high) = _registry_reasons(str(query.device), dtypes[0])
    reasons = list(missing)
    if not low <= query.shape[-1] <= high:
        reasons.append(f"head dim {query.shape[-1]} is outside {low}..{high}")
    if dtypes[1] != dtypes[0] or dtypes[2] != dtypes[0]:
        reasons.append(f"query, key and value have dtypes {', '.join(map(str, dtypes))}")
    if attn_mask is not None and _autocast_dtype(attn_mask) not in (torch.bool, torch.float32, dtypes[0]):
        reasons.append(f"attn_mask has dtype {attn_mask.dtype}; torch takes bool, float32 or query's, {dtypes[0]}")
    return reasons


def _why_not_shapes(query, key, value, attn_mask, is_causal, enable_gqa) -> list[str]:
    """Reasons that lie in shapes, strides or the mask; all three have the same number of axes."""
    reasons = []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            reasons.append(f"the last axis of {name} has stride {tensor.stride(-1)}, not 1")
    if value.shape[-1] != query.shape[-1]:
        reasons.append(f"value has head dim {value.shape[-1]}, query {query.shape[-1]}; the kernels need one for both")
    if key.shape[-1] != query.shape[-1] or value.shape[:-1] != key.shape[:-1] or key.shape[:-3] != query.shape[:-3]:
        reasons.append(
            f"shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} differ or need broadcasting"
        )
    if query.ndim == 2 and enable_gqa:
        reasons.append("enable_gqa needs an axis of heads; query has 2 axes")
    if query.ndim > 2 and key.shape[-3] != query.shape[-3]:
        if not enable_gqa:
            reasons.append(f"key has {key.shape[-3]} heads, query {query.shape[-3]}, without enable_gqa")
        elif not key.shape[-3] or query.shape[-3] % key.shape[-3]:
            reasons.append(f"key has {key.shape[-3]} heads, which do not divide query's {query.shape[-3]}")
    if attn_mask is None:
        return reasons
    if is_causal:
        reasons.append("attn_mask with is_causal: versions of torch combine or refuse them")
    scores = (*query.shape[:-1], key.shape[-2])
    broadcast = zip(reversed(attn_mask.shape), reversed(scores), strict=False)
    if not 2 <= attn_mask.ndim <= query.ndim or any(have != 1 and have != want for have, want in broadcast):
        reasons.append(
            f"attn_mask has shape {tuple(attn_mask.shape)}, not broadcastable to {tuple(scores)} from 2 axes up"
        )
    return reasons


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast hands this tensor to torch's attention; its own where autocast is off."""
    kind = tensor.device.type
    eligible = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not eligible or kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def _autocast(tensor: Tensor) -> Tensor:
    dtype = _autocast_dtype(tensor)
    return tensor if dtype == tensor.dtype else tensor.to(dtype)


def _attend(query, key, value, attn_mask, causal, scale, rope=None, qk_norm=None) -> Tensor:
    """The call on the kernels; `_why_not` had nothing against it."""
    q, k, v = (_autocast(tensor) for tensor in (query, key, value))
    for _ in range(4 - query.ndim):
        q, k, v = q[None], k[None], v[None]
    bias = mask = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = attn_mask
    elif attn_mask is not None:
        bias = _autocast(attn_mask)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    scale = None if scale is None else float(scale)
    options: Any = {"bias": bias, "mask": mask, "causal": causal, "scale": scale, "rope": rope, "qk_norm": qk_norm}
    out = ops.attention(q, k, v, **options, backend="triton").transpose(1, 2)
    for _ in range(4 - query.ndim):
        out = out[0]
    if query.ndim < 4 or not key.shape[-2]:
        return out.contiguous()
    return _laid_out_as(query, out)


def _laid_out_as(query: Tensor, out: Tensor) -> Tensor:
    """`out` with the axes in memory in query's order, as torch's op has them; copies only if it must."""
    strides = torch.zeros_like(query, device="meta").stride()
    # Counted, not sorted: torch.compile sorts no symbolic sizes.
    place = [sum(1 for other in range(4) if (-strides[other], other) < (-strides[axis], axis)) for axis in range(4)]
    order = [place.index(axis) for axis in range(4)]
    return out.permute(order).contiguous().permute(place)
