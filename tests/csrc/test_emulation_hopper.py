"""The emulated instructions of sm_90 against the PTX ISA, and the mistakes that emulation must notice.

What "by hand" says below is written from the PTX ISA's words and figures, not from csrc/device/hopper.cuh.
"""

import ctypes
import math
import re

import pytest
import torch
from helpers.emulated import library, needs_compiler

pytestmark = needs_compiler

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
NAMES = {BF16: b"bf16", FP16: b"fp16"}

# Mistake -> how it must show: the trap's words, or WRONG for a wrong result.
WRONG = "wrong result"
EARLY = "nobody has written|nobody has waited for|race: which a copy wrote"
IN_USE = "product or store under way still reads"
MISTAKES = {
    "": "",
    "two arrivals where one comes": r"deadlock: .*128 threads wait for parity 0 of the mbarrier at \d+, .* with 1 arr",
    "TMA has not seen the mbarriers": "TMA has not seen the mbarrier made",
    "mbarriers used before all know of them": "race: .* uses an mbarrier|no mbarrier at",
    "stage filled before it is empty": f"{IN_USE}|race: .* no barrier between|more arrivals",
    "waits for the wrong phase to fill": r"deadlock: .*1 threads wait for parity 0 of the mbarrier at \d+, .* with 4",
    "waits for the wrong phase to multiply": f"{EARLY}|deadlock",
    "expects too few bytes": r"nobody has waited for|race: which a copy wrote|deadlock: .* -\d+ bytes to come",
    "expects too many bytes": r"deadlock: .*128 threads wait for .* 0 arrivals and 8192 bytes to come",
    "tile off its swizzle": f"nobody has written|race|{WRONG}",
    "takes registers that nobody gave": "deadlock: .* threads wait for 4096 registers where .* are spare",
    "a step too many": r"deadlock: 128 threads wait for parity \d of the mbarrier at \d+, .* 1 arrivals",
    "a step too few": f"{WRONG}|the block ends with copies under way",
    "no wait for the copies": EARLY,
    "no product_fence": "begins a product with no product_fence",
    "stage released before its products are done": f"{IN_USE}|nobody has waited for",
    "swizzle of 64 bytes": f"{WRONG}|does not begin where its swizzle does|nobody has written|waited for|race",
    "no swizzle": f"{WRONG}|nobody has written|waited for|race",
    "stride of four rows": WRONG,
    "inner axis not advanced": WRONG,
    "warps want different products": "divergence: the warps of .* want different products",
    "sums begin anew too late": WRONG,
    "sums touched under way": "wrote sums of a product under way",
    "sums read before the wait": WRONG,
    "y not swizzled": WRONG,
    "y stored with no async_fence": "wrote with no async_fence after it",
    "y stored before all have written": "nobody has written|race: which thread .* wrote with no barrier between",
    "a barrier of another size": "is at barrier 1 of|deadlock",
    "stores in no group": "ends with stores whose reads nobody has waited for",
    "ends before y is read": "ends with stores whose reads nobody has waited for",
    "y written again too early": f"race: .* writes .*({IN_USE}|no barrier between)|no async_fence",
}


