"""The libraries whose models are taken: what their import needs first, and how its failure is told."""

import pytest
from helpers import peers

from vitfast.models import checkpoints, libraries
from vitfast.models.checkpoints import CheckpointError


@pytest.mark.parametrize("name", ["timm", "torchvision", "open_clip"])
def test_torchvisions_operators_are_declared_before_what_needs_them(name, monkeypatch):
    peers.import_torchvision()
    steps = []
    monkeypatch.setattr(libraries, "declare_torchvision_ops", lambda: steps.append("declared"))
    monkeypatch.setattr(libraries.importlib, "import_module", steps.append)
    libraries.import_library(name)
    assert steps == ["declared", name]


def test_an_import_that_fails_names_the_library_and_the_versions(monkeypatch):
    peers.import_timm()

    def failing(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(libraries.importlib, "import_module", failing)
    said = r"import timm raises RuntimeError: operator .* does not exist \(timm \d.*, torchvision \d.*, torch \d.*\)"
    with pytest.raises(ImportError, match=said):
        libraries.import_library("timm")
    with pytest.raises(CheckpointError, match=f"needs timm, which cannot be imported: {said}"):
        checkpoints.load("vit_tiny_patch16_224")
