"""The CUDA attention kernel without a GPU: its body under emulation, and nvcc's report of its registers."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from helpers.emulated import ROOT, attention_call, library, needs_compiler, needs_nvcc

from vitfast import testing
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded, strided

FP16, BF16 = torch.float16, torch.bfloat16
TYPES = {FP16: "fp16", BF16: "bf16"}
HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 128)
STEPS = (4, 13, 17, 20)
# head dim, tokens, dtype.
GRID = [(64, n, BF16) for n in (1, 17, 64, 65, 197)] + [(72, 50, FP16)]
# All head dims at 50 tokens; all sizes of the register block at head dim 64.
FULL_GRID = [(d, 50, (BF16, FP16)[i % 2]) for i, d in enumerate(HEAD_DIMS) if d != 72]
FULL_GRID += [(64, n, BF16) for n in (15, 16, 63, 208, 257)] + [(72, 50, BF16), (72, 257, FP16), (128, 320, BF16)]
GRIDS = [*GRID, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL_GRID)]


pytestmark = needs_compiler


def steps_for(keys):
    return next(steps for steps in STEPS if keys <= 16 * steps)


def compiled(folder, cases, include=ROOT / "csrc"):
    listed = " ".join(f"CASE({TYPES[dtype]},{d},{steps})" for d, steps, dtype in sorted(cases, key=str))
    found = library("attention", folder, [f"CASES={listed}"], include)
    found.attention.restype = ctypes.c_char_p
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, request):
    full = any(item.get_closest_marker("full") for item in request.session.items)
    cases = {(d, steps_for(n), dtype) for d, n, dtype in (*GRID, *(FULL_GRID if full else ()))}
    cases |= {(64, 4, FP16), (64, 13, FP16), (72, 4, BF16)}
    return compiled(tmp_path_factory.mktemp("attention"), cases)


def run(kernels, q, k, v, scale=None, seed=0):
    """The kernel's output, complete and within bounds, and how many bank conflicts it met."""
    memory, params, pointers, sizes = attention_call(q, k, v, scale)
    conflicts = ctypes.c_int64()
    error = kernels.attention(
        TYPES[q.dtype].encode(), q.shape[3], steps_for(k.shape[1]), ctypes.byref(params), q.shape[0],
        pointers, sizes, ctypes.c_uint64(seed), ctypes.byref(conflicts),
    ).decode()  # fmt: skip
    if error:
        raise RuntimeError(error)
    return memory, conflicts.value


def check(kernels, q, k, v, scale=None, seed=0):
    actual, conflicts = run(kernels, q, k, v, scale, seed)
    oracle = reference.attention(q, k, v, scale=scale, upcast=True)
    assert_close(actual, oracle, reference.attention(q, k, v, scale=scale))
    assert conflicts == 0
    return actual


def packed(batch, tokens, heads, d, dtype):
    return guarded(testing.make(batch, tokens, 3, heads, d, dtype=dtype).cpu()).unbind(2)


@pytest.mark.parametrize(("d", "tokens", "dtype"), GRIDS)
def test_sizes(kernels, d, tokens, dtype):
    check(kernels, *packed(1, tokens, 1, d, dtype))


def test_batch_heads_and_strides(kernels):
    check(kernels, *packed(2, 17, 3, 64, BF16))
    # [B, H, N, D] memory seen as [B, N, H, D]; rows with poison between; batches far apart.
    q = guarded(testing.make(2, 3, 45, 72, dtype=BF16, seed=0).cpu()).transpose(1, 2)
    k = strided(testing.make(2, 50, 3, 72, dtype=BF16, seed=1).cpu())
    v = guarded(testing.make(50, 3, 2, 72, dtype=BF16, seed=2).cpu()).permute(2, 0, 1, 3)
    check(kernels, q, k, v)


@pytest.mark.parametrize("lengths", [(1, 64), (131, 7), (80, 33)], ids=str)
def test_cross_attention(kernels, lengths):
    q, k, v = (
        guarded(testing.make(1, n, 2, 64, dtype=FP16, seed=i).cpu()) for i, n in enumerate((*lengths, lengths[1]))
    )
    check(kernels, q, k, v)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1.0])
def test_scale(kernels, scale):
    check(kernels, *packed(1, 50, 1, 64, BF16), scale=scale)


def test_any_order_of_threads_gives_the_same_bits(kernels):
    args = packed(1, 50, 1, 64, BF16)
    first, _ = run(kernels, *args, seed=1)
    for seed in range(2, 8):
        assert torch.equal(run(kernels, *args, seed=seed)[0], first)


