"""Heads q_phi(x | c): from a context to a distribution over the state."""

from amortlib.heads.base import AbstractHead
from amortlib.heads.mixture import GaussianMixture, MixtureHead
from amortlib.heads.regression import CholeskyHead, DiagonalHead, InformationHead
from amortlib.heads.score import ScoreDistribution, ScoreHead

__all__ = [
    "AbstractHead",
    "CholeskyHead",
    "DiagonalHead",
    "GaussianMixture",
    "InformationHead",
    "MixtureHead",
    "ScoreDistribution",
    "ScoreHead",
]
