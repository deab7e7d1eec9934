"""What a campaign leaves behind: one JSON of everything, whole at every moment, from which it can go on.

    schema       1
    kind         "campaign"
    environment  as in every result file, when it began
    calls        one per call: when it began, its budget in seconds, and the boot of the machine
    steps        name -> state, seconds, calls it took part in, culprits, and what it measured

A step's state is "done", "cut" (its time was up; what it has is kept, and the next call goes on with it), "failed" or
"running" (nobody lived to say more, which counts as "cut"). `result` is what `benchmarks/result_file.py` describes;
steps that measure nothing have `answer` instead.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitfast.benchmarks.environment import ROOT, commit_of, sources_digest
from vitfast.benchmarks.page import campaign_page
from vitfast.benchmarks.result_file import results_folder, write

SCHEMA = 1


class CampaignFile:
    """The file in the making, and the others of its folder. What is there already is gone on with.

    Whatever ends the process, the folder has whole files only: what is not whole yet stands beside the folder, under a
    hidden name. Where nothing can be moved from there (the folder is a disk of its own), it stands inside.

    Raises:
        ValueError: if the file is of something else, or of another GPU or other sources.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any], call: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "schema": SCHEMA, "kind": "campaign", "environment": dict(environment), "calls": [], "steps": {},
        }  # fmt: skip
        if path.is_file():
            self.content = read(path)
            for name in ("gpu", "sources"):
                was, here = self.content["environment"].get(name), environment.get(name)
                if was != here:
                    raise ValueError(
                        f"{path} was begun with {name} {was!r}, here it is {here!r}: choose another folder"
                    )
        self.content["calls"].append(dict(call))
        folder = path.parent.resolve()
        self._part = folder.with_name(f".{folder.name}.part")
        try:
            self.write()
        except OSError:
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)
            self._part = folder / ".part"
            self.write()

    def step(self, name: str) -> dict[str, Any]:
        """What is known of a step."""
        return self.content["steps"].setdefault(name, {"state": "", "seconds": 0.0, "culprits": []})

    def keep(self, name: str, text: str) -> None:
        """Write a file of the folder in one step."""
        write(self.path.with_name(name), text, part=self._part)

    def write(self) -> None:
        """Write the file itself."""
        self.keep(self.path.name, json.dumps(self.content, indent=1) + "\n")

    def write_page(self) -> None:
        """Write the page that shows everything so far."""
        self.keep("page.html", campaign_page(self.content))


def read(path: Path) -> dict[str, Any]:
    """A campaign's file.

    Raises:
        ValueError: if it is none.
    """
    try:
        content = json.loads(path.read_text())
        if content["kind"] != "campaign" or content["schema"] != SCHEMA:
            raise ValueError(f"kind {content['kind']!r}, schema {content['schema']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no campaign's file: {type(error).__name__}: {error}") from None
    return content


def unpack(path: Path) -> Iterator[Path]:
    """Write every step's result as a file of its own into benchmarks/results/<gpu>, and give their paths.

    A tuning table beside the campaign's file goes to kernels/configs.

    A result that was measured from a copy of the checkout without .git names no commit. It gets that of this checkout
    if its sources are the very same.

    Raises:
        ValueError: if they are not.
    """
    content = read(path)
    environment = content["environment"]
    slug = environment["slug"]
    commit = environment["commit"]
    if commit is None:
        here = sources_digest()
        if environment.get("sources") != here:
            raise ValueError(
                f"the campaign was run from sources {environment.get('sources')}, here they are {here}: "
                "check out the commit that it was run from"
            )
        commit = commit_of()
        if commit is None:
            raise ValueError("this is no git checkout, which could say what commit the campaign was run from")
    stem = f"{environment['date'][:10]}-{commit[:9]}"
    for name, step in content["steps"].items():
        if (result := step.get("result")) and result["kind"] in ("kernels", "model") and result["rows"]:
            named = {**result, "environment": {**result["environment"], "commit": commit}}
            result_path = results_folder() / slug / f"{stem}-{name}.json"
            write(result_path, json.dumps(named, indent=1) + "\n")
            yield result_path
    if (table := path.with_name(f"{slug}.json")).is_file():
        write(ROOT / "kernels" / "configs" / table.name, table.read_text())
        yield ROOT / "kernels" / "configs" / table.name
