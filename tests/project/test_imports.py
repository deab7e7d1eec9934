"""Who may import whom, read from the source with `ast`: floors, no circles; and what importing vitfast does not do."""

import ast
import graphlib
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.grids import thinned
from helpers.scripts import ROOT, python

from vitfast import testing

FLOORS = (
    {"version"},
    {"kernels"},
    {"ops", "images"},
    {"attention", "models"},
    {"engine"},
    {"integrations", "pipeline", "diagnostics"},
    {"serving", "benchmarks"},
    {"cli"},
    {"__main__", "__init__"},
)
"""The rooms of vitfast, lowest floor first. A file imports its own room and the floors below, wherever in the file the
import stands; rooms of one floor do not know each other. Nobody imports `testing`: it is for tests."""

LAZY = {"kernels", "_C"}
"""What is imported inside functions only, by every room that is not the thing itself: it may be absent."""

OUTSIDE = {
    "kernels": {"torch", "triton"},
    "ops": {"torch"},
    "images": {"PIL", "numpy", "torch"},
    "attention": {"torch"},
    "models": {"torch"},
    "engine": {"numpy", "torch"},
    "integrations": {"torch"},
    "pipeline": {"numpy", "pyarrow"},
    "diagnostics": {"torch"},
    "serving": {"numpy", "torch"},
    "benchmarks": {"torch"},
    "cli": {"typer"},
    "testing": {"torch"},
}
"""Third-party packages that a room may import with the file; inside functions any may be."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FLOOR_OF["testing"] = FLOOR_OF["engine"]

# Folders beside the package -> what of this repository they may import. Nobody imports top-level `kernels`.
FOLDERS = {
    "tests": {"vitfast", "tests", "helpers", "examples"},
    "benchmarks": {"vitfast"},
    "examples": {"vitfast", "examples"},
    "vitfast": {"vitfast"},
    "kernels": {"vitfast"},
}

HEAVY = ("triton", "transformers", "timm", "torchvision", "onnx", "onnxruntime", "ray", "starlette", "uvicorn")


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name."""

    module: str
    line: int
    at_import: bool


def imports(source: str, package: str) -> Iterator[Import]:
    """All imports in a file of `package`, `importlib.import_module("...")` included.

    Of `from vitfast.ops import checks` the module is vitfast.ops.checks where that is a file, else vitfast.ops. A bare
    `from vitfast import load` counts as vitfast.load, which no rule allows: take names from where they are defined.
    """

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                known = base == "vitfast" or file_of(inner) is not None
                yield Import(inner if known else base, node.lineno, at_import)
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


def file_of(module: str) -> Path | None:
    """The file of a module of this repository, by its absolute name; None for anything else."""
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if module.startswith("vitfast") and file.is_file()), None)


