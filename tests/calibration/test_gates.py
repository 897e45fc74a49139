"""All gates together: an exact head passes, each planted fault is caught, each error is raised."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.calibration import GateError, GateReport, run_gates
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.types import Event
from benchmarks.gates import PIECES, TIMES, TwoPieces, path_problem, pieces_problem

from .conftest import make_head

FLIPPED = np.array([-1.0, *np.ones(TIMES - 1)])
FAULTS = {
    "variance x 0.8": ({"scale": 0.8**0.5}, {"sbc"}),
    "variance x 1.25": ({"scale": 1.25**0.5}, {"sbc"}),
    "mean + 0.5 sd": ({"shift": 0.5 * np.eye(TIMES)[0]}, {"sbc"}),
    "mean + 1.5 sd": ({"shift": 1.5 * np.eye(TIMES)[0]}, {"agreement", "sbc"}),
    "no correlations": ({"correlated": False}, {"sbc"}),
    "prior": ({"is_prior": True}, {"agreement", "adjoint", "sbc"}),
    "Jacobian x 1.1": ({"jacobian": np.full(TIMES, 1.1)}, {"adjoint"}),
    "Jacobian, one row's sign": ({"jacobian": FLIPPED}, {"adjoint"}),
}
"""Which gates each fault fails. `benchmarks.gates` measures a power of at least 0.99 for each at
this number of events, so that the seed is no matter of luck."""


def judge(sample, head=None, **changes) -> GateReport:
    problem, events, truths, analysis = sample
    head = make_head() if head is None else head
    given = {"problem": problem, "events": events, "truths": truths, "analysis": analysis}
    settings = {"key": jax.random.key(1), "batch": 250, "importance_draws": 200} | changes
    return run_gates(head, **(given | settings))


@pytest.fixture(scope="module")
def exact(sample) -> GateReport:
    return judge(sample)


def test_the_exact_posterior_passes(exact: GateReport) -> None:
    """SBC is wrong here with a probability of at most 1%; the seed is one where it is not."""
    assert exact.passed
    assert exact.failing == ()
    assert exact.agreement.max() < 1e-9
    assert exact.adjoint.max() < 1e-9
    np.testing.assert_allclose(exact.kl, 0.0, atol=1e-12)
    np.testing.assert_allclose(exact.ess, 1.0, atol=1e-9)
    assert (exact.khat == 0.0).all()
    assert min(exact.diagnostics.values()) > 1e-3
    assert "all three gates hold" in str(exact)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_by_the_gates_that_can(sample, name: str) -> None:
    fault, caught_by = FAULTS[name]
    report = judge(sample, make_head(**fault))
    assert not report.passed
    assert {gate.name for gate in report.gates if not gate.passed} == caught_by
    assert "NOT every gate holds" in str(report)
    if name == "prior":  # every component ranks well; only a statistic of the data can tell
        components = [report.sbc_p[f"x{i}"] for i in range(TIMES)]
        assert min(components) > 1e-3
        assert report.sbc_p["J"] < 1e-6


def test_figures_of_a_wrong_variance_are_the_known_ones(sample) -> None:
    """q with variance 1.25 times p's: KL and ESS/N are known, four dimensions."""
    report = judge(sample, make_head(scale=1.25**0.5))
    kl = 0.5 * TIMES * (np.log(1.25) + 1 / 1.25 - 1)
    # E_q[w^2] = prod of 1.25 / sqrt(2 * 1.25 - 1): the chi-square divergence of two Gaussians.
    ess = (1.25 / np.sqrt(2 * 1.25 - 1)) ** -TIMES
    for values, want in ((report.kl, kl), (report.ess, ess)):
        error = values.std() / np.sqrt(values.size)
        # Self-normalising biases one sample of 200 by the order of its variance over 200.
        assert abs(values.mean() - want) < 5 * error + 0.01
    # w is a decreasing function of the distance and bounded: its tail is that of a bounded law.
    assert (report.khat < 0.7).all()


