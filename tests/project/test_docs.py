"""The documentation site: its navigation has every page, its reference all that is public and nothing that is not."""

import importlib
import re

import pytest
import yaml
from helpers.scripts import ROOT

import vitfast

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
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
    links = {page for page in PAGES if (DOCS / page).is_symlink()}
    assert listed | {"index.md", "speed-log.md"} | links == {page for page in PAGES if not page.startswith("api/")}
