"""Operators, noise, and the gap patterns: what they promise holds for every draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from amortlib.observation import (
    AllMissing,
    ContiguousGaps,
    Dropouts,
    FixedMask,
    GaussianNoise,
    LinearOperator,
    MixedGaps,
    NoGaps,
    PeriodicRevisit,
    Select,
    VaryingGaussianNoise,
    gap,
)

FRACTIONS = st.floats(0.0, 1.0, allow_nan=False)
LENGTHS = st.sampled_from([1, 7, 24])  # few, so that compilations are shared
SEEDS = st.integers(0, 2**32 - 1)


def masks(pattern, shape, number=32, seed=0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), number)
    return np.asarray(jax.vmap(lambda key: pattern(key, shape))(keys))


def gaps_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of every run of misses."""
    edges = np.flatnonzero(np.diff(np.concatenate([[1], mask.astype(int), [1]])))
    return [(int(a), int(b - a)) for a, b in edges.reshape(-1, 2)]


# --- operators and noise ----------------------------------------------------------------------


def test_linear_operator_is_the_product():
    matrix = np.arange(6.0).reshape(2, 3)
    got = LinearOperator(jnp.asarray(matrix, jnp.float32))(jnp.array([1.0, 0.0, -1.0]))
    np.testing.assert_array_equal(got, [-2.0, -2.0])


@pytest.mark.parametrize(
    ("components", "stride", "start"), [((0,), 1, 0), ((2, 0), 3, 1), ((-1,), 2, 0)]
)
def test_select_takes_what_it_says(components, stride, start):
    path = np.arange(30.0, dtype=np.float32).reshape(10, 3)
    got = Select(components, stride, start)(jnp.asarray(path))
    np.testing.assert_array_equal(got, path[start::stride][:, list(components)])


def test_select_refuses_what_is_not_there():
    with pytest.raises(ValueError, match=r"components of a state of 3, got \(0, 3\)"):
        Select((0, 3))(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="at least one component"):
        Select(())
    with pytest.raises(ValueError, match="stride >= 1 and start >= 0, got 0, 0"):
        Select((0,), 0)
    with pytest.raises(ValueError, match="stride >= 1 and start >= 0, got 1, -1"):
        Select((0,), 1, -1)


def test_noise_has_the_standard_deviation_it_states():
    """40 000 draws an entry: errors are normal with the stated sd (Kolmogorov-Smirnov, each of
    two p-values above 1e-6: false alarm 2e-6) and independent (correlation within 5 / sqrt(N)).
    """
    n, sd = 40_000, jnp.array([0.5, 3.0])
    noise = GaussianNoise(sd)
    clean = jnp.array([10.0, -10.0])
    keys = jax.random.split(jax.random.key(0), n)
    errors = np.asarray(jax.vmap(lambda key: noise(key, clean))(keys) - clean) / np.asarray(sd)
    assert all(scipy.stats.kstest(column, "norm").pvalue > 1e-6 for column in errors.T)
    assert abs(np.corrcoef(errors.T)[0, 1]) <= 5 / np.sqrt(n)


def test_varying_noise_is_log_uniform():
    """Kolmogorov-Smirnov on 5000 levels, p above 1e-6: that is its false-alarm rate."""
    noise = VaryingGaussianNoise(0.1, 2.0)
    keys = jax.random.split(jax.random.key(1), 5000)
    levels = np.asarray(jax.vmap(lambda key: noise.draw(key).sd)(keys))
    assert levels.min() >= 0.1 * (1 - 1e-6)
    assert levels.max() <= 2.0 * (1 + 1e-6)
    law = scipy.stats.loguniform(0.1, 2.0)
    assert scipy.stats.kstest(levels, law.cdf).pvalue > 1e-6


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
def test_varying_noise_refuses_bad_bounds(low, high):
    with pytest.raises(ValueError, match=f"0 < low < high, got low={low}, high={high}"):
        VaryingGaussianNoise(low, high)


# --- gaps -------------------------------------------------------------------------------------


@given(n=LENGTHS, fraction=FRACTIONS, number=st.sampled_from([1, 3]), seed=SEEDS)
def test_contiguous_gaps_miss_exactly_their_share(n, fraction, number, seed):
    drawn = masks(ContiguousGaps(fraction, max_gaps=number), (n,), seed=seed)
    missed = (~drawn).sum(axis=1)
    # round() in single precision: where fraction * n lies at a half, either side will do.
    assert len(set(missed.tolist())) == 1
    assert abs(missed[0] - fraction * n) <= 0.5 + 1e-4
    assert max(len(gaps_of(mask)) for mask in drawn) <= number


