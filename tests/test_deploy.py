"""A guarded head in the catalogue and the alert, on a problem whose posterior is known."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _kit import heads

from amortlib.alert import Alert
from amortlib.catalogue import Status, reprocess
from amortlib.deploy import GuardedHead, WarmStart
from amortlib.energy import Energy
from amortlib.gaussian import condition
from amortlib.guard import calibrate
from amortlib.problems import InverseProblem
from amortlib.solvers import IncrementalFourDVar
from amortlib.types import Event

pytestmark = pytest.mark.slow

GOOD, NOISY = 60, 20


@pytest.fixture(scope="module")
def parts() -> tuple[GuardedHead, WarmStart, InverseProblem, Event]:
    """A guarded head, its fallback, and events: the last of them with six times the noise."""
    model, problem = heads.load_ou_head()
    energy = Energy(problem.prior, problem.forward)
    _, usual = problem.batch(jax.random.key(1), 600)
    guard = calibrate(model, energy, usual, key=jax.random.key(2), rate=0.01)
    truths, events = problem.batch(jax.random.key(3), GOOD + NOISY)
    clean = jax.vmap(problem.forward)(truths)
    factor = jnp.where(jnp.arange(GOOD + NOISY) < GOOD, 1.0, 6.0)[:, None]
    events = eqx.tree_at(
        lambda e: (e.y, e.mask), events, (clean + factor * (events.y - clean), events.mask | True)
    )
    return GuardedHead(guard), WarmStart(IncrementalFourDVar(energy)), problem, events


def test_a_catalogue_is_answered_and_what_is_not_trusted_is_solved(
    parts: tuple[GuardedHead, WarmStart, InverseProblem, Event], tmp_path: Path
) -> None:
    answer, fallback, problem, events = parts
    found = reprocess(
        answer,
        events,
        tmp_path,
        key=jax.random.key(4),
        fallback=fallback,
        block=8,
        chunk=32,
        progress=False,
    )
    assert (found.status[:GOOD] == Status.TRUSTED).mean() > 0.8
    assert (found.status[GOOD:] == Status.SOLVED).mean() > 0.5
    right = jax.vmap(lambda e: condition(problem.prior, jnp.eye(32), e))(events)
    # By whomever it was answered: the exact mode and widths, for J is the same.
    np.testing.assert_allclose(found.answers["mode"], right.loc, atol=0.05)
    np.testing.assert_allclose(found.answers["sd"], jax.vmap(lambda q: q.sd())(right), rtol=0.03)


def test_the_alert_asks_the_solver_where_the_guard_says_so(
    parts: tuple[GuardedHead, WarmStart, InverseProblem, Event],
) -> None:
    answer, fallback, _, events = parts
    one = jax.tree.map(lambda a: np.asarray(a[0]), events)
    alert = Alert(answer, one, key=jax.random.key(5), budget=60.0, fallback=fallback)
    replies = [alert(jax.tree.map(lambda a, i=i: a[i], events)) for i in (0, 1, GOOD, GOOD + 1)]
    assert {r.status for r in replies[:2]} == {Status.TRUSTED}
    assert Status.SOLVED in {r.status for r in replies[2:]}
    assert all(r.in_time and r.answer["mode"].shape == (32,) for r in replies)


def test_a_solver_that_does_not_converge_leaves_the_heads_answer_marked(
    parts: tuple[GuardedHead, WarmStart, InverseProblem, Event],
) -> None:
    _, _, problem, events = parts
    idle = IncrementalFourDVar(Energy(problem.prior, problem.forward), max_outer=1, max_inner=1)
    some = jax.tree.map(lambda a: a[:3], events)
    mode = np.full((3, 32), 5.0, np.float32)
    out = WarmStart(idle)(some, {"mode": mode, "sd": np.ones((3, 32), np.float32)}, None)
    assert (out["status"] == Status.DISTRUSTED).all()
    np.testing.assert_array_equal(out["mode"], mode)
