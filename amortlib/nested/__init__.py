"""Nested Laplace: exp(-J) as it is along its widest direction, a Gaussian that changes across it.

Where a gap is long, or the forward model bends, the posterior is a curved ridge, and a Gaussian at
its highest point says nothing of the curve. J itself does: from the minimum a few steps lead out
along the widest axis, and at each of them one Gauss-Newton step across finds the ridge, its width
and its height. Along the ridge the density is then what J says; across it is the Gaussian of the
place. Nothing is learned, and where J is a parabola nothing is changed.

The marginal along the axis is that of Tierney and Kadane (1986), *Accurate approximations for
posterior moments and marginal densities*, J. Am. Stat. Assoc. 81, section 4; with the conditionals
it is the nested approximation of Rue, Martino and Chopin (2009), *Approximate Bayesian inference
for latent Gaussian models by using integrated nested Laplace approximations*, J. R. Stat. Soc. B
71, with the axis in the place of their hyperparameter.
"""

from amortlib.nested.encoder import NestedContext, NestedEncoder
from amortlib.nested.head import NestedHead, SharedHead, nested_posterior
from amortlib.nested.mixture import NestedMixture
from amortlib.nested.ridge import NestedLaplace, nested_laplace

__all__ = [
    "NestedContext",
    "NestedEncoder",
    "NestedHead",
    "NestedLaplace",
    "NestedMixture",
    "SharedHead",
    "nested_laplace",
    "nested_posterior",
]
