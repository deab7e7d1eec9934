"""The linear kernel for sm_90a without a GPU: its body under emulation, and nvcc's report of its registers."""

import re
import subprocess

import pytest
import torch
from helpers.emulated import ROOT, needs_compiler, needs_nvcc
from helpers.emulated_linear import BF16, FP16, compiled, compiled_with_fault, launch

from vitfast import testing
from vitfast.diagnostics.compiled import run_tool
from vitfast.ops import reference
from vitfast.ops.accuracy import assert_close
from vitfast.testing import guarded, strided

pytestmark = needs_compiler


CASES = [(kind, kind, columns) for kind in ("bf16", "fp16") for columns in (128, 256)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("linear"), CASES)


def run(kernels, x, weight, bias=None, *, columns=256, blocks=2, seed=0, **epilogue):
    """As reference.linear; `blocks` are whole clusters of two."""
    return launch(kernels, x, weight, x.dtype, bias=bias, columns=columns, blocks=blocks, seed=seed, **epilogue)


def check(kernels, x, weight, bias=None, *, stats=False, columns=256, blocks=2, seed=0, **epilogue):
    result = run(kernels, x, weight, bias, columns=columns, blocks=blocks, seed=seed, stats=stats, **epilogue)
    y = result[0] if stats else result
    oracle = reference.linear(x, weight, bias, **epilogue, upcast=True)
    assert_close(y, oracle, reference.linear(x, weight, bias, **epilogue))
    if stats:  # of y as stored
        assert_close(result[1], reference.row_stats(y, upcast=True), reference.row_stats(y))


def test_columns_of_a_tile(kernels):
    """Wide tiles where there are enough of them, narrow ones to spread the work, or where y is narrow."""
    for shape, columns in {(50432, 2304): 256, (50432, 768): 256, (197, 768): 128, (50432, 104): 128}.items():
        assert kernels.tile_columns(*shape, 132) == columns


def test_blocks_of_a_grid(kernels):
    """Whole clusters: as many as there are tiles of 256 rows, or as the GPU takes at a time."""
    for shape, processors, blocks in (
        ((50432, 2304), 132, 132),
        ((50432, 2304), 131, 130),
        ((197, 768), 132, 12),
        ((1, 8), 132, 2),
    ):
        assert kernels.grid_blocks(*shape, processors) == blocks


def make(*shape, dtype=BF16, **kwargs):
    """Inputs in poisoned memory whose rows stay aligned to 16 bytes."""
    return guarded(testing.make(*shape, dtype=dtype, **kwargs).cpu())


def operands(m, n, k, dtype=BF16):
    return make(m, k, dtype=dtype), make(n, k, dtype=dtype, scale=k**-0.5, seed=1)


def epilogue_of(names, x, weight):
    """Keyword arguments for the parts named, of the shapes and dtype of a product."""
    (m, n), dtype = (x.shape[0], weight.shape[0]), x.dtype
    made = {
        "bias": lambda: {"bias": make(n, dtype=dtype, seed=2)},
        "layer_scale": lambda: {"layer_scale": make(n, dtype=dtype, seed=3)},
        "residual": lambda: {"residual": make(m, n, dtype=dtype, seed=4)},
        "norm": lambda: {"row_stats": reference.row_stats(x), "weight_sum": weight.float().sum(1)},
        "stats": lambda: {"stats": True},
    }
    return {key: value for name in names for key, value in (made.get(name, lambda n=name: {"activation": n})()).items()}


# M, N, K, columns of a tile, blocks; and why.
GRID = [
    (197, 264, 136, 256, 2, "tails on all sides, each box of y by itself"),
    (256, 512, 64, 256, 4, "no tails, one step, a tile column for each cluster"),
    (1, 8, 8, 128, 2, "the smallest"),
    (197, 1000, 72, 256, 6, "a classifier, clusters with unlike numbers of tiles"),
    (65, 128, 776, 128, 2, "more steps than stages, rows of the second warpgroup, and the second block's, missing"),
    (64, 72, 200, 128, 4, "more clusters than tiles"),
    (1100, 136, 16, 128, 2, "a group of tile rows and a part of one, which has a block too many"),
]


