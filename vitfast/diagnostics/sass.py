"""Machine code as data: the instructions of a cubin, the pipe each runs on, and the loops that multiply.

Read from what `nvdisasm -c` prints. Names of instructions are those of NVIDIA's "CUDA Binary Utilities" manual.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_LINE = re.compile(
    r"^\s*/\*(?P<at>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*)", re.MULTILINE
)
_LABEL = re.compile(r"^(?P<label>\.L\w+):", re.MULTILINE)
_TARGET = re.compile(r"`\((?P<label>\.L\w+)\)")

PIPES: dict[str, tuple[str, ...]] = {
    "tensor": ("HGMMA", "QGMMA", "IGMMA", "BGMMA", "HMMA", "QMMA", "IMMA", "BMMA", "DMMA"),
    "fma": (
        "FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FMUL2", "FADD2",
        "FHADD", "FHFMA",
    ),
    "imad": ("IMAD", "IDP", "IDP4A"),
    "alu": (
        "IADD3", "LOP3", "ISETP", "SEL", "FSEL", "FMNMX", "FSETP", "PRMT", "SHF", "LEA", "MOV", "PLOP3", "VIADD",
        "IABS", "VIMNMX", "VIADDMNMX", "F2FP", "I2FP", "P2R", "R2P", "SGXT", "BMSK", "FCHK", "IMNMX",
        "HSETP2", "HMNMX2", "FLO", "VIMNMX3", "FMNMX3", "LOP", "IADD", "ISCADD", "HSET2", "FSET", "BREV",
    ),
    "mufu": ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS", "SHFL"),
    "global": ("LDG", "STG", "LD", "ST", "RED", "ATOMG", "ATOM", "LDGSTS"),
    "local": ("LDL", "STL"),
    "tensor_memory": ("LDT", "LDTM", "STT", "STTM"),
    "copy": ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UTMAPF", "UTMACMDFLUSH", "UTMACCTL"),
    "barrier": ("BAR", "SYNCS", "MEMBAR", "WARPSYNC", "ERRBAR", "FENCE", "CCTL", "DEPBAR", "LDGDEPBAR", "WARPGROUP",
                "ELECT"),
    "control": (
        "BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "NOP", "NANOSLEEP", "YIELD", "BPT", "KILL", "JMP", "BREAK",
        "BRX", "ACQBULK", "USETMAXREG", "PREEXIT",
    ),
    "other": (
        "CS2R", "S2R", "S2UR", "LDC", "LDCU", "ULDC", "R2UR", "UP2UR", "VOTE", "VOTEU", "REDUX", "CREDUX", "MATCH",
        "MOVM", "R2B", "B2R", "GETLMEMBASE", "LEPC", "RPCMOV", "PMTRIG", "UF2FP",
    ),
}  # fmt: skip
"""Which unit of a multiprocessor runs an instruction. Uniform ones (U...) have a unit of their own, "uniform"; integer
multiply-adds go to the heavy half of the fp32 unit. Moves by IMAD and MOV alike are counted where they issue."""

_PIPE = {name: pipe for pipe, names in PIPES.items() for name in names}


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it stands, its name with modifiers, its operands, and the label it may jump to.

    `never`: its guard is never true. ptxas puts such loads before copies on sm_80; they take an issue slot alone.
    """

    address: int
    name: str
    operands: str
    target: str | None = None
    never: bool = False

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def pipe(self) -> str:
        """The unit that runs it.

        Raises:
            ValueError: for a name that PIPES does not have.
        """
        if self.never:
            return "control"
        base = self.base
        if base in _PIPE:
            return _PIPE[base]
        if base.startswith("UTC"):  # tensor memory and products of compute capability 10
            return "tensor" if "MMA" in base else "copy"
        if base.startswith("U"):
            return "uniform"
        raise ValueError(f"no pipe is known for the instruction {self.name}")

    @property
    def width(self) -> int:
        """Bytes a thread of a load or store moves: 4 unless its name says 8, 16 or less."""
        modifiers = self.name.split(".")[1:]
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((sizes[m] for m in modifiers if m in sizes), 4)


