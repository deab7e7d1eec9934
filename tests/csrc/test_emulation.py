"""The emulated GPU instructions against the tables of the PTX ISA, and the mistakes that emulation must notice."""

import ctypes
import math
import re

import pytest
import torch
from helpers.emulated import library, needs_compiler

pytestmark = needs_compiler

BF16, FP16 = torch.bfloat16, torch.float16
MISTAKES = {
    "none": "",
    "no barrier": "race: which thread .* wrote with no barrier between|nobody has written|waited for",
    "no barrier before writing again": "race: thread .* touched with no barrier between|waited for",
    "no wait": "whose copy nobody has waited for",
    "waits for the wrong group": "whose copy nobody has waited for",
    "copies in no group": "ends with copies in no group",
    "reads what nobody wrote": "which nobody has written",
    "two threads write one place": "race: thread .* writes shared address 0",
    "shared address beyond the end": "shared address 512 is beyond the 512 bytes there are",
    "shared address not aligned": "shared address .* is not aligned",
    "global address not aligned": "a global address is not aligned to 4",
    "reads beyond the input": "reads global memory out of bounds",
    "writes the input": "writes global memory out of bounds",
    "lanes part": "divergence: thread .* is at",
    "a lane leaves": "deadlock: 31 threads wait for their warp, at shuffle, 1 have ended",
    "a thread skips the barrier": "deadlock: 31 threads wait at a barrier, 1 have ended",
}


@pytest.fixture(scope="module")
def atoms(tmp_path_factory):
    found = library("atoms", tmp_path_factory.mktemp("atoms"))
    for name in ("mistake_name", "mistake", "multiply_add", "load_matrices", "shuffle_xor"):
        getattr(found, name).restype = ctypes.c_char_p
    found.max_of.restype, found.max_of.argtypes = ctypes.c_float, [ctypes.c_float, ctypes.c_float]
    for name in ("pack_bf16", "pack_fp16", "pack_e4m3"):
        getattr(found, name).restype = ctypes.c_uint32
        getattr(found, name).argtypes = [ctypes.c_float, ctypes.c_float]
    return found


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def test_every_mistake_is_noticed_in_every_order(atoms):
    names = []
    while name := atoms.mistake_name(len(names)).decode():
        for seed in range(20):
            message = atoms.mistake(len(names), ctypes.c_uint64(seed)).decode()
            assert re.search(MISTAKES[name], message) if MISTAKES[name] else not message, (name, seed, message)
        names.append(name)
    assert set(names) == set(MISTAKES)


def registers(matrix, positions):
    """[32 lanes, registers] of two elements each; positions(lane, i) is where element i of a lane lies."""
    count = positions.count
    elements = torch.tensor(
        [[matrix[positions(lane, i)] for i in range(count)] for lane in range(32)], dtype=matrix.dtype
    )
    return elements.view(torch.int16).view(32, count // 2, 2).contiguous().view(torch.int32)[..., 0].contiguous()


# "Matrix fragments for mma.m16n8k16 with floating point type", word for word: groupID = lane >> 2,
# threadID_in_group = lane % 4.
def a_position(lane, i):
    row = lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1) + (0 if i < 4 else 8)


def b_position(lane, i):
    return (lane % 4) * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2


def c_position(lane, i):
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), (lane % 4) * 2 + (i & 1)


a_position.count, b_position.count = 8, 4


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_multiply_add(atoms, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*shape, generator=generator) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = a.to(dtype), b.to(dtype)
    out = torch.tensor([[c[c_position(lane, i)] for i in range(4)] for lane in range(32)])
    a_registers, b_registers = registers(a, a_position), registers(b, b_position)
    assert not atoms.multiply_add(dtype == BF16, pointer(out), pointer(a_registers), pointer(b_registers))
    want = a.double() @ b.double() + c
    for lane in range(32):
        for i in range(4):
            assert out[lane, i].item() == pytest.approx(want[c_position(lane, i)].item(), rel=1e-6, abs=1e-6)


