"""A small model and its input, for what audits models."""

import pytest
from helpers.audits import small_model

from vitfast.testing import make


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def x():
    return make(6, 16)
