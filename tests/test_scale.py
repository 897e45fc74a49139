"""The yardstick of `benchmarks.scale`, and what its cases report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.gaussian import condition
from amortlib.observation import ContiguousGaps
from amortlib.types import to_double
from benchmarks import scale


def test_the_exact_posterior_is_the_dense_one() -> None:
    """The tridiagonal posterior against the Gaussian-process formula, which shares no step."""
    problem = scale.problem_of(48)
    _, events = problem.batch(jax.random.key(0), 3)
    with jax.enable_x64(True):
        problem, events = to_double((problem, events))
        for i in range(3):
            event = jax.tree.map(lambda leaf, i=i: leaf[i], events)
            banded, dense = (
                scale.exact(problem, event),
                condition(problem.prior, jnp.eye(48), event),
            )
            # The event holds its sd in single precision, which is off by 4e-8 of it.
            np.testing.assert_allclose(banded.mean(), dense.mean(), atol=1e-6)
            np.testing.assert_allclose(banded.covariance(), dense.covariance(), atol=1e-6)


def test_masks_of_many_gaps_miss_what_was_asked() -> None:
    """Hundreds of gaps, some of no length, some touching: the share is exact all the same."""
    for share in (0.0, 0.3, 1.0):
        gaps = ContiguousGaps(share, max_gaps=300)
        masks = jax.vmap(lambda key: gaps.times(key, 4096))(jax.random.split(jax.random.key(1), 8))  # noqa: B023
        np.testing.assert_array_equal((~masks).sum(axis=1), round(share * 4096))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["information", "flow", "score"])
def test_a_case_reports_a_divergence_between_none_and_the_priors(head: str) -> None:
    """Hardly trained, a head is no better than the prior by more than the error of the estimate.

    Of the sampled ones the mean over 256 draws has its standard error beside it, and five of
    them bound it: less than one false alarm in a million runs.
    """
    row = scale.case(head, 16, budget=0.3)
    assert row["ran"]
    assert row["steps"] >= 3
    assert -5 * row["kl_error"] < row["kl"] < 1.5 * row["kl_of_prior"] + 5 * row["kl_error"]
    assert (row["kl_error"] == 0.0) == (head == "information")


def test_a_head_that_does_not_fit_is_a_row_that_says_so() -> None:
    row = scale.case("cholesky", 8192, budget=0.1)
    assert not row["ran"]
    assert "GB" in row["why"]
