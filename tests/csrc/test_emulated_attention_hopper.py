"""The attention kernel for sm_90a without a GPU: its body under emulation, and nvcc's report of its registers."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from helpers.emulated import ROOT, attention_call, library, needs_compiler, needs_nvcc

from vitfast import testing
from vitfast.diagnostics.compiled import run_tool
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded, strided

FP16, BF16 = torch.float16, torch.bfloat16
TYPES = {FP16: "fp16", BF16: "bf16"}
HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 128)
# The most keys of an instance, and the widths of the products that give their scores.
KEYS = {64: (64,), 200: (200,), 208: (208,), 264: (136, 128), 320: (160, 160)}

pytestmark = needs_compiler


def keys_for(keys):
    return next(most for most in KEYS if keys <= most)


def compiled(folder, cases, include=ROOT / "csrc"):
    listed = " ".join(f"CASE({TYPES[dtype]},{d},{keys})" for d, keys, dtype in sorted(cases, key=str))
    found = library("attention_hopper", folder, [f"CASES={listed}"], include)
    found.attention.restype, found.takes.restype = ctypes.c_char_p, ctypes.c_bool
    return found


# Head dim, tokens, heads, blocks, dtype; and why.
GRID = [
    (64, 50, 3, 2, BF16, "a tile a head, consumers in turn, blocks with unlike numbers of heads"),
    (64, 197, 2, 1, BF16, "ViT, the last step of 16 keys half empty, a tail of 5 queries"),
    (72, 64, 1, 2, FP16, "a second box of columns with 8 of 64, and a block with nothing to do"),
]
FULL_GRID = [(d, 50, 1, 1, (FP16, BF16)[i % 2], "every head dim") for i, d in enumerate(HEAD_DIMS)]
FULL_GRID += [(64, n, 1, 1, BF16, "around the sizes") for n in (1, 16, 63, 64, 65, 199, 200, 201, 208, 209, 264, 265)]
FULL_GRID += [(128, 320, 1, 1, FP16, "the most"), (80, 257, 3, 2, BF16, "ViT-H, scores of two products, odd tiles")]
FULL_GRID += [(64, 50, 13, 1, BF16, "a tile a head, many heads"), (64, 197, 5, 1, FP16, "more heads than stages")]
FULL_GRID += [(32, 320, 2, 1, BF16, "one stage for two heads")]
GRIDS = [*GRID, *(pytest.param(case, marks=pytest.mark.full) for case in FULL_GRID)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, request):
    full = any(item.get_closest_marker("full") for item in request.session.items)
    cases = {(d, keys_for(n), dtype) for d, n, _, _, dtype, _ in (*GRID, *(FULL_GRID if full else ()))}
    return compiled(tmp_path_factory.mktemp("attention_hopper"), cases)


def run(kernels, q, k, v, scale=None, blocks=1, seed=0):
    """The kernel's output, complete and within bounds."""
    out, params, pointers, sizes = attention_call(q, k, v, scale)
    assert kernels.takes(q.shape[3], ctypes.byref(params), q.shape[0])
    conflicts = ctypes.c_int64()
    error = kernels.attention(
        TYPES[q.dtype].encode(), q.shape[3], keys_for(k.shape[1]), ctypes.byref(params), q.shape[0], blocks,
        pointers, sizes, ctypes.c_uint64(seed), ctypes.byref(conflicts),
    ).decode()  # fmt: skip
    if error:
        raise RuntimeError(error)
    assert conflicts.value == 0
    return out


def check(kernels, q, k, v, scale=None, blocks=1, seed=0):
    actual = run(kernels, q, k, v, scale, blocks, seed)
    oracle = reference.attention(q, k, v, scale=scale, upcast=True)
    assert_close(actual, oracle, reference.attention(q, k, v, scale=scale))


def packed(batch, tokens, heads, d, dtype):
    return guarded(testing.make(batch, tokens, 3, heads, d, dtype=dtype).cpu()).unbind(2)


