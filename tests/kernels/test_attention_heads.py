"""Norm and rotary embedding of q and k inside attention, against loops in float64 written from the formulas."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import peers

from vitfast import ops
from vitfast.kernels import attention as kernel
from vitfast.ops import BackendError, QKNorm, Rope, heads, reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import DTYPES, guarded, make

FP32, FP16, BF16 = DTYPES


def normed(x, weight, bias, eps, rms):
    """x [..., D] in float64."""
    mean = 0.0 if rms else x.mean(-1, keepdim=True)
    y = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


def rotated(x, rope):
    """x [B, N, H, D] in float64, channel by channel."""
    batch, tokens, count, head_dim = x.shape
    rows = rope.cos.shape[-2]
    cos, sin = (t.double().expand(batch, count, rows, head_dim).transpose(1, 2) for t in (rope.cos, rope.sin))
    y, last = x.clone(), x[:, tokens - rows :]
    for i in range(head_dim // 2):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + head_dim // 2)
        y[:, tokens - rows :, :, a] = last[..., a] * cos[..., a] - last[..., b] * sin[..., a]
        y[:, tokens - rows :, :, b] = last[..., b] * cos[..., b] + last[..., a] * sin[..., b]
    return y


def expected(q, k, v, rope=None, norm=None, **options):
    q, k, v = q.double(), k.double(), v.double()
    if norm is not None:
        q = normed(q, norm.q_weight, norm.q_bias, norm.eps, norm.rms)
        k = normed(k, norm.k_weight, norm.k_bias, norm.eps, norm.rms)
    if rope is not None:
        q, k = rotated(q, rope), rotated(k, rope)
    return reference.attention(q, k, v, **options, upcast=True)


def tables(*shape, dtype=FP32, interleaved=False):
    """cos and sin as timm has them, halves of one tensor; no angle is a model's, so that no symmetry can hide."""
    both = guarded(make(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=7))
    sin, cos = both.chunk(2, dim=-1)
    return Rope(cos, sin, interleaved)


def norm_of(head_dim, dtype=FP32, rms=False, eps=0.02):
    parts = [guarded(make(1, head_dim, dtype=dtype, seed=seed))[0] for seed in range(20, 24)]
    parts = [part / 4 + (i < 2) for i, part in enumerate(parts)]
    return QKNorm(*parts[:2], *([] if rms else parts[2:]), eps=eps, rms=rms)


def inputs(batch, tokens, count, key_count, head_dim, dtype=FP32):
    shapes = ((batch, tokens, count, head_dim), *[(batch, tokens, key_count, head_dim)] * 2)
    return [guarded(make(*shape, dtype=dtype, seed=seed)) for seed, shape in enumerate(shapes)]


CASES = {  # tokens, heads, key heads, D, dtype, rope, norm
    "half": (70, 1, 1, 64, FP32, tables(70, 64), None),
    "half, class token": (70, 1, 1, 64, BF16, tables(69, 64), None),
    "half, 72": (50, 2, 2, 72, FP16, tables(45, 72), None),
    "half, bf16 tables": (50, 2, 2, 32, BF16, tables(49, 32, dtype=BF16), None),
    "interleaved": (70, 1, 1, 64, FP32, tables(70, 64, interleaved=True), None),
    "interleaved, registers": (70, 1, 1, 72, BF16, tables(65, 72, interleaved=True), None),
    "interleaved, 32": (50, 2, 2, 32, FP16, tables(49, 32, interleaved=True), None),
    "shared key heads": (40, 4, 2, 32, FP32, tables(39, 32), None),
    "for each head": (40, 2, 2, 32, FP32, tables(2, 35, 32, interleaved=True), None),
    "for each image": (40, 2, 2, 32, FP32, tables(2, 1, 35, 32), None),
    "two tokens of many": (40, 1, 1, 32, FP32, tables(2, 32), None),
    "no token": (20, 1, 1, 32, FP32, tables(0, 32), None),
    "one pair": (20, 1, 1, 2, FP32, tables(19, 2), None),
    "norm": (40, 1, 1, 64, FP32, None, norm_of(64)),
    "norm, 17": (70, 2, 1, 17, BF16, None, norm_of(17, BF16)),
    "rms norm, 17": (70, 2, 2, 17, FP16, None, norm_of(17, rms=True)),
    "both": (70, 1, 1, 64, FP16, tables(65, 64), norm_of(64)),
    "both, 72": (40, 2, 1, 72, FP32, tables(39, 72), norm_of(72)),
    "rms norm and interleaved": (70, 1, 1, 72, BF16, tables(69, 72, interleaved=True), norm_of(72, BF16, rms=True)),
}


