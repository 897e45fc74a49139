"""The classifier two-sample score: what it must say of samples whose answer is known."""

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.two_sample import c2st

N = 500


def _normal(seed: int, n: int = N, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 2)) + shift


def test_one_distribution_scores_a_half() -> None:
    """Labels are exchangeable, so a held-out answer is right with probability about a half.

    Folds share training points, so that answers are not independent: over 40 seeds the score's
    standard deviation was 1.4 times that of 2 N independent answers, 0.5 / sqrt(2 N). Five of
    them: a false alarm below 1e-6 over the choice of seeds.
    """
    score = c2st(_normal(0), _normal(1), seed=2)
    assert abs(score - 0.5) < 5 * 1.4 * 0.5 / np.sqrt(2 * N)


def test_a_shift_scores_what_the_best_rule_scores() -> None:
    """N(0, I) against N((2, 2), I): the best rule is right with probability Phi(sqrt(2)).

    A trained classifier does a little worse, by at most 0.03; five standard deviations of 2 N
    answers beside that.
    """
    best = norm.cdf(np.sqrt(2.0))
    score = c2st(_normal(3), _normal(4, shift=2.0), seed=5)
    spread = np.sqrt(best * (1 - best) / (2 * N))
    assert best - 0.03 - 5 * spread < score < best + 5 * spread


def test_it_is_blind_to_units() -> None:
    x, y = _normal(6), _normal(7, shift=1.0)
    units = np.array([1e-3, 1e4])
    assert c2st(x * units + 5.0, y * units + 5.0, seed=8) == pytest.approx(
        c2st(x, y, seed=8), abs=0.02
    )


def test_a_seed_fixes_the_score() -> None:
    x, y = _normal(9, 100), _normal(10, 100, shift=1.0)
    first = c2st(x, y, seed=11, folds=2)
    assert c2st(x, y, seed=11, folds=2) == first
    assert c2st(x, y, seed=12, folds=2) != first


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((10, 2)), np.zeros((10, 3)), r"got \(10, 2\) and \(10, 3\)"),
        (np.zeros(10), np.zeros(10), r"shape \(n, d\)"),
        (_normal(0, 4), _normal(1, 4), "folds=5 with n=4"),
        (_normal(0, 10), np.full((10, 2), np.nan), "got y with values that are not"),
        (np.zeros((10, 2)), _normal(1, 10), "to vary"),
    ],
)
def test_samples_that_cannot_be_compared_are_refused(
    x: np.ndarray, y: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        c2st(x, y, seed=0)