# The same of two blocks that copy for each other.
CLUSTER_MISTAKES = {
    "": "",
    "stage empty when one block has read it": "more arrivals|race: .* of block . writes .* no barrier between",
    "mbarriers known to their own block alone": "race: .* uses an mbarrier|no mbarrier at",
    "copies for itself alone": r"deadlock: .* with 0 arrivals and 4096 bytes to come",
    "copies for the other alone": r"deadlock: .* with 0 arrivals and 4096 bytes to come",
    "copies for a block that is not there": "a multicast to blocks that the cluster has not",
    "expects its own half": f"{EARLY}|race: .* writes .* no barrier between|deadlock: .* -\\d+ bytes to come",
    "both halves in one place": "race: .* writes .* no barrier between|nobody has written",
    "a block reads a box less": "race: .* no barrier between|ends with copies|deadlock|not knowing",
    "no arrival at the other block": r"deadlock: .* with 32 arrivals and 0 bytes to come",
    "both arrivals at its own block": "more arrivals|race: .* of block . writes .* no barrier between",
    "arrives as if at its own block": "there is no mbarrier at",
    "ends while the other block arrives": "not knowing that thread .* is through with it|a block that has ended",
}


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    found = library("hopper", tmp_path_factory.mktemp("hopper"))
    for name in ("run_pipeline", "run_shared_boxes", "product", "product_transposed", "load_box", "load_head_box"):
        getattr(found, name).restype = ctypes.c_char_p
    found.operand_descriptor.restype = found.transposed_descriptor.restype = ctypes.c_uint64
    found.swizzled.restype = found.transposed_address.restype = ctypes.c_uint32
    return found


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def random(*shape, dtype=BF16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(hopper, mistake, steps, seed):
    """What went wrong, if anything did."""
    x, w = random(64, 64 * steps), random(128, 64 * steps, seed=1)
    y, conflicts = torch.full((64, 128), float("nan"), dtype=BF16), ctypes.c_int64()
    error = hopper.run_pipeline(
        mistake.encode(), pointer(x), pointer(w), pointer(y), steps, ctypes.c_uint64(seed), ctypes.byref(conflicts)
    ).decode()
    if error:
        return error
    want = (x.double() @ w.double().T).to(BF16)
    if not mistake:
        assert conflicts.value == 0
    return "" if torch.allclose(y, want, rtol=2**-7, atol=1e-6) else WRONG


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_noticed_in_every_order(hopper, mistake):
    for seed in range(3):
        found = run(hopper, mistake, 5, seed)
        assert re.search(MISTAKES[mistake], found) if MISTAKES[mistake] else not found, (seed, found)


@pytest.mark.parametrize("mistake", CLUSTER_MISTAKES)
def test_every_mistake_of_a_cluster_is_noticed_in_every_order(hopper, mistake):
    for seed in range(6):
        x, y = random(64 * 5, 64), torch.zeros(2, 64 * 5, 64, dtype=BF16)
        found = hopper.run_shared_boxes(mistake.encode(), pointer(x), pointer(y), 5, ctypes.c_uint64(seed)).decode()
        assert re.search(CLUSTER_MISTAKES[mistake], found) if mistake else not found, (seed, found)
        if not mistake:
            assert torch.equal(y, torch.cat([swizzled_image(part) for part in x.split(64)]).expand(2, -1, -1))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pipelines_of_any_length(hopper, steps):
    assert not run(hopper, "", steps, 0)


def swizzled_image(matrix):
    """By hand, "128-byte swizzle mode": rows of 128 bytes, chunk c of 16 bytes of row r at place c xor (r mod 8)."""
    rows, columns = matrix.shape
    assert matrix.element_size() * columns == 128
    image = torch.empty(rows, 8, columns // 8, dtype=matrix.dtype)
    for r in range(rows):
        for c in range(8):
            image[r, c ^ (r % 8)] = matrix[r, columns // 8 * c : columns // 8 * (c + 1)]
    return image.view(rows, columns)


def test_descriptor(hopper):
    # By hand, "Matrix descriptor format": bits 13-0 address / 16, 29-16 leading offset / 16 (not used, 1), 45-32 eight
    # rows' 1024 bytes / 16 = 64, 51-49 base offset 0, 63-62 = 1 for the 128-byte swizzle.
    assert hopper.operand_descriptor(0) == 0x4000004000010000
    assert hopper.operand_descriptor(0x400) == 0x4000004000010040
    assert hopper.operand_descriptor(0x24C20) == 0x40000040000124C2
    # Transposed, the leading offset is that of the next 64 columns: 26624 / 16 = 0x680.
    assert hopper.transposed_descriptor(0x400, 26624) == 0x4000004006800040
    # Swizzle<3, 4, 3>: bits 6-4 xor bits 9-7.
    assert [hopper.swizzled(a) for a in (0, 16, 128, 144, 1024, 0x3F4)] == [0, 16, 144, 128, 1024, 0x384]


def fragment(n):
    """Row and column of every element [thread, i] of the sums.

    By hand, "WGMMA .m64nNk16 register fragment layout for accumulator matrix D": warp w has rows 16 w .. 16 w + 15; a
    lane d0 and d1 in row lane / 4, d2 and d3 eight rows below, columns 2 (lane % 4) and the next; d4 .. d7 eight
    columns further on, and so on.
    """
    thread, i = torch.arange(128)[:, None], torch.arange(n // 2)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    return row, i // 4 * 8 + thread % 4 * 2 + i % 2


@pytest.mark.parametrize("n", [64, 128, 136, 200, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_product(hopper, dtype, n):
    a, b = random(64, 64, dtype=dtype), random(n, 64, dtype=dtype, seed=1)
    image = torch.cat([swizzled_image(a), swizzled_image(b)])
    for column, add in ((0, False), (48, True)):
        before = random(128, n // 2, dtype=torch.float32, seed=2)
        product = a[:, column : column + 16].double() @ b[:, column : column + 16].double().T  # [64, n]
        sums = before.clone()
        args = pointer(image), image.numel() * 2, 2 * column, add, pointer(sums)
        assert not hopper.product(NAMES[dtype], n, *args).decode()
        want = product[fragment(n)] + (before if add else 0)
        assert torch.allclose(sums.double(), want, rtol=1e-6, atol=1e-5)


def e4m3_product(hopper, a, b, column=0, sums=None):
    """[128, 64] sums of 32 columns from `column` on of a [64, 128] and b [128, 128]."""
    image = torch.cat([swizzled_image(a.to(E4M3)), swizzled_image(b.to(E4M3))])
    found = torch.empty(128, 64) if sums is None else sums.clone()
    args = pointer(image), image.numel(), column, sums is not None, pointer(found)
    assert not hopper.product(b"e4m3", 128, *args).decode()
    return found


def test_product_of_e4m3(hopper):
    """As of two-byte elements, but K is 32: again 32 bytes of a row. Whole numbers, which no sum has to round."""
    a, b = (random(rows, 128, dtype=torch.float32, seed=rows).mul(2).round().clamp(-8, 8) for rows in (64, 128))
    before = random(128, 64, dtype=torch.float32).round()
    for column in (0, 32, 96):
        product = (a[:, column : column + 32] @ b[:, column : column + 32].T)[fragment(128)]
        assert torch.equal(e4m3_product(hopper, a, b, column), product)
        assert torch.equal(e4m3_product(hopper, a, b, column, before), product + before)


def test_sums_of_e4m3_have_14_bits(hopper):
    """By hand, from the model that wgmma.h cites: the place of the last bit is 13 below the largest exponent."""
    a, b = torch.zeros(64, 128), torch.ones(128, 128)
    a[:, 0] = 128.0  # 2^7: the last place is 2^-6

    def first(*others, sums=None):
        a[:, 1:] = 0.0
        a[:, 1 : 1 + len(others)] = torch.tensor(others)
        return e4m3_product(hopper, a, b, sums=sums)[0, 0].item()

    assert first(2**-6) == 128 + 2**-6
    assert first(2**-7, 2**-7) == 128  # cut one by one, though together they are a place
    assert first(-(2**-7)) == 128  # toward zero
    assert first(1.75 * 2**-6) == 128 + 2**-6  # not rounded
    a[:, 0] = 448.0  # an exponent of 8: the last place is 2^-5
    assert first(2**-5, 2**-6) == 448 + 2**-5
    assert first(448.0, 2**-5) == 896  # whose own last place is 2^-4
    a[:, 0] = 0.0
    before = torch.full((128, 64), 2.0**13)  # the sum so far has a say too
    assert first(1.0, 0.5, sums=before) == 2**13 + 1
    assert first(*[0.5] * 30, sums=before) == 2**13
    assert math.isnan(first(math.nan)) and first() == 0


def a_fragment(a):
    """a [64, 16] as registers [thread, 4, 2].

    By hand, "WGMMA .m64nNk16 register fragment layout for matrix A": warp w has rows 16 w .. 16 w + 15; a lane a0 and
    a1 in row lane / 4, columns 2 (lane % 4) and the next, a2 and a3 eight rows below, a4 .. a7 eight columns on.
    """
    out = torch.empty(128, 4, 2, dtype=a.dtype)
    for thread in range(128):
        row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        for i, (down, right) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
            out[thread, i] = a[row + down, column + right : column + right + 2]
    return out


@pytest.mark.parametrize("n", [32, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_transposed_product(hopper, dtype, n):
    """a in registers; of b [48, 128], in boxes of 64 columns, 16 rows and the first n columns."""
    a, b = random(64, 16, dtype=dtype), random(48, 128, dtype=dtype, seed=1)
    image, registers = torch.cat([swizzled_image(b[:, :64]), swizzled_image(b[:, 64:])]), a_fragment(a)
    for row, add in ((0, False), (32, True)):
        before = random(128, n // 2, dtype=torch.float32, seed=2)
        sums = before.clone()
        args = pointer(image), image.numel() * 2, 128 * row, 48 * 128, pointer(registers), add, pointer(sums)
        assert not hopper.product_transposed(NAMES[dtype], n, *args, 0).decode()
        want = (a.double() @ b[row : row + 16, :n].double())[fragment(n)] + (before if add else 0)
        assert torch.allclose(sums.double(), want, rtol=1e-6, atol=1e-5)


def test_mistakes_with_an_operand_in_registers(hopper):
    """Some warps compute when they wait, and find a changed by then; and the fence is there for a, too."""
    a, b = random(64, 16), random(16, 64, seed=1)
    image, registers, sums = swizzled_image(b), a_fragment(a), torch.zeros(128, 32)
    args = pointer(image), image.numel() * 2, 0, 2048, pointer(registers), False, pointer(sums)
    assert not hopper.product_transposed(b"bf16", 64, *args, 1).decode()
    want = (a.double() @ b.double())[fragment(64)]
    assert not torch.allclose(sums.double(), want, rtol=1e-6, atol=1e-5)
    assert "begins a product with no product_fence" in hopper.product_transposed(b"bf16", 64, *args, 2).decode()


# Swizzle mode, leading and stride offsets, and the layout over ((8, w, 2), (8, 2)) of elements, in elements.
MANUAL = [
    (0, 256, 128, ((1, 8, 64), (8, 128)), 1),
    (3, 256, 512, ((1, 8, 128), (16, 256)), 2),
    (2, 512, 1024, ((1, 8, 256), (32, 512)), 4),
]


@pytest.mark.parametrize(("mode", "leading", "stride", "layout", "w"), MANUAL, ids=["none", "32 bytes", "64 bytes"])
def test_transposed_layouts_of_the_manual(hopper, mode, leading, stride, layout, w):
    """By hand, the bf16 examples of "Canonical layouts", MN-major: figures 168 to 170, their "exact layouts"."""
    descriptor = mode << 62 | stride // 16 << 32 | leading // 16 << 16
    (_, chunk, block), (k, further) = layout
    bits = w.bit_length() - 1
    for outer in range(2 * w):
        for inner in range(16):
            at = 2 * (outer % w * chunk + outer // w * block + inner % 8 * k + inner // 8 * further)
            at ^= (at >> 7 & (1 << bits) - 1) << 4
            assert hopper.transposed_address(ctypes.c_uint64(descriptor), outer, inner) == at


def test_box_of_a_head(hopper):
    """Rows of one head of one image, with zeros where the next image, head or token would be."""
    data = random(2, 21, 3, 72)
    for image, row, head, column in ((0, 0, 0, 0), (1, 8, 2, 0), (0, 16, 1, 64), (1, 24, 2, 64)):
        box = torch.zeros(16, 64, dtype=BF16)
        part = data[image, row : row + 16, head, column : column + 64]
        box[: part.shape[0], : part.shape[1]] = part
        got = torch.full((16, 64), float("nan"), dtype=BF16)
        sizes, at = (ctypes.c_int * 4)(*data.shape), (ctypes.c_int * 4)(image, row, head, column)
        assert not hopper.load_head_box(pointer(data), sizes, 16, at, pointer(got)).decode()
        assert torch.equal(got, swizzled_image(box))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 64), (16, 0), (8, 128), (-5, -8)], ids=str)
def test_box(hopper, row, column):
    """A box as the swizzle orders it, with zeros beyond the matrix."""
    matrix, box = random(21, 104), torch.zeros(16, 64, dtype=BF16)
    for r in range(16):
        for c in range(64):
            if 0 <= row + r < 21 and 0 <= column + c < 88:
                box[r, c] = matrix[row + r, column + c]
    image = torch.full((16, 64), float("nan"), dtype=BF16)
    assert not hopper.load_box(pointer(matrix), 21, 88, 104, 16, row, column, pointer(image)).decode()
    assert torch.equal(image, swizzled_image(box))


@pytest.mark.parametrize(
    ("stride", "box_rows", "message"),
    [
        (100, 16, "rows are not aligned to 16 bytes"),
        (96, 16, "no rows, columns or stride"),
        (104, 264, "1 to 256 rows"),
    ],
)
def test_maps_that_the_driver_would_refuse(hopper, stride, box_rows, message):
    matrix, image = random(21, 112), torch.empty(264, 64, dtype=BF16)
    error = hopper.load_box(pointer(matrix), 21, 104, stride, box_rows, 0, 0, pointer(image)).decode()
    assert message in error
