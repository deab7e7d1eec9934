"""Any call at all: vitfast.scaled_dot_product_attention against torch's own, by hypothesis.

The same result, or the same kind of error; gradients too. `calls` draws whatever one may pass, most of which is
for torch; `able_calls` what the kernels take. CALLS and ABLE_CALLS say how many of each.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vitfast
from vitfast import testing
from vitfast.attention.sdpa import attention_backend, explain, scaled_dot_product_attention
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded, make, strided

FP32, FP16, BF16 = testing.DTYPES
INF = float("inf")
CALLS = [400, pytest.param(2500, marks=pytest.mark.full)]
ABLE_CALLS = [15, pytest.param(2000, marks=pytest.mark.full)]

LAYOUTS = {
    "contiguous": lambda x: guarded(x),
    "heads inside": lambda x: guarded(x.transpose(-3, -2).contiguous()).transpose(-3, -2) if x.ndim > 2 else guarded(x),
    "gaps": lambda x: strided(x),
    "last axis apart": lambda x: guarded(x.transpose(-1, -2).contiguous()).transpose(-1, -2),
    "batch innermost": lambda x: guarded(x.movedim(0, -2).contiguous()).movedim(-2, 0),
    "expanded": lambda x: guarded(x[:1]).expand(x.shape) if x.shape[0] else guarded(x),
}


@dataclass(frozen=True)
class Call:
    """Arguments of one call, as data that hypothesis can shrink and print."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[str, ...]
    mask: tuple[int, ...] | None
    mask_dtype: torch.dtype
    mask_special: str | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    seed: int

    def tensors(self) -> tuple[Tensor, ...]:
        shapes = (self.query, self.key, self.value)
        parts = zip(shapes, self.dtypes, self.layouts, strict=True)
        return tuple(
            LAYOUTS[layout](make(*shape, dtype=dtype, seed=self.seed + i))
            for i, (shape, dtype, layout) in enumerate(parts)
        )

    def attn_mask(self) -> Tensor | None:
        if self.mask is None:
            return None
        values = make(1, *self.mask, seed=self.seed + 3)[0]
        mask = values > -0.5 if self.mask_dtype == torch.bool else values.to(self.mask_dtype)
        if self.mask_special is not None and mask.ndim >= 2 and mask.numel() and mask.dtype != torch.int32:
            lowest = torch.finfo(FP16).min if mask.dtype == FP16 else torch.finfo(FP32).min
            special = {"blind": -INF, "lowest": lowest}[self.mask_special]
            mask[..., :: max(1, mask.shape[-2] // 2), :] = False if mask.dtype == torch.bool else special  # whole rows
            mask[..., -1:] = False if mask.dtype == torch.bool else special
        return guarded(mask)

    def arguments(self) -> dict:
        return {"is_causal": self.is_causal, "scale": self.scale, "enable_gqa": self.enable_gqa}


SIZE = st.sampled_from([0, 1, 2, 3, 3, 5])
LENGTH = st.sampled_from([0, 1, 2, 7, 16, 17, 33])


@st.composite
def calls(draw) -> Call:
    ndim = draw(st.sampled_from([4, 4, 4, 4, 4, 3, 2, 5]))
    lead = [draw(SIZE) for _ in range(ndim - 2)]
    queries, keys = draw(LENGTH), draw(LENGTH)
    head_dim = draw(st.sampled_from([0, 1, 8, 8, 16, 24, 72]))
    value_dim = draw(st.sampled_from([head_dim] * 7 + [5]))
    kv_lead = list(lead)
    if lead and draw(st.integers(0, 4)) == 0:  # fewer heads, which may or may not divide the queries'
        kv_lead[-1] = draw(st.sampled_from([1, 1, 2]))
        lead[-1] = draw(st.sampled_from([2, 3, 4]))
    elif len(lead) > 1 and draw(st.integers(0, 9)) == 0:
        kv_lead[0] = 1
    dtype = draw(st.sampled_from([FP32, FP32, FP16, BF16, torch.float64]))
    other = draw(st.sampled_from([dtype] * 15 + [FP16]))
    scores = [*lead, queries, keys]
    mask = None
    if draw(st.booleans()):
        mask = [draw(st.sampled_from([n, n, 1])) for n in scores[draw(st.integers(0, ndim)) :]]
        if mask and draw(st.integers(0, 14)) == 0:
            mask[0] += 1
    return Call(
        query=(*lead, queries, head_dim),
        key=(*kv_lead, keys, head_dim),
        value=(*kv_lead, draw(st.sampled_from([keys] * 15 + [keys + 1])), value_dim),
        dtypes=(dtype, dtype, other),
        layouts=tuple(draw(st.sampled_from(sorted(LAYOUTS) + ["contiguous"] * 6)) for _ in range(3)),
        mask=None if mask is None else tuple(mask),
        mask_dtype=draw(st.sampled_from([torch.bool, torch.bool, dtype, dtype, FP32, FP16, torch.int32])),
        mask_special=draw(st.sampled_from([None, "blind", "lowest"])),
        is_causal=draw(st.sampled_from([False, False, True])),
        scale=draw(st.sampled_from([None, None, 0.0, -0.3, 0.7, 1, math.inf, math.nan])),
        enable_gqa=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def able_calls(draw) -> Call:
    """Calls that the kernels take."""
    ndim = draw(st.sampled_from([4, 4, 4, 3, 2]))
    lead = [draw(st.sampled_from([0, 1, 1, 2])), draw(st.sampled_from([1, 1, 2]))][4 - ndim :]
    queries, keys = (draw(st.sampled_from([0, 1, 1, 2, 3, 7, 7, 9, 16, 17, 17, 33, 70])) for _ in range(2))
    head_dim = draw(st.sampled_from([1, 8, 16, 17, 24, 64, 72]))
    kv_lead, enable_gqa = list(lead), False
    if lead and draw(st.integers(0, 2)) == 0:
        lead[-1], enable_gqa = lead[-1] * draw(st.sampled_from([1, 2, 3])), True
    dtype = draw(st.sampled_from(testing.DTYPES))
    mask = None
    if draw(st.booleans()):
        scores = [*lead, queries, keys]
        mask = [draw(st.sampled_from([n, n, 1])) for n in scores[draw(st.integers(0, ndim - 2)) :]]
    layouts = [name for name in sorted(LAYOUTS) if name != "last axis apart"]
    return Call(
        query=(*lead, queries, head_dim),
        key=(*kv_lead, keys, head_dim),
        value=(*kv_lead, keys, head_dim),
        dtypes=(dtype,) * 3,
        layouts=tuple(draw(st.sampled_from(layouts)) for _ in range(3)),
        mask=None if mask is None else tuple(mask),
        mask_dtype=draw(st.sampled_from([torch.bool, dtype, FP32])),
        mask_special=draw(st.sampled_from([None, None, "blind", "lowest"])),
        is_causal=mask is None and draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.0, -0.3, 0.7, 1])),
        enable_gqa=enable_gqa,
        seed=draw(st.integers(0, 99)),
    )


