"""What the tests of audits compare."""

import pytest
from helpers.audits import small_model

from vitfast.testing import make


@pytest.fixture
def model():
    """A small model of two blocks, [B, 16] -> [B, 10]."""
    return small_model()


@pytest.fixture
def x():
    """Its input, [6, 16]."""
    return make(6, 16)
