"""What the numerics tests share."""

from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

# Examples are the same on every run, and a slow first compilation is not a failure.
settings.register_profile("house", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("house")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go() -> Iterator[None]:
    """Drop a module's compiled programs when it is done.

    Each holds memory maps. Over the whole suite they reach the number that Linux allows a process
    (65,530 by default), and the next compilation ends in a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision, inside the test alone."""
    with jax.enable_x64(True):
        yield
