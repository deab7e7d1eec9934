"""Who may import whom, read from the source with `ast`; and what importing vitfast does not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Rule:
    """What the files of one room may import, the standard library and the room itself aside."""

    rooms: tuple[str, ...] = ()
    """Rooms of vitfast, anywhere in a file. "vitfast" is the package itself, for its version."""
    later: tuple[str, ...] = ()
    """Rooms that may only be imported inside functions or for type checkers."""
    outside: tuple[str, ...] = ()
    """Third-party packages that may be imported with the file; inside functions any may be."""


# fmt: off
RULES = {
    "__init__":    Rule(later=("attention", "checkpoints", "config", "engine", "flash_attention", "images",
                               "integrations", "ops", "output", "verify")),
    "__main__":    Rule(rooms=("cli",)),
    "config":      Rule(),
    "kernels":     Rule(outside=("torch", "triton")),
    "ops":         Rule(later=("kernels", "_C"), outside=("torch",)),
    "output":      Rule(outside=("torch",)),
    "model":       Rule(rooms=("config", "ops", "output"), outside=("torch",)),
    "resample":    Rule(outside=("PIL", "numpy", "torch")),
    "images":      Rule(rooms=("resample",), outside=("numpy", "PIL", "torch")),
    "checkpoints": Rule(rooms=("config", "images"), outside=("torch",)),
    "testing":     Rule(rooms=("config", "ops"), outside=("torch",)),
    "sites":       Rule(rooms=("config", "model", "ops"), outside=("torch",)),
    "planner":     Rule(rooms=("vitfast", "config", "model", "ops", "sites", "testing"), outside=("torch",)),
    "graphs":      Rule(rooms=("output",), later=("engine",), outside=("torch",)),
    "stream":      Rule(rooms=("output",), later=("engine",), outside=("numpy", "torch")),
    "engine":      Rule(rooms=("config", "model", "planner", "checkpoints", "ops", "output", "images", "graphs",
                               "sites", "stream"), later=("calibrate",), outside=("torch",)),
    "embed":       Rule(rooms=("images",), later=("engine",), outside=("numpy",)),
    "embedding_folder": Rule(rooms=("embed",), later=("engine",), outside=("numpy", "pyarrow")),
    "calibrate":   Rule(rooms=("checkpoints", "engine", "model", "sites"), outside=("torch",)),
    "doctor":      Rule(rooms=("vitfast", "ops"), later=("sites", "engine", "_C"), outside=("torch",)),
    "attention":   Rule(rooms=("ops",), outside=("torch",)),
    "flash_attention": Rule(rooms=("attention", "ops"), outside=("torch",)),
    "integrations": Rule(rooms=("attention", "flash_attention", "ops"), outside=("torch",)),
    "inspect":     Rule(later=("kernels",)),
    "findings":    Rule(),
    "differences": Rule(rooms=("findings", "testing"), outside=("torch",)),
    "verify":      Rule(rooms=("differences", "findings"), later=("checkpoints", "embed", "engine", "images", "ops"),
                        outside=("torch",)),
    "launches":    Rule(rooms=("config", "sites"), later=("kernels",), outside=("torch",)),
    "predict":     Rule(rooms=("config", "launches"), later=("inspect",), outside=("torch",)),
    "benchmarks":  Rule(rooms=("vitfast", "config", "engine", "model", "ops", "planner", "predict", "testing"),
                        later=("kernels",), outside=("torch",)),
    "bench_cli":   Rule(later=("benchmarks", "cli", "config", "engine"), outside=("typer",)),
    "cli":         Rule(
        rooms=("vitfast", "bench_cli"),
        later=("benchmarks", "config", "embed", "embedding_folder", "doctor", "inspect", "predict", "engine", "ops",
               "verify"),
        outside=("typer",),
    ),
}
# fmt: on

# Folders beside the package -> what of this repository they may import. Nobody imports top-level `kernels`.
FOLDERS = {
    "tests": {"vitfast", "tests", "examples"},
    "benchmarks": {"vitfast"},
    "examples": {"vitfast", "examples"},
    "vitfast": {"vitfast"},
    "kernels": {"vitfast"},
}

HEAVY = ("triton", "transformers", "timm", "torchvision", "onnx", "onnxruntime", "ray")


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name."""

    module: str
    line: int
    at_import: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """All imports in a file of `package`, `importlib.import_module("...")` included.

    `from vitfast import model` counts as vitfast.model; a bare `from vitfast import load` as well
    (vitfast.load), which no rule allows: take names from where they are defined.
    """

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            if base == "vitfast":
                yield from (Import(f"vitfast.{alias.name}", node.lineno, at_import) for alias in node.names)
            else:
                yield Import(base, node.lineno, at_import)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            name = node.args[0]
            if isinstance(name, ast.JoinedStr):
                name = name.values[0]  # the constant beginning of an f-string
            if isinstance(name, ast.Constant):
                yield Import(name.value.rstrip("."), node.lineno, at_import)
        inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            inside = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), True)


