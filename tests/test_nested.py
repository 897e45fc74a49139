"""Nested Laplace: exact where J lets it be, a density everywhere, each minimum counted once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from amortlib.encoders import FlatEncoder
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.heads import CholeskyHead
from amortlib.laplace import laplace
from amortlib.nested import (
    NestedEncoder,
    NestedHead,
    SharedHead,
    nested_laplace,
    nested_posterior,
)
from amortlib.nested.mixture import told_apart
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import ornstein_uhlenbeck
from amortlib.search import Field, search_ends, search_posterior
from amortlib.types import Event, to_double
from tests.two_minima import ENERGY, KEY, PRIOR, guess

pytestmark = pytest.mark.slow

FIELD = Field((4, 4, 2, 2))
SIDE = 401
"""Points along each side of the grid that densities are added up on."""


def parabola(x):
    """Seen through x_2 + x_1^2: a posterior that is a bent ridge, and across it a Gaussian."""
    return (x[1] + x[0] ** 2)[None]


def bent(y: float = 0.0, sd: float = 0.15) -> tuple[Energy, Event]:
    prior = Gaussian(jnp.zeros(2), jnp.diag(jnp.array([1.5, 3.0])))
    event = Event(jnp.array([y]), jnp.ones(1, bool), jnp.full(1, sd))
    return to_double((Energy(prior, parabola), event))


TWO_SIDED = Event(jnp.array([4.0, 0.0, 0.3]), jnp.array([True, False, True]), jnp.full(3, 0.3))


def grid_of(low: float, high: float) -> tuple[jax.Array, float]:
    """Points of a square, and the logarithm of the area of each."""
    x = np.linspace(low, high, SIDE)
    grid = jnp.stack(jnp.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    return grid, 2.0 * np.log(x[1] - x[0])


def on_grid(energy: Energy, event: Event, q, low: float, high: float) -> tuple[np.ndarray, ...]:
    """Points, and the probability of each by exp(-J) and by q."""
    grid, cell = grid_of(low, high)
    log_p = -np.asarray(jax.vmap(lambda x: energy(x, event))(grid))
    p = np.exp(log_p - log_p.max())
    return np.asarray(grid), p / p.sum(), np.exp(np.asarray(jax.vmap(q.log_prob)(grid)) + cell)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    seen = p > 1e-30
    return float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-300))))


def test_a_bent_ridge_is_followed(x64):
    """Its posterior is one along the ridge and a Gaussian across: what is left is the wider share
    (.012 nats) and the straight pieces. A Gaussian at the minimum is off by a hundred times that.
    """
    energy, event = bent()
    v = jnp.zeros(2)
    q = nested_laplace(energy, v, event)
    grid, p, there = on_grid(energy, event, q, -9.0, 9.0)
    assert there.sum() == pytest.approx(1.0, abs=2e-3)
    plain = laplace(energy, energy.prior.colour(v), event)
    _, _, flat = on_grid(energy, event, plain, -9.0, 9.0)
    assert divergence(p, there) < 0.02
    assert divergence(p, flat) > 100 * 0.02
    # The moments are those of the posterior, and Laplace's know nothing of the curve.
    mean = p @ grid
    off = grid - mean
    cov = (off * p[:, None]).T @ off
    np.testing.assert_allclose(q.mean(), mean, atol=0.05)
    np.testing.assert_allclose(q.covariance(), cov, rtol=0.05, atol=0.08)
    np.testing.assert_allclose(q.sd(), np.sqrt(np.diag(cov)), rtol=0.03)
    assert plain.covariance()[1, 1] < 0.05 * cov[1, 1]


def test_the_next_place_is_looked_for_where_the_ridge_leads(x64):
    """Where one step across does not reach the ridge from the place before, its slope does.

    Held to the lowest of a fine row of places across, in widths of the ridge.
    """
    energy, event = bent()
    energy = Energy(energy.prior, lambda x: jnp.sinh(0.15 * parabola(x)) / 0.15)
    q = nested_laplace(energy, jnp.zeros(2), event)
    across = jnp.linspace(-4.0, 4.0, 80_001)
    for i in range(2, 7):
        places = jax.vmap(lambda b, i=i: q.centre + q.axes @ jnp.stack([q.at[i], b]))(across)
        height = jax.vmap(lambda v: energy.at_control(v, event))(places)
        off = q.middle[i, 0] - across[jnp.argmin(height)]
        assert abs(off) < q.width[i, 0, 0]


def test_the_mass_is_the_integral(x64):
    """log_mass is that of exp(-J) over the control variable, to the accuracy of the pieces."""
    energy, event = bent()
    q = nested_laplace(energy, jnp.zeros(2), event)
    grid, cell = grid_of(-9.0, 9.0)
    height = jax.vmap(lambda v: 0.5 * jnp.sum(energy.residual(v, event) ** 2))(grid)
    assert q.log_mass == pytest.approx(float(jax.nn.logsumexp(-height)) + cell, abs=0.01)


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_draws_have_the_density(y, x64):
    """Counts of 40,000 draws in 35 cells against the density added up on a grid.

    By the chi-square of the counts, below which one in a million right samplers stays.
    """
    energy, event = bent(y)
    v = jnp.zeros(2)
    q = nested_laplace(energy, v, event)
    grid, _, there = on_grid(energy, event, q, -9.0, 9.0)
    cuts = np.array([-3.0, -1.5, -0.7, 0.1, 1.0, 2.2])

    def counts(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        column = np.digitize(x[:, 0], cuts)
        # Above or below the ridge, near or far: the spread across it is tested, too.
        across = x[:, 1] + x[:, 0] ** 2 - y
        row = np.digitize(across, [-0.35, -0.05, 0.05, 0.35])
        return np.bincount(5 * column + row, weight, minlength=35)

    n = 40_000
    drawn = np.asarray(q.sample(n, key=jax.random.key(2)))
    seen, expected = counts(drawn, np.ones(n)), n * counts(grid, there / there.sum())
    kept = expected > 20
    assert kept.sum() > 20
    score = np.sum((seen - expected)[kept] ** 2 / expected[kept])
    # The density in a cell of the grid is taken at its middle: a part in a hundred at most.
    bias = np.sum((0.01 * expected[kept]) ** 2 / expected[kept])
    assert score < chi2.ppf(1 - 1e-6, kept.sum()) + bias


def test_the_share_before_a_place_leads_back_to_it(x64):
    """Within a cell, rising, falling or flat, and in either tail, by the trapezoidal rule."""
    energy, event = bent()
    q = nested_laplace(energy, jnp.zeros(2), event)
    steps = jnp.concatenate([jnp.linspace(0.0, 2.0, 33), jnp.full(8, 2.0), jnp.zeros(24)])
    q = eqx.tree_at(lambda q: (q.log_density, q.fall), q, (steps, jnp.array([0.5, 2.0])))
    q = q.normalised()
    a = np.linspace(q.grid[0] - 40.0, q.grid[-1] + 12.0, 2_000_001)
    density = np.exp(np.asarray(jax.vmap(q.log_along)(a)))
    before = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(a))])
    assert before[-1] == pytest.approx(1.0, abs=1e-5)
    u = np.array([1e-4, 1e-3, 0.02, 0.1, 0.3, 0.5, 0.8, 0.95, 0.999, 0.9999])
    places = np.asarray(jax.vmap(q.along)(jnp.asarray(u)))
    assert places[0] < q.grid[0]
    assert places[-1] > q.grid[-1]
    np.testing.assert_allclose(np.interp(places, a, before), u, atol=2e-5)


def test_where_j_is_a_parabola_nothing_is_changed(x64):
    """On a grid of six states with two missed: the exact Gaussian, but for its wider share."""
    prior = to_double(ornstein_uhlenbeck(6).prior)
    event = Event(
        jnp.array([0.3, jnp.nan, jnp.nan, -0.8, 0.1, 1.2]),
        jnp.array([True, False, False, True, True, True]),
        jnp.full(6, 0.4),
    )
    energy = Energy(prior, lambda x: x)
    hessian = jax.hessian(lambda v: 0.5 * jnp.sum(energy.residual(v, event) ** 2))(jnp.zeros(6))
    slope = jax.grad(lambda v: 0.5 * jnp.sum(energy.residual(v, event) ** 2))(jnp.zeros(6))
    q = nested_laplace(energy, -jnp.linalg.solve(hessian, slope), event)
    exact = laplace(energy, q.mode(), event)
    np.testing.assert_allclose(q.mean(), exact.mean(), atol=1e-6)
    axes = np.asarray(q.axes)
    curvature = np.diag(axes.T @ np.asarray(hessian) @ axes)
    x = exact.sample(200, key=KEY)
    z = (np.asarray(jax.vmap(prior.whiten)(x)) - np.asarray(q.centre)) @ axes * np.sqrt(curvature)
    # 3% of what is across, five of the six directions, is 2.2 times as wide.
    across = np.sum(z[:, 1:] ** 2, axis=1)
    wider = np.log(0.97 + 0.03 * np.exp(0.5 * across * (1.0 - 1.0 / 2.2**2)) / 2.2**5)
    expected = np.asarray(jax.vmap(exact.log_prob)(x)) + wider
    np.testing.assert_allclose(jax.vmap(q.log_prob)(x), expected, atol=0.02)


def test_a_model_that_breaks_down_leaves_a_density(x64):
    """Where the forward model is no number the ridge ends, and what is left adds up to one."""
    prior = to_double(Gaussian(jnp.zeros(2), jnp.eye(2)))

    def fragile(x):
        return jnp.stack([jnp.where(x[0] < 1.5, 0.2 * x[0], jnp.nan), 3.0 * x[1] + x[0]])

    event = to_double(Event(jnp.array([0.0, 0.2]), jnp.ones(2, bool), jnp.full(2, 1.0)))
    energy = Energy(prior, fragile)
    hessian = jax.hessian(lambda v: 0.5 * jnp.sum(energy.residual(v, event) ** 2))(jnp.zeros(2))
    slope = jax.grad(lambda v: 0.5 * jnp.sum(energy.residual(v, event) ** 2))(jnp.zeros(2))
    q = nested_laplace(energy, -jnp.linalg.solve(hessian, slope), event)
    for leaf in jax.tree.leaves(eqx.filter(q, eqx.is_array)):
        assert np.all(np.isfinite(leaf))
    grid, cell = grid_of(-7.0, 7.0)
    there = np.exp(np.asarray(jax.vmap(q.log_prob)(grid)) + cell)
    assert there.sum() == pytest.approx(1.0, abs=0.01)
    beyond = np.asarray(grid)[:, 0] > 2.5
    assert there[beyond].sum() < 1e-3 < there[~beyond].sum()
    assert np.isfinite(q.sample(1000, key=KEY)).all()


def test_each_minimum_counts_once(x64):
    """However many ends went there: three in one minimum and one in another are two ridges."""
    energy, event = to_double((ENERGY, TWO_SIDED))
    starts = jnp.array([[1.0, 0.5], [-3.0, 0.5]])
    two = search_ends(energy, starts, event, field=Field((2,) * 12))
    ridges = jax.vmap(lambda v: nested_laplace(energy, v, event))
    apart = ridges(two).log_mass
    told = told_apart(ridges(two[jnp.array([0, 0, 1, 0])])).log_mass
    assert np.abs(two[0] - two[1]).max() > 1.0
    np.testing.assert_allclose(told[jnp.array([0, 1, 3])], apart[0] - np.log(3), atol=0.06)
    np.testing.assert_allclose(told[2], apart[1], atol=0.06)


def test_both_minima_have_their_mass():
    """Eight ends in two minima: the density is that of exp(-J) on either side, on a grid."""
    q = nested_posterior(guess(8), ENERGY, field=Field((8,) * 6))(TWO_SIDED)
    grid, p, there = on_grid(ENERGY, TWO_SIDED, q, -7.0, 7.0)
    assert there.sum() == pytest.approx(1.0, abs=0.02)
    right = grid[:, 0] > 0
    assert 0.05 < p[right].sum() < 0.95
    assert there[right].sum() == pytest.approx(p[right].sum(), abs=0.03)
    assert divergence(p, there) < 0.1
    x = np.asarray(q.sample(20_000, key=KEY))
    # Six standard errors: one in a billion.
    assert (x[:, 0] > 0).mean() == pytest.approx(there[right].sum(), abs=6 * 0.5 / 20_000**0.5)
    np.testing.assert_allclose(q.mean(), x.mean(0), atol=6 * np.max(q.sd()) / 20_000**0.5)
    cov = np.cov(x.T)
    np.testing.assert_allclose(q.covariance(), cov, atol=0.06 * cov.max())


def test_the_mode_is_that_of_the_search():
    """Lowest minimum and its derivative, as the gates judge them; and q is nearly highest there."""
    field = Field((8,) * 4)  # which ends in both minima
    nested = nested_posterior(guess(8), ENERGY, field=field)
    plain = search_posterior(guess(8), ENERGY, field=field)
    ask = eqx.filter_jit(lambda q, e: (q.mode(e), q.mode_jacobian(e)))
    (mode, slope), (there, expected) = ask(nested, TWO_SIDED), ask(plain, TWO_SIDED)
    np.testing.assert_allclose(mode, there, atol=1e-5)
    np.testing.assert_allclose(slope, expected, atol=1e-4)
    q = nested(TWO_SIDED)
    draws = q.sample(2000, key=KEY)
    assert q.log_prob(mode) > jnp.max(jax.vmap(q.log_prob)(draws)) - 0.3


def test_a_network_beside_the_ridges_has_the_weight_that_the_net_gives_it():
    """Its density is between the two, at the odds of the doubts; and it can be trained."""
    encoder = FlatEncoder((3,), key=KEY, features=5, width=8, depth=1)
    inner = CholeskyHead(5, 2, key=KEY, centre=PRIOR.loc, scale=PRIOR.sd())
    shape = NestedEncoder(guess(), ENERGY, field=FIELD, beside=encoder)
    context = shape(TWO_SIDED)
    assert context.doubt.shape == (shape.doubts,)
    assert np.isfinite(context.doubt).all()
    head = SharedHead(inner, shape.doubts, 5, key=KEY, centre=0.5, scale=2.0)
    q = head(context)
    share = float(q.share)
    assert 0.1 < share < 0.9
    x = jnp.array([[2.0, -1.0], [0.0, 0.0], [-1.8, 0.5]])
    alone = NestedHead(1e-6)(eqx.tree_at(lambda c: c.beside, context, inner(context.beside)))
    ridges = np.exp(jax.vmap(alone.log_prob)(x))
    far = np.exp(jax.vmap(inner(context.beside).log_prob)(x))
    both = (1.0 - share) * ridges + share * far
    np.testing.assert_allclose(np.exp(jax.vmap(q.log_prob)(x)), both, rtol=1e-3)

    # Where the ridges are right their doubts are small, and larger ones move the weight.
    line = Energy(PRIOR, lambda x: jnp.stack([x[0], x[1], x[0] - x[1]]))
    doubt = NestedEncoder(guess(), line, field=FIELD, beside=encoder)(TWO_SIDED).doubt
    looks = 15  # at five places two across, and at five on the ridge
    # With wide error bars the posterior reaches over the fold between the two minima.
    folded = shape(Event(TWO_SIDED.y, TWO_SIDED.mask, jnp.full(3, 1.5))).doubt
    assert np.abs(doubt[:looks]).max() < 0.1 < np.abs(folded[:looks]).max()
    odds = [head.log_odds(d, context.beside) for d in (context.doubt, context.doubt + 3.0)]
    assert np.abs(odds[0] - odds[1]) > 1e-3

    def loss(parts, x):
        encoder, head = parts
        beside = NestedEncoder(guess(), ENERGY, field=FIELD, beside=encoder)
        return -AmortizedPosterior(beside, head).log_prob(x, TWO_SIDED)

    slope = eqx.filter_jit(eqx.filter_grad(loss))((encoder, head), x[0])
    for part in (slope[0], slope[1].head, slope[1].net):
        leaves = jax.tree.leaves(part)
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        assert max(np.abs(leaf).max() for leaf in leaves) > 0.0


def test_masked_values_are_not_looked_at_and_nothing_compiles_twice():
    compiled = []

    @eqx.filter_jit
    def run(posterior, event):
        compiled.append(None)
        q = posterior(event)
        return q.sample(20, key=KEY), q.log_prob(PRIOR.loc), q.mean(), q.sd()

    posterior = nested_posterior(guess(), ENERGY, field=FIELD)
    first = run(posterior, TWO_SIDED)
    blind = Event(TWO_SIDED.y.at[1].set(jnp.nan), TWO_SIDED.mask, TWO_SIDED.sd)
    for a, b in zip(first, run(posterior, blind), strict=True):
        np.testing.assert_array_equal(a, b)
    seen = run(posterior, Event(TWO_SIDED.y, jnp.ones(3, bool), TWO_SIDED.sd))
    assert np.abs(seen[2] - first[2]).max() > 1e-3
    assert len(compiled) == 1


def test_what_does_not_fit_is_refused():
    one = Gaussian(jnp.zeros(1), jnp.eye(1))
    event = Event(jnp.zeros(1), jnp.ones(1, bool), jnp.ones(1))
    with pytest.raises(ValueError, match="at least two numbers, got 1"):
        nested_laplace(Energy(one, lambda x: x), jnp.zeros(1), event)
    with pytest.raises(ValueError, match="at least one step, got none"):
        nested_posterior(guess(), ENERGY, field=Field(()))
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1, got"):
            NestedHead(share)
    single = AmortizedPosterior(guess().encoder, CholeskyHead(6, 2, key=KEY))
    with pytest.raises(TypeError, match="a mixture, got Gauss"):
        nested_posterior(single, ENERGY, field=FIELD)(TWO_SIDED)
    q = nested_posterior(guess(), ENERGY, field=FIELD)(TWO_SIDED)
    with pytest.raises(ValueError, match="at least one sample, got n=0"):
        q.sample(0, key=KEY)
    with pytest.raises(ValueError, match="at least one sample, got n=0"):
        jax.tree.map(lambda leaf: leaf[0], q.ridges).sample(0, key=KEY)