@dataclass(frozen=True)
class Loop:
    """A stretch of code that is jumped back over: instructions first to last, by their place in the listing."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        """Whether the other loop lies within."""
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class Listing:
    """The code of one kernel, in order."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    @property
    def product_loops(self) -> tuple[Loop, ...]:
        """The innermost loops that multiply on tensor cores, in order."""
        multiplying = [loop for loop in self.loops if any(i.pipe == "tensor" for i in self.of(loop))]
        return tuple(loop for loop in multiplying if not any(loop.holds(other) for other in multiplying))

    def of(self, loop: Loop) -> tuple[Instruction, ...]:
        """The instructions of a loop."""
        return self.instructions[loop.first : loop.last + 1]

    def outside(self) -> tuple[Instruction, ...]:
        """The instructions of no product loop: what a tile has before and after its products.

        Of a persistent kernel only those of the loop over tiles: what stands before it runs once.
        """
        inner = self.product_loops
        around = [loop for loop in self.loops if any(loop.holds(other) for other in inner)]
        whole = max(around, key=lambda loop: loop.last - loop.first, default=Loop(0, len(self.instructions) - 1))
        skipped = {at for loop in inner for at in range(loop.first, loop.last + 1)}
        waits = {at for loop in self.loops if _only_waits(self.of(loop)) for at in range(loop.first, loop.last + 1)}
        places = range(whole.first, whole.last + 1)
        return tuple(self.instructions[at] for at in places if at not in skipped | waits)


def parse(disassembly: str) -> Listing:
    """Read the output of `nvdisasm -c -ndf` of a cubin with one kernel.

    Raises:
        ValueError: if there is no instruction in it.
    """
    matches = list(_LINE.finditer(disassembly))
    targets = (_TARGET.search(m["rest"]) for m in matches)
    instructions = [
        Instruction(
            int(m["at"], 16),
            m["name"],
            m["rest"].strip(),
            target["label"] if target else None,
            never=(m["guard"] or "").strip() == "@!PT",
        )
        for m, target in zip(matches, targets, strict=True)
    ]
    if not instructions:
        raise ValueError(f"no instructions in {disassembly[:200]!r}")
    labels = _label_places(disassembly)
    # What stands after the last EXIT are waits moved out of the way: they jump back, but are no loops over work.
    exits = [at for at, m in enumerate(matches) if m["name"].startswith("EXIT") and not m["guard"]]
    end = max(exits, default=len(matches))
    instructions = instructions[: end + 1]
    loops = [
        Loop(labels[i.target], at)
        for at, i in enumerate(instructions)
        if i.base == "BRA" and i.target in labels and labels[i.target] <= at
    ]
    return Listing(tuple(instructions), tuple(dict.fromkeys(loops)))


def count_pipes(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many of the instructions each pipe runs."""
    return Counter(i.pipe for i in instructions)


def products_waited_for(instructions: Iterable[Instruction]) -> int:
    """How often the code waits for products: `wgmma.wait_group`."""
    return sum(i.name.startswith("WARPGROUP.DEPBAR") for i in instructions)


def load_widths(instructions: Iterable[Instruction]) -> dict[str, dict[int, int]]:
    """Loads and stores by kind ("LDG", "STS", ...) and bytes a thread."""
    widths: dict[str, Counter[int]] = {}
    for i in instructions:
        if i.base in ("LDG", "STG", "LDS", "STS", "LDL", "STL") and not i.never:
            widths.setdefault(i.base, Counter())[i.width] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(widths.items())}


def _label_places(disassembly: str) -> dict[str, int]:
    """Label -> number of instructions before it."""
    places, seen = {}, 0
    for line in disassembly.splitlines():
        if m := _LABEL.match(line):
            places[m["label"]] = seen
        elif _LINE.match(line):
            seen += 1
    return places


def _only_waits(instructions: Sequence[Instruction]) -> bool:
    """Whether a loop only asks again and again whether something has arrived."""
    return all(i.base in ("SYNCS", "NANOSLEEP", "BRA", "NOP", "YIELD") for i in instructions)


def tensor_instructions(instructions: Iterable[Instruction]) -> Iterator[tuple[str, int, int, int]]:
    """(base name, M, N, K) of each tensor-core instruction; M is a warpgroup's 64 for the asynchronous ones.

    Raises:
        ValueError: for one whose name has no shape.
    """
    for i in instructions:
        if i.pipe != "tensor":
            continue
        if m := re.search(r"\.(\d+)x(\d+)x(\d+)", i.name):
            yield i.base, int(m[1]), int(m[2]), int(m[3])
        elif m := re.search(r"\.(\d+)", i.name):  # HMMA.16816: M 16, N 8, K 16; IMMA.16832
            digits = m[1]
            yield i.base, int(digits[:2]), int(digits[2]), int(digits[3:])
        else:
            raise ValueError(f"the tensor-core instruction {i.name} does not tell its shape")