def outcome_of(function, *args, **kwargs):
    """The result, or the type of the error."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error)


def outcome(function, call: Call):
    return outcome_of(function, *call.tensors(), attn_mask=call.attn_mask(), **call.arguments())


def gradients(function, call: Call, dtype: torch.dtype | None = None, **arguments) -> list[Tensor]:
    """Those of query, key, value and a float mask; `dtype`: computed in this one."""
    tensors = [*call.tensors(), *([] if call.mask is None else [call.attn_mask()])]
    leaves = [t.to(dtype or t.dtype) if t.is_floating_point() else t for t in tensors]
    wanting = [t.requires_grad_() for t in leaves if t.is_floating_point()]
    mask = {} if call.mask is None else {"attn_mask": leaves[3]}
    out = function(*leaves[:3], **call.arguments() | mask | arguments)
    dout = output_gradient(call).to(out.dtype)
    return list(torch.autograd.grad(out, wanting, dout, allow_unused=True, materialize_grads=True))


def output_gradient(call: Call) -> Tensor:
    """Numbers that all dtypes hold."""
    values = make(1, *call.query[:-1], call.value[-1], seed=call.seed + 4)[0]
    return (values * 8).round() / 8


def strides(tensor: Tensor) -> list[int]:
    """Strides that mean something: those of axes with more than one entry, in a tensor that has any."""
    return [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1] if tensor.numel() else []


def check(call: Call) -> str:
    """Compare one call with torch's on both routes; which of them the kernels took or what torch raised."""
    torchs = outcome(F.scaled_dot_product_attention, call)
    ours = outcome(scaled_dot_product_attention, call)
    if isinstance(torchs, type):
        assert ours is torchs
    elif explain(*call.tensors(), attn_mask=call.attn_mask(), **call.arguments()).backend == "torch":
        assert torch.equal(ours.nan_to_num(7.25), torchs.nan_to_num(7.25))
        assert (ours.dtype, ours.stride()) == (torchs.dtype, torchs.stride())
        if call.key[-2] == call.value[-2]:  # else torch's op reads, and its gradient may write, past the key's memory
            same_gradients(call)

    with attention_backend("triton"):
        actual = outcome(scaled_dot_product_attention, call)
    if actual is vitfast.BackendError:
        return "torch" if isinstance(torchs, Tensor) else "error"
    assert isinstance(torchs, Tensor), f"the kernels took a call that torch refuses with {torchs}"
    assert isinstance(actual, Tensor), f"{actual} from the kernels"
    inner = all(tensor.stride(-1) == 1 for tensor in call.tensors())  # even where there is one entry
    if inner and (call.mask is None or len(call.mask) != 3):  # else torch leaves its fused ops, and their layout
        assert strides(actual) == strides(torchs)
    # Beside the values that were averaged: where they cancel, errors are still in units of them. Of
    # thousands of tiny cases, torch's own error is by luck next to nothing in some.
    compare(call, [actual], *([t] for t in expected(call)), [call.tensors()[2]])
    return "triton"