def module_of(path: Path) -> str:
    """The absolute name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path) -> tuple[str, str]:
    """The room a file of the package belongs to, and the dotted name of the package that holds it."""
    parts = path.relative_to(ROOT / "vitfast").with_suffix("").parts
    return parts[0], ".".join(("vitfast", *parts[:-1]))


def broken_rules(source: str, room: str, package: str) -> list[str]:
    """What a file of this room imports against the floors."""
    problems = []
    for item in imports(source, package):
        top, _, rest = item.module.partition(".")
        when = "on import" if item.at_import else "inside a function"
        if top == "vitfast":
            target = rest.partition(".")[0] or "__init__"
            below = {name for name, floor in FLOOR_OF.items() if floor < FLOOR_OF[room] and name != "testing"}
            allowed = {room} | (below | {"_C"}) - (LAZY if item.at_import and room != "benchmarks" else set())
            if room == "kernels":
                allowed = {room}
        else:
            target = top
            allowed = {*sys.stdlib_module_names, *OUTSIDE.get(room, ())} if item.at_import else {top}
        if target not in allowed:
            problems.append(f"line {item.line}: {room} may not import {item.module} {when}")
    return problems


def sources(folder: str) -> list[Path]:
    """All Python files under a folder of the repository, links followed."""
    tops = [ROOT / folder, *(path for path in (ROOT / folder).glob("*/") if path.is_symlink())]
    return sorted({path for top in tops for path in top.rglob("*.py") if "__pycache__" not in path.parts})


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("path", sources("vitfast"), ids=lambda path: str(path.relative_to(ROOT)))
def test_floors(path):
    room, package = room_of(path)
    assert room in FLOOR_OF, f"{room} is a new room: give it a floor in FLOORS, or put the file into a room"
    if room != "__init__":  # which is every public name's door, and imports nothing but on use
        assert not broken_rules(path.read_text(), room, package)


def test_no_circles():
    graph = {}
    for path in sources("vitfast"):
        room, package = room_of(path)
        if room != "__init__":
            found = (item.module for item in imports(path.read_text(), package))
            graph[module_of(path)] = {name for name in found if file_of(name) and name != module_of(path)}
    assert len(graph) > 80
    assert not circle(graph)


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders(folder):
    tests = {path.stem for path in sources("tests") if path.stem.startswith("test_")}
    for path in sources(folder):
        for item in imports(path.read_text(), folder):
            top = item.module.partition(".")[0]
            where = f"{path}:{item.line}: {item.module}"
            assert top not in {*FOLDERS, "helpers", "setup"} - FOLDERS[folder], where
            last = item.module.rpartition(".")[2]
            assert last not in tests, f"{path}:{item.line} imports a test file"


def test_no_dead_rooms():
    assert set(FLOOR_OF) == {room_of(path)[0] for path in sources("vitfast")}
    assert set(OUTSIDE) <= set(FLOOR_OF)


@pytest.mark.parametrize(
    ("source", "room", "fault"),
    [
        ("import triton", "ops", "may not import triton on import"),
        ("def f():\n    import transformers", "models", ""),
        ("import transformers", "models", "may not import transformers on import"),
        ("class A:\n    import timm", "models", "may not import timm on import"),
        ("from vitfast.kernels import linear", "ops", "may not import vitfast.kernels.linear on import"),
        ("def f():\n    from vitfast.kernels import linear", "ops", ""),
        ("import importlib\ndef f(x):\n    importlib.import_module(f'vitfast.cli.{x}')", "models", "inside a function"),
        ("from vitfast.engine import engine", "models", "may not import vitfast.engine.engine on import"),
        ("from ..engine.load import load", "ops", "may not import vitfast.engine.load on import"),
        ("from . import checks", "ops", ""),
        ("def f():\n    from vitfast.engine import planner", "models", "may not import vitfast.engine.planner inside"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vitfast.cli import app",
            "engine",
            "vitfast.cli",
        ),
        ("from vitfast.ops import linear", "kernels", "may not import vitfast.ops on import"),
        ("def f():\n    from vitfast.models import vit", "attention", "may not import vitfast.models.vit inside"),
        ("from vitfast.testing import make", "engine", "may not import vitfast.testing on import"),
        ("from vitfast import load", "pipeline", "may not import vitfast.load on import"),
        ("import vitfast", "benchmarks", "may not import vitfast on import"),
    ],
)
def test_the_check_sees_faults(source, room, fault):
    problems = broken_rules(source, room, f"vitfast.{room}")
    assert (fault in problems[0]) if fault else not problems


def test_a_file_in_a_wrong_room_is_seen():
    """The engine's file, were it in another room."""
    source = (ROOT / "vitfast" / "engine" / "engine.py").read_text()
    assert not broken_rules(source, "engine", "vitfast.engine")
    for room in ("ops", "images", "models", "attention"):
        assert broken_rules(source, room, f"vitfast.{room}")


MODULES = sorted(module_of(path) for path in sources("vitfast") if room_of(path)[0] not in ("__main__", "kernels"))


def test_import_vitfast_is_light():
    assert python(f"import sys, vitfast; print([m for m in {('torch', 'numpy', *HEAVY)} if m in sys.modules])") == "[]"


def test_import_everything_touches_no_device():
    loaded = python(
        f"import sys, importlib, torch\n"
        f"for name in {MODULES}: importlib.import_module(name)\n"
        f"print(torch.cuda.is_initialized(), [m for m in {HEAVY} if m in sys.modules])"
    )
    assert loaded == "False []"


def test_code_in_strings_imports_what_there_is():
    """Tests run much code in processes of their own, which no editor and no linter follows."""
    missing = []
    for path in sources("tests"):
        for module, names in re.findall(r"from (vitfast[\w.]*) import ([\w, ]+)", path.read_text()):
            for name in names.split(", "):
                elsewhere = "_C" in (name, module[-2:]) or not name.isidentifier()  # not everywhere; "x as y"
                if not (elsewhere or file_of(f"{module}.{name}") or hasattr(importlib.import_module(module), name)):
                    missing.append(f"{path}: {module}.{name}")
    assert missing == []


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


@pytest.mark.parametrize(
    ("old", "new"),
    thinned(
        [
            ("vitfast.checkpoints", "vitfast.models.checkpoints"),
            ("vitfast.embed", "vitfast.pipeline.embed"),
            ("vitfast.embedding_folder", "vitfast.pipeline.parquet"),
            ("vitfast.flash_attention", "vitfast.attention.flash_attn"),
        ],
        4,
        unpack=True,
    ),
)
def test_moved_modules_are_the_new_ones_and_say_so(old, new):
    code = (
        f"import importlib, warnings\n"
        f"with warnings.catch_warnings(record=True) as told:\n"
        f"    warnings.simplefilter('always')\n"
        f"    old = importlib.import_module({old!r})\n"
        f"new = importlib.import_module({new!r})\n"
        f"print(old is new, new.__spec__.name, [w.category.__name__ for w in told], told[0].message)"
    )
    assert python(code) == f"True {new} ['DeprecationWarning'] {old} has moved to {new}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import_peer", "vitfast.models.libraries.import_library"),
        ("TOLERANCES", "vitfast.ops.accuracy.TOLERANCES"),
    ],
)
def test_moved_names_of_testing_are_the_new_ones_and_say_so(old, new):
    place, _, name = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"vitfast\.testing\.{old} has moved to {new}"):
        found = getattr(testing, old)
    assert found is getattr(importlib.import_module(place), name)
