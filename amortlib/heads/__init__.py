"""Heads q_phi(x | c): from a context to a distribution over the state."""

from amortlib.heads.base import AbstractHead
from amortlib.heads.flow import FlowDistribution, FlowHead
from amortlib.heads.regression import CholeskyHead, DiagonalHead, InformationHead

__all__ = [
    "AbstractHead",
    "CholeskyHead",
    "DiagonalHead",
    "Fixed",
    "FlowDistribution",
    "FlowHead",
    "InformationHead",
]
