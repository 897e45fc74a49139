"""The negative log-likelihood is a mean over events; the ELBO is log Z minus a divergence."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from amortlib.encoders import AbstractEncoder
from amortlib.energy import Energy, GibbsPosterior
from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov, condition, kl
from amortlib.heads import AbstractHead
from amortlib.objectives import Lesson, ModeMatch, NegativeELBO, elbo, nll
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import InverseProblem, ornstein_uhlenbeck
from amortlib.training import fit
from amortlib.types import Event

KEY = jax.random.key(0)
T = 4
NOISE = 0.4
NLL = eqx.filter_jit(nll)


@pytest.fixture(scope="module")
def problem() -> InverseProblem:
    return ornstein_uhlenbeck(T, noise=NOISE)


@pytest.fixture(scope="module")
def model(problem) -> AmortizedPosterior:
    return regression_posterior(
        "cholesky", key=KEY, prior=problem.prior, width=6, depth=1, features=4
    )


def test_it_is_the_mean_over_events_of_scipy_s_log_density(problem, model):
    """Single precision against double: 1e-5."""
    x, events = problem.batch(jax.random.key(1), 8)
    said = eqx.filter_jit(jax.vmap(lambda e: (model.mean(e), model.covariance(e))))(events)
    want = [
        -scipy.stats.multivariate_normal(mean, cov).logpdf(state)
        for mean, cov, state in zip(*(np.asarray(a, float) for a in (*said, x)), strict=True)
    ]
    np.testing.assert_allclose(NLL(model, (x, events), KEY), np.mean(want), rtol=1e-5)


def test_the_same_batch_twice_is_the_same_loss(problem, model):
    """A mean over events: the size of a batch is not a rate of learning."""
    batch = problem.batch(jax.random.key(2), 8)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)
    once = NLL(model, batch, KEY)
    np.testing.assert_allclose(NLL(model, twice, KEY), once, rtol=1e-5)


def test_it_draws_nothing(problem, model):
    batch = problem.batch(jax.random.key(2), 8)
    assert NLL(model, batch, KEY) == NLL(model, batch, jax.random.key(77))


def test_its_expectation_is_divergence_plus_entropy(problem, model):
    """E[-log q(x | y)] = E[KL(p(. | y) || q(. | y)) + H(p(. | y))], both known in closed form.

    Event by event the two sides differ by what x happened to be, with mean zero: over 20 000
    events the mean difference lies within 5 standard errors (false alarm 6e-7). Had components
    been averaged and not summed, it would be out by more than half of either side.
    """
    n = 20_000
    batch = problem.batch(jax.random.key(3), n)

    @eqx.filter_jit
    def both(model, batch):
        def one(x, event):
            exact = condition(problem.prior, jnp.eye(T), event)
            log_det = jnp.sum(jnp.log(jnp.diagonal(exact.chol)))
            entropy = log_det + 0.5 * T * jnp.log(2 * jnp.pi * jnp.e)
            return -model.log_prob(x, event), kl(exact, model(event)) + entropy

        return jax.vmap(one)(*batch)

    drawn, expected = (np.asarray(a, float) for a in both(model, batch))
    error = np.std(drawn - expected) / np.sqrt(n)
    assert error < 0.02 * expected.mean()
    assert abs(drawn.mean() - expected.mean()) <= 5 * error
    np.testing.assert_allclose(NLL(model, batch, KEY), drawn.mean(), rtol=1e-4)


# --- the evidence lower bound -----------------------------------------------------------------

D, P = 3, 5  # a small linear problem: x has 3 components, y has 5 entries
H = np.random.default_rng(5).normal(size=(P, D))
SD = np.array([0.5, 0.8, 0.4, 1.1, 0.7])
LINEAR_EVENT = Event(
    jnp.array([0.3, -1.2, 0.8, 2.0, -0.4]),
    jnp.array([True, True, False, True, True]),
    jnp.array(SD, jnp.float32),
)


class Unnamed(AbstractDistribution):
    """A Gaussian of which the objective does not know that it is one."""

    exact_log_prob: ClassVar[bool] = True

    inner: Gaussian

    def log_prob(self, x):
        return self.inner.log_prob(x)

    def sample(self, n, *, key):
        return self.inner.sample(n, key=key)

    def mode(self):
        return self.inner.mode()

    def mean(self):
        return self.inner.mean()

    def covariance(self):
        return self.inner.covariance()

    def sd(self):
        return self.inner.sd()


@pytest.fixture(scope="module")
def energy() -> Energy:
    root = jnp.array([[1.3, 0.0, 0.0], [0.4, 0.9, 0.0], [-0.2, 0.3, 0.7]])
    operator = jnp.array(H, jnp.float32)
    return Energy(Gaussian(jnp.array([0.2, -0.1, 0.5]), root), lambda x: operator @ x)


def log_z_by_scipy(energy: Energy, event: Event) -> float:
    """log Z from the density of y under the model, with the constants of J taken out."""
    seen = np.asarray(event.mask)
    h, sd = H[seen], SD[seen]
    cov_b = np.asarray(energy.prior.covariance(), float)
    loc = h @ np.asarray(energy.prior.loc, float)
    y = np.asarray(event.y, float)[seen]
    log_evidence = scipy.stats.multivariate_normal(loc, h @ cov_b @ h.T + np.diag(sd**2)).logpdf(y)
    constants = 0.5 * (D + seen.sum()) * np.log(2 * np.pi)
    return log_evidence + constants + 0.5 * np.linalg.slogdet(cov_b)[1] + np.log(sd).sum()


def somewhere_else(exact: Gaussian) -> Gaussian:
    """A density that is wrong in its mean, its widths and its correlations."""
    root = jnp.array([[0.8, 0.0, 0.0], [-0.3, 0.5, 0.0], [0.1, 0.2, 0.9]])
    return Gaussian(exact.loc + jnp.array([0.3, -0.5, 0.2]), root)


def many(q, energy: Energy, event: Event, n: int, keys) -> np.ndarray:
    run = eqx.filter_jit(lambda q, keys: jax.vmap(lambda k: elbo(q, energy, event, n, key=k))(keys))
    return np.asarray(run(q, keys), float)


@pytest.mark.parametrize("n", [1, 4, 64])
def test_at_the_posterior_the_bound_is_log_z(energy, n):
    """There J is its minimum plus half a chi-squared number with D degrees of freedom.

    So the mean over K keys of n draws has the standard error sqrt(D / (2 n K)), known and not
    estimated. Within 5 of them: false alarm 6e-7 for each n, up to the skewness of a mean of 6400
    or more draws. The spread over keys has a relative error of sqrt((2 + 12 / (n D)) / (4 K)),
    again within 5. log Z comes from scipy's density of y.
    """
    k = 6400
    exact = GibbsPosterior(energy).gaussian(LINEAR_EVENT)
    values = many(exact, energy, LINEAR_EVENT, n, jax.random.split(jax.random.key(4), k))
    want = log_z_by_scipy(energy, LINEAR_EVENT)
    np.testing.assert_allclose(GibbsPosterior(energy).log_normaliser(LINEAR_EVENT), want, rtol=1e-5)
    spread = np.sqrt(D / (2 * n))
    assert abs(values.mean() - want) <= 5 * spread / np.sqrt(k) + 1e-5
    assert abs(values.std() / spread - 1) <= 5 * np.sqrt((2 + 12 / (n * D)) / (4 * k))


def test_without_a_known_entropy_the_bound_is_log_z_draw_by_draw(energy):
    """-J - log q is the constant log Z at the posterior: no Monte Carlo error, rounding alone."""
    exact = Unnamed(GibbsPosterior(energy).gaussian(LINEAR_EVENT))
    values = many(exact, energy, LINEAR_EVENT, 1, jax.random.split(jax.random.key(5), 100))
    np.testing.assert_allclose(values, log_z_by_scipy(energy, LINEAR_EVENT), atol=3e-5)


@pytest.mark.parametrize("form", ["dense", "markov", "unnamed"])
def test_elsewhere_it_is_lower_by_the_reverse_divergence(energy, form):
    """Over 10 000 draws within 5 standard errors of log Z - KL(q || p): false alarm 6e-7 each.

    The forward divergence, in its place, would be out by 20 standard errors and more.
    """
    exact = GibbsPosterior(energy).gaussian(LINEAR_EVENT)
    q = somewhere_else(exact)
    want = log_z_by_scipy(energy, LINEAR_EVENT) - float(kl(q, exact))
    other = log_z_by_scipy(energy, LINEAR_EVENT) - float(kl(exact, q))
    form = {
        "dense": lambda: q,
        "markov": lambda: GaussMarkov.from_gaussian(q, D),
        "unnamed": lambda: Unnamed(q),
    }[form]()
    values = many(form, energy, LINEAR_EVENT, 10, jax.random.split(jax.random.key(6), 1000))
    error = values.std() / np.sqrt(values.size)
    assert abs(values.mean() - want) <= 5 * error
    assert abs(values.mean() - other) > 20 * error


def test_its_gradient_is_unbiased(energy):
    """J is a parabola with Hessian A, so E grad J = grad J(mean), and the gradients are known.

    With respect to the mean it is -grad J(mean); to the factor L it is the lower triangle of
    -A L plus diag(1 / L_ii), where A L says what J wants and 1 / L_ii what the entropy does.
    Nine numbers within 5 standard errors of 20 000 one-draw gradients: false alarm 6e-6.
    """
    exact = GibbsPosterior(energy).gaussian(LINEAR_EVENT)
    q = somewhere_else(exact)
    curvature = exact.precision()

    @eqx.filter_jit
    def gradients(q, keys):
        return jax.vmap(lambda k: jax.grad(lambda q: elbo(q, energy, LINEAR_EVENT, 1, key=k))(q))(
            keys
        )

    found = gradients(q, jax.random.split(jax.random.key(7), 20_000))
    want_loc = -curvature @ (q.loc - exact.loc)
    want_chol = jnp.diag(1 / jnp.diagonal(q.chol)) - curvature @ q.chol
    rows, cols = np.tril_indices(D)
    drawn = np.concatenate([found.loc, found.chol[:, rows, cols]], axis=1).astype(float)
    want = np.concatenate([want_loc, want_chol[rows, cols]]).astype(float)
    error = drawn.std(axis=0) / np.sqrt(len(drawn))
    assert np.all(np.abs(drawn.mean(axis=0) - want) <= 5 * error)
    assert np.all(np.abs(want).max() > 20 * error)


def test_what_stands_in_a_gap_changes_no_bit(problem, model):
    energy = Energy(problem.prior, problem.forward)
    loss = eqx.filter_jit(eqx.filter_value_and_grad(NegativeELBO(energy)))
    x, events = problem.batch(jax.random.key(8), 8)
    assert not bool(events.mask.all())
    clean, slope = loss(model, (x, events), KEY)
    for filler in (-999.0, jnp.nan):
        dirty = Event(jnp.where(events.mask, events.y, filler), events.mask, events.sd)
        value, other = loss(model, (x, dirty), KEY)
        assert value == clean
        assert all(map(jnp.array_equal, jax.tree.leaves(slope), jax.tree.leaves(other)))


def test_the_states_of_the_pairs_are_not_read(problem, model):
    loss = eqx.filter_jit(NegativeELBO(Energy(problem.prior, problem.forward)))
    x, events = problem.batch(jax.random.key(8), 8)
    assert loss(model, (x, events), KEY) == loss(model, (jnp.full_like(x, jnp.nan), events), KEY)


def test_it_draws_from_its_key_and_each_event_draws_its_own(problem, model):
    """The same event four times: with one set of draws for all, the mean would be each of them."""
    energy = Energy(problem.prior, problem.forward)
    loss = eqx.filter_jit(NegativeELBO(energy, samples=1))
    x, events = problem.batch(jax.random.key(8), 1)
    four = jax.tree.map(lambda a: jnp.repeat(a, 4, axis=0), (x, events))
    assert loss(model, four, KEY) == loss(model, four, KEY)
    assert loss(model, four, KEY) != loss(model, four, jax.random.key(77))
    one = jax.tree.map(lambda a: a[0], events)
    keys = jax.random.split(KEY, 4)
    apart = eqx.filter_jit(lambda m: jax.vmap(lambda k: elbo(m(one), energy, one, 1, key=k))(keys))
    values = np.asarray(apart(model))
    assert np.unique(values).size == 4
    np.testing.assert_allclose(loss(model, four, KEY), -values.mean(), rtol=1e-5)


def test_the_same_batch_twice_is_the_same_expected_loss(problem, model):
    """A mean over events. The draws differ, so over 500 keys: within 5 standard errors (6e-7).

    A sum over events would be twice as much.
    """
    loss = NegativeELBO(Energy(problem.prior, problem.forward))
    batch = problem.batch(jax.random.key(2), 8)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)

    @eqx.filter_jit
    def over_keys(model, batch, keys):
        return jax.vmap(lambda k: loss(model, batch, k))(keys)

    one = np.asarray(over_keys(model, batch, jax.random.split(jax.random.key(9), 500)), float)
    two = np.asarray(over_keys(model, twice, jax.random.split(jax.random.key(10), 500)), float)
    error = np.sqrt((one.var() + two.var()) / 500)
    assert abs(one.mean() - two.mean()) <= 5 * error
    assert error < 0.01 * abs(one.mean())


def test_fit_with_it_finds_the_posterior_of_a_path(problem):
    """No state is shown to it, and one event is fitted: the answer is that of conditioning.

    A free Gaussian of four numbers against the exact posterior; it starts at the prior. The rate
    falls to nothing, so that what is left of the draws is averaged: 0.01 nats is a mean off by
    0.07 sd in each component.
    """
    _, events = problem.batch(jax.random.key(11), 1)
    event = jax.tree.map(lambda a: a[0], events)
    exact = jax.jit(lambda e: condition(problem.prior, jnp.eye(T), e))(event)

    class Free(eqx.Module):
        loc: jax.Array
        root: jax.Array

        def __call__(self, event):
            low = jnp.tril(self.root, -1) + jnp.diag(jnp.exp(jnp.diagonal(self.root)))
            return Gaussian(self.loc, low)

    start = Free(jnp.zeros(T), jnp.zeros((T, T)))
    found = fit(
        start,
        NegativeELBO(Energy(problem.prior, problem.forward), samples=32),
        lambda key: (jnp.full((1, T), jnp.nan), events),
        key=jax.random.key(12),
        steps=1500,
        every=500,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.03, 1500)),
        progress=False,
    )
    divergence = jax.jit(kl)
    assert divergence(start(event), exact) > 0.5
    assert divergence(found.model(event), exact) < 0.01


@pytest.mark.parametrize("n", [0, -3])
def test_no_draw_is_refused(energy, n):
    with pytest.raises(ValueError, match=f"n={n}"):
        elbo(energy.prior, energy, LINEAR_EVENT, n, key=KEY)
    with pytest.raises(ValueError, match=f"got {n}"):
        NegativeELBO(energy, samples=n)


class Values(AbstractEncoder):
    """What was seen is the context."""

    obs_shape: tuple[int, ...] | None = None
    uses_sd: bool = False

    def __call__(self, event):
        return event.values


class LinearHead(AbstractHead):
    """A Gaussian whose mode is linear in its context."""

    matrix: jax.Array

    def __call__(self, context):
        return Gaussian(self.matrix @ context, jnp.eye(2))


def linear(matrix) -> AmortizedPosterior:
    return AmortizedPosterior(Values(), LinearHead(jnp.asarray(matrix)))


@pytest.fixture(scope="module")
def lessons() -> tuple[Lesson, Event, np.ndarray]:
    """Three events with gaps, and a teacher whose mode is linear in what was seen."""
    rng = np.random.default_rng(0)
    y, mask = rng.normal(size=(3, T)), np.array([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    right = rng.normal(size=(2, T)).astype(np.float32)
    jacobian = np.where(mask[:, None], right, 0.0).astype(np.float32)
    chol = np.linalg.cholesky(np.eye(2) + 0.3).astype(np.float32)[None].repeat(3, 0)
    mode = np.einsum("eij,ej->ei", jacobian, y).astype(np.float32)
    # What stands at a masked entry is as people have it, in the event and in the lesson.
    jacobian = np.where(mask[:, None], jacobian, 7.0).astype(np.float32)
    events = Event(jnp.asarray(np.where(mask, y, np.nan), jnp.float32), jnp.asarray(mask))
    return Lesson(*map(jnp.asarray, (mode, chol, jacobian))), events, right


def test_a_head_that_is_the_teacher_has_nothing_to_learn(lessons):
    lesson, events, right = lessons
    loss = ModeMatch(2.0)(linear(right), (lesson, events), KEY)
    assert 0.0 <= loss < 1e-10


@pytest.mark.parametrize("column", range(T))
def test_matching_modes_and_jacobians_is_the_formula(lessons, column):
    """Wrong in one column alone, the signs drawn cancel: equal to numpy, whatever the key."""
    lesson, events, right = lessons
    wrong = right.copy()
    wrong[:, column] += 0.5
    off = np.where(events.mask[:, None], wrong - right, 0.0)
    miss = np.einsum("eij,ej->ei", off, np.where(events.mask, np.nan_to_num(events.y), 0.0))
    white = np.linalg.solve(np.asarray(lesson.chol), miss[..., None])[..., 0]
    size = (np.where(events.mask[:, None], right, 0.0) ** 2).sum((1, 2))
    share = (off**2).sum((1, 2)) / np.where(size > 0, size, 1.0)
    for slope in (0.0, 0.7):
        want = np.mean((white**2).mean(1) + slope * share)
        got = ModeMatch(slope)(linear(wrong), (lesson, events), KEY)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)


def test_random_signs_measure_the_whole_jacobian(lessons):
    """Wrong everywhere: the mean over 4,000 keys lies within five standard errors of the squared
    Frobenius norm (false alarm 6e-7), and the keys do not all say the same."""
    lesson, events, right = lessons
    wrong = right + np.random.default_rng(1).normal(size=right.shape).astype(np.float32)
    batch, model = (lesson, events), linear(wrong)
    run = eqx.filter_jit(lambda key: ModeMatch(1.0)(model, batch, key))
    values = np.asarray(jax.vmap(run)(jax.random.split(KEY, 4000)))
    off = np.where(events.mask[:, None], wrong - right, 0.0)
    size = (np.where(events.mask[:, None], right, 0.0) ** 2).sum((1, 2))
    share = ((off**2).sum((1, 2)) / np.where(size > 0, size, 1.0)).mean()
    values = values - ModeMatch(0.0)(model, batch, KEY)
    assert values.std() > 0
    assert abs(values.mean() - share) < 5 * values.std() / np.sqrt(4000)
    many = ModeMatch(1.0, probes=4000)(model, batch, KEY) - ModeMatch(0.0)(model, batch, KEY)
    assert abs(many - share) < 5 * values.std() / np.sqrt(4000)


def test_training_on_slopes_mends_slopes(problem):
    """Two trainings alike but for the Jacobian's part. On fresh events the head that was taught
    slopes is nearer to the teacher's, and both are nearer in the mode than they began."""
    model = regression_posterior(
        "cholesky", key=KEY, prior=problem.prior, width=24, depth=1, features=12
    )

    def taught(key, n):
        _, events = problem.batch(key, n)

        def exact(event):
            q = condition(problem.prior, jnp.eye(T), event)
            move = jax.jacfwd(
                lambda y: (
                    condition(problem.prior, jnp.eye(T), eqx.tree_at(lambda e: e.y, event, y)).loc
                )
            )
            return Lesson(q.loc, q.chol, move(event.y))

        return jax.vmap(exact)(events), events

    lesson, events = taught(jax.random.key(9), 256)

    @eqx.filter_jit
    def judged(model):
        def one(lesson, event):
            move = jax.jacfwd(lambda y: model.mode(eqx.tree_at(lambda e: e.y, event, y)))(event.y)
            return jnp.sum((move - lesson.jacobian) ** 2), jnp.sum(
                (model.mode(event) - lesson.mode) ** 2
            )

        slope, miss = jax.vmap(one)(lesson, events)
        return jnp.mean(slope), jnp.mean(miss)

    before = judged(model)
    after = {}
    for slope in (0.0, 1.0):
        run = fit(
            model,
            ModeMatch(slope),
            lambda key: taught(key, 64),
            key=KEY,
            steps=300,
            optimizer=optax.adam(1e-2),
            progress=False,
        )
        after[slope] = judged(run.model)
    assert after[1.0][0] < 0.8 * after[0.0][0]
    assert after[1.0][1] < before[1]
    assert after[0.0][1] < before[1]


@pytest.mark.parametrize(("slope", "probes"), [(-1.0, 1), (1.0, 0)])
def test_a_weight_below_nothing_or_no_direction_is_refused(slope, probes):
    with pytest.raises(ValueError, match="expected slope >= 0 and probes >= 1"):
        ModeMatch(slope, probes)
