"""The same noise in Python and on the page: standard normal numbers from a seed.

A widget redraws from the same numbers at every position, and its picture made by the kernel must
be the page's. Mulberry32 (Tommy Ettinger, 2017; public domain) walks a counter, so that numpy makes
all numbers at once; Box and Muller (1958), Ann. Math. Statist. 29, 610. `js/noise.mjs` mirrors it.
"""

from __future__ import annotations

import numpy as np

_STEP = 0x6D2B79F5


def uniforms(seed: int, n: int) -> np.ndarray:
    """`(n,)` numbers above 0 and below 1, 32 bits each."""
    with np.errstate(over="ignore"):
        a = np.uint32(seed) + np.uint32(_STEP) * np.arange(1, n + 1, dtype=np.uint32)
        t = (a ^ (a >> np.uint32(15))) * (a | np.uint32(1))
        t ^= t + (t ^ (t >> np.uint32(7))) * (t | np.uint32(61))
        t ^= t >> np.uint32(14)
    return (t.astype(float) + 0.5) / 2.0**32


def normals(seed: int, n: int) -> np.ndarray:
    """`(n,)` standard normal numbers."""
    u = uniforms(seed, 2 * ((n + 1) // 2)).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:n]
