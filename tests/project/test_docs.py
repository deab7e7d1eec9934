"""The documentation site: its navigation has every page, its reference all that is public and nothing that is not."""

import importlib
import re

import pytest
import yaml
from helpers.scripts import ROOT

import vitfast

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
LINKS = {page for page in PAGES if (DOCS / page).is_symlink()}
"""Pages that are files of the repository's root."""
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(entry) -> list[str]:
    """The pages of an entry of the navigation, sections entered."""
    if isinstance(entry, str):
        return [entry]
    children = entry if isinstance(entry, list) else entry.values()
    return [page for child in children for page in pages(child)]


def resolve(name: str) -> object:
    """What a dotted name stands for: a module, or an attribute of the longest module in it.

    Raises:
        AttributeError: if there is no such thing.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def test_navigation_lists_every_page_once():
    listed = pages(SITE["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == PAGES


def test_the_build_is_strict():
    """`make docs` then fails at a broken link, an anchor that is not there and a page left out."""
    assert SITE["strict"] is True
    assert SITE["validation"]["links"] == dict.fromkeys(
        ("not_found", "anchors", "absolute_links", "unrecognized_links"), "warn"
    )
    assert SITE["validation"]["nav"]["omitted_files"] == "warn"


@pytest.mark.parametrize("page", sorted(page for page in PAGES if page.startswith("api/")))
def test_reference_names_what_has_a_docstring(page):
    text = (DOCS / page).read_text()
    names = [*re.findall(r"^::: (\S+)", text, re.MULTILINE), *re.findall(r"\]\[(vitfast[\w.]*)\]", text)]
    assert names
    for name in names:
        assert resolve(name).__doc__, name


def test_reference_has_every_public_name():
    index = (DOCS / "api" / "index.md").read_text()
    rest = (DOCS / "api" / "attention.md").read_text()  # index.md has one of flash-attn's five signatures
    for name in set(vitfast.__all__) - {"__version__"}:
        assert re.search(rf"`(vitfast\.)?{name}`", index) or f"flash_attn.{name}\n" in rest, name


def test_readme_lists_every_guide():
    listed = set(re.findall(r"\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert listed | {"index.md", "speed-log.md"} == {page for page in PAGES - LINKS if not page.startswith("api/")}


TOPS = ("benchmarks", "csrc", "docs", "examples", "kernels", "tests", "vitfast")
LEFT_OUT = {"kernels/configs/", "kernels/configs/<gpu>.json"}  # tables appear once a GPU is tuned


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in sorted(PAGES))])
def test_files_that_are_named_exist(page):
    """Of `kernels/<op>.py` some file must."""
    text = (ROOT / page).read_text()
    for path in re.findall(r"`([\w./<>-]+/[\w./<>-]*)`", text) + re.findall(r"\btests/[\w/]+\.py\b", text):
        if path.partition("/")[0] in TOPS and path not in LEFT_OUT:
            assert list(ROOT.glob(re.sub(r"<\w+>", "*", path))), f"{page} names {path}"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in sorted(PAGES - LINKS))])
def test_names_in_prose_exist(page):
    for name in re.findall(r"`(vitfast(?:\.\w+)+)[`(]", (ROOT / page).read_text()):
        if name != "vitfast._C":  # not everywhere
            resolve(name)
