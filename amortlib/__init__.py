"""Amortized inference for data assimilation, on gappy observations.

The package is read bottom up, in the order in which its modules may import each other:
``types``, ``export``, ``gaussian``, ``modes``, ``dynamics``, ``observation``, ``problems``,
``energy``, ``laplace``, ``solvers``, ``encoders``, ``heads``, ``posterior``, ``objectives``,
``training``.

Notation, used in code and docstrings alike: state ``x``, observations ``y``, mask ``m``
(``True`` = observed), background mean ``x_b`` and covariance ``B``, observation-error covariance
``R``, observation operator ``H``, energy ``J``, context ``c``.
"""

from amortlib import (
    dynamics,
    encoders,
    energy,
    export,
    gaussian,
    heads,
    laplace,
    modes,
    objectives,
    observation,
    posterior,
    problems,
    solvers,
    training,
    types,
)
from amortlib.energy import Energy, GibbsPosterior
from amortlib.export import CheckpointError, load, save
from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, simulate_pair
from amortlib.training import fit
from amortlib.types import Event, InvalidEventError, as_event

__version__ = "0.1.0"

__all__ = [
    "AmortizedPosterior",
    "CheckpointError",
    "Energy",
    "Event",
    "GaussMarkov",
    "Gaussian",
    "GibbsPosterior",
    "InvalidEventError",
    "InverseProblem",
    "as_event",
    "dynamics",
    "encoders",
    "energy",
    "export",
    "fit",
    "gaussian",
    "heads",
    "laplace",
    "load",
    "modes",
    "objectives",
    "observation",
    "posterior",
    "problems",
    "save",
    "simulate_pair",
    "solvers",
    "training",
    "types",
]