@pytest.mark.parametrize("case", GRID, ids=lambda case: case[-1])
def test_sizes(kernels, case):
    m, n, k, columns, blocks, _ = case
    check(kernels, *operands(m, n, k, (BF16, FP16)[GRID.index(case) % 2]), columns=columns, blocks=blocks)


@pytest.mark.full
@pytest.mark.parametrize("columns", [128, 256])
def test_vit_base(kernels, columns):
    """Two images through qkv of ViT-B, on as many blocks as take several tiles each."""
    x, weight = operands(394, 2304, 768)
    check(kernels, x, weight, columns=columns, blocks=6, **epilogue_of(("norm", "bias"), x, weight))


EPILOGUES = [
    ("bias", "gelu"),
    ("bias", "gelu_tanh"),
    ("quick_gelu",),
    ("silu", "layer_scale"),
    ("norm",),
    ("norm", "bias", "gelu"),
    ("residual",),
    ("bias", "layer_scale", "residual", "stats"),
    ("norm", "bias", "gelu", "layer_scale", "residual", "stats"),
]


@pytest.mark.parametrize("names", EPILOGUES, ids="+".join)
def test_epilogues(kernels, names):
    columns, dtype = ((256, BF16), (128, FP16))[EPILOGUES.index(names) % 2]
    x, weight = operands(150, 328, 264, dtype)
    check(kernels, x, weight, columns=columns, blocks=4, **epilogue_of(names, x, weight))


WHOLE = [("norm", "bias", "gelu"), ("norm",), ("bias", "layer_scale", "residual", "stats")]


@pytest.mark.parametrize("names", WHOLE, ids="+".join)
def test_epilogues_of_whole_tiles(kernels, names):
    """N is a multiple of a tile's columns: vectors are read without a look at where they end."""
    columns, dtype = ((128, BF16), (256, FP16))[WHOLE.index(names) % 2]
    x, weight = operands(130, 256, 200, dtype)
    check(kernels, x, weight, columns=columns, blocks=4, **epilogue_of(names, x, weight))


def check_gelu(kernels, dtype):
    """In bias: y is GELU of it. Ends of the range, inf and NaN too."""
    bias = torch.cat([torch.linspace(-12, 12, 116), torch.tensor([1e4, -1e4, torch.inf, -torch.inf]), torch.zeros(8)])
    bias[-1] = torch.nan
    bias = guarded(bias.to(dtype))
    x, weight = guarded(torch.zeros(2, 8, dtype=dtype)), guarded(torch.zeros(128, 8, dtype=dtype))
    y = run(kernels, x, weight, bias, activation="gelu", columns=128)[1].double()
    want = torch.nn.functional.gelu(bias.double())
    want[bias == -torch.inf] = 0.0
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    finite, rounding = want.isfinite(), torch.finfo(dtype).eps / 2
    assert ((y - want).abs()[finite] <= torch.clamp(want.abs() * rounding, min=1e-3)[finite]).all()


def test_gelu_of_any_value(kernels):
    for dtype in (FP16, BF16):
        check_gelu(kernels, dtype)


def test_norm_far_from_zero(kernels):
    """Rows with a mean of five deviations, whose statistics are of three tiles, the last a part of one."""
    x, weight = operands(20, 64, 296)
    x = guarded((x + 5 * torch.arange(1, 21)[:, None] / 20).to(BF16))
    weight = guarded((weight - weight.float().mean(1, keepdim=True)).to(BF16))
    check(kernels, x, weight, columns=128, **epilogue_of(("norm", "stats"), x, weight))


def test_strides(kernels):
    x, weight = (
        guarded(testing.make(70, 256, dtype=BF16).cpu())[:, 8:144],
        strided(testing.make(80, 136, dtype=BF16).cpu(), 8),
    )
    residual = guarded(testing.make(70, 200, dtype=BF16).cpu())[:, 64:144]
    check(kernels, x, weight, residual=residual, columns=128)