def test_an_event_is_judged_alike_in_any_company(sample, exact: GateReport) -> None:
    """300 of the events, in a batch of 250 and one of 50 that is filled up."""
    problem, *rest = sample
    few = judge((problem, *jax.tree.map(lambda a: a[:300], tuple(rest))))
    for name in ("ranks", "tarp", "coverage", "agreement", "adjoint", "kl", "khat"):
        np.testing.assert_array_equal(getattr(few, name), getattr(exact, name)[:300])
    assert few.average.sum(axis=1).tolist() == [300] * (TIMES + 1)
    assert "a small fault may pass" in str(few)
    assert "a small fault may pass" not in str(exact)


def test_events_with_several_minima_are_shown_and_not_judged(sample) -> None:
    head, analysis = make_head(is_prior=True), sample[3]
    first = np.arange(1000) < 400
    rise = np.where(first, 1.0, np.inf)
    several = eqx.tree_at(lambda a: a.rise, analysis, rise)
    report = judge(sample, head, analysis=several, several=1)
    agreement, adjoint, _ = report.gates
    assert agreement.events == adjoint.events == 600
    assert min(adjoint.failing) >= 400
    assert report.ranks.shape[0] == 1000
    assert "400 events have several minima" in str(report)


def test_what_cannot_be_judged_is_an_error(sample) -> None:
    problem, events, truths, analysis = sample
    some = jax.tree.map(lambda a: a[:250], (events, truths, analysis))
    small = (problem, *some)

    def none(tree):
        return jax.tree.map(lambda a: a[:0], tree)

    with pytest.raises(GateError, match="an empty sample passes nothing"):
        judge(small, events=none(events), truths=truths[:0], analysis=none(analysis))
    with pytest.raises(GateError, match="as many events"):
        judge(small, truths=truths[:100])
    lost = eqx.tree_at(lambda a: a.converged, some[2], np.arange(250) != 17)
    with pytest.raises(GateError, match=r"converged on every event, got 1 .* event 17"):
        judge(small, analysis=lost)
    broken = eqx.tree_at(lambda a: a.jacobian, some[2], np.full((250, 4, 4), np.nan))
    with pytest.raises(GateError, match="finite numbers in the oracle's jacobian"):
        judge(small, analysis=broken)
    with pytest.raises(GateError, match="finite draws of q"):
        judge(small, make_head(breaks=True))
    shifted = jax.tree.map(lambda a: np.roll(a, 1, axis=0), some[2])
    with pytest.raises(GateError, match="analysed other events"):
        judge(small, analysis=shifted)
    several = eqx.tree_at(lambda a: a.rise, some[2], np.zeros(250))
    with pytest.raises(GateError, match="at least one event with a single minimum"):
        judge(small, analysis=several)
    with pytest.raises(GateError, match="at least 50 events for 10 bins, got 30"):
        judge((problem, *jax.tree.map(lambda a: a[:30], some)), batch=250)
    with pytest.raises(GateError, match="importance_draws >= 99"):
        judge(small, importance_draws=50)


def test_head_simulator_and_oracle_share_the_prior_or_nothing_is_judged(sample) -> None:
    problem, _, truths, _ = sample
    other = eqx.tree_at(lambda p: p.prior.loc, problem, problem.prior.loc + 0.1)
    with pytest.raises(GateError, match="share one prior"):
        judge(
            sample,
            energy=eqx.tree_at(
                lambda e: e.prior, Energy(problem.prior, problem.forward), other.prior
            ),
        )
    with pytest.raises(GateError, match="problem with its prior"):
        judge(sample, problem=eqx.tree_at(lambda p: p.prior, problem, None))
    with pytest.raises(GateError, match="simulator draws its states from something else"):
        judge(sample, truths=truths + 0.5)

    class Holder(eqx.Module):
        head: eqx.Module

        def __call__(self, event):
            return self.head(event)

    class Held(eqx.Module):
        prior: eqx.Module
        inner: eqx.Module

        def __call__(self, event):
            return self.inner(event)

    with pytest.raises(GateError, match="head to hold the oracle's prior"):
        judge(sample, Holder(Held(other.prior, make_head())))