# What is changed in attention.cuh, and how it must show: the trap's words, or "" for a wrong result.
BARRIER_K, BARRIER_V = (f"block_barrier();  // every thread's {what} are there" for what in ("keys", "values"))
STORE = "pack(T{}, r[2] * norm1, r[3] * norm1)"
FAULTS = {
    "no barrier after the keys": (BARRIER_K, "", "race|waited"),
    "no barrier after the values": (BARRIER_V, "", "race|waited"),
    "no wait for the keys": ("copy_wait<1>();", "", "waited for"),
    "no wait for the values": ("copy_wait<0>();", "", "waited for"),
    "barrier that some warps skip": ("if (round == 0) {", "if (round == 0 && row0 < p.queries) {", "race|wait at a"),
    "permutation that repeats too late": ("chunk ^= row / rows_per_line %", "chunk ^= row / 4 %", ""),
    "no permutation": ("permuted = (chunks & (chunks - 1)) == 0", "permuted = false && chunks", "bank conflicts"),
    "a key too many": ("if (key >= p.keys)", "if (key > p.keys)", ""),
    "a key too few": ("if (key >= p.keys)", "if (key >= p.keys - 1)", ""),
    "right half of the keys not masked": ("if (key + 8 >= p.keys)", "if (key + 8 >= 16 * steps)", ""),
    "keys copied beyond the last": ("const bool valid = row < keys;", "const bool valid = true;", "out of bounds"),
    "rows stored beyond the last": ("if (row1 < p.queries) store", "store", "out of bounds"),
    "rows of the product exchanged": (STORE, STORE.replace("2", "0").replace("3", "1"), ""),
    "half a row's sum": ("return x + shuffle_xor(x, 2);", "return x;", ""),
    "natural exponent": ("fabsf(p.scale) * 1.44269504f", "fabsf(p.scale)", ""),
}


@pytest.mark.full  # each takes a compilation
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_show(fault, tmp_path):
    old, new, trap = FAULTS[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc" / "cuda" / "attention.cuh"
    source = kernel.read_text()
    assert source.count(old) == 1, f"attention.cuh no longer contains {old!r} once"
    changed = source.replace(old, new)
    if fault == "no permutation":  # nor the padding that stands in for it
        changed = changed.replace(": chunks | 1;", ": chunks;")
    kernel.write_text(changed)
    kernels = compiled(tmp_path, {(64, 4, BF16)}, tmp_path / "csrc")
    args = packed(1, 35, 1, 64, BF16)
    if not trap:
        with pytest.raises(AssertionError, match=r"error|other places"):
            check(kernels, *args)
    elif trap == "bank conflicts":
        assert run(kernels, *args)[1] > 0
    else:
        with pytest.raises(RuntimeError, match=trap):
            run(kernels, *args)


@needs_nvcc
@pytest.mark.full
@pytest.mark.parametrize("archs", [("80",), ("80", "90")], ids=["some, sm_80", "all"])
def test_registers_do_not_spill(archs, tmp_path):
    """ptxas' report: no spills, and for 197 tokens of head dim 64 three blocks on an SM."""
    source = ROOT / "csrc" / "cuda" / "attention.cu"
    if len(archs) == 1:  # the commonest instances, and the one that needs the most registers
        source = tmp_path / "some.cu"
        cases = [("bf16", 64, 13), ("fp16", 64, 17), ("bf16", 80, 17), ("bf16", 128, 20)]
        instances = [f"template __global__ void attention_kernel<{t}, {d}, {s}>(AttentionParams);" for t, d, s in cases]
        source.write_text("\n".join(['#include "cuda/attention.cuh"', "namespace vitfast {", *instances, "}"]))
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = ["nvcc", "-std=c++17", *targets, "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-c", str(source), "-o", str(tmp_path / "attention.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(spills) == (4 if len(archs) == 1 else 2 * len(TYPES) * len(HEAD_DIMS) * len(STEPS))
    assert set(spills) == {("0", "0", "0")}
    pattern = r"attention_kernelINS_4bf16ELi64ELi13E\w+' for 'sm_\d+'.*?Used (\d+) registers"
    registers = [int(n) for n in re.findall(pattern, result.stderr, re.DOTALL)]
    assert len(registers) == len(archs)
    assert max(registers) <= 65536 // (3 * 128) // 8 * 8