@pytest.mark.full
def test_any_order_of_threads_gives_the_same_bits(kernels):
    x, weight = operands(140, 136, 200)
    epilogue = epilogue_of(("norm", "bias", "gelu", "residual", "stats"), x, weight)
    first = run(kernels, x, weight, columns=128, seed=1, **epilogue)
    for seed in range(100, 104):
        again = run(kernels, x, weight, columns=128, seed=seed, **epilogue)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


# File, what is changed in it, and how it must show: the trap's words, or "" for a wrong result.
BODY, EPILOGUE, ATOMS = "cuda/linear.cuh", "cuda/linear_epilogue.cuh", "device/hopper.cuh"
EMPTY_WAIT = "mbarrier_wait(shared + Shared::empty + 8 * ring.stage, ring.parity ^ 1);"
FULL_WAIT = "mbarrier_wait(shared + Shared::full + 8 * ring.stage, ring.parity);"
FAULTS = {
    "swizzle of four rows": (ATOMS, "address >> 7 & 7", "address >> 7 & 3", ""),
    "operands with another swizzle": (ATOMS, "swizzle_128 = 1", "swizzle_128 = 2", ""),
    "operands with half the stride": (ATOMS, "eight_rows = 1024", "eight_rows = 512", ""),
    "shared memory not rounded up": (
        BODY,
        "(shared_begin() + 1023) / 1024 * 1024",
        "shared_begin()",
        "not aligned|swizzle",
    ),
    "mbarriers not known to all": (BODY, "cluster_barrier();  // all know the mbarriers", "", "mbarrier"),
    "mbarriers not known to the other block": (
        BODY,
        "cluster_barrier();  // all know the mbarriers",
        "block_barrier();",
        "mbarrier",
    ),
    "mbarriers not known to TMA": (BODY, "    async_fence();\n  }", "  }", "has not seen"),
    "no wait for a full stage": (BODY, FULL_WAIT, "", "nobody has w|a copy wrote"),
    "no wait for an empty stage": (BODY, EMPTY_WAIT, "", "race|more arrivals"),
    "full stages of the wrong phase": (
        BODY,
        FULL_WAIT,
        FULL_WAIT.replace("parity)", "parity ^ 1)"),
        "nobody has w|a copy wrote|deadlock",
    ),
    "empty stages of the wrong phase": (BODY, EMPTY_WAIT, EMPTY_WAIT.replace(" ^ 1", ""), "deadlock"),
    "stage given back under its products": (BODY, "product_wait<1>();", "", "still reads"),
    "sums read under way": (BODY, "product_wait<0>();", "", ""),
    "no product_fence": (BODY, "product_fence();", "", "no product_fence"),
    "a consumer warp forgotten": (BODY, "kConsumerWarps = 8", "kConsumerWarps = 7", "still reads|more arrivals|race"),
    "a consumer warp too many": (BODY, "kConsumerWarps = 8", "kConsumerWarps = 9", "deadlock"),
    "no arrivals of the other block": (
        BODY,
        "kConsumerWarps * kLinearCluster)",
        "kConsumerWarps)",
        "race|more arr|still",
    ),
    "no arrival at the other block": (
        BODY,
        "threadIdx.x % 32 < kLinearCluster",
        "threadIdx.x % 32 == blockIdx.x % kLinearCluster",
        "deadlock",
    ),
    "all arrivals at its own block": (
        BODY,
        "address_in_cluster(empty, threadIdx.x % kLinearCluster)",
        "address_in_cluster(empty, blockIdx.x % kLinearCluster)",
        "race|still reads",
    ),
    "weights for its own block alone": (BODY, "full, kWholeCluster", "full, 1 << blockIdx.x % 2", "deadlock"),
    "weights for the other block alone": (BODY, "full, kWholeCluster", "full, 2 >> blockIdx.x % 2", "deadlock"),
    "weights for a third block": (BODY, "full, kWholeCluster", "full, 7", "the cluster has not"),
    "bytes of its own half expected": (
        BODY,
        "(full, Shared::stage)",
        "(full, Shared::stage - part * 128)",
        "waited for|nobody|race|deadlock",
    ),
    "halves of the weights in one place": (BODY, "weight + first_row * 128", "weight", "race|nobody"),
    "the first half of the weights twice": (BODY, "tile_column * kColumns + first_row", "tile_column * kColumns", ""),
    "one tile row for both blocks": (BODY, " + blockIdx.x % kLinearCluster;", ";", ""),
    "ends while the other block arrives": (
        BODY,
        "cluster_barrier();  // shared memory outlives",
        "//",
        "not knowing that|has ended",
    ),
    "too few bytes expected": (BODY, "(full, Shared::stage)", "(full, Shared::stage - 128)", "deadlock"),
    "producer a step short": (
        BODY,
        "step < p.steps; ++step, ring.next()) {\n      const",
        "step + 1 < p.steps; ++step, ring.next()) {\n      const",
        "deadlock",
    ),
    "consumer a step short": (
        BODY,
        "step < p.steps; ++step) {",
        "step + 1 < p.steps; ++step) {",
        "",
    ),
    "sums of the last tile kept": (BODY, "i > 0 || !first", "first || !first", ""),
    "sums begun anew at every step": (BODY, "i > 0 || !first", "i > 0 && (first || !first)", ""),
    "rounds of the ring miscounted": (
        "device/hopper.cuh",
        "parity ^= stage == 0",
        "parity ^= stage == 1",
        "deadlock|nobody",
    ),
    "y written while it leaves": (
        BODY,
        "store_wait_read<0>();  // the last tile's y has left: its place is free",
        "",
        "still reads|race",
    ),
    "not all know that y has left": (
        BODY,
        "named_barrier(1 + group, 128);  // thread 0 knows",
        "//",
        "still reads|race|nobody",
    ),
    "y stored before all is there": (
        BODY,
        "named_barrier(1 + group, 128);  // all of",
        "//",
        "race|nobody has w|async_fence",
    ),
    "y stored with no fence": (BODY, "    async_fence();\n    named", "    named", "no async_fence"),
    "warpgroups at one barrier": (
        BODY,
        "named_barrier(1 + group, 128);  // all of",
        "named_barrier(1, 128); //",
        "race|nobody|fence|deadlock",
    ),
    "residual not waited for": (
        BODY,
        "mbarrier_wait(residual, residual_parity);",
        "",
        "waited for|nobody|race",
    ),
    "residual of the wrong phase": (BODY, ", residual_parity ^= 1", "", "waited for|race|nobody|deadlock"),
    "rows of y exchanged": (BODY, "half * 8 * 128", "half * 7 * 128", "race"),
    "chunks of y not swizzled": (BODY, "(begin ^ j % 8 * 16)", "(begin + j % 8 * 16)", ""),
    "every tile taken as whole": (BODY, "c.n % kColumns == 0", "true", "out of bounds"),
    "columns of whole tiles shifted": (EPILOGUE, "load(j, column + 8 * j);", "load(j, column + 8 * j - 8);", ""),
    "columns beyond y": (EPILOGUE, "column < n ? column", "column <= n ? column", "out of bounds"),
    "statistics of rows beyond y": (EPILOGUE, "row0 < p.m) store_floats", "row0 <= p.m) store_floats", "out of bounds"),
    "statistics of columns beyond y": (
        EPILOGUE,
        "left < kLinearStats ? left / 8 : kLinearStats / 8",
        "kLinearStats / 8",
        "",
    ),
    "statistics of half a row": (EPILOGUE, "return x + shuffle_xor(x, 2);", "return x;", ""),
    "polynomial of gelu turns back": (EPILOGUE, "fminf(x * x, 30.0f)", "x * x", ""),
    "gelu's tail grows": (EPILOGUE, "x = fmaxf(x, -3.9f);", "", ""),
    "no eps": (EPILOGUE, " + p.eps", "", ""),
    "last tile of statistics taken as whole": (EPILOGUE, "kLinearStats ? left : kL", "kLinearStats ? 128 : kL", ""),
    "ends before y is read": (BODY, "if (thread == 0) store_wait_read<0>();  // shared", "//", "nobody has waited for"),
    "more registers than there are": (
        BODY,
        "kConsumerRegisters = 240",
        "kConsumerRegisters = 248",
        "deadlock: .* registers",
    ),
}