def same_gradients(call: Call) -> None:
    """On torch's route: its own gradients, or its kind of error."""
    wanted, ours = (
        outcome_of(gradients, function, call)
        for function in (F.scaled_dot_product_attention, scaled_dot_product_attention)
    )
    if isinstance(wanted, type):
        assert ours is wanted
    else:
        torch.testing.assert_close(ours, wanted, equal_nan=True)


def check_with_gradients(call: Call) -> str:
    """Compare one call with torch's, and on the kernels also its gradients."""
    seen = check(call)
    with attention_backend("triton"):
        actual = gradients(scaled_dot_product_attention, call)
    masked = causal_as_mask(call)
    oracle = gradients(F.scaled_dot_product_attention, call, torch.float64, **masked)
    baseline = gradients(F.scaled_dot_product_attention, call, **masked)
    # An fp32 mask's gradient of a half-precision call is as exact as the call: it comes from the rounded output.
    actual, baseline = ([t.to(call.dtypes[0]) for t in grads] for grads in (actual, baseline))
    compare(call, actual, oracle, baseline, sizes(call))
    return seen


def compare(call: Call, actual, oracle, baseline, units) -> None:
    """Each tensor by itself, beside the sizes in units of which it is off."""
    for parts in zip(actual, oracle, baseline, units, strict=True):
        *results, unit = parts
        assert_close(*(torch.cat([t.flatten(), unit.to(t.dtype).flatten()]) for t in results), str(call))


def causal_as_mask(call: Call) -> dict:
    """Arguments for torch's op, whose own causal form gives NaN for a scale <= 0 on some versions."""
    if not call.is_causal:
        return {}
    seen = torch.ones(call.query[-2], call.key[-2], dtype=torch.bool, device=testing.device()).tril()
    return {"is_causal": False, "attn_mask": seen}


def expected(call: Call) -> tuple[Tensor, Tensor]:
    """Torch's op in float64 and in the call's dtype."""
    arguments = {"attn_mask": call.attn_mask()} | call.arguments() | causal_as_mask(call)
    mask = arguments.pop("attn_mask")
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    oracle = F.scaled_dot_product_attention(*(t.double() for t in call.tensors()), attn_mask=wide, **arguments)
    return oracle, F.scaled_dot_product_attention(*call.tensors(), attn_mask=mask, **arguments)


