"""attention with 8-bit output: both kernels, dtypes and head dims, what else attention does, refusals, batches."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from helpers.mutants import mutant
from helpers.scripts import compiling_code

from vitfast import ops
from vitfast.kernels import attention as kernel
from vitfast.kernels import attention_short
from vitfast.kernels._parts import launch
from vitfast.ops import reference, registry
from vitfast.testing import DTYPES, check_op, device, guarded, make

each_kind = pytest.mark.parametrize("kind", list(ops.QUANTIZED), ids=str)


def packed(tokens, head_dim=64, dtype=torch.bfloat16, heads=2, batch=1):
    """q, k, v as views of one guarded qkv [B, N, 3, H, D]; heads of sizes far apart."""
    size = 10.0 ** -torch.arange(heads, device=device())[:, None]
    return guarded(make(batch, tokens, 3, heads, head_dim, dtype=dtype) * size.to(dtype)).unbind(2)


def check(*args, **kwargs):
    check_op(kernel.attention, reference.attention, *args, **kwargs)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", sorted(ops.SCALE_GROUPS))
def test_head_dims(head_dim, dtype, kind):
    check(*packed(19, head_dim, dtype), quantize=kind)


@each_kind
@pytest.mark.parametrize("tokens", [1, 131, pytest.param(197, marks=pytest.mark.full)])
def test_tokens(tokens, kind):
    check(*packed(tokens), quantize=kind)


@each_kind
@pytest.mark.parametrize("config", attention_short.CONFIGS, ids=lambda config: config.name)
def test_short_configs(config, kind):
    problem = kernel.Problem(64, 70, 70, torch.bfloat16, launch.capability(device()), in_8_bits=True)
    reasons = attention_short.why_not(config, problem)
    if reasons and device().type == "cuda":
        pytest.skip("; ".join(reasons))
    run = functools.partial(attention_short_in_8_bits, config)
    check_op(run, reference.attention, *packed(70, batch=2), quantize=kind)


def attention_short_in_8_bits(config, q, k, v, *, quantize):
    """The kernel itself: the launcher would refuse what spills on the chip that the interpreter stands for."""
    out, scale = torch.empty(q.shape, dtype=quantize, device=q.device), torch.empty(q.shape[:3], device=q.device)
    attention_short.attention_short(out, scale, q, k, v, q.shape[3] ** -0.5, config)
    return out, scale


def test_with_all_that_attention_does():
    """Rotation, causality, bias, mask and shared key heads change the values, not how they are written."""
    q, (k, v) = guarded(make(1, 20, 4, 64)), (guarded(make(1, 20, 2, 64, seed=s)) for s in (1, 2))
    bias, mask = make(1, 20, 20, seed=3), make(1, 4, 1, 20, seed=4) > -1
    table = {"cos": make(15, 64, seed=5), "sin": make(15, 64, seed=6)}
    check(q, k, v, bias=bias, mask=mask, **table, right=0, quantize=torch.float8_e4m3fn)


@each_kind
def test_packed_sequences(kind):
    """Each sequence as if alone."""
    q, k, v = packed(30)
    cu = torch.tensor([0, 10, 30], device=device())
    options = {"cu_queries": cu, "cu_keys": cu, "max_queries": 20, "max_keys": 20}
    values, scale = ops.attention(q, k, v, **options, quantize=kind, backend="triton")
    for rows in (slice(0, 10), slice(10, 30)):
        check_op(
            lambda *_, rows=rows, **__: (values[:, rows], scale[:, rows]), reference.attention,
            *(t[:, rows] for t in (q, k, v)), quantize=kind,
        )  # fmt: skip


@each_kind
@pytest.mark.parametrize("implementation", [kernel.attention, reference.attention], ids=["triton", "torch"])
def test_no_keys_and_nan(implementation, kind):
    q, k, v = packed(20)
    values, scale = implementation(q, k[:, :0], v[:, :0], quantize=kind)
    assert not values.float().any() and scale.isfinite().all()
    assert implementation(q[:0], k[:0], v[:0], quantize=kind)[1].shape == (0, 20, 2)
    v[0, 3, 1, 7] = float("nan")
    scale = implementation(q, k, v, quantize=kind)[1]
    assert scale[:, :, 1].isnan().all() and scale[:, :, 0].isfinite().all()


@each_kind
def test_bits_do_not_depend_on_the_batch(kind):
    q, k, v = packed(20, batch=3)
    values, scale = kernel.attention(q, k, v, quantize=kind)
    for i in range(3):
        one = kernel.attention(*(t[i : i + 1] for t in (q, k, v)), quantize=kind)
        assert torch.equal(one[0].float(), values[i : i + 1].float()) and torch.equal(one[1], scale[i : i + 1])


@each_kind
@pytest.mark.parametrize("head_dim", sorted(ops.SCALE_GROUPS))
def test_a_product_reads_what_attention_writes(head_dim, kind):
    """Against the same product of the output in fp32: what 8 bits cost, with heads of sizes far apart."""
    q, k, v = packed(20, head_dim, heads=3)
    weight = reference.quantize(make(40, 3 * head_dim, scale=(3 * head_dim) ** -0.5), dtype=kind)
    values, scale = ops.attention(q, k, v, quantize=kind, backend="triton")
    y = ops.quantized_linear(values.flatten(2), scale, *weight, dtype=torch.float32, backend="triton")
    exact = reference.attention(q, k, v, upcast=True).flatten(2) @ (weight[0].double() * weight[1][:, None]).t()
    rms = ((y - exact).square().mean() / exact.square().mean()).sqrt()
    assert rms < 0.03  # e4m3 rounds by 2.6 % RMS


@each_kind
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("+ queries) * heads + head", "+ queries) * heads"), ("= in_8_bits(value,", "= in_8_bits(1.1 * value,")],
)
def test_wrong_kernels_are_noticed(right, wrong, kind, tmp_path):
    copy = mutant(kernel, right, wrong, tmp_path)
    with pytest.raises(AssertionError):
        check_op(copy.attention, reference.attention, *packed(20), quantize=kind)


@each_kind
def test_wrong_short_kernels_are_noticed(kind, tmp_path, monkeypatch):
    copy = mutant(attention_short, "+ queries.to(tl.int64) * heads, head_scale", "+ queries, head_scale", tmp_path)
    run = functools.partial(attention_short_in_8_bits, copy.CONFIGS[0])
    check_op(run, reference.attention, *packed(20), quantize=kind)
    monkeypatch.setattr(attention_short, "attention_short", copy.attention_short)
    with pytest.raises(AssertionError):
        check_op(run, reference.attention, *packed(20), quantize=kind)


def test_a_table_has_choices_of_its_own(monkeypatch):
    """A short config that holds 257 keys in bf16 would spill, and is refused, in 8 bits."""
    q, k, v = packed(257, heads=1)
    short = attention_short.CONFIGS[0]
    problem = kernel.Problem(64, 257, 257, torch.bfloat16, (9, 0))
    reasons = attention_short.why_not(short, replace(problem, in_8_bits=True))
    assert reasons == ["257 keys of head dim 64 are outside 1..208, in 8 bits"]
    assert not attention_short.why_not(short, problem)
    table = {"attention": {kernel.problem_of(q[:, :1], k, v).key: "short"}}
    monkeypatch.setattr(launch, "tuned_choices", lambda device: table)
    assert kernel.attention(q[:, :1], k, v, quantize=torch.int8)[0].shape == (1, 1, 1, 64)
    with pytest.raises(ValueError, match=r"257 keys of head dim 64 are outside 1\.\.208, in 8 bits"):
        kernel.attention(q, k, v, config=short, quantize=torch.int8)


@pytest.mark.parametrize(
    ("head_dim", "options", "message"),
    [
        (64, {"quantize": torch.float8_e5m2}, "got torch.float8_e5m2"),
        (32, {"quantize": torch.int8}, "head dim of 64 or 128, got 32"),
        (80, {"quantize": torch.int8}, "head dim of 64 or 128, got 80"),
        (64, {"quantize": torch.int8, "return_lse": True}, "quantize must be None with return_lse, got torch.int8"),
    ],
)
def test_bad_input(head_dim, options, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(*packed(5, head_dim), **options)


def test_who_refuses():
    for dtype, capability, able in (
        ("float8_e4m3fn", (8, 6), False), ("float8_e4m3fn", (8, 9), True), ("int8", (8, 0), True),
    ):  # fmt: skip
        spec = ops.Spec("attention", "cuda", torch.bfloat16, capability, {"head_dim": 64}, (f"{dtype} output",))
        reasons = registry.backend("attention", "torch").why_not(spec)
        assert reasons == ([] if able else ["compute capability 8.6 is below 8.9"])
    with pytest.raises(ops.BackendError, match=r"float8_e4m3fn output|not built"):
        ops.attention(*packed(5), quantize=torch.float8_e4m3fn, backend="native")


COMPILE = """
import json
from vitfast.diagnostics.compiled import inspect_case
from vitfast.kernels._compile.attention_short import more_compile_cases
cases = [(case, arch) for case in more_compile_cases() for arch in case.archs]
print(json.dumps([inspect_case(case, f"sm_{arch}") for case, arch in cases]))
"""


@pytest.mark.full
def test_short_configs_compile_without_spills():
    """At the most keys that they take in 8 bits; the general kernel is inspected with the others."""
    rows = json.loads(compiling_code(COMPILE))
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert [row["config"] for row in rows if row["spill_bytes"] or not row["fits"]] == []


def test_no_gradient():
    q, k, v = (t.detach().requires_grad_() for t in packed(5))
    with pytest.raises(NotImplementedError, match="no gradient with quantize"):
        ops.attention(q, k, v, quantize=torch.int8)
    with torch.no_grad():
        assert ops.attention(q, k, v, quantize=torch.int8)[0].dtype == torch.int8
