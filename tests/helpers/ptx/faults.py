"""Mistakes put into PTX, each such as a compiler could make: the executor must find every one."""

import re
from collections.abc import Callable
from dataclasses import dataclass

SWIZZLE_128 = 1 << 62  # of a descriptor of wgmma: swizzling by 128 bytes, and by 64
SWIZZLE_64 = 2 << 62


@dataclass(frozen=True)
class Fault:
    """A change of the PTX of one compile case, and what the executor says of it, as a regular expression."""

    file: str
    case: str
    change: Callable[[str], str]
    says: str
    arch: int = 90


def replaced(pattern: str, new: str, which: int | None = None) -> Callable[[str], str]:
    """A change of every match of a pattern, or of one: -1 is the last."""

    def change(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx))
        assert matches, f"the PTX has no {pattern!r}"
        for match in [matches[which]] if which is not None else reversed(matches):
            ptx = ptx[: match.start()] + match.expand(new) + ptx[match.end() :]
        return ptx

    return change


def _swizzled_otherwise(ptx: str) -> str:
    def other(match: re.Match[str]) -> str:
        value = int(match[1]) & 2**64 - 1
        if value >> 62 != 1:
            return match[0]
        value = value - SWIZZLE_128 + SWIZZLE_64
        return f", {value - 2**64 if value >= 2**63 else value};"

    changed = re.sub(r", (-?\d{15,});", other, ptx)
    assert changed != ptx, "the PTX has no descriptor that is swizzled by 128 bytes"
    return changed


TMA_LOAD = r"(cp\.async\.bulk\.tensor\.2d\.shared\S* \[%r\d+\], \[%rd\d+, \{%r\d+, )%r\d+(\}\])"
TMA, POINTERS, NORM = ("linear", "tma_64x64x64_gelu"), ("linear", "64x64x64_gelu"), ("layer_norm", "1024")

WRONG = "AssertionError: result"  # wrong numbers

FAULTS = {
    "no fence before a TMA store": Fault(*TMA, replaced(r"fence\.proxy\.async\S*;", "", -1), "no fence.proxy.async"),
    "no barrier before a TMA store": Fault(
        *TMA, replaced(r"(fence\.proxy\.async\S*;(?:\s|//.*)*)bar\.sync\s+0;", r"\1", -1), "race"
    ),
    "no wait for a TMA load": Fault(*TMA, replaced(r"@!complete bra\.uni waitLoop;", ""), "race|nobody has waited for"),
    "no wait for a TMA store": Fault(*TMA, replaced(r"cp\.async\.bulk\.wait_group\S*\s+0;", ""), "race|not waited for"),
    "no commit of a TMA store": Fault(*TMA, replaced(r"cp\.async\.bulk\.commit_group;", ""), "race|not waited for"),
    "a box one row off": Fault(*TMA, replaced(TMA_LOAD, r"\g<1>1\2", 0), WRONG),
    "too few bytes expected": Fault(*TMA, replaced(r"(expect_tx\S* _, \[%r\d+\]), 16384", r"\1, 16368", 0), "deadlock"),
    "the wrong phase": Fault(
        *TMA, replaced(r"(try_wait\.parity\S* complete, \[%r\d+\]), %r\d+", r"\1, 1"), "race|nobody has waited for"
    ),
    "no barrier after an mbarrier is made": Fault(
        *TMA, replaced(r"(mbarrier\.init\S* \[%r\d+\], 1;(?:\s|//.*|\.loc.*)*)bar\.sync\s+0;", r"\1", 0), "race"
    ),
    "a wrong swizzle": Fault(*TMA, _swizzled_otherwise, WRONG + "|does not begin where"),
    "no fence before products": Fault(*TMA, replaced(r"wgmma\.fence\.sync\.aligned;", ""), "no wgmma.fence"),
    "no wait for products": Fault(*TMA, replaced(r"wgmma\.wait_group\.sync\.aligned\s+\d;", ""), WRONG + "|under way"),
    "no commit of products": Fault(*TMA, replaced(r"wgmma\.commit_group\.sync\.aligned;", ""), WRONG + "|under way"),
    "a wait for one group too few": Fault(
        *POINTERS, replaced(r"cp\.async\.wait_group\s+[1-9];", "cp.async.wait_group 9;"), "nobody has waited for", 80
    ),
    "no commit of copies": Fault(
        *POINTERS, replaced(r"cp\.async\.commit_group;", ""), "nobody has waited for|not waited for", 80
    ),
    "no barrier after copies": Fault(
        *POINTERS,
        replaced(r"(cp\.async\.wait_group\s+\d;(?:\s|//.*)*)bar\.sync\s+0;", r"\1"),
        "race|nobody has written",
        80,
    ),
    "no barrier in a reduction": Fault(*NORM, replaced(r"bar\.sync\s+0;", "", 0), "race|nobody has written"),
    "rows of a matrix one off": Fault(
        *POINTERS, replaced(r"(ldmatrix\S* \{[^}]*\}, \[%r\d+)(\+\d+)?\]", r"\1+16]", 0), WRONG, 80
    ),
    "a load beyond the end": Fault(*NORM, replaced(r"@%p1 (ld\.global)", r"\1"), "out of bounds"),
}  # fmt: skip
