"""The PTX that Triton emits as data: one kernel, its parameters, registers and instructions.

Only what such a file holds is understood: one entry, no functions. Nothing here knows what an instruction does.
"""

import re
from dataclasses import dataclass, field

BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}


class PtxError(ValueError):
    """The file has something that is not understood."""


@dataclass(frozen=True)
class Instruction:
    """`guard`: the predicate's name and whether it is negated. `operands`: nested tuples; see `_operand`."""

    opcode: str
    operands: tuple
    guard: tuple[str, bool] | None
    line: int
    source: str = ""
    """File and line of the kernel's own source."""


@dataclass
class Kernel:
    name: str = ""
    target: str = ""
    threads: int = 0
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name -> offset and bytes among the parameters."""
    registers: dict[str, int] = field(default_factory=dict)
    """Name, or prefix of numbered names -> bits; 1 for a predicate."""
    counts: dict[str, int] = field(default_factory=dict)
    """Prefix -> how many."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    """The lines of the file."""

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters.values()), default=0)


_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s.*?(\w+)(?:\[(\d+)\])?\s*$")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$")
_STATEMENT = re.compile(r"\s*(?:(?P<label>[$\w]+):|(?P<open>\{)|(?P<close>\})|(?P<text>[^;]*);)")
_GUARD = re.compile(r"@(!?)([%\w]+)\s+")
_TOKEN = re.compile(r"\s*([%$]?[\w.$]+|[{}\[\],+|!-])")


def parse(ptx: str) -> Kernel:
    """The kernel of a file.

    Raises:
        PtxError: for what is not understood; with the line.
    """
    kernel = Kernel(text=ptx.splitlines())
    files, sources, lines, source = {}, [], [], ""
    for line in kernel.text:
        code = line.split("//", 1)[0]
        if match := re.match(r'\s*\.file\s+(\d+)\s+"[^"]*?([^"/]+)"\s*$', code):
            files[match[1]] = match[2]
        if match := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", code):
            source = f"{match[1]} {match[2]}"
        lines.append("" if re.match(r"\s*\.(loc|file|pragma)\b", code) else code)
        sources.append(source)
    body = "\n".join(lines)
    if not (head := re.search(r"\.entry\s+([$\w]+)\s*\((.*?)\)(.*?)\n\{", body, re.S)):
        raise PtxError("there is no .entry")
    kernel.name = head[1]
    kernel.target = re.search(r"\.target\s+(\w+)", body)[1]
    kernel.threads = int(re.search(r"\.reqntid\s+(\d+)", head[3])[1])
    _read_parameters(kernel, head[2])
    _read_body(
        kernel, body, head.end(), [f"{files.get(s[0], '?')}:{s[1]}" if (s := at.split()) else "" for at in sources]
    )
    return kernel


def _read_parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for declaration in filter(str.strip, text.split(",")):
        if not (match := _PARAMETER.search(declaration.strip())):
            raise PtxError(f"a parameter is not understood: {declaration.strip()!r}")
        align, kind, name, count = match.groups()
        size = int(re.sub(r"\D", "", kind)) // 8
        align = int(align) if align and count else size
        offset = -(-offset // align) * align
        kernel.parameters[name] = (offset, size * int(count or 1))
        offset += size * int(count or 1)


def _read_body(kernel: Kernel, body: str, at: int, sources: list[str]) -> None:
    line = body.count("\n", 0, at)
    scopes: list[dict[str, str]] = [{}]
    scoped = 0
    while True:
        if not (match := _STATEMENT.match(body, at)):
            raise PtxError(f"line {line + 1} is not understood")
        start = match.end() - len(match[0].lstrip())
        line += body.count("\n", at, start)
        here, at = line, match.end()
        line += body.count("\n", start, at)
        if match["open"]:
            scoped += 1
            end = _end_of_scope(body, at)
            names = re.findall(r"\.reg\s+\.\w+\s+(\w+)\s*;", body[at:end]) + re.findall(
                r"^\s*(\w+):", body[at:end], re.M
            )
            scopes.append(scopes[-1] | {name: f"{name}@{scoped}" for name in names})
        elif match["close"]:
            scopes.pop()
            if not scopes:
                return
        elif match["label"]:
            kernel.labels[scopes[-1].get(match["label"], match["label"])] = len(kernel.instructions)
        elif (text := match["text"].strip()).startswith("."):
            if registers := _REGISTERS.match(text):
                _declare(kernel, registers[1], registers[2], scopes[-1])
            else:
                raise PtxError(f"line {here + 1}: {text.split()[0]} is not understood")
        elif text:
            kernel.instructions.append(_instruction(text, here, sources[here], scopes[-1]))


def _end_of_scope(body: str, at: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(body, at):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return match.start()
    raise PtxError("a scope does not end")


def _declare(kernel: Kernel, kind: str, names: str, scope: dict[str, str]) -> None:
    bits = BITS.get(kind) or int(re.sub(r"\D", "", kind))
    for name in names.split(","):
        if match := re.match(r"\s*(%\w+)<(\d+)>", name):
            kernel.registers[match[1]] = bits
            kernel.counts[match[1]] = int(match[2])
        else:
            kernel.registers[scope.get(name.strip(), name.strip())] = bits


def _instruction(text: str, line: int, source: str, scope: dict[str, str]) -> Instruction:
    guard = None
    if match := _GUARD.match(text):
        guard = (scope.get(match[2], match[2]), match[1] == "!")
        text = text[match.end() :]
    opcode, _, rest = text.partition(" ") if " " in text.split("\t")[0] else text.partition("\t")
    tokens = _TOKEN.findall(rest)
    if "".join(tokens) != re.sub(r"\s", "", rest):
        raise PtxError(f"line {line + 1}: the operands of {text!r} are not understood")
    operands, tokens = [], [scope.get(token, token) for token in tokens]
    while tokens:
        operands.append(_operand(tokens))
        if tokens and tokens.pop(0) not in (",", "|"):
            raise PtxError(f"line {line + 1}: {text!r} is not understood")
    return Instruction(opcode.strip(), tuple(operands), guard, line, source)


def _operand(tokens: list[str]):
    """A name or number, ("vector", …), or ("address", base, offset, …coordinates); takes its tokens."""
    token = tokens.pop(0)
    if token == "{":
        inside = [_operand(tokens)]
        while tokens.pop(0) == ",":
            inside.append(_operand(tokens))
        return ("vector", *inside)
    if token == "[":
        base, offset, coordinates = tokens.pop(0), 0, []
        while (separator := tokens.pop(0)) != "]":
            if separator == "+":
                offset = number(_operand(tokens))
            elif separator == "-":
                offset = -number(_operand(tokens))
            else:
                coordinates += _operand(tokens)[1:]
        return ("address", base, offset, *coordinates)
    if token in "-!":
        return token + tokens.pop(0)
    return token


def number(token: str) -> int | None:
    """The bits of an immediate operand, None if it is none."""
    if match := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", token):
        return int(match[1], 16)
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", token):
        return int(token.rstrip("U"), 0)
    return None
