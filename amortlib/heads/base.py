"""What every head is: a function from a context to a distribution."""

import abc
from typing import Any

import equinox as eqx

from amortlib.gaussian import AbstractDistribution

__all__ = ["AbstractHead"]


class AbstractHead(eqx.Module):
    """q_phi(. | c).

    A head never sees an energy or a solver: what it knows of the problem, it was given when made
    or learned from simulation.
    """

    @abc.abstractmethod
    def __call__(self, context: Any) -> AbstractDistribution:
        """The distribution over x for one context."""