def test_load_matrices(atoms):
    rows = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)  # element j of row i of matrix m is 64 m + 8 i + j
    for transposed in (False, True):
        out, conflicts = torch.zeros(32, 4, 2, dtype=torch.int16), ctypes.c_int64()
        assert not atoms.load_matrices(pointer(rows), transposed, 16, pointer(out), ctypes.byref(conflicts))
        # By hand: lane 0 holds elements 0 and 1 of row 0, or of column 0; lane 6 = 4 * 1 + 2 elements 4 and 5 of 1.
        assert out[0, 0].tolist() == ([0, 8] if transposed else [0, 1])
        assert out[6, 3].tolist() == ([192 + 33, 192 + 41] if transposed else [192 + 12, 192 + 13])
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            for m in range(4):
                matrix = rows[8 * m : 8 * m + 8].T if transposed else rows[8 * m : 8 * m + 8]
                assert out[lane, m].tolist() == matrix[row, column : column + 2].tolist()
        assert conflicts.value == 0


@pytest.mark.parametrize(("stride", "conflicts"), [(16, 0), (144, 0), (32, 4 * 4), (128, 4 * 7), (64, 4 * 6)])
def test_bank_conflicts_are_counted(atoms, stride, conflicts):
    rows, out, found = torch.zeros(32, 8, dtype=torch.int16), torch.zeros(32, 4, dtype=torch.int32), ctypes.c_int64()
    assert not atoms.load_matrices(pointer(rows), False, stride, pointer(out), ctypes.byref(found))
    assert found.value == conflicts


def test_shuffle(atoms):
    for mask in (1, 2, 16):
        x = torch.arange(32.0)
        assert not atoms.shuffle_xor(pointer(x), mask)
        assert x.tolist() == [float(lane ^ mask) for lane in range(32)]


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "pack_bf16"), (FP16, "pack_fp16")], ids=str)
def test_pack_rounds_to_nearest_even(atoms, dtype, name):
    values = [
        0.0,
        -0.0,
        1.0,
        1 / 3,
        -2.7182817,
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        1 + 2.0**-11,
        65504.0,
        65520.0,
        1e-7,
        3e38,
    ]
    values += [float("inf"), float("-inf")]
    for low in values:
        for high in (2.5, low):
            want = torch.tensor([low, high], dtype=torch.float32).to(dtype).view(torch.int16)
            pair = torch.tensor([getattr(atoms, name)(low, high)], dtype=torch.int64).to(torch.int32).view(torch.int16)
            assert pair.tolist() == want.tolist(), (low, high)
    nan = torch.tensor([getattr(atoms, name)(float("nan"), 1.0)], dtype=torch.int64).to(torch.int32).view(dtype)
    assert nan[0].isnan()


def test_pack_e4m3(atoms):
    """By hand, from the PTX ISA (cvt with .satfinite) and the OCP's specification; then every number there is."""
    by_hand = {
        0.0: 0x00, 1.0: 0x38, -240.0: 0xF7, 448.0: 0x7E, 464.0: 0x7E, -1e30: 0xFE, math.inf: 0x7E,
        math.nan: 0x7F,
        1.0625: 0x38, 1.1875: 0x3A, 1.07: 0x39,  # between 1, 1.125 and 1.25: the even one, or the nearer
        2.0**-9: 0x01, 2.0**-10: 0x00, 3 * 2.0**-10: 0x02, 2.0**-6 - 2.0**-12: 0x08, 1.96875: 0x40,
    }  # fmt: skip
    for value, bits in by_hand.items():
        assert atoms.pack_e4m3(value, 1.0) == 0x3800 | bits and atoms.pack_e4m3(1.0, value) == bits << 8 | 0x38, value
    assert atoms.pack_e4m3(-0.0, -0.0) == 0x8080
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    for code, value in zip(codes.tolist(), values.tolist(), strict=True):
        assert atoms.pack_e4m3(value, 0.0) == (code if value == value else 0x7F)
    between = torch.linspace(-440, 440, 999)
    rounded = between.to(torch.float8_e4m3fn).view(torch.uint8)
    assert [atoms.pack_e4m3(value, 0.0) for value in between.tolist()] == rounded.tolist()


def test_max_or_nan(atoms):
    assert [atoms.max_of(1.0, 2.0), atoms.max_of(-1.0, -2.0), atoms.max_of(3.0, math.inf)] == [2.0, -1.0, math.inf]
    assert all(math.isnan(atoms.max_of(*pair)) for pair in ((math.nan, 1.0), (1.0, math.nan)))
