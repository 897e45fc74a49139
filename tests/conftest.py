"""What the numerics tests share."""

import gc
import os
from collections.abc import Iterator

# Before JAX is loaded, the kit chooses the code generator that compiles in three quarters of the
# time; processes that tests start inherit the choice.
import _kit  # noqa: F401
import pytest
from hypothesis import settings

# Before JAX is loaded, too: it warns of each compiled program that it reads from disk.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax

# Examples are the same on every run, and a slow first compilation is not a failure.
settings.register_profile("house", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs on disk: half of the suite's time is spent in the compiler.

    Most programs are small and the same in many modules. Each test process has a folder of its own,
    because JAX does not write the files in one step, and another process could read a half.
    """
    process = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = config.rootpath / "_build" / ".programs" / process
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have the garbage collector look less often, and not at what was imported.

    Tracing makes many small objects, and every look also asks JAX's runtime: 5% of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


LONGEST = ("tests/test_benchmarks.py", "tests/book/test_in_browser.py")
"""What would keep one process at work when the other has nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; the others follow in their order."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


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
