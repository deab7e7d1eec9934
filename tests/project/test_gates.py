"""What is checked before a commit, by `make lint` and in continuous integration is one list."""

import ast
import re

import pytest
import yaml
from helpers.scripts import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def extra(name: str) -> list[str]:
    """The packages of one of pyproject's optional dependencies, without extras of their own."""
    listed = re.search(rf"^{name} = (\[.*\])", PYPROJECT, re.MULTILINE)
    assert listed, f"pyproject.toml has no optional dependencies {name!r} on one line"
    return [package.partition("[")[0] for package in ast.literal_eval(listed[1])]


def test_hooks_are_the_parts_of_make_lint():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"  # nothing is fetched: the tools are those of constraints.txt
    parts = re.search(r"^lint:(.*?)##", MAKEFILE, re.MULTILINE)
    assert [hook["entry"] for hook in local["hooks"]] == [f"make {part}" for part in parts[1].split()]
    assert all(hook["pass_filenames"] is False for hook in local["hooks"])


def test_continuous_integration_runs_every_gate():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make lint", "make docs", "make test", "make demo"]


@pytest.mark.parametrize("name", ["lint", "docs"])
def test_tools_are_pinned_and_installed(name):
    pinned = dict(re.findall(r"^([\w-]+)==(\S+?);?(?: .*)?$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert extra(name)
    assert not set(extra(name)) - set(pinned)
    installed = re.search(r"-e '\.\[([\w,]+)\]'", MAKEFILE)
    assert name in installed[1].split(",")


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_ask_for_the_report(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    labels = " ".join(field["attributes"]["label"] for field in form["body"])
    assert "vitfast doctor --json" in labels
    assert ("Result file" in labels) == (path.stem == "slow")


def test_pull_requests_ask_for_report_and_result_file():
    text = (ROOT / ".github" / "pull_request_template.md").read_text()
    assert "vitfast doctor --json" in text
    assert "result file" in text
