"""From `Engine.__call__` to a kernel every hop is a plain function or a typed attribute; the docs list them."""

import ast
import inspect
import re
import textwrap
import typing

import pytest
import torch
from helpers.engines import SMALL
from helpers.scripts import ROOT

from vitfast import testing
from vitfast.engine import planner
from vitfast.engine.engine import Engine
from vitfast.engine.runner import Runner
from vitfast.models import plan, vit

HOPS = [
    ("Engine.__call__", Engine.__call__),
    ("Runner.forward", Runner.forward),
    ("vit.forward", vit.forward),
    ("folded_block", vit.folded_block),
    ("_mlp_half", vit._mlp_half),
]
MOST = 8


def named(tree):
    """The functions that code calls or chooses, by the last part of their names."""
    return {node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}  # fmt: skip


def kernel_path():
    """The shortest way from the launcher `linear` to a kernel, inside its file."""
    module = ast.parse((ROOT / "kernels" / "linear.py").read_text())
    functions = {node.name: named(node) for node in module.body if isinstance(node, ast.FunctionDef)}
    paths = [["linear"]]
    while paths:
        path = paths.pop(0)
        if "_linear_kernel" in functions[path[-1]]:
            return [*path, "_linear_kernel"]
        paths += [[*path, name] for name in functions[path[-1]] & functions.keys() if name not in path]
    pytest.fail("no function of kernels/linear.py that linear reaches launches _linear_kernel")


def test_every_hop_names_the_next():
    for (name, function), (following, _) in zip(HOPS, [*HOPS[1:], ("plan.fc1", None)], strict=True):
        source = inspect.getsource(inspect.unwrap(function))
        tree = ast.parse(textwrap.dedent(source))
        assert following.rpartition(".")[2] in named(tree), f"{name} does not name {following}"
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not {"fc1", "qkv"} & strings, f"{name} looks a site up by its name"


def test_the_plan_holds_the_launcher_itself():
    from vitfast.kernels import linear as module

    made = planner.build(SMALL, device=testing.device(), dtype=torch.bfloat16, backend="triton")
    assert made.qkv is made.fc1 is made.fc2 is module.linear
    hints = typing.get_type_hints(plan.Plan)
    for name, site in plan.SITES.items():
        (kind,) = {*(typing.get_args(hints[name]) or (hints[name],))} - {type(None)}
        assert f"`vitfast.ops.{site.op}`" in kind.__doc__, f"{name} is typed for another op"


def test_the_docs_list_the_hops():
    path = [*(name for name, _ in HOPS), "plan.fc1", *kernel_path()]
    assert len(path) - 1 <= MOST, path
    text = (ROOT / "docs" / "kernels.md").read_text().split("## From a call to a kernel")[1].split("\n## ")[0]
    listed = [re.match(r"\d+\. .*?`(\S+?)`", line)[1] for line in text.splitlines() if re.match(r"\d+\. ", line)]
    assert listed == path