def test_faults_are_changes_of_what_is_there():
    for name, (file, old, *_) in FAULTS.items():
        assert old in (ROOT / "csrc" / file).read_text(), name


@pytest.mark.full  # each takes a compilation
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_show(fault, tmp_path):
    *change, trap = FAULTS[fault]
    kernels = compiled_with_fault(tmp_path, [("bf16", "bf16", 128)], change)
    x, weight = operands(261, 200, 136)  # three tile rows, one row of y in the last; two tile columns; three steps
    whole = operands(40, 128, 64)  # a tile's columns
    runs = [epilogue_of(EPILOGUES[-1], x, weight) | {"eps": 0.1}, epilogue_of(("stats",), x, weight)]

    def both():
        for epilogue in runs:
            check(kernels, x, weight, columns=128, **epilogue)
        check(kernels, *whole, columns=128, **epilogue_of(EPILOGUES[-1], *whole))
        check_gelu(kernels, BF16)

    with pytest.raises(RuntimeError if trap else (AssertionError, RuntimeError), match=trap or None):
        both()


@pytest.mark.full
@needs_nvcc
def test_compiles_for_sm_90a(tmp_path):
    """ptxas' report and the machine code: no spills, no products that wait for each other, wgmma and TMA."""
    source, compiled = ROOT / "csrc" / "cuda" / "linear.cu", tmp_path / "linear.o"
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    result = subprocess.run([*command, "-c", source, "-o", compiled], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    instances = 2 * len(CASES)  # of e4m3 as many, with either type around
    assert spills == [("0", "0", "0")] * instances
    # 384 threads of 168 registers are all that a multiprocessor has; what setmaxnreg moves is counted under emulation.
    assert re.findall(r"Used (\d+) registers", result.stderr) == ["168"] * instances
    # ptxas tells where it makes wgmma wait, for registers that it cannot leave alone, or ignores setmaxnreg.
    assert "warpgroup" not in result.stderr and "setmaxnreg" not in result.stderr and "wgmma" not in result.stderr
    code = run_tool("cuobjdump", "-sass", str(compiled))
    for products in (
        "HGMMA.64x128x16.F32.BF16",
        "HGMMA.64x256x16.F32.BF16",
        r"HGMMA.64x128x16.F32 ",
        r"HGMMA.64x256x16.F32 ",
    ):
        # Of the first step and of another: 64 columns, 16 at a time.
        assert len(re.findall(products, code)) == 2 * 4, products
    # In e4m3 a step is 128 columns, 32 at a time; products of 256 columns of y are two, and there are two types of y.
    assert len(re.findall(r"QGMMA.64x128x32.F32.E4M3.E4M3 ", code)) == 2 * (4 + 2 * 4)
    for instruction in ("UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UTMASTG.2D", "USETMAXREG", "SYNCS.PHASECHK"):
        assert instruction in code
    # A fence of the whole GPU stands at each of the two barriers of a cluster, and at no step of the products.
    assert code.count("UCGABAR_WAIT") == code.count("MEMBAR.ALL.GPU") == 2 * instances


@pytest.mark.full
@needs_nvcc
def test_compiles_to_a_trap_elsewhere(tmp_path):
    """For GPUs without wgmma: no product is left, and what is left stops."""
    source, compiled = ROOT / "csrc" / "cuda" / "linear.cu", tmp_path / "linear.o"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90", "100")]
    command = ["nvcc", "-std=c++17", *targets, "-c", source, "-o", compiled]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    code = run_tool("cuobjdump", "-sass", str(compiled))
    assert code.count("BPT.TRAP") == len(targets) * 2 * len(CASES) and "MMA" not in code
