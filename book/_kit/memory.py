"""Give back memory between the parts of a chapter: Binder has about one gigabyte."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import jax


def give_back() -> None:
    """Drop compiled programs, and hand freed memory back to the system where it can be.

    What XLA frees after a compilation stays with the allocator of the C library, which hands it
    back only when asked. Where that library is not glibc the programs are dropped and no more.
    """
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