def room_of(path: Path) -> tuple[str, str]:
    """The room a file of the package belongs to, and the dotted name of the package that holds it."""
    parts = path.relative_to(ROOT / "vitfast").with_suffix("").parts
    return parts[0], ".".join(("vitfast", *parts[:-1]))


def broken_rules(source: str, room: str, package: str) -> list[str]:
    """What a file of this room imports against RULES."""
    rule, problems = RULES[room], []
    for item in imports(source, package):
        top, _, rest = item.module.partition(".")
        if top == "vitfast":
            target = rest.partition(".")[0] or "vitfast"
            allowed = {room, *rule.rooms} | (set() if item.at_import else set(rule.later))
        else:
            target = top
            allowed = {*sys.stdlib_module_names, *rule.outside} if item.at_import else {top}
        if target not in allowed:
            when = "on import" if item.at_import else "inside a function"
            problems.append(f"line {item.line}: {room} may not import {item.module} {when}")
    return problems


def sources(folder: str) -> list[Path]:
    """All Python files under a folder of the repository, links followed."""
    tops = [ROOT / folder, *(path for path in (ROOT / folder).glob("*/") if path.is_symlink())]
    return sorted({path for top in tops for path in top.rglob("*.py") if "__pycache__" not in path.parts})


@pytest.mark.parametrize("path", sources("vitfast"), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms(path):
    room, package = room_of(path)
    assert room in RULES, f"{room} is a new room: add its rule to RULES"
    assert not broken_rules(path.read_text(), room, package)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders(folder):
    for path in sources(folder):
        for item in imports(path.read_text(), folder):
            top = item.module.partition(".")[0]
            assert top not in {*FOLDERS, "setup"} - FOLDERS[folder], f"{path}:{item.line} imports {item.module}"


def test_rules_have_no_dead_rows():
    rooms = {room_of(path)[0] for path in sources("vitfast")}
    assert set(RULES) == rooms


@pytest.mark.parametrize(
    ("source", "room", "fault"),
    [
        ("import triton", "ops", "may not import triton on import"),
        ("def f():\n    import transformers", "checkpoints", ""),
        ("import transformers", "checkpoints", "may not import transformers on import"),
        ("class A:\n    import timm", "checkpoints", "may not import timm on import"),
        ("from vitfast.kernels import linear", "ops", "may not import vitfast.kernels on import"),
        ("def f():\n    from vitfast.kernels import linear", "ops", ""),
        (
            "import importlib\ndef f(x):\n    importlib.import_module(f'vitfast.kernels.{x}')",
            "model",
            "inside a function",
        ),
        ("from vitfast import engine", "model", "may not import vitfast.engine on import"),
        ("from ..engine import load", "ops", "may not import vitfast.engine on import"),
        ("from . import checks", "ops", ""),
        ("def f():\n    from vitfast import planner", "model", "may not import vitfast.planner inside"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vitfast.engine import Engine", "embed", ""),
        ("from vitfast.ops import linear", "kernels", "may not import vitfast.ops on import"),
    ],
)
def test_the_check_sees_faults(source, room, fault):
    package = f"vitfast.{room}" if room in ("ops", "kernels", "checkpoints") else "vitfast"
    problems = broken_rules(source, room, package)
    assert (fault in problems[0]) if fault else not problems


def python(code: str) -> str:
    """Run code in a fresh interpreter at the repository root; its output."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


MODULES = sorted(f"vitfast.{room}" for room in RULES if room not in ("__init__", "__main__", "kernels"))
MODULES += [f"vitfast.benchmarks.{path.stem}" for path in sources("benchmarks")]


def test_import_vitfast_is_light():
    assert python(f"import sys, vitfast; print([m for m in {('torch', 'numpy', *HEAVY)} if m in sys.modules])") == "[]"


def test_import_everything_touches_no_device():
    loaded = python(
        f"import sys, importlib, torch\n"
        f"for name in {MODULES}: importlib.import_module(name)\n"
        f"print(torch.cuda.is_initialized(), [m for m in {HEAVY} if m in sys.modules])"
    )
    assert loaded == "False []"


def test_works_without_triton():
    output = python(
        f"import sys, importlib; sys.modules['triton'] = None\n"
        f"for name in {MODULES}: importlib.import_module(name)\n"
        f"import torch, vitfast\n"
        f"from vitfast import ops\n"
        f"from vitfast.ops import registry\n"
        f"x = ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.zeros(8))\n"
        f"print(x.abs().max().item(), registry.backend('layer_norm', 'triton').missing)"
    )
    value, reason = output.split(" ", 1)
    assert float(value) == 0
    assert "triton" in reason
    assert "import" in reason


def test_public_names_resolve():
    assert python("import vitfast; print(all(getattr(vitfast, n) is not None for n in vitfast.__all__))") == "True"