@pytest.mark.parametrize("case", GRIDS, ids=lambda case: "-".join(map(str, (*case[:2], case[-1]))))
def test_sizes(kernels, case):
    d, tokens, heads, blocks, dtype, _ = case
    check(kernels, *packed(1, tokens, heads, d, dtype), blocks=blocks)


def test_batch_heads_and_strides(kernels):
    # [B, H, N, D] memory seen as [B, N, H, D]; rows with poison between; batches innermost.
    q = guarded(testing.make(2, 3, 140, 64, dtype=BF16, seed=0).cpu()).transpose(1, 2)
    k = strided(testing.make(2, 50, 3, 64, dtype=BF16, seed=1).cpu(), 8)
    v = guarded(testing.make(50, 3, 2, 64, dtype=BF16, seed=2).cpu()).permute(2, 0, 1, 3)
    check(kernels, q, k, v, blocks=2)


def test_nan_of_one_image_stays_there(kernels):
    """Where a box reaches beyond the last token lies the next image."""
    qkv = testing.make(3, 50, 3, 1, 64, dtype=BF16).cpu()
    qkv[1] = float("nan")
    check(kernels, *guarded(qkv).unbind(2))


@pytest.mark.parametrize("lengths", [(1, 64), (131, 7)], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_cross_attention_and_scales(kernels, lengths, scale):
    q, k, v = (
        guarded(testing.make(1, n, 2, 64, dtype=BF16, seed=i).cpu()) for i, n in enumerate((*lengths, lengths[1]))
    )
    check(kernels, q, k, v, scale=scale)


def test_any_order_of_threads_gives_the_same_bits(kernels):
    args = packed(1, 50, 3, 64, BF16)
    first = run(kernels, *args, seed=1)
    for seed in range(2, 6):
        assert torch.equal(run(kernels, *args, seed=seed), first)


def test_what_it_leaves_to_the_other_kernel(kernels):
    def takes(q, k, v, scale=None):
        return kernels.takes(q.shape[3], ctypes.byref(attention_call(q, k, v, scale)[1]), q.shape[0])

    q, k, v = packed(2, 10, 3, 64, BF16)
    assert takes(q, k, v) and takes(q[:1], k[:1], v[:1]) and takes(q[:, :1], k, v, scale=0.0)
    assert not takes(q, k, v, scale=-0.1) and not takes(q, k, v, scale=float("nan"))
    for shared in (k[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 10, -1, -1), k[:, :, :1].expand(-1, -1, 3, -1)):
        assert not takes(q, shared, v) and not takes(q, k, shared)
    assert not takes(q, torch.empty(9000, dtype=BF16).as_strided(k.shape, (1920, 32, 640, 1)), v)  # rows in each other


# File, what is changed in it, and how it must show: the trap's words, or "" for a wrong result.
BODY, HEADER, PRODUCTS = "cuda/attention_hopper.cuh", "cuda/attention_hopper.h", "device/products.cuh"
FULL_WAIT = "if (tile < p.tiles || thread == 0) mbarrier_wait(shared + Shared::full + 8 * ring.stage, ring.parity);"
EMPTY_WAIT = "mbarrier_wait(shared + Shared::empty + 8 * ring.stage, ring.parity ^ 1);"
QUERY_WAIT = "mbarrier_wait(arrived + turn % 2 * 8, turn / 2 % 2);"
EARLY = "nobody has w|a copy wrote"
FAULTS = {
    "swizzle of four rows": ("device/hopper.cuh", "address >> 7 & 7", "address >> 7 & 3", ""),
    "values with another swizzle": (PRODUCTS, "swizzle_128 = 1", "swizzle_128 = 2", ""),
    "values with half the stride": (PRODUCTS, "eight_rows = 1024", "eight_rows = 512", ""),
    "second box of values elsewhere": (BODY, "Shared::values, Shared::key_box)", "Shared::values, 1024)", ""),
    "operands too far on": (PRODUCTS, "bytes >> 4); }", "bytes >> 3); }", "swizzle|nobody|still|beyond|race"),
    "shared memory not rounded up": (BODY, "(shared_begin() + 1023) / 1024 * 1024", "shared_begin()", "not al|swizzle"),
    "mbarriers not known to all": (BODY, "block_barrier();  // all know the mbarriers", "", "mbarrier"),
    "mbarriers not known to TMA": (BODY, "    async_fence();\n  }", "  }", "has not seen"),
    "no wait for a full stage": (BODY, FULL_WAIT, "", EARLY),
    "no wait for an empty stage": (BODY, EMPTY_WAIT, "", "race|more arrivals"),
    "full stages of the wrong phase": (BODY, FULL_WAIT, FULL_WAIT.replace("parity)", "parity ^ 1)"), f"{EARLY}|dead"),
    "empty stages of the wrong phase": (BODY, EMPTY_WAIT, EMPTY_WAIT.replace(" ^ 1", ""), "deadlock"),
    "no wait for queries": (BODY, QUERY_WAIT, "", EARLY),
    "queries of the wrong phase": (BODY, QUERY_WAIT, QUERY_WAIT.replace("turn / 2", "turn"), f"{EARLY}|deadlock"),
    "queries where output still leaves": (BODY, "        store_wait_read<0>();\n", "", "still reads|race"),
    "too few bytes expected": (BODY, "(full, Shared::stage)", "(full, Shared::stage - 128)", "deadlock|nobody has w"),
    "scores read under way": (BODY, "product_wait<0>();\n\n      uint32_t", "uint32_t", ""),
    "result read under way": (BODY, "product_wait<0>();\n\n      // Store", "// Store", ""),
    "no fence before the scores": (BODY, "product_fence();\n      begin", "begin", "no product_fence"),
    "no fence before the result": (BODY, "product_fence();\n#pragma", "\n#pragma", "no product_fence"),
    "a consumer forgotten": (BODY, "Consumers = 2", "Consumers = 1", "still reads|more arrivals|race"),
    "a consumer too many": (BODY, "Consumers = 2", "Consumers = 3", "deadlock"),
    "all wait where one gives back": (BODY, "if (tile < p.tiles || thread == 0) mbarrier_wait", "mbarrier_wait",
                                      "deadlock"),
    "output before all are through": (BODY, "named_barrier(1 + group, 128);  // all warps", "//", "still reads|race"),
    "output leaves before all is there": (BODY, "named_barrier(1 + group, 128);  // all of", "//",
                                          f"{EARLY}|race|fence"),
    "output leaves with no fence": (BODY, "async_fence();\n      named", "named", "no async_fence"),
    "consumers at one barrier": (BODY, "named_barrier(1 + group, 128);  // all", "named_barrier(1, 128);  //",
                                 f"{EARLY}|race|fence|deadlock|still"),
    "ends before output is read": (BODY, "if (thread == 0) store_wait_read<0>();  // sh", "//", "nobody has waited"),
    "tiles of queries not in turn": (BODY, "tile -= p.tiles, ring.next()", "tile = group, ring.next()", ""),
    "values of the first image": (BODY, "p.v, head / p.heads", "p.v, 0", ""),
    "a key too many": (BODY, ">= keys - pair", "> keys - pair", ""),
    "a key too few": (BODY, ">= keys - pair", ">= keys - 1 - pair", ""),
    "keys beyond the last not masked": (BODY, "8 * j + 8 > keys", "8 * j > keys", ""),
    "values beyond the last token": (HEADER, "map(p.v, p.keys,", "map(p.v, p.keys + 1,", "out of bounds"),
    "output beyond the last query": (HEADER, "map(p.out, p.queries,", "map(p.out, p.queries + 1,", "out of bounds"),
    "weights of 8 keys exchanged": (BODY, "[2 * (j % 2)] =", "[2 - 2 * (j % 2)] =", ""),
    "rows of the result exchanged": (BODY, "result[4 * j] * norm0", "result[4 * j] * norm1", ""),
    "half a row's sum": ("cuda/attention.cuh", "return x + shuffle_xor(x, 2);", "return x;", ""),
    "natural exponent": (HEADER, "p.scale * 1.44269504f", "p.scale", ""),
    "more registers than there are": (BODY, "ConsumerRegisters = 240", "ConsumerRegisters = 248", "deadlock: .* regis"),
    "second part of the keys elsewhere": (BODY, "further(key, left * 128)", "further(key, right * 128)", ""),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_show(fault, tmp_path):
    file, old, new, trap = FAULTS[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = (tmp_path / "csrc" / file).read_text()
    assert source.count(old) >= 1, f"{file} no longer contains {old!r}"
    (tmp_path / "csrc" / file).write_text(source.replace(old, new))
    # Two boxes of columns, three tiles of queries, more heads than stages; or keys in two boxes; or a tile a head.
    d, keys, queries, batch = 72, 50, 130, 2
    if "second part" in fault:
        d, keys = 64, 257
    if "gives back" in fault:
        queries, batch = 50, 20
    kernels = compiled(tmp_path, {(d, keys_for(keys), BF16)}, tmp_path / "csrc")
    lengths = (queries, keys, keys)
    q, k, v = (guarded(testing.make(batch, n, 3, d, dtype=BF16, seed=i).cpu()) for i, n in enumerate(lengths))

    def several():  # most show at once
        for seed in range(5):
            check(kernels, q, k, v, seed=seed)

    with pytest.raises(RuntimeError if trap else (AssertionError, RuntimeError), match=trap or None):
        several()


@pytest.mark.full
@needs_nvcc
def test_compiles_for_sm_90a(tmp_path):
    """ptxas' report and the machine code: no spills, no products that wait for each other, wgmma and TMA."""
    source, compiled = ROOT / "csrc" / "cuda" / "attention_hopper.cu", tmp_path / "attention.o"
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    result = subprocess.run([*command, "-c", source, "-o", compiled], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    instances = len(TYPES) * len(HEAD_DIMS) * len(KEYS)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills == [("0", "0", "0")] * instances
    # 384 threads of 168 registers are all that a multiprocessor has; what setmaxnreg moves is counted under emulation.
    assert re.findall(r"Used (\d+) registers", result.stderr) == ["168"] * instances
    # ptxas tells where it makes wgmma wait, for registers that it cannot leave alone, or ignores setmaxnreg.
    assert "warpgroup" not in result.stderr and "setmaxnreg" not in result.stderr and "wgmma" not in result.stderr
    code = run_tool("cuobjdump", "-sass", str(compiled))
    for kernel in re.split("Function : ", code)[1:]:
        d, keys = map(int, re.search(r"Li(\d+)ELi(\d+)E", kernel).groups())
        for part in set(KEYS[keys]):  # along the head, 16 columns at a time
            scores = rf"HGMMA\.64x{part}x16\S* R\d+, gdesc"
            assert len(re.findall(scores, kernel)) == -(-d // 16) * KEYS[keys].count(part), kernel[:80]
        # The weights in registers, the values transposed, one step of 16 keys after the other.
        result = rf"HGMMA\.64x{d}x16\S* R\d+, R\d+, gdesc\[UR\d+\]\.tnspB"
        assert len(re.findall(result, kernel)) == -(-keys // 16), kernel[:80]
        # Weights are rounded before the fence, or the products might read others.
        for products in re.findall(r"WARPGROUP\.ARRIVE(.*?)WARPGROUP\.DEPBAR", kernel, re.DOTALL):
            assert "HGMMA" in products and "F2FP" not in products, kernel[:80]
        for instruction in ("UTMALDG.4D", "UTMASTG.4D", "USETMAXREG", "SYNCS.PHASECHK"):
            assert instruction in kernel


@pytest.mark.full
@needs_nvcc
def test_compiles_to_a_trap_elsewhere(tmp_path):
    """For GPUs without wgmma: no product is left, and what is left stops."""
    source, compiled = ROOT / "csrc" / "cuda" / "attention_hopper.cu", tmp_path / "attention.o"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90", "100")]
    command = ["nvcc", "-std=c++17", *targets, "-c", source, "-o", compiled]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    code = run_tool("cuobjdump", "-sass", str(compiled))
    assert code.count("BPT.TRAP") == len(targets) * len(TYPES) * len(HEAD_DIMS) * len(KEYS) and "MMA" not in code
