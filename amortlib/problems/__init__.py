"""Inverse problems: prior, forward model, noise and gaps; a user's own, and the book's."""

from amortlib.problems.base import (
    DrawOne,
    InvalidProblemError,
    InverseProblem,
    simulate_pair,
)
from amortlib.problems.lorenz import (
    SignLost,
    lorenz63,
    lorenz63_climatology,
    lorenz63_model_error,
    lorenz63_sign_lost,
    lorenz96,
    lorenz96_climatology,
)
from amortlib.problems.ornstein_uhlenbeck import ornstein_uhlenbeck
from amortlib.problems.window import WeakWindow, Window

__all__ = [
    "DrawOne",
    "InvalidProblemError",
    "InverseProblem",
    "SignLost",
    "WeakWindow",
    "Window",
    "lorenz63",
    "lorenz63_climatology",
    "lorenz63_model_error",
    "lorenz63_sign_lost",
    "lorenz96",
    "lorenz96_climatology",
    "ornstein_uhlenbeck",
    "simulate_pair",
]
