"""The guard on a problem whose posterior is known, and a head that is all but exact there."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _kit import heads

from amortlib.energy import Energy
from amortlib.gaussian import GaussMarkov, condition
from amortlib.guard import Guard, GuardError, Trust, calibrate
from amortlib.heads.base import AbstractHead
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem
from amortlib.types import Event, Fixed

pytestmark = pytest.mark.slow

N, RATE = 1000, 0.01
FIVE_SD = 5 * np.sqrt(2 * RATE * (1 - RATE) / N)
"""Of a share of N events, judged by a level that N others set: a false alarm in a million."""


class Shifted(AbstractHead):
    """A head whose answer is moved by a share of its own sd."""

    inner: Any
    by: jax.Array

    def __call__(self, context: Any) -> GaussMarkov:
        q = self.inner(context)
        return eqx.tree_at(lambda q: q.loc, q, q.loc + self.by * q.sd())


def guarded(model: AmortizedPosterior, problem: InverseProblem, seed: int = 1) -> Guard:
    _, events = problem.batch(jax.random.key(seed), N)
    energy = Energy(problem.prior, problem.forward)
    return calibrate(model, energy, events, key=jax.random.key(seed + 1), rate=RATE)


@pytest.fixture(scope="module")
def made() -> tuple[Guard, InverseProblem]:
    model, problem = heads.load_ou_head()
    return guarded(model, problem), problem


@eqx.filter_jit
def _judge(guard: Guard, events: Event, key: jax.Array) -> Any:
    keys = jax.random.split(key, events.y.shape[0])
    return jax.lax.map(lambda a: guard(a[0], key=a[1]), (events, keys), batch_size=100)


def fresh(problem: InverseProblem, n: int = N) -> tuple[jax.Array, Event]:
    return problem.batch(jax.random.key(50), n)


def with_noise(problem: InverseProblem, truths: jax.Array, events: Event, factor: float) -> Event:
    """The same events with errors of another size than they claim."""
    clean = jax.vmap(problem.forward)(truths)
    return eqx.tree_at(lambda e: e.y, events, clean + factor * (events.y - clean))


def test_false_alarms_are_as_rare_as_stated(made: tuple[Guard, InverseProblem]) -> None:
    guard, problem = made
    _, events = fresh(problem)
    alarms = np.asarray(_judge(guard, events, jax.random.key(3)).trust) != Trust.TRUST
    assert abs(alarms.mean() - RATE) < FIVE_SD


def test_errors_larger_or_smaller_than_claimed_are_left_to_the_solver(
    made: tuple[Guard, InverseProblem],
) -> None:
    """Where errors are the larger part of what is seen: at sd 0.8 from one time to the next, where
    the path itself moves by 0.5. At an sd of 0.1 nobody could tell, and the guard cannot."""
    guard, problem = made
    truths, events = fresh(problem)
    full = eqx.tree_at(lambda e: e.mask, events, jnp.ones_like(events.mask))
    assert full.sd is not None
    noisy = np.asarray(full.sd[:, 0]) > 0.8
    for factor in (2.0, 0.2):
        judged = _judge(guard, with_noise(problem, truths, full, factor), jax.random.key(3))
        caught = np.asarray(judged.trust) == Trust.SOLVE
        assert caught[noisy].mean() > 0.9, caught[noisy].mean()


def test_a_head_that_has_drifted_is_refined_to_the_exact_mode(
    made: tuple[Guard, InverseProblem],
) -> None:
    """The guard was set with the head as it passed; the head that answers is another."""
    guard, problem = made
    _, events = fresh(problem, 200)
    good = guard.posterior.tree
    moved = AmortizedPosterior(good.encoder, Shifted(good.head, jnp.asarray(2.0)))
    judged = _judge(
        eqx.tree_at(lambda g: g.posterior, guard, Fixed(moved)), events, jax.random.key(3)
    )
    assert np.mean(np.asarray(judged.trust) != Trust.TRUST) > 0.95
    right = jax.vmap(lambda e: condition(problem.prior, jnp.eye(32), e).loc)(events)
    np.testing.assert_allclose(judged.refined, right, atol=2e-3)


def test_an_answer_that_is_no_number_is_not_trusted(made: tuple[Guard, InverseProblem]) -> None:
    guard, problem = made
    _, events = fresh(problem, 4)
    good = guard.posterior.tree
    broken = AmortizedPosterior(good.encoder, Shifted(good.head, jnp.asarray(jnp.nan)))
    judged = _judge(
        eqx.tree_at(lambda g: g.posterior, guard, Fixed(broken)), events, jax.random.key(3)
    )
    assert (np.asarray(judged.trust) == Trust.SOLVE).all()


def test_an_event_of_another_kind_is_seen_in_its_context(
    made: tuple[Guard, InverseProblem],
) -> None:
    """Observations ten background sd away from all that was simulated."""
    guard, problem = made
    _, events = fresh(problem, 50)
    far = eqx.tree_at(
        lambda e: (e.y, e.mask), events, (events.y + 10.0, jnp.ones_like(events.mask))
    )
    assert (np.asarray(_judge(guard, far, jax.random.key(3)).trust) == Trust.SOLVE).all()


def test_it_does_not_compile_anew_for_another_mask_or_level(
    made: tuple[Guard, InverseProblem],
) -> None:
    guard, problem = made
    _, events = fresh(problem, 3)
    count = 0

    @eqx.filter_jit
    def run(guard: Guard, event: Event, key: jax.Array) -> Any:
        nonlocal count
        count += 1
        return guard(event, key=key)

    for i in range(3):
        run(guard, jax.tree.map(lambda a, i=i: a[i], events), jax.random.key(i))
    assert count == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rate": 0.0}, "between 0 and 1"),
        ({"rate": 0.001}, "at least 5000"),
    ],
)
def test_what_cannot_be_set_says_so(
    made: tuple[Guard, InverseProblem], change: dict[str, float], words: str
) -> None:
    guard, problem = made
    _, events = fresh(problem)
    with pytest.raises(GuardError, match=words):
        calibrate(guard.posterior.tree, guard.energy.tree, events, key=jax.random.key(0), **change)
    broken = AmortizedPosterior(
        guard.posterior.tree.encoder, Shifted(guard.posterior.tree.head, jnp.asarray(jnp.nan))
    )
    with pytest.raises(GuardError, match="NaN in the sign 'distance'"):
        calibrate(broken, guard.energy.tree, events, key=jax.random.key(0), rate=RATE)


class Steep(AbstractHead):
    """The answer of a head, but for a ripple in its mean: small, and steep on one event of two."""

    inner: Any
    by: jax.Array

    def __call__(self, context: Any) -> GaussMarkov:
        q = self.inner(context)
        ripple = 1e-3 * jnp.sin(self.by * q.loc)
        return eqx.tree_at(lambda q: q.loc, q, q.loc + jnp.where(q.loc[0] > 0, ripple, 0.0))


def test_a_mode_that_moves_unlike_the_minimum_is_caught_where_it_is_asked_for(
    made: tuple[Guard, InverseProblem],
) -> None:
    """It is where it should be, and everything else about it is as usual: the guard that does not
    look trusts it, the one that does refines it on the events where it is steep, and no other."""
    plain, problem = made
    energy = Energy(problem.prior, problem.forward)
    _, usual = problem.batch(jax.random.key(1), N // 2)
    good = plain.posterior.tree
    guard = calibrate(good, energy, usual, key=jax.random.key(2), rate=RATE, slopes=True)
    assert guard.thresholds.wrong < 0.01
    _, events = fresh(problem, 200)
    steep = AmortizedPosterior(good.encoder, Steep(good.head, jnp.asarray(300.0)))
    held = Fixed(steep)
    said = {}
    for name, g in (("plain", plain), ("looks", guard)):
        judged = _judge(eqx.tree_at(lambda g: g.posterior, g, held), events, jax.random.key(3))
        said[name] = np.asarray(judged.trust), np.asarray(judged.signs.slope)
    mean = np.asarray(eqx.filter_jit(jax.vmap(good.mode))(events))
    bad = mean[:, 0] > 0.01
    fine = mean[:, 0] < -0.01
    assert (said["plain"][1] == 0.0).all()
    assert (said["plain"][0][bad] == Trust.TRUST).mean() > 0.9
    assert (said["looks"][0][bad] != Trust.TRUST).all()
    assert (said["looks"][0][fine] == Trust.TRUST).mean() > 0.9
    assert said["looks"][1][bad].min() > 0.05 > np.median(said["looks"][1][fine])
