"""README's code runs: its Python as it stands, its commands as far as their arguments go."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer
from helpers import peers
from helpers.grids import thinned
from helpers.peers import VIT, transformers_model
from helpers.scripts import ROOT, python

from vitfast.cli.app import app

README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
BLOCKS = [text for language, text in FENCED if language == "python"]
COMMANDS = [line for _, text in FENCED for line in text.splitlines() if line.startswith("vitfast ")]
STARTUP = ROOT / "tests" / "environment"


def _environment_imports_timm() -> str:
    """Why README's `import timm` does not work here, "" if it does."""
    done = subprocess.run([sys.executable, "-c", "import timm"], capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition("\n")[2]


def block(word: str) -> str:
    (found,) = (text for text in BLOCKS if word in text)
    return found


def test_every_block_is_tested():
    assert len(BLOCKS) == 3
    assert {block(word) for word in ("openai/clip", "timm.create_model", "ops.attention")} == set(BLOCKS)


def test_loading_a_model(tmp_path, monkeypatch):
    """With a small CLIP of random weights in place of the hub's."""
    peers.import_transformers()
    model = transformers_model("CLIPVisionModelWithProjection", VIT | {"projection_dim": 512})
    model.save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    peers.import_transformers().CLIPImageProcessorPil(**sizes).save_pretrained(tmp_path)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    text = block("openai/clip")
    line = text.strip().splitlines()[-1]
    code = compile(text.replace(line, f"shown = {line}"), "README.md", "exec")
    names: dict = {}
    exec(code, names)
    assert list(names["shown"].shape) == [8, 512], line


@pytest.mark.skipif(
    bool(why := _environment_imports_timm()) and Path(sys.prefix) != ROOT / ".venv",
    reason=f"`import timm` does not work in this environment, which make has not made: {why}",
)
def test_a_model_that_one_has():
    """In a process of its own, with random weights in place of timm's trained ones."""
    text = block("timm.create_model")
    assert text.count("pretrained=True") == 1
    after = """
from vitfast.integrations.accelerate import accelerated
(trunk,) = accelerated(model).values()
assert len(trunk.blocks) == 2 and not trunk.refusal, trunk.refusal
"""
    python(text.replace("pretrained=True", "pretrained=False, depth=2") + after)


@pytest.mark.full
@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(
    "line", thinned(["import timm, torch, vitfast", "import torch, torchvision", "import torchvision, timm"], 3)
)
def test_the_environments_startup_file(line):
    """What the Makefile puts into its environment is enough for README's imports, in any order."""
    python(f"import sys; sys.path.append({str(STARTUP)!r}); import torchvision_beside_cpu_torch; {line}")


def test_the_startup_file_waits():
    """Python starts with it as it does without: no library is imported for it."""
    code = (
        f"import sys; sys.path.append({str(STARTUP)!r}); import torchvision_beside_cpu_torch;"
        "print([name for name in ('torch', 'torchvision', 'vitfast', 'timm') if name in sys.modules])"
    )
    assert python(code) == "[]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="README's attention runs on a GPU")
def test_an_op():
    exec(compile(block("ops.attention"), "README.md", "exec"), {})


def test_the_commands_exist():
    """Every option of every command that README shows."""
    assert len(COMMANDS) >= 3
    for line in COMMANDS:
        parser, arguments, parent = typer.main.get_command(app), shlex.split(line)[1:], None
        while hasattr(parser, "commands"):
            parent = typer.Context(parser, parent=parent)
            _, parser, arguments = parser.resolve_command(parent, arguments)
        parser.make_context(line, arguments, parent=parent)  # raises UsageError for what it does not know