def check(q, k, v, rope, norm, **options):
    """All three: the kernel, the torch backend, and the oracle that other tests use."""
    oracle = expected(q, k, v, rope, norm, **options)
    asked = heads.options(rope, norm)
    torch.testing.assert_close(reference.attention(q, k, v, **options, **asked, upcast=True), oracle)
    baseline = ops.attention(q, k, v, **options, rope=rope, qk_norm=norm, backend="torch")
    assert_close(baseline, oracle, reference.attention(*prepared(q, k, rope, norm), v, **options))
    assert_close(ops.attention(q, k, v, **options, rope=rope, qk_norm=norm, backend="triton"), oracle, baseline)


def prepared(q, k, rope, norm):
    """q and k as a model would have made them: step by step, each rounded."""
    if norm is not None:
        q = normed(q.double(), norm.q_weight, norm.q_bias, norm.eps, norm.rms).to(q.dtype)
        k = normed(k.double(), norm.k_weight, norm.k_bias, norm.eps, norm.rms).to(k.dtype)
    if rope is not None:
        q, k = (rotated(t.double(), rope).to(t.dtype) for t in (q, k))
    return q, k


@pytest.mark.parametrize("name", CASES)
def test_against_the_formulas(name):
    tokens, count, key_count, head_dim, dtype, rope, norm = CASES[name]
    check(*inputs(2 if name == "for each image" else 1, tokens, count, key_count, head_dim, dtype), rope, norm)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_head_dims(head_dim, dtype, interleaved):
    rope, norm = tables(130, head_dim, interleaved=interleaved), norm_of(head_dim)
    check(*inputs(1, 131, 2, 2, head_dim, dtype), rope, norm)


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_projection_with_bias_and_mask(interleaved):
    """As in a model: views of one projection; with all that may change a score."""
    qkv = guarded(make(2, 50, 3, 2, 72, dtype=BF16))
    mask = make(2, 1, 50, 50, seed=3) > -1
    options = {"bias": guarded(make(1, 2, 50, 50, seed=5)), "mask": mask, "softcap": 5.0, "left": 30, "right": 20}
    check(*qkv.unbind(2), tables(49, 72, interleaved=interleaved), norm_of(72), **options)


def test_norms_go_with_packed_sequences():
    q, k, v = inputs(1, 70, 2, 2, 32)
    norm, lengths = norm_of(32), torch.tensor([0, 30, 70], dtype=torch.int32, device=q.device)
    packed = {"cu_queries": lengths, "cu_keys": lengths, "max_queries": 40, "max_keys": 40}
    actual = ops.attention(q, k, v, **packed, qk_norm=norm, backend="triton")
    parts = list(zip(*(t.split((30, 40), 1) for t in (q, k, v)), strict=True))
    oracle = torch.cat([expected(*part, norm=norm) for part in parts], 1)
    baseline = torch.cat([ops.attention(*part, qk_norm=norm, backend="torch") for part in parts], 1)
    assert_close(actual, oracle, baseline)


def check_theirs(turn, rope):
    """Against another library's rotation of q and k [B, H, N, D], which works in any dtype, and attention after it."""
    q, k, v = inputs(1, 40, 1, 1, 64)
    oracle, baseline = (
        reference.attention(*(turn(t.to(dtype).transpose(1, 2)).transpose(1, 2) for t in (q, k)), v.to(dtype))
        for dtype in (torch.float64, FP32)
    )
    assert_close(ops.attention(q, k, v, rope=rope, backend="triton"), oracle, baseline)


@pytest.mark.parametrize("half", [False, True])
def test_is_what_timm_does(half):
    peers.import_timm()
    from timm.layers import apply_rot_embed_cat

    both = make(35, 128, seed=7)
    sin, cos = both.chunk(2, dim=-1)
    check_theirs(
        lambda x: torch.cat([x[:, :, :5], apply_rot_embed_cat(x[:, :, 5:], both, half=half)], 2),
        Rope(cos, sin, interleaved=not half),
    )