def test_a_density_that_is_not_exact_has_no_importance_figures(sample) -> None:
    class Rough(Gaussian):
        exact_log_prob = False

    class RoughHead(eqx.Module):
        inner: eqx.Module

        def __call__(self, event):
            q = self.inner(event)
            return Rough(q.loc, q.chol)

    problem, *rest = sample
    few = jax.tree.map(lambda a: a[:100], tuple(rest))
    report = run_gates(
        RoughHead(make_head()), problem, *few, key=jax.random.key(0), batch=100, importance_draws=99
    )
    assert report.kl is None
    assert report.ess is None
    assert report.khat is None
    assert report.coverage is None
    assert set(report.diagnostics) == {"tarp", "average"}
    assert "no exact density" in str(report)
    assert GateReport.from_json(report.to_json()).coverage is None


@pytest.mark.slow
def test_the_exact_posterior_of_two_pieces_is_right() -> None:
    """Its density against exp(-J) on a grid, its draws against its density: share of the left
    piece and mean, within five standard errors (one in a million for each)."""
    problem = pieces_problem()
    prior = problem.prior
    event = Event(jnp.array([0.9, 0.4]), jnp.ones(2, bool), jnp.full(2, 0.4))
    q = TwoPieces.of(prior, event)
    axis = jnp.linspace(-5, 5, 401)
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log_q = jax.vmap(q.log_prob)(grid)
    minus_j = -jax.vmap(lambda x: Energy(problem.prior, problem.forward)(x, event))(grid)
    away = jnp.abs(grid[:, 0]) > 1e-6  # on the seam either side will do
    np.testing.assert_allclose(jnp.ptp((log_q - minus_j)[away]), 0.0, atol=1e-3)
    cell = (axis[1] - axis[0]) ** 2
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_q)) * cell, 1.0, atol=2e-3)
    n = 20_000
    x = np.asarray(q.sample(n, key=jax.random.key(0)))
    left = float(jnp.sum(jnp.where(grid[:, 0] < 0, jnp.exp(log_q), 0.0)) * cell)
    assert 0.05 < left < 0.45
    assert abs((x[:, 0] < 0).mean() - left) < 5 * np.sqrt(left * (1 - left) / n) + 2e-3
    mean = np.asarray(jnp.sum(grid * jnp.exp(log_q)[:, None], 0) * cell)
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 5 * x.std(0) / np.sqrt(n) + 2e-3)
    one = q.without_the_lighter()
    assert float(one.log_share.max()) == 0.0
    assert (np.asarray(one.sample(500, key=jax.random.key(1)))[:, 0] > 0).all()
    assert PIECES[1] == "one piece missing"
    assert path_problem().shapes() == ((TIMES,), (TIMES,))


def test_a_head_that_reads_the_times_is_judged_like_another(sample) -> None:
    class TimedHead(eqx.Module):
        head: eqx.Module

        def __call__(self, event: Event) -> Gaussian:
            q = self.head(event)
            return Gaussian(q.loc + 0.0 * jnp.sum(event.when), q.chol)

    problem, *rest = sample
    few = jax.tree.map(lambda a: a[:100], tuple(rest))
    timed = dataclasses.replace(few[0], time=jnp.ones_like(few[0].y))
    settings = {"key": jax.random.key(0), "batch": 100, "importance_draws": 99}
    report = run_gates(TimedHead(make_head()), problem, timed, *few[1:], **settings)
    np.testing.assert_array_equal(
        report.agreement, run_gates(make_head(), problem, *few, **settings).agreement
    )
    assert report.adjoint.max() < 1e-6
