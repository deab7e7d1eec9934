"""A kernel decoded for tests/emulation/ptx: registers become offsets, names of instructions numbers."""

import ctypes
import re
from dataclasses import dataclass

import numpy as np
from helpers.ptx.parser import Instruction, Kernel, PtxError, number, parse

SHARED_BASE = 1024  # kSharedBase of machine.h
SPECIAL = ("%tid.x", "%laneid", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x")
WIDTHS = {16: 1, 32: 2, 64: 3}  # bits -> log2 of the bytes, which the low bits of an offset hold
TOTALS = (
    "global_read_bytes", "global_written_bytes", "tma_read_bytes", "tma_written_bytes", "cp_async_bytes",
    "shared_read_bytes", "shared_written_bytes", "operand_bytes", "shared_accesses", "shared_turns", "implied_waits",
)  # fmt: skip


class Trapped(AssertionError):
    """A kernel did what it must not: the trap, and the instruction."""


def spelled(instruction: Instruction) -> str:
    """An instruction's name in the executor's table: without hints, with what its operands say about it."""
    opcode, operands = instruction.opcode, instruction.operands
    opcode = opcode.replace("::cta", "").replace("::cluster", "").replace(".relaxed", "")
    opcode = re.sub(r"\.L[12]::\w+|\.unified|\.weak", "", opcode)
    vectors = [isinstance(operand, tuple) and operand[0] == "vector" for operand in operands]
    if opcode in ("mov.b32", "mov.b64") and any(vectors):
        if len(operands[vectors.index(True)]) != 3:
            raise PtxError(f"line {instruction.line + 1}: {opcode} of other than two parts")
        return ("unpack" if vectors[0] else "pack") + opcode[3:]
    if opcode.startswith("wgmma.mma_async"):
        return re.sub(r"\.m64n\d+", ".", opcode) + ".registers" * vectors[1]
    if opcode.startswith(("cp.async.ca", "cp.async.cg")):
        return f"{opcode}.{number(operands[2])}"
    if opcode == "bra.uni":
        return "bra"
    return opcode


@dataclass
class Library:
    """The compiled executor."""

    handle: ctypes.CDLL

    def __post_init__(self) -> None:
        self.handle.op_name.restype = ctypes.c_char_p
        self.handle.program_new.restype = ctypes.c_void_p
        self.handle.program_delete.argtypes = [ctypes.c_void_p]
        names = [self.handle.op_name(op).decode() for op in range(self.handle.op_count())]
        self.names = names
        self.ops = {name: op for op, name in reversed(list(enumerate(names)))}


class Program:
    """A kernel that can be run.

    Raises:
        PtxError: for an instruction that the executor does not know, with its name.
    """

    def __init__(self, library: Library, ptx: str, shared_bytes: int) -> None:
        self.library, self.kernel, self.shared_bytes = library, parse(ptx), shared_bytes
        decoder = _Decoder(library, self.kernel)
        code = np.array(decoder.code, np.int32)
        operands = np.array(decoder.operands, np.int32)
        registers = np.array(decoder.is_register, np.uint8)
        constants = np.array(decoder.constants, np.uint64)
        special = np.array(
            [decoder.offsets.get(name, -64) & ~63 if name in decoder.offsets else -1 for name in SPECIAL], np.int32
        )
        shared = -(-shared_bytes // 16) * 16
        sizes = (
            len(code), len(operands), len(constants), decoder.register_bytes, self.kernel.threads // 32, decoder.unit,
            shared, decoder.global_unit,
        )  # fmt: skip
        arrays = (code, operands, registers, constants, special, np.array(sizes, np.int32))
        self._handle = library.handle.program_new(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays))

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self.library.handle.program_delete(ctypes.c_void_p(handle))

    def run(self, grid, parameters: np.ndarray, ranges, seed: int = 0) -> dict[str, int]:
        """All blocks of a grid.

        Args:
            parameters: the bytes of all, aligned to 64. ranges: (begin, end) of memory that may be touched.

        Returns:
            How many instructions of a warp were executed, by name, and `TOTALS`.

        Raises:
            Trapped: for what is wrong with the kernel or its launch.
        """
        if len(parameters) < self.kernel.parameter_bytes:
            raise ValueError(f"{len(parameters)} bytes of parameters, the kernel has {self.kernel.parameter_bytes}")
        memory = np.array([list(each) for each in ranges], np.uint64).reshape(-1)
        executed = np.zeros(len(self.library.names), np.int64)
        totals = np.zeros(len(TOTALS), np.int64)
        error = ctypes.create_string_buffer(4096)
        at = self.library.handle.program_run(
            ctypes.c_void_p(self._handle),
            np.array([*grid, 1, 1][:3], np.uint32).ctypes.data_as(ctypes.c_void_p),
            ctypes.c_void_p(parameters.ctypes.data),
            ctypes.c_uint64(len(parameters)),
            memory.ctypes.data_as(ctypes.c_void_p),
            len(memory) // 2,
            ctypes.c_uint64(seed),
            executed.ctypes.data_as(ctypes.c_void_p),
            totals.ctypes.data_as(ctypes.c_void_p),
            error,
            len(error),
        )
        if at >= 0:
            instruction = self.kernel.instructions[at]
            text = self.kernel.text[instruction.line].split("//")[0].strip()
            raise Trapped(
                f"{self.kernel.name}, {error.value.decode()}\n  at {instruction.source}, "
                f"line {instruction.line + 1} of the PTX: {text[:160]}"
            )
        counted = {self.library.names[op]: int(executed[op]) for op in np.flatnonzero(executed)}
        return counted | dict(zip(TOTALS, map(int, totals), strict=True))


class _Decoder:
    def __init__(self, library: Library, kernel: Kernel) -> None:
        self.library, self.kernel = library, kernel
        self.offsets: dict[str, int] = {}
        self.register_bytes = 64  # the first is where "_" goes
        self.code: list[tuple[int, int, int, int]] = []
        self.operands: list[int] = []
        self.is_register: list[bool] = []  # of each: an offset of an address, or a label, could look like one
        self.constants: list[int] = []
        self._constant: dict[int, int] = {}
        self.unit = self.global_unit = 4  # the smallest access, in bytes
        for instruction in kernel.instructions:
            self._add(instruction)

    def _add(self, instruction: Instruction) -> None:
        name = spelled(instruction)
        if name not in self.library.ops:
            raise PtxError(f"line {instruction.line + 1}: the executor has no {name} ({instruction.opcode})")
        if match := re.match(r"(?:ld|st)\.shared.*\.[bus](\d+)$", name):
            self.unit = min(self.unit, int(match[1]) // 8)
        if match := re.match(r"(?:ld|st)\.global.*\.[bus](\d+)$", name):
            self.global_unit = min(self.global_unit, int(match[1]) // 8)
        if name.startswith("cp.async.bulk.tensor"):
            self.global_unit = 1
        guard, negated = -1, False
        if instruction.guard:
            guard, negated = self._register(instruction.guard[0]) & ~63, instruction.guard[1]
        self.code.append((self.library.ops[name], guard, len(self.operands), negated))
        if name == "bra":
            self._put(self.kernel.labels[instruction.operands[0]])
            return
        if name.startswith("wgmma.mma_async"):
            self._put(int(re.search(r"m64n(\d+)", instruction.opcode)[1]))
        if name.startswith("mbarrier.arrive"):  # the state, which nobody takes
            instruction = Instruction(name, instruction.operands[1:], None, instruction.line)
        for operand in instruction.operands:
            self._flatten(operand)
        if name.startswith(("cp.async.ca", "cp.async.cg")) and len(instruction.operands) == 3:  # no size: all of it
            self._flatten(instruction.operands[2])

    def _put(self, number: int, is_register: bool = False) -> None:
        self.operands.append(number)
        self.is_register.append(is_register)

    def _flatten(self, operand) -> None:
        if isinstance(operand, str):
            value = self._value(operand)
            self._put(value, value >= 0)
        elif operand[0] == "vector":
            for each in operand[1:]:
                self._flatten(each)
        else:
            self._flatten(operand[1])
            self._put(operand[2])
            for each in operand[3:]:
                self._flatten(each)

    def _value(self, token: str) -> int:
        """A register's offset, or below zero a constant."""
        if (value := number(token)) is not None:
            return self._immediate(value)
        if token == "global_smem":
            return self._immediate(SHARED_BASE)
        if token in self.kernel.parameters:
            return self._immediate(self.kernel.parameters[token][0])
        return self._register(token)

    def _immediate(self, value: int) -> int:
        value &= 2**64 - 1
        if value not in self._constant:
            self._constant[value] = len(self.constants)
            self.constants.append(value)
        return -1 - self._constant[value]

    def _register(self, token: str) -> int:
        if token in self.offsets:
            return self.offsets[token]
        if token in SPECIAL:
            bits = 32
        elif token == "_":
            bits = 64
        elif (
            bits := self.kernel.registers.get(token) or self.kernel.registers.get(token.rstrip("0123456789"))
        ) is None:
            raise PtxError(f"{token} is not understood")
        code = WIDTHS.get(bits, 0)
        self.offsets[token] = self.register_bytes | code
        self.register_bytes += 64 if bits == 1 else -(-32 * bits // 8 // 64) * 64
        return self.offsets[token]