def test_is_what_transformers_does():
    peers.import_transformers()
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    rope = tables(35, 64)
    check_theirs(lambda x: apply_rotary_pos_emb(x, x, rope.cos, rope.sin)[0], rope)


WRONG = {
    "pairing": lambda rope, norm: (Rope(rope.cos, rope.sin, not rope.interleaved), norm),
    "direction": lambda rope, norm: (Rope(rope.cos.clone(), -rope.sin.clone(), rope.interleaved), norm),
    "prefix": lambda rope, norm: (Rope(rope.cos[1:], rope.sin[1:], rope.interleaved), norm),
    "kind of norm": lambda rope, norm: (rope, QKNorm(*_others(norm, rms=True))),
    "eps": lambda rope, norm: (rope, QKNorm(*_others(norm, eps=0.2))),
}


def _others(norm, **changes):
    return (vars(norm) | changes).values()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_ones_are_caught(wrong, dtype):
    q, k, v = inputs(1, 40, 1, 1, 64, dtype)
    rope, norm = tables(39, 64), norm_of(64, eps=0.1)
    oracle, baseline = expected(q, k, v, rope, norm), reference.attention(*prepared(q, k, rope, norm), v)
    rope, norm = WRONG[wrong](rope, norm)
    with pytest.raises(AssertionError, match="error"):
        assert_close(ops.attention(q, k, v, rope=rope, qk_norm=norm, backend="triton"), oracle, baseline)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients(backend):
    q, k, v = inputs(2, 20, 2, 2, 32)
    rope, norm = tables(2, 19, 32), norm_of(32)
    tensors = [q, k, v, rope.cos, rope.sin, *(getattr(norm, f"{x}_{y}") for y in ("weight", "bias") for x in "qk")]
    dout = make(*q.shape, seed=5)

    def gradients(call, cast):
        leaves = [t.detach().to(cast).requires_grad_() for t in tensors]
        q, k, v, cos, sin, *parts = leaves
        out = call(q, k, v, Rope(cos, sin), QKNorm(*parts, eps=norm.eps))
        return torch.autograd.grad(out, leaves, dout.to(cast))

    actual = gradients(lambda q, k, v, *how: ops.attention(q, k, v, rope=how[0], qk_norm=how[1], backend=backend), FP32)
    oracle = gradients(expected, torch.float64)
    baseline = gradients(lambda q, k, v, *how: reference.attention(*_step_by_step(q, k, *how), v), FP32)
    assert_close(actual, oracle, baseline)


def _step_by_step(q, k, rope, norm):
    def prepare(x, weight, bias):
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
        turned = torch.cat([-x[..., 16:], x[..., :16]], -1)[:, 1:]
        last = x[:, 1:] * rope.cos.transpose(0, 1) + turned * rope.sin.transpose(0, 1)
        return torch.cat([x[:, :1], last], 1)

    return prepare(q, norm.q_weight, norm.q_bias), prepare(k, norm.k_weight, norm.k_bias)