def sizes(call: Call) -> list[Tensor]:
    """In units of which each gradient of a call on the kernels is off, also where its terms cancel (a row that sees
    one key has dq = 0): terms of random sign along the head, and along queries or keys, where all of a row share
    the error of its sum, all of one sign."""
    q, k, v = (t.double() for t in call.tensors())
    dout, group = output_gradient(call).double(), 1
    if call.enable_gqa:
        group = q.shape[-3] // k.shape[-3]
        k, v = (t.repeat_interleave(group, -3) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    mask = causal_as_mask(call).get("attn_mask", call.attn_mask())
    products = scores = q @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num(0.0)  # NaN: a row that sees nothing
    if call.dtypes[0] == FP32:  # the backward makes the weights again: q kᵀ, rounded twice, is in the exponent
        weights = weights * (1 + products.abs())
    dweights = (dout.square() @ v.square().mT).sqrt()
    dscores = weights * (dweights + (weights * dweights).sum(-1, keepdim=True))
    found = [dscores @ k.abs() * abs(scale), dscores.mT @ q.abs() * abs(scale), weights.mT @ dout.abs()]
    if group > 1:
        found[1:] = [t.unflatten(-3, (-1, group)).sum(-3) for t in found[1:]]
    if mask is not None and mask.is_floating_point():
        found.append(dscores.sum_to_size(mask.shape))
    return found


PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def run_property(strategy, check_one, examples: int) -> dict[str, int]:
    """How many calls ended on which route; the default suite draws the same ones each time."""
    seen = {"triton": 0, "torch": 0, "error": 0}

    @settings(max_examples=examples, derandomize=examples < 1000, **PROPERTY)
    @given(strategy)
    def agrees(call):
        seen[check_one(call)] += 1

    agrees()
    return seen


@pytest.mark.parametrize("examples", CALLS)
def test_any_call(examples):
    seen = run_property(calls(), check, examples)
    assert sum(seen.values()) >= examples
    assert min(seen.values()) >= examples // 12, f"the generator favours one outcome too much: {seen}"


@pytest.mark.parametrize("examples", ABLE_CALLS)
def test_any_call_on_the_kernels(examples):
    seen = run_property(able_calls(), check_with_gradients, examples)
    assert seen["triton"] >= examples
    assert seen["triton"] == sum(seen.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_longer_than_key_is_torchs_affair(layout):
    # On the CPU torch's fused op takes the number of keys from the value, and reads past the key's memory
    # (github.com/pytorch/pytorch/pull/193728). Poison lies there, so that both routes read the same.
    q, k, v = (make(2, 3, n, 16, seed=n) for n in (9, 19, 20))
    k = LAYOUTS[layout](k)
    wanted, actual = (
        outcome_of(function, q, k, v) for function in (F.scaled_dot_product_attention, scaled_dot_product_attention)
    )
    assert actual is wanted if isinstance(wanted, type) else torch.equal(actual.nan_to_num(), wanted.nan_to_num())
    with pytest.raises(vitfast.BackendError, match="differ or need broadcasting"), attention_backend("triton"):
        scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_gradients_that_are_off_are_caught(dtype):
    shape = (1, 2, 17, 16)
    call = Call(
        shape, shape, shape, (dtype,) * 3, ("contiguous",) * 3, (17, 17), dtype, None,
        is_causal=False, scale=0.25, enable_gqa=False, seed=0,
    )  # fmt: skip
    right = gradients(F.scaled_dot_product_attention, call, torch.float64)
    torchs = gradients(F.scaled_dot_product_attention, call)
    compare(call, torchs, right, torchs, sizes(call))
    for i in range(len(torchs)):
        wrong = [t * 1.06 if i == j else t for j, t in enumerate(torchs)]
        with pytest.raises(AssertionError, match="error"):
            compare(call, wrong, right, torchs, sizes(call))
