"""The libraries that vitfast's results are compared with: imported here, or the test is skipped with a reason."""

import importlib.util
from types import ModuleType

import pytest

from vitfast import testing


def _peer(name: str) -> ModuleType:
    """The library; only its absence is a skip, an import that fails is a failure."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: nothing to compare with")
    if importlib.util.find_spec("torchvision") is not None:
        testing.import_peer("torchvision")  # transformers and timm import it; it may need repair first
    return testing.import_peer(name)


def import_torchvision() -> ModuleType:
    """torchvision, or skip."""
    return _peer("torchvision")


def import_timm() -> ModuleType:
    """timm, or skip."""
    return _peer("timm")


def import_transformers() -> ModuleType:
    """transformers, or skip."""
    return _peer("transformers")