@pytest.mark.parametrize("which", ["v", "cos", "q_weight", "k_bias"])
def test_one_tensor_that_wants_a_gradient_is_enough(which):
    q, k, v = inputs(1, 20, 2, 2, 32)
    rope, norm = tables(19, 32), norm_of(32)
    leaf = {"v": v, "cos": rope.cos, "q_weight": norm.q_weight, "k_bias": norm.k_bias}[which].requires_grad_()
    out = ops.attention(q, k, v, rope=rope, qk_norm=norm, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        oracle = expected(q, k, v, rope, norm)
        plain = ops.attention(q, k, v, rope=rope, qk_norm=norm, backend="torch")
        assert_close(out, oracle, plain)
        assert_close(ops.attention(q, k, v, rope=rope, qk_norm=norm, backend="triton"), oracle, plain)


def test_log_sum_exp():
    q, k, v = inputs(1, 20, 2, 2, 32)
    rope, norm = tables(19, 32), norm_of(32)
    out, lse = ops.attention(q, k, v, rope=rope, qk_norm=norm, return_lse=True, backend="triton")
    assert_close(out, expected(q, k, v, rope, norm), ops.attention(q, k, v, rope=rope, qk_norm=norm, backend="torch"))
    q, k = prepared(q.double(), k.double(), rope, norm)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 32**-0.5
    assert_close(lse, scores.logsumexp(-1), scores.float().logsumexp(-1))


def test_traced_whole():
    q, k, v = inputs(1, 20, 2, 2, 32)
    rope, norm = tables(19, 32), norm_of(32)

    def call(q, k, v, cos, sin):
        return ops.attention(q, k, v, rope=Rope(cos, sin), qk_norm=norm, backend="triton") * 2

    with torch.no_grad():
        compiled = torch.compile(call, backend="eager", fullgraph=True)(q, k, v, rope.cos, rope.sin)
        assert torch.equal(compiled, call(q, k, v, rope.cos, rope.sin))


GOOD = (2, 5, 4, 32)
REJECTED = {
    "cos must be [rows, D], [H, rows, D] or [B, H, rows, D] with at most 5 rows, got (6, 32)": {"rope": tables(6, 32)},
    "or [B, H, rows, D] with at most 5 rows, got (5, 16)": {"rope": tables(5, 16)},
    "or [B, H, rows, D] with at most 5 rows, got (3, 5, 32)": {"rope": tables(3, 5, 32)},
    "sin has shape (4, 32), expected (5, 32)": {"rope": Rope(make(5, 32), make(4, 32))},
    "cos has dtype torch.float64": {"rope": Rope(*[make(5, 32).double()] * 2)},
    "the last axis of cos has stride 5": {"rope": Rope(*[make(32, 5).T] * 2)},
    "cos and sin must be laid out alike": {"rope": Rope(make(5, 32), make(5, 64)[:, :32])},
    "q_weight has shape (16,), expected (32,)": {"qk_norm": QKNorm(make(16), make(32))},
    "k_bias has dtype torch.float16": {"qk_norm": QKNorm(make(32), make(32), k_bias=make(32).half())},
    "sin is on meta, ": {"rope": Rope(make(5, 32), make(5, 32).to("meta"))},
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    tensors, options = [make(*GOOD, seed=seed) for seed in range(3)], REJECTED[message]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        ops.attention(*tensors, **options)
    assert message in str(caught.value)


def test_rejects_what_does_not_go_together():
    q, k, v = (make(1, 5, 4, 32, seed=seed) for seed in range(3))
    lengths = torch.tensor([0, 5], device=q.device)
    calls = (
        ((q, k[:, :4], v[:, :4]), {}),
        ((q[..., :31], k[..., :31], v[..., :31]), {"rope": Rope(make(5, 31), make(5, 31))}),
        ((q, k, v), {"cu_queries": lengths, "cu_keys": lengths, "max_queries": 5, "max_keys": 5}),
    )
    for tensors, options in calls:
        with pytest.raises(ValueError, match="rope needs an even head dim, as many keys as queries and no packed"):
            ops.attention(*tensors, **{"rope": tables(4, 32), **options})
    with pytest.raises(ValueError, match="cos for each head needs as many key heads, got 2 for 4"):
        ops.attention(q, k[:, :, :2], v[:, :, :2], rope=tables(4, 5, 32))
    with pytest.raises(BackendError, match=r"it has no rope; it has no qk-norm|the C\+\+ extension is not built"):
        ops.attention(q, k, v, rope=tables(5, 32), qk_norm=norm_of(32), backend="native")
    short = next(config for config in kernel.CONFIGS if config.name == "short")
    asked = heads.options(tables(5, 32, dtype=BF16), None)
    with pytest.raises(ValueError, match="config short cannot run this call: it has no rope"):
        kernel.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **asked, config=short)


COMPILE = """
from vitfast.diagnostics.compiled import inspect_case
from vitfast.kernels._compile.attention import more_compile_cases
for case in more_compile_cases():
    for arch in [80, 86] if case.archs == (80,) else case.archs:
        row = inspect_case(case, f"sm_{arch}")
        print(row["config"], arch, "spill", row["spill_bytes"], "fits", row["fits"], row["tensor_core"])
"""


@pytest.mark.full
def test_other_head_dims_compile_without_spills():
    """As tests/diagnostics/test_inspect.py has it for the rest."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 46
    assert [line for line in lines if "spill 0 fits True" not in line] == []
    cores = {arch: {line.split()[-1] for line in lines if line.split()[1] == arch} for arch in ("80", "90", "100")}
    assert cores == {"80": {"mma"}, "90": {"wgmma"}, "100": {"tcgen05"}}
