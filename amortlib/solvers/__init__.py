"""Solvers: one method a file, all (y, mask) -> Analysis, from optimal interpolation upwards."""

from amortlib.solvers.base import AbstractSolver, Analysis
from amortlib.solvers.fourdvarnet import (
    FourDVarNet,
    FourDVarNetwork,
    fourdvar_network,
    reconstruction,
    trajectories,
)
from amortlib.solvers.incremental import IncrementalFourDVar
from amortlib.solvers.oi import OptimalInterpolation
from amortlib.solvers.oracle import Oracle, OracleAnalysis
from amortlib.solvers.reference import WeightedSample, importance_sample, population_sample
from amortlib.solvers.strong import StrongFourDVar
from amortlib.solvers.threedvar import ThreeDVar
from amortlib.solvers.weak import WeakFourDVar

__all__ = [
    "AbstractSolver",
    "Analysis",
    "FourDVarNet",
    "FourDVarNetwork",
    "IncrementalFourDVar",
    "OptimalInterpolation",
    "Oracle",
    "OracleAnalysis",
    "StrongFourDVar",
    "ThreeDVar",
    "WeakFourDVar",
    "WeightedSample",
    "fourdvar_network",
    "importance_sample",
    "population_sample",
    "reconstruction",
    "trajectories",
]
