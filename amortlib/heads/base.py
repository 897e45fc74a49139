"""What every head is: a function from a context to a distribution."""

import abc
from typing import Any

import equinox as eqx
import jax

from amortlib.gaussian import AbstractDistribution

__all__ = ["AbstractHead", "Fixed"]


class Fixed(eqx.Module):
    """Something a model carries and training must not move: a prior, a scale, a grid.

    Attributes:
        tree: what is carried. Read it through `value`.
    """

    tree: Any

    @property
    def value(self) -> Any:
        """The tree, through which no gradient flows."""
        return jax.tree.map(
            lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, self.tree
        )


class AbstractHead(eqx.Module):
    """q_phi(. | c).

    A head never sees an energy or a solver: what it knows of the problem, it was given when made
    or learned from simulation.
    """

    @abc.abstractmethod
    def __call__(self, context: Any) -> AbstractDistribution:
        """The distribution over x for one context."""
