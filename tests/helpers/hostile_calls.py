"""Hostile calls of the C++ extension's CPU ops: shapes, strides, storages and numbers that nobody means.

As a script, `hostile_calls.py SEED COUNT [planted]`, it makes COUNT calls and ends with one line of JSON. A call must
give the right result or a RuntimeError or ValueError. Each call is named on stderr before it is made, so that a crash
has a name; memory that the extension allocates is poisoned (see `environment`), so that what nobody wrote shows.
"""

from __future__ import annotations

import collections
import ctypes
import json
import math
import os
import random
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfast import _C, ops, testing
from vitfast.ops import native, reference

FLOATS = (torch.float32, torch.bfloat16)
OTHER_DTYPES = (torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64)
SMALL = (0, 1, 1, 2, 3, 4, 5, 8, 17, 33)
# Sizes that int32 and int64 do not count, or their products do not; 48 times the last but one is 2^64 + 512.
HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**61 - 1, 2**62, 2**63 - 17, 384307168202282336, 2**63 - 1)
NUMBERS = (0, 1, -1, 2, 3, 4, *HUGE, -(2**63))
SIMD_LEVELS = ("default", "avx2", "avx512f", "avx512_vnni", "avx512_bf16")
LARGEST = 2**20
"""Numbers of a tensor whose values are looked at."""
ROOM = 1 << 30
"""Bytes that the calls may take: more than any of the usual sizes does, less than the least result of a HUGE one."""


def environment(sanitized: bool) -> dict[str, str]:
    """What a process that makes these calls needs: fresh memory is poison, and what is too large is refused."""
    if not sanitized:
        return os.environ | {"MALLOC_PERTURB_": "128"}  # glibc: fresh memory is full of 0x7f, floats of 3.4e38
    options = "allocator_may_return_null=1:max_allocation_size_mb=1024:max_malloc_fill_size=67108864"
    given = os.environ.get("ASAN_OPTIONS", "detect_leaks=0")
    return os.environ | {"ASAN_OPTIONS": f"{given}:{options}:malloc_fill_byte=255"}


class Unbuildable(Exception):
    """torch itself refuses to make such a tensor."""