@given(n=LENGTHS, bounds=st.tuples(FRACTIONS, FRACTIONS).map(sorted), seed=SEEDS)
def test_contiguous_gaps_stay_between_their_bounds(n, bounds, seed):
    low, high = bounds
    missed = (~masks(ContiguousGaps(low, high, max_gaps=3), (n,), seed=seed)).sum(axis=1)
    assert np.all(missed >= low * n - 0.5 - 1e-4)
    assert np.all(missed <= high * n + 0.5 + 1e-4)


def test_contiguous_gaps_vary_in_number_length_and_place():
    """Every number of gaps comes up, every place is reached, and the share is uniform.

    The share (rounded to 1/64) has mean 1/2 and variance 1/12: the tolerance of 5 standard errors
    of the mean over 4000 masks raises a false alarm with probability 6e-7.
    """
    drawn = masks(ContiguousGaps(0.0, 1.0, max_gaps=3), (64,), number=4000)
    missed = (~drawn).mean(axis=1)
    assert abs(missed.mean() - 0.5) <= 5 * np.sqrt(1 / 12 / 4000)
    assert {0, 1, 2, 3} == {len(gaps_of(mask)) for mask in drawn}
    single = masks(ContiguousGaps(0.25, max_gaps=1), (16,), number=600)
    # 13 places, equally likely; the rarest of them is missed by 600 draws with probability 1e-20.
    assert {start for mask in single for start, _ in gaps_of(mask)} == set(range(13))
    counts = np.bincount([gaps_of(mask)[0][0] for mask in single], minlength=13)
    assert scipy.stats.chisquare(counts).pvalue > 1e-6  # false alarm 1e-6


def test_times_are_missed_with_all_their_components():
    drawn = masks(ContiguousGaps(0.5, max_gaps=2), (8, 3))
    assert np.all(drawn == drawn[:, :, :1])
    assert np.all((~drawn[:, :, 0]).sum(axis=1) == 4)


def test_dropouts_have_their_rate_entry_by_entry():
    """Rate within 5 binomial standard errors, and neighbours uncorrelated within 5 / sqrt(N)."""
    drawn = masks(Dropouts(0.3), (10, 4), number=2000)
    n = drawn.size
    assert abs((~drawn).mean() - 0.3) <= 5 * np.sqrt(0.3 * 0.7 / n)
    flat = (~drawn).reshape(-1, 4).astype(float)
    correlations = np.corrcoef(flat.T)[np.triu_indices(4, 1)]
    assert np.all(np.abs(correlations) <= 5 / np.sqrt(len(flat)))


def test_dropouts_draw_a_rate_for_every_event():
    """Shares of 400 entries: uniform on (0.2, 0.8) plus binomial noise, variance in closed form.

    The mean of 2000 events lies within 5 standard errors (6e-7); the variance too, its standard
    error bounded by that of a variable with a normal's kurtosis (the truth is flatter).
    """
    shares = (~masks(Dropouts(0.2, 0.8), (400,), number=2000)).mean(axis=1)
    variance = 0.6**2 / 12 + (0.5 - 0.25 - 0.6**2 / 12) / 400
    assert abs(shares.mean() - 0.5) <= 5 * np.sqrt(variance / 2000)
    assert abs(shares.var() - variance) <= 5 * variance * np.sqrt(2 / 2000)


def test_the_ends_of_dropouts_are_exact():
    assert masks(Dropouts(0.0), (50,)).all()
    assert not masks(Dropouts(1.0), (50,)).any()


@given(
    n=LENGTHS,
    visit=st.sampled_from([(1, 1), (3, 1), (5, 2), (4, 4)]),
    seed=SEEDS,
)
def test_revisits_are_periodic(n, visit, seed):
    period, seen = visit
    for mask in masks(PeriodicRevisit(period, seen), (n,), number=8, seed=seed):
        assert np.array_equal(mask[period:], mask[: max(n - period, 0)])
        for start in range(n - period + 1):
            assert mask[start : start + period].sum() == seen
        # A visit lasts `seen` times in a row, but for the ends of the record.
        inner = [k for s, k in gaps_of(mask) if s > 0 and s + k < n]
        assert all(k == period - seen for k in inner)


def test_every_phase_of_a_revisit_comes_up():
    drawn = masks(PeriodicRevisit(5, 2), (5,), number=200)
    assert len({tuple(mask) for mask in drawn.tolist()}) == 5


def test_all_or_nothing():
    assert masks(NoGaps(), (4, 2)).all()
    assert not masks(AllMissing(), (4, 2)).any()


