"""What the numerics tests share."""

from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

# Examples are the same on every run, and a slow first compilation is not a failure.
settings.register_profile("house", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("house")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision, inside the test alone."""
    with jax.enable_x64(True):
        yield
