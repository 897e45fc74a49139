"""The public tasks: simulators against their likelihoods, exact draws against a second method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from benchmarks.tasks import SLCP, TASKS, TWO_MOONS, Task

CHAINS, STEPS = 4000, 100


def _walk(task: Task, y: np.ndarray, start: np.ndarray, jumps: np.ndarray, key) -> np.ndarray:
    """Metropolis: `STEPS` jumps of each chain, under the uniform prior and the likelihood.

    A jump is a difference of two draws: it has the shape of the posterior, and of the way from
    one of its pieces to another. Jumps are as likely forth as back whatever those draws are of.
    """

    def log_p(theta):
        inside = jnp.all((theta >= task.low) & (theta <= task.high))
        return jnp.where(inside, task.log_likelihood(theta, y), -jnp.inf)

    def step(state, key):
        theta, here = state
        k_pick, k_size, k_accept = jax.random.split(key, 3)
        pick = jax.random.randint(k_pick, (2, len(start)), 0, len(jumps))
        size = jax.random.choice(k_size, jnp.array([0.1, 0.5, 1.0]), (len(start), 1))
        new = theta + size * (jumps[pick[0]] - jumps[pick[1]])
        there = jax.vmap(log_p)(new)
        accept = jnp.log(jax.random.uniform(k_accept, here.shape)) < there - here
        state = jnp.where(accept[:, None], new, theta), jnp.where(accept, there, here)
        return state, accept.mean()

    first = jnp.asarray(start), jax.vmap(log_p)(jnp.asarray(start))
    (theta, _), accepted = jax.lax.scan(step, first, jax.random.split(key, STEPS))
    return theta, accepted.mean()


@pytest.mark.parametrize("name", list(TASKS))
def test_draws_are_at_rest_under_another_sampler(name: str, x64: None) -> None:
    """Chains that start from exact draws stay where they are in distribution; others move.

    Means of theta, |theta|, products and the log-likelihood, after against a fresh set of exact
    draws: at most 26 statistics of 10 posteriors, 5.5 standard errors each: a false alarm of 1e-5.
    """
    task = TASKS[name]
    walk = jax.jit(lambda y, start, jumps, key: _walk(task, y, start, jumps, key))

    log_likelihood = jax.jit(jax.vmap(task.log_likelihood, (0, None)))

    def statistics(theta: np.ndarray, y: np.ndarray) -> np.ndarray:
        i, j = np.triu_indices(theta.shape[1])
        parts = [theta, np.abs(theta), theta[:, i] * theta[:, j], log_likelihood(theta, y)[:, None]]
        return np.concatenate(parts, 1)

    for k, y in enumerate(task.observations):
        start, fresh = (task.reference(k, CHAINS, seed=seed) for seed in (0, 1))
        jumps = task.reference(k, CHAINS, seed=2)
        after, accepted = walk(y, start, jumps, jax.random.key(k))
        assert accepted > 0.02, "chains that do not move show nothing"
        a, b = statistics(np.asarray(after), y), statistics(fresh, y)
        error = np.sqrt((a.var(0) + b.var(0)) / CHAINS)
        z = (a.mean(0) - b.mean(0)) / error
        assert np.abs(z).max() < 5.5, (k, z)


def test_two_moons_draws_are_calibrated() -> None:
    """Simulation-based: the truth's rank among draws given its own data is uniform.

    No likelihood is used, so this holds simulator and draws together. 400 events, two components
    and the sum: a Kolmogorov-Smirnov p below 1e-6 in any of three is a false alarm of 3e-6.
    """
    truth, events = TWO_MOONS.problem.batch(jax.random.key(0), 400)
    truth, y = np.asarray(truth), np.asarray(events.y)
    rng = np.random.default_rng(1)
    ranks = []
    for x, seen in zip(truth, y, strict=True):
        draws = TWO_MOONS.draw(seen.astype(float), 100, rng)
        columns = [(draws[:, 0], x[0]), (draws[:, 1], x[1]), (draws.sum(1), x.sum())]
        ranks.append([(np.sum(d < t) + rng.uniform()) / 101 for d, t in columns])
    assert min(kstest(column, "uniform").pvalue for column in np.array(ranks).T) > 1e-6


def test_slcp_simulates_what_its_likelihood_says() -> None:
    """Score and information: E[g] = 0 and E[g g^T + H] = 0 at the truth, with y drawn there.

    Both hold for one density only, that of the draws. 20 entries at 5.5 standard errors.
    """
    theta = jnp.array([0.5, -1.0, -1.5, 1.2, 0.7])
    keys = jax.random.split(jax.random.key(2), 20_000)

    @jax.jit
    def both(keys):
        y = jax.vmap(lambda k: SLCP.problem.obs_noise(k, SLCP.problem.forward(theta)))(keys)
        g = jax.vmap(jax.grad(SLCP.log_likelihood), (None, 0))(theta, y)
        h = jax.vmap(jax.hessian(SLCP.log_likelihood), (None, 0))(theta, y)
        return g, g[:, :, None] * g[:, None, :] + h

    for values in both(keys):
        values = np.asarray(values, np.float64)
        z = values.mean(0) / (values.std(0) / np.sqrt(len(values)))
        assert np.abs(z).max() < 5.5, z


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_is_what_it_says(name: str) -> None:
    task = TASKS[name]
    task.problem.check(jax.random.key(3), 256)
    x, events = task.problem.batch(jax.random.key(4), 5000)
    x = np.asarray(x)
    assert events.y.shape[1:] == task.observations.shape[1:]
    for column, low, high in zip(x.T, task.low, task.high, strict=True):
        assert kstest(column, "uniform", args=(low, high - low)).pvalue > 1e-6
    first = task.reference(0, 100, seed=5)
    np.testing.assert_array_equal(first, task.reference(0, 100, seed=5))
    assert (np.abs(first) <= task.high).all()
    assert not np.array_equal(first, task.reference(0, 100, seed=6))