def test_a_fixed_mask_is_itself_and_fits_its_shape_only():
    mask = np.array([[True, False], [False, True]])
    assert np.array_equal(FixedMask(jnp.asarray(mask))(jax.random.key(0), (2, 2)), mask)
    with pytest.raises(ValueError, match=r"mask of shape \(3,\), got \(2, 2\)"):
        FixedMask(jnp.asarray(mask))(jax.random.key(0), (3,))


def test_mixed_gaps_draw_each_pattern_with_its_weight():
    """Share of one of two patterns within 5 binomial standard errors: false alarm 6e-7."""
    n = 4000
    drawn = masks(MixedGaps([NoGaps(), AllMissing(), Dropouts(0.5)], [3.0, 1.0, 0.0]), (6,), n)
    assert np.all(drawn.all(axis=1) | ~drawn.any(axis=1))
    assert abs(drawn[:, 0].mean() - 0.75) <= 5 * np.sqrt(0.75 * 0.25 / n)
    equal = masks(MixedGaps((NoGaps(), AllMissing())), (6,), n)
    assert abs(equal[:, 0].mean() - 0.5) <= 5 * np.sqrt(0.25 / n)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ContiguousGaps(-0.1), r"0 <= low <= high <= 1, got -0.1, -0.1"),
        (lambda: ContiguousGaps(0.5, 0.4), r"0 <= low <= high <= 1, got 0.5, 0.4"),
        (lambda: ContiguousGaps(0.5, 1.1), r"0 <= low <= high <= 1, got 0.5, 1.1"),
        (lambda: ContiguousGaps(float("nan")), r"0 <= low <= high <= 1, got nan"),
        (lambda: ContiguousGaps(0.5, max_gaps=0), r"max_gaps >= 1, got 0"),
        (lambda: Dropouts(1.5), r"probabilities 0 <= low <= high <= 1, got 1.5"),
        (lambda: Dropouts(0.5, 0.1), r"probabilities 0 <= low <= high <= 1, got 0.5, 0.1"),
        (lambda: PeriodicRevisit(3, 4), r"1 <= seen <= period, got 4, 3"),
        (lambda: PeriodicRevisit(0, 0), r"1 <= seen <= period, got 0, 0"),
        (lambda: MixedGaps([]), r"at least one gap pattern"),
        (lambda: MixedGaps([NoGaps()], [0.5, 0.5]), r"expected 1 weights, got shape \(2,\)"),
        (lambda: MixedGaps([NoGaps(), AllMissing()], [1.0, -1.0]), r"weights >= 0"),
        (lambda: MixedGaps([NoGaps(), AllMissing()], [0.0, 0.0]), r"at least one of them pos"),
        (lambda: MixedGaps([NoGaps(), AllMissing()], [np.nan, 1.0]), r"weights >= 0"),
    ],
)
def test_bad_arguments_are_refused_with_their_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


PATTERNS = {
    "none": NoGaps(),
    "all": AllMissing(),
    "contiguous": ContiguousGaps(0.0, 1.0, max_gaps=3),
    "dropouts": Dropouts(0.1, 0.9),
    "revisit": PeriodicRevisit(4, 2),
    "fixed": FixedMask(jnp.arange(12) % 3 > 0),
    "mixed": MixedGaps([ContiguousGaps(0.5, max_gaps=2), Dropouts(0.5)]),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_compile_map_and_repeat(name):
    """Compiled, mapped and plain draws are the same; another key gives another mask."""
    pattern, shape = PATTERNS[name], (12,)
    keys = jax.random.split(jax.random.key(5), 8)
    plain = np.stack([np.asarray(pattern(key, shape)) for key in keys])
    assert plain.dtype == np.bool_
    compiled = jax.jit(lambda key: pattern(key, shape))
    np.testing.assert_array_equal(plain, np.stack([np.asarray(compiled(key)) for key in keys]))
    np.testing.assert_array_equal(plain, jax.vmap(compiled)(keys))
    if name in ("contiguous", "dropouts", "revisit", "mixed"):
        assert len({tuple(mask) for mask in plain.tolist()}) > 1
    np.testing.assert_array_equal(plain[0], pattern.times(keys[0], 12))


# --- the slider's gap -------------------------------------------------------------------------


@given(n=LENGTHS, start=st.integers(0, 30), length=st.integers(0, 30))
def test_gap_is_where_it_says(n, start, length):
    want = np.ones(n, bool)
    want[start : start + length] = False
    np.testing.assert_array_equal(gap(n, start, length), want)


@pytest.mark.parametrize(
    ("start", "length", "seen"), [(0, 0, 5), (0, 5, 0), (4, 1, 4), (5, 3, 5), (3, 99, 3), (0, 1, 4)]
)
def test_gap_at_its_ends(start, length, seen):
    moving = jax.jit(lambda start, length: gap(5, start, length))
    assert int(moving(start, length).sum()) == seen
