"""What benchmarks' tests share. A benchmark pins threads and reads plans: here that changes nothing afterwards."""

import pytest
import torch
from helpers.global_state import threads

from vitfast.benchmarks import device
from vitfast.models import libraries


@pytest.fixture(autouse=True)
def _harmless(monkeypatch, tmp_path):
    """The tests' own process stays on all its cores with as many threads, and the user's plans stay as they are."""
    monkeypatch.setattr(device.os, "sched_setaffinity", lambda task, cores: None)
    monkeypatch.setenv("VITFAST_CACHE", str(tmp_path / "cache"))
    with threads(torch.get_num_threads()):
        yield


@pytest.fixture
def timm():
    """timm, or why there is none."""
    try:
        return libraries.import_library("timm")
    except ImportError as error:
        pytest.skip(str(error))
