"""Heads q_phi(x | c): from a context to a distribution over the state."""

from amortlib.heads.base import AbstractHead
from amortlib.heads.flow import FlowDistribution, FlowHead
from amortlib.heads.mixture import GaussianMixture, MixtureHead
from amortlib.heads.regression import CholeskyHead, DiagonalHead, InformationHead
from amortlib.heads.score import ScoreDistribution, ScoreHead

__all__ = [
    "AbstractHead",
    "CholeskyHead",
    "DiagonalHead",
    "FlowDistribution",
    "FlowHead",
    "GaussianMixture",
    "InformationHead",
    "MixtureHead",
    "ScoreDistribution",
    "ScoreHead",
]