class Maker:
    """Makes the arguments of one call, and remembers what they held when they were whole."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.values = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.mutations: list[str] = []
        self.twins: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []  # an id is that of another once its tensor is gone

    def size(self, *usual: int) -> int:
        """Mostly a usual size, at times one from the edges."""
        kind = self.random.random()
        return self.random.choice(usual if kind < 0.8 else SMALL if kind < 0.93 else HUGE)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Random numbers; huge axes are expanded, from one number."""
        held = [1 if n > 4096 else n for n in shape]
        made = torch.randn(held, generator=self.values) * scale
        made = (made * 40 + 128).clamp(0, 255) if dtype == torch.uint8 else made > -1 if dtype == torch.bool else made
        return built(lambda: made.to(dtype).expand(shape))

    def hostile(self, name: str, tensor: Tensor | None, probability: float = 0.12) -> Tensor | None:
        """The tensor, at times changed so that it does not suit."""
        if tensor is None:
            return None
        while self.chance(probability):
            change = self.random.choice(CHANGES if tensor.numel() <= LARGEST else LAZY_CHANGES)
            tensor = built(lambda t=tensor, f=change: f(self, t))  # type: ignore[misc]
            self.mutations.append(f"{name}: {change.__name__}")
        self.kept.append(tensor)
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.numel() <= LARGEST:
            self.twins[id(tensor)] = built(lambda t=tensor: t.clone(memory_format=torch.contiguous_format))
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and self.chance(probability / 3):
            whole = tensor.untyped_storage().nbytes()
            kept = self.random.choice((0, whole // 2, max(whole - 1, 0)))
            if tensor.untyped_storage().resizable():
                tensor.untyped_storage().resize_(kept)
                self.mutations.append(f"{name}: storage of {whole} bytes resized to {kept}")
        return tensor

    def twin(self, tensor: Any) -> Any:
        """What a tensor held before its storage was resized; itself for anything else."""
        return self.twins.get(id(tensor), tensor) if isinstance(tensor, Tensor) else tensor


def built(make: Callable[[], Tensor]) -> Tensor:
    try:
        return make()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Unbuildable(str(error)) from error


def other_size(m: Maker, t: Tensor) -> Tensor:
    shape = list(t.shape)
    if shape:
        shape[m.random.randrange(len(shape))] = m.random.choice(SMALL)
    return m.tensor(*shape, dtype=t.dtype)


def expanded(m: Maker, t: Tensor) -> Tensor:
    axis = m.random.randrange(max(t.ndim, 1))
    shape = list(t.shape)
    shape[axis] = m.random.choice((*HUGE, *SMALL))
    return t.narrow(axis, 0, 1).expand(shape)


def other_strides(m: Maker, t: Tensor) -> Tensor:
    """Overlapping, far apart, negative, or huge along an axis of one, where no stride matters."""
    strides = [m.random.choice((0, 1, 1, 2, 7, -1, 2**40)) if n > 1 else m.random.choice((1, 2**62)) for n in t.shape]
    return t.contiguous().as_strided(t.shape, strides, m.random.choice((0, 0, 1)))


def transposed(m: Maker, t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def gapped(m: Maker, t: Tensor) -> Tensor:
    return testing.strided(t, gap=m.random.choice((1, 3, 8)))


def misaligned(m: Maker, t: Tensor) -> Tensor:
    data = t.contiguous().view(torch.uint8).flatten()
    buffer, offset = bytearray(data.numel() + 8), m.random.choice((1, 2, 4))
    torch.frombuffer(buffer, dtype=torch.uint8, offset=offset, count=data.numel()).copy_(data)
    return torch.frombuffer(buffer, dtype=t.dtype, offset=offset, count=t.numel()).view(t.shape)


def other_dtype(m: Maker, t: Tensor) -> Tensor:
    return t.to(m.random.choice((*FLOATS, *OTHER_DTYPES)))


def on_meta(m: Maker, t: Tensor) -> Tensor:
    return t.to("meta")


def sparse(m: Maker, t: Tensor) -> Tensor:
    return t.to_sparse()


def other_axes(m: Maker, t: Tensor) -> Tensor:
    return m.random.choice((lambda: t[None], lambda: t[0], lambda: t.flatten(), lambda: t.sum()))()


def not_finite(m: Maker, t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[m.random.randrange(t.numel()) if t.numel() else 0 :][:1] = m.random.choice((float("nan"), float("inf")))
    return t


LAZY_CHANGES = (other_size, expanded, on_meta)  # which do not go through the numbers
CHANGES = (
    *LAZY_CHANGES, other_strides, transposed, gapped, misaligned, other_dtype, sparse, other_axes, not_finite,
)  # fmt: skip


# Each gives the call, and the oracle of its result: from the same arguments, as they were when they were whole; or None
# where there is no telling.
Case = tuple[Callable[[], Any], Callable[[bool], Any]]


def attention(m: Maker) -> Case:
    batch, queries, keys, heads = m.size(1, 2), m.size(1, 5, 25), m.size(1, 7, 70), m.size(1, 2, 3)
    head_dim, dtype = m.size(1, 8, 20, 32), m.random.choice(FLOATS)
    q, k, v = (
        m.hostile(name, m.tensor(batch, n, heads, head_dim, dtype=dtype))
        for name, n in (("q", queries), ("k", keys), ("v", keys))
    )
    shape = [m.random.choice((1, n)) for n in (batch, heads, queries, keys)][m.random.randrange(5) :]
    bias = m.hostile("bias", m.tensor(*shape, dtype=m.random.choice(testing.DTYPES)) if m.chance(0.3) else None)
    mask = m.hostile("mask", m.tensor(*shape, dtype=torch.bool) if m.chance(0.3) else None)
    causal, scale = m.chance(0.3), m.random.choice((None, None, 0.0, -0.3, 0.5))
    quantize = torch.int8 if m.chance(0.2) else None
    right = 0 if causal else None

    def call() -> Any:
        if m.chance(0.3):
            options = {"bias": bias, "mask": mask, "causal": causal, "scale": scale, "quantize": quantize}
            return ops.attention(q, k, v, **options, backend="native")
        run = torch.ops.vitfast_native.attention_quantize if quantize else torch.ops.vitfast_native.attention
        return run(q, k, v, bias=bias, mask=mask, causal=causal, scale=scale)

    def oracle(upcast: bool) -> Any:
        if (causal or mask is not None) and v is not None and not m.twin(v).isfinite().all():
            return None  # 0 * inf, for a key that may not be seen: NaN in the formula; who skips such keys has none
        twins = map(m.twin, (q, k, v))
        scores = {"bias": m.twin(bias), "mask": m.twin(mask), "right": right, "scale": scale}
        return reference.attention(*twins, **scores, quantize=quantize, upcast=upcast)

    return call, oracle


def layer_norm(m: Maker) -> Case:
    lead = [m.size(1, 2, 5, 20) for _ in range(m.random.randrange(4))]
    width, dtype = m.size(1, 7, 64, 100), m.random.choice(FLOATS)
    x, residual = (m.hostile(name, m.tensor(*lead, width, dtype=dtype)) for name in ("x", "residual"))
    weight, bias = (m.hostile(name, m.tensor(width, dtype=dtype)) for name in ("weight", "bias"))
    eps = m.random.choice((1e-6, 1e-6, 0.0, 1.0))
    name = m.random.choice(("layer_norm", "add_layer_norm"))
    args = (x, weight, bias, eps) if name == "layer_norm" else (x, residual, weight, bias, eps)

    def call() -> Any:
        if m.chance(0.3):
            return getattr(ops, name)(*args, backend="native")
        return getattr(torch.ops.vitfast_native, name)(*args)

    return call, lambda upcast: getattr(reference, name)(*map(m.twin, args), upcast=upcast)


def pack_linear(m: Maker) -> Case:
    dtype = m.random.choice(FLOATS)
    weight = m.hostile("weight", m.tensor(m.size(1, 31, 33, 70), m.size(1, 4, 9), dtype=dtype), 0.4)

    def oracle(upcast: bool) -> Any:
        """Each panel of 32 rows is transposed, in bf16 by pairs of columns."""
        whole = m.twin(weight)
        group = 1 if whole.dtype == torch.float32 else 2
        words = torch.nn.functional.pad(whole, (0, -whole.shape[1] % group)).unflatten(1, (-1, group))
        panels = [panel.transpose(0, 1).reshape(-1) for panel in words.split(32)]
        return torch.cat(panels).view(whole.shape[0], -1)

    return lambda: torch.ops.vitfast_native.pack_linear(weight), oracle


def linear(m: Maker) -> Case:
    lead = [m.size(1, 2, 5, 20) for _ in range(m.random.randrange(3))]
    n, k = m.size(1, 24, 33, 130), m.size(1, 8, 40, 130)
    dtype = m.random.choice(FLOATS)
    plain = m.tensor(n, k, dtype=dtype)
    packed = weight = m.hostile("weight", plain, 0.06)
    direct = m.chance(0.7)
    if direct:
        packed = built(lambda: native.pack(plain))
        packed = m.hostile("packed", packed, 0.06)
    plain_x = m.tensor(*lead, k, dtype=dtype)
    held_x = plain_x.clone() if plain_x.numel() <= LARGEST else plain_x  # the other one's storage may be resized
    x = m.hostile("x", plain_x)
    sometimes = lambda name, *shape: m.hostile(  # noqa: E731
        name, m.tensor(*shape, dtype=dtype) if m.chance(0.3) else None
    )
    bias, layer_scale, residual = sometimes("bias", n), sometimes("layer_scale", n), sometimes("residual", *lead, n)
    row_stats = weight_sum = None
    if m.chance(0.3):
        row_stats = m.tensor(min(math.prod(lead), HUGE[-1]), -(-k // reference.STATS_TILE), 2)
        if max(held_x.numel(), k) <= LARGEST:
            row_stats = built(lambda: reference.row_stats(held_x))
        row_stats = m.hostile("row_stats", row_stats)
        weight_sum = m.hostile("weight_sum", m.tensor(n))
    activation = m.random.choice((None, None, "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"))
    eps, stats = m.random.choice((1e-6, 1e-6, 1.0)), m.chance(0.3)
    names = ("activation", "layer_scale", "residual", "row_stats", "weight_sum", "eps", "stats")
    options = dict(zip(names, (activation, layer_scale, residual, row_stats, weight_sum, eps, stats), strict=True))

    def call() -> Any:
        if direct:
            return native.linear_packed(x, packed, bias, **options)
        return ops.linear(x, weight, bias, **options, backend="native")

    def oracle(upcast: bool) -> Any:
        used = m.twin(weight)
        if direct:  # the weight is not to be had from a pack that was changed
            if not torch.equal(m.twin(packed), native.pack(plain)):
                return None
            used = plain
        twins = {name: m.twin(value) for name, value in options.items()}
        return reference.linear(m.twin(x), used, m.twin(bias), **twins, upcast=upcast)

    return call, oracle


def patches_of(m: Maker) -> tuple[Any, ...]:
    ph, pw = m.size(1, 2, 4), m.size(1, 2, 5)
    batch, channels, down, right = m.size(1, 2), m.size(1, 3, 3), m.size(1, 2), m.size(1, 3)
    height, width, last = min(ph * down, 2**63 - 1), min(pw * right, 2**63 - 1), m.chance(0.5)
    shape = (batch, height, width, channels) if last else (batch, channels, height, width)
    images = m.tensor(*shape, dtype=m.random.choice((torch.uint8, torch.uint8, *testing.DTYPES, torch.float64)))
    patch_size = [ph, pw]
    if m.chance(0.1):
        patch_size[m.random.randrange(2)] = m.random.choice(NUMBERS)
        m.mutations.append(f"patch_size {patch_size}")
    if m.chance(0.03):
        patch_size = patch_size * m.random.randrange(3)
    k = min(channels * ph * pw, 2**63 - 1)
    return images, k, min(down * right, 2**63 - 1), {"patch_size": patch_size, "channels_last": last}


def patch_embed(m: Maker) -> Case:
    images, k, patches, layout = patches_of(m)
    uint8 = images.dtype == torch.uint8
    images = m.hostile("images", images)
    n, dtype = m.size(1, 17, 33), m.random.choice(FLOATS)
    plain = m.tensor(n, k, dtype=dtype, scale=max(k, 1) ** -0.5)
    packed = weight = m.hostile("weight", plain)
    direct = dtype in (torch.float32, torch.bfloat16) and m.chance(0.5)
    pack = lambda: native.pack_patch_embed(plain, **layout, uint8=uint8)  # noqa: E731
    if direct:
        packed = m.hostile("packed", built(pack))
    sometimes = lambda name, *shape: m.hostile(  # noqa: E731
        name, m.tensor(*shape, dtype=dtype) if m.chance(0.4) else None
    )
    rest = sometimes("bias", n), sometimes("position", patches, n), sometimes("prefix", m.size(0, 1, 2), n)

    def call() -> Any:
        if direct:
            return torch.ops.vitfast_native.patch_embed_packed(images, packed, *rest, **layout)
        if m.chance(0.3):
            return ops.patch_embed(images, weight, *rest, **layout, backend="native")
        return torch.ops.vitfast_native.patch_embed(images, weight, *rest, **layout)

    def oracle(upcast: bool) -> Any:
        used = m.twin(weight)
        if direct:
            before, after = pack(), m.twin(packed)
            same = before.dtype == after.dtype and before.shape == after.shape
            if not same or not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
                return None
            used = plain
        return reference.patch_embed(m.twin(images), used, *map(m.twin, rest), **layout, upcast=upcast)

    return call, oracle


def pack_patch_embed(m: Maker) -> Case:
    _, k, _, layout = patches_of(m)
    dtype = m.random.choice((*3 * [torch.float32], torch.bfloat16))  # which not every SIMD level has
    weight = m.hostile("weight", m.tensor(m.size(1, 17, 33), k, dtype=dtype), 0.3)
    uint8 = m.chance(0.5)
    if m.chance(0.3):
        return lambda: len(native.why_no_integers(weight, **layout)), lambda upcast: None

    def call() -> Any:
        """The pack is opaque: what is compared is a flat image's tokens."""
        packed = torch.ops.vitfast_native.pack_patch_embed(weight, **layout, uint8=uint8)
        return torch.ops.vitfast_native.patch_embed_packed(picture(), packed, **layout)

    def picture() -> Tensor:
        (ph, pw), last = layout["patch_size"], layout["channels_last"]
        shape = (1, ph, pw, weight.shape[1] // ph // pw)
        image = torch.full(shape if last else (1, shape[3], ph, pw), 130.0)
        return image.to(torch.uint8) if uint8 else image

    return call, lambda upcast: reference.patch_embed(picture(), m.twin(weight), **layout, upcast=upcast)


def quantized_linear(m: Maker) -> Case:
    """On plain weights there is none for the CPU; a build with CUDA has one, which must not run here."""
    x, weight = (m.hostile(name, m.tensor(3, 16).to(torch.int8)) for name in ("x", "weight"))
    scales = [m.hostile(name, m.tensor(3)) for name in ("x_scale", "weight_scale")]
    run = torch.ops.vitfast_native.quantized_linear
    options = (None, None, None, None, torch.float16, m.chance(0.5))
    return lambda: run(x, scales[0], weight, scales[1], *options), lambda upcast: None


def quantize(m: Maker) -> Case:
    lead = [m.size(1, 2, 5, 20) for _ in range(m.random.randrange(4))]
    width, dtype = m.size(1, 7, 64, 100), m.random.choice(testing.DTYPES)
    x = m.hostile("x", m.tensor(*lead, width, dtype=dtype))
    norm = m.chance(0.5)
    affine = [m.hostile(name, m.tensor(width, dtype=dtype) if norm else None) for name in ("weight", "bias")]
    eps, kind = m.random.choice((1e-6, 1e-6, 0.0, 1.0)), torch.int8 if m.chance(0.95) else torch.float8_e4m3fn

    def call() -> Any:
        if m.chance(0.3):
            return ops.quantize(x, *affine, eps, dtype=kind, backend="native")
        return torch.ops.vitfast_native.quantize(x, *affine, eps, dtype=kind)

    return call, lambda upcast: reference.quantize(*map(m.twin, (x, *affine)), eps, dtype=kind, upcast=upcast)


def pack_quantized_linear(m: Maker) -> Case:
    weight = m.hostile("weight", m.tensor(m.size(1, 31, 33, 70), m.size(1, 4, 9), dtype=torch.int8, scale=40), 0.4)

    def oracle(upcast: bool) -> Any:
        """Each panel of 32 rows in words of four columns, 128 added to each byte."""
        whole = m.twin(weight)
        words = torch.nn.functional.pad(whole, (0, -whole.shape[1] % 4)).unflatten(1, (-1, 4))
        panels = [panel.transpose(0, 1).reshape(-1) for panel in words.split(32)]
        return (torch.cat(panels).view(whole.shape[0], -1).int() ^ -128).to(torch.int8)

    return lambda: torch.ops.vitfast_native.pack_quantized_linear(weight), oracle


def quantized_linear_packed(m: Maker) -> Case:
    lead = [m.size(1, 2, 5, 20) for _ in range(m.random.randrange(3))]
    n, k, dtype = m.size(1, 24, 33, 130), m.size(1, 8, 40, 130), m.random.choice(testing.DTYPES)
    integers = lambda *shape: m.tensor(*shape, dtype=torch.int8, scale=40)  # noqa: E731
    plain = integers(n, k)
    packed = weight = m.hostile("weight", plain, 0.06)
    direct = m.chance(0.7)
    if direct:
        packed = m.hostile("packed", built(lambda: native.pack_quantized(plain)), 0.06)
    x = m.hostile("x", integers(*lead, k))
    group = m.random.choice((0, 0, 128, 64))
    x_scale = m.hostile("x_scale", m.tensor(*lead, *([-(-k // group)] if group else [])))
    weight_scale = m.hostile("weight_scale", m.tensor(n))
    sometimes = lambda name, *shape: m.hostile(  # noqa: E731
        name, m.tensor(*shape, dtype=dtype) if m.chance(0.3) else None
    )
    bias, layer_scale, residual = sometimes("bias", n), sometimes("layer_scale", n), sometimes("residual", *lead, n)
    activation = m.random.choice((None, None, "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"))
    options = {"activation": activation, "layer_scale": layer_scale, "residual": residual, "dtype": dtype}
    options["requantize"] = m.chance(0.3)

    def call() -> Any:
        if direct:
            return native.quantized_linear_packed(x, x_scale, packed, weight_scale, bias, **options)
        return ops.quantized_linear(x, x_scale, weight, weight_scale, bias, **options, backend="native")

    def oracle(upcast: bool) -> Any:
        used = m.twin(weight)
        if direct:  # the weight is not to be had from a pack that was changed
            if not torch.equal(m.twin(packed), native.pack_quantized(plain)):
                return None
            used = plain
        twins = {name: m.twin(value) for name, value in options.items()}
        args = map(m.twin, (x, x_scale, used, weight_scale, bias))
        return reference.quantized_linear(*args, **twins, upcast=upcast)

    return call, oracle


def resample(m: Maker) -> Case:
    batch, height, width, channels = m.size(1, 2), m.size(1, 9, 40), m.size(1, 9, 70), m.size(1, 3, 3, 4, 4)
    images = m.hostile("images", m.tensor(batch, height, width, channels, dtype=torch.uint8))
    axis = m.random.choice((1, 2, 2, 1, 0, 3)) if m.chance(0.1) else m.random.choice((1, 2))
    length, taps, out = (height, width)[axis == 2], m.size(1, 2, 5, 20), m.size(1, 4, 20)
    last = min(max(length - taps, 0), LARGEST) + m.chance(0.05)
    first = m.tensor(out, dtype=torch.int64)
    if first.numel() <= LARGEST:
        first = torch.randint(0, last + 1, (out,), generator=m.values)
    factor = 1 << (24 if m.chance(0.05) else 20)
    weights = m.tensor(out, taps, scale=factor / 4)
    weights = built(lambda: weights.clamp(-factor, factor).int()) if weights.numel() <= LARGEST else weights
    first, weights = m.hostile("first", first), m.hostile("weights", weights)

    def call() -> Any:
        return torch.ops.vitfast_native.resample(images, first, weights, axis=axis).float()

    def oracle(upcast: bool) -> Any:
        if images.numel() > LARGEST:
            return None
        pixels, begin, factors = m.twin(images).long(), m.twin(first), m.twin(weights).long()
        total = torch.zeros(1, dtype=torch.int64).expand(*pixels.shape[:axis], len(begin), *pixels.shape[axis + 1 :])
        for tap in range(factors.shape[1]):
            total = total + pixels.index_select(axis, begin + tap) * factors[:, tap].view(-1, *[1] * (3 - axis))
        wrapped = (total + (1 << 21) + (1 << 31)) % (1 << 32) - (1 << 31)
        return (wrapped >> 22).clamp(0, 255).double()

    return call, oracle


OPS = (
    attention, layer_norm, pack_linear, linear, patch_embed, pack_patch_embed, quantized_linear, quantize,
    pack_quantized_linear, quantized_linear_packed, resample,
)  # fmt: skip
WEIGHTS = (4, 3, 1, 4, 4, 2, 0.2, 2, 1, 4, 2)


def why_wrong(actual: Any, oracle: Any, baseline: Any) -> str:
    """What is wrong with a result, "" if nothing is. Coarse: uninitialised memory is NaN or 3.4e38 here."""
    if not isinstance(actual, Tensor):
        pairs = zip(actual, oracle, baseline, strict=True)
        return next((reason for reason in (why_wrong(*parts) for parts in pairs) if reason), "")
    if actual.shape != oracle.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    got, want, base = actual.double(), oracle.double(), baseline.double()
    finite = want.isfinite()
    if not (got.isfinite() == finite).logical_or(base.isfinite() != finite).all():
        return "infinity or NaN in other places than in the oracle"
    finite &= got.isfinite() & base.isfinite()
    if not finite.any():
        return ""
    error, expected = (got - want)[finite].abs().max(), (base - want)[finite].abs().nan_to_num(0.0, posinf=0.0).max()
    # Sums of terms a hundred times the result, in pixels.
    bound = 2 * expected + 64 * testing.TOLERANCES[actual.dtype].ulp * max(1.0, want[finite].abs().max().item())
    return "" if error <= bound else f"max error {error:.3e} exceeds {bound:.3e}"


def describe(maker: Maker, op: str) -> str:
    shapes = ", ".join(f"{tuple(t.shape)}/{t.stride() if t.layout == torch.strided else t.layout}" for t in maker.kept)
    return f"{op}: {'; '.join(maker.mutations) or 'plain'} ({shapes})"


def outcome_of(call: Callable[[], Any], oracle: Callable[[bool], Any]) -> str:
    """ "right", "empty", "refused" by the op, "unknown" without an oracle, or else what is wrong."""
    try:
        result = call()
    except (RuntimeError, ValueError) as error:
        return "refused" if str(error) else f"wrong: {type(error).__name__} without a message"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    if isinstance(result, int):
        return "right"
    if not sum(t.numel() for t in (result if isinstance(result, (list, tuple)) else [result])):
        return "empty"
    try:
        exact = oracle(True)
        baseline = oracle(False)
    except Exception as error:
        return f"wrong: a result where the reference has {type(error).__name__}: {str(error)[:200]}"
    if exact is None:
        return "unknown"
    reason = why_wrong(result, exact, baseline)
    return f"wrong: {reason}" if reason else "right"


def crash() -> int:
    return len(ctypes.string_at(0))


def unwritten() -> Tensor:
    return torch.ops.aten.empty.memory_format([3, 2000])


def main(seed: str, count: int, planted: bool = False) -> None:
    """`planted`: the last call but one leaves its result unwritten and the last crashes; the harness must see both."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)  # torch fills what is allocated through it with NaN
    if "-fsanitize" not in _C.build_info()["flags"]:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong = []
    for i in range(count):
        attempts, name = 0, ""
        while not name:
            maker = Maker(f"{seed}:{i}:{attempts}")
            attempts += 1
            _C.limit_simd(maker.random.choice(SIMD_LEVELS))
            op = maker.random.choices(OPS, WEIGHTS)[0]
            print(f"call {i} of seed {seed}: {op.__name__}, its arguments", file=sys.stderr)
            try:
                call, oracle = op(maker)
                name = describe(maker, op.__name__)
            except Unbuildable:
                continue
        if planted and i >= count - 2:
            last = i == count - 1
            call, oracle, name = crash if last else unwritten, lambda upcast: torch.zeros(3, 2000), "planted"
        print(f"call {i} of seed {seed}: {name}", file=sys.stderr)
        outcome = outcome_of(call, oracle)
        counts[op.__name__][outcome.partition(":")[0]] += 1
        if outcome.startswith("wrong"):
            wrong.append(f"call {i} of seed {seed}: {name}: {outcome}")
            print(wrong[-1], file=sys.stderr)
    print(json.dumps({"counts": counts, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "planted" in sys.argv)
