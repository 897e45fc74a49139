"""Amortized inference for data assimilation, on gappy observations.

The package is read bottom up, in the order in which its modules may import each other:
``types``, ``export``, ``gaussian``, ``modes``, ``dynamics``, ``observation``, ``problems``,
``pairs``, ``energy``, ``laplace``, ``solvers``, ``encoders``, ``heads``, ``posterior``,
``symmetry``, ``refine``, ``search``, ``nested``, ``objectives``, ``training``, ``calibration``,
``guard``, ``bundle``, ``catalogue``, ``alert``, ``deploy``.

Notation, used in code and docstrings alike: state ``x``, observations ``y``, mask ``m``
(``True`` = observed), background mean ``x_b`` and covariance ``B``, observation-error covariance
``R``, observation operator ``H``, energy ``J``, context ``c``.
"""

from amortlib import (
    alert,
    bundle,
    calibration,
    catalogue,
    deploy,
    dynamics,
    encoders,
    energy,
    export,
    gaussian,
    guard,
    heads,
    laplace,
    modes,
    nested,
    objectives,
    observation,
    pairs,
    posterior,
    problems,
    refine,
    search,
    solvers,
    symmetry,
    training,
    types,
)
from amortlib.bundle import PromotionError, load_bundle, promote
from amortlib.calibration import GateError, GateReport, run_gates
from amortlib.energy import Energy, GibbsPosterior
from amortlib.export import CheckpointError, load, save
from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.pairs import from_pairs
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, simulate_pair
from amortlib.training import fit, train_step
from amortlib.types import Event, InvalidEventError, as_event

__version__ = "0.1.0"

__all__ = [
    "AmortizedPosterior",
    "CheckpointError",
    "Energy",
    "Event",
    "GateError",
    "GateReport",
    "GaussMarkov",
    "Gaussian",
    "GibbsPosterior",
    "InvalidEventError",
    "InverseProblem",
    "PromotionError",
    "alert",
    "as_event",
    "bundle",
    "calibration",
    "catalogue",
    "deploy",
    "dynamics",
    "encoders",
    "energy",
    "export",
    "fit",
    "from_pairs",
    "gaussian",
    "guard",
    "heads",
    "laplace",
    "load",
    "load_bundle",
    "modes",
    "nested",
    "objectives",
    "observation",
    "pairs",
    "posterior",
    "problems",
    "promote",
    "refine",
    "run_gates",
    "save",
    "search",
    "simulate_pair",
    "solvers",
    "symmetry",
    "train_step",
    "training",
    "types",
]
