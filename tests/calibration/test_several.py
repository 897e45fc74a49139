"""Events with several minima: an exact head passes, one that misses a piece does not."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.calibration import GateError, GateReport, c2st, judge_several
from amortlib.calibration.several import (
    _FEW,
    C2ST,
    MINIMA,
    SEVERAL,
    WEIGHTS,
    SeveralMinima,
    weight_limit,
)
from amortlib.energy import Energy
from amortlib.solvers import Oracle, OracleAnalysis
from amortlib.types import Event, to_double
from benchmarks.gates import pieces_problem
from benchmarks.several import KEEPS, VERDICTS, PiecesHead, calls, repetition

from .test_report import N, made

TABLE = Path(__file__).resolve().parents[2] / "book" / "data" / "several.json"


@pytest.fixture(scope="module")
def reports() -> dict[str, GateReport]:
    """One repetition of `benchmarks.several`: through `run_gates`, oracle included."""
    return repetition(0)


@pytest.mark.slow
def test_an_exact_head_passes_and_its_figures_are_those_of_an_exact_head(
    reports: dict[str, GateReport],
) -> None:
    report = reports["exact"]
    found = report.several
    assert found is not None
    assert found.event.tolist() == np.flatnonzero(~report.single)[:SEVERAL].tolist()
    assert [gate.name for gate in report.several_gates] == ["c2st", "weights"]
    assert report.passed
    assert (found.minima == 2).all()
    assert found.judged.all()
    # An sd of 0.5 / sqrt(1000) each: five of them over the mean of 16.
    assert abs(found.c2st.mean() - 0.5) < 5 * 0.5 / np.sqrt(1000 * SEVERAL)
    # Errors are half-normal about their floor, with an sd of 0.76 of it.
    ratio = found.weight_error.mean() / found.weight_floor.mean()
    assert abs(ratio - 1.0) < 5 * 0.76 / np.sqrt(SEVERAL)
    assert found.kl is not None
    assert np.abs(found.kl).max() < 0.05
    assert "held against a reference" in str(report)


@pytest.mark.slow
def test_a_missing_piece_is_caught_through_all_of_run_gates(
    reports: dict[str, GateReport],
) -> None:
    """`benchmarks.several` repeats it: both verdicts are against it in every one of 30."""
    report = reports["one piece missing"]
    assert calls(report)["c2st"]
    assert calls(report)["weights"]
    assert not report.passed
    found = report.several
    assert found is not None
    assert found.kl is not None
    assert np.isinf(found.kl).all()
    light = calls(reports["lighter piece x 0.5"])
    assert light["weights"]
    assert light["report"]


@pytest.mark.slow
def test_the_weights_of_the_pieces_are_the_exact_ones(reports: dict[str, GateReport]) -> None:
    """With a piece missing the error is the weight of that piece, known in closed form."""
    found = reports["one piece missing"].several
    assert found is not None
    problem = pieces_problem()
    from benchmarks.gates import TwoPieces
    from benchmarks.several import EVENTS, SEEDS, SPARE

    key = jax.random.key(SEEDS["events"])
    _, events = problem.batch(key, EVENTS + SPARE)
    energy = Energy(problem.prior, problem.forward)
    analysis = Oracle(energy, starts=8, rounds=2)(events, key=jax.random.key(SEEDS["oracle"]))
    keep = np.flatnonzero(analysis.converged)[:EVENTS]
    events = jax.tree.map(lambda a: a[keep], events)
    for i, error, floor in zip(found.event, found.weight_error, found.weight_floor, strict=True):
        exact = TwoPieces.of(problem.prior, jax.tree.map(lambda a, i=i: a[i], events))
        lighter = float(jnp.exp(exact.log_share.min()))
        assert abs(error - lighter) < 5 * floor / np.sqrt(2 / np.pi)


def test_the_record_holds_its_bars_and_is_of_these_settings() -> None:
    data = json.loads(TABLE.read_text(encoding="utf-8"))
    assert not data["quick"]
    assert all(bar["holds"] for bar in data["bars"])
    results = data["results"]
    assert results["repetitions"] >= 30
    assert results["looked"] == [SEVERAL, SEVERAL]
    assert set(results["shares"]) == set(KEEPS)
    for row in results["shares"].values():
        assert set(row) == set(VERDICTS)


def some(**changes) -> SeveralMinima:
    event = np.array([1, 4, 7, 8, 9])
    return dataclasses.replace(
        SeveralMinima(
            event=event,
            minima=np.full(5, 2),
            reference=np.full(5, 5000.0),
            c2st=np.full(5, 0.5),
            weight_error=np.full(5, 0.02),
            weight_floor=np.full(5, 0.012),
            kl=np.full(5, 0.01),
            draws=1000,
        ),
        **changes,
    )


SINGLE = ~np.isin(np.arange(N), [1, 4, 7, 8, 9])


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, set()),
        ({"c2st": np.full(5, C2ST)}, set()),
        ({"c2st": np.full(5, C2ST + 1e-4)}, {"c2st"}),
        ({"weight_error": np.full(5, WEIGHTS * 0.012)}, set()),
        ({"weight_error": np.full(5, WEIGHTS * 0.012 + 1e-6)}, {"weights"}),
        # What no reference was worth its draws for counts in neither mean.
        (
            {
                "c2st": np.array([0.9, 0.5, 0.5, 0.5, 0.5]),
                "weight_error": np.array([0.5, 0.02, 0.02, 0.02, 0.02]),
                "reference": np.array([999.0, 5000.0, 5000.0, 5000.0, 5000.0]),
            },
            set(),
        ),
    ],
)
def test_the_thresholds_stand_where_they_are_said_to(changes: dict, failed: set[str]) -> None:
    report = made(single=SINGLE, several=some(**changes))
    assert {gate.name for gate in report.several_gates if not gate.passed} == failed
    assert report.passed is not bool(failed)
    for name in failed:
        assert f"  {name:10s} FAIL" in str(report)


def test_few_events_are_given_what_luck_alone_takes() -> None:
    """The mean of m half-normal errors, over what is expected of it: a million draws."""
    z = np.abs(np.random.default_rng(0).normal(size=(1_000_000, 16))) / np.sqrt(2 / np.pi)
    for m in (1, 2, 3, 4, 5, 16):
        # Three standard errors of the rate, and two digits of the quantile.
        assert np.mean(z[:, :m].mean(axis=1) > weight_limit(m)) < 0.01 + 4e-4
        if m <= len(_FEW):
            assert np.mean(z[:, :m].mean(axis=1) > weight_limit(m)) > 0.0095
    assert weight_limit(5) == WEIGHTS


def test_nobody_looked_is_said_and_nothing_is_judged() -> None:
    report = made(single=SINGLE)
    assert report.several_gates == ()
    assert report.passed
    assert "None of them was held against a reference" in str(report)
    assert "Every event has a single minimum" in str(made())
    poor = made(single=SINGLE, several=some(reference=np.full(5, 10.0)))
    assert poor.several_gates == ()
    assert "On 5 of these it is worth fewer than 1000" in str(poor)


def test_a_file_gives_it_back_and_one_of_the_first_version_has_none() -> None:
    report = made(single=SINGLE, several=some(kl=np.array([0.1, np.inf, 0.1, 0.1, 0.1])))
    back = GateReport.from_json(report.to_json())
    assert str(back) == str(report)
    assert back.to_json() == report.to_json()
    assert [g["name"] for g in json.loads(report.to_json())["gates"]][3:] == ["c2st", "weights"]
    data = json.loads(made(single=SINGLE).to_json())
    del data["several"]
    assert GateReport.from_json(json.dumps({**data, "version": 1})).several is None
    with pytest.raises(GateError, match="expected a whole report"):
        GateReport.from_json(json.dumps(data))
    # A worse score in the file than its verdict knows of.
    bad = json.loads(report.to_json())
    bad["several"]["c2st"] = [0.9] * 5
    with pytest.raises(GateError, match="changed after it was written"):
        GateReport.from_json(json.dumps(bad))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"c2st": np.full(5, np.nan)}, r"numbers in several\.c2st, got NaN at event 1"),
        ({"kl": np.zeros(3)}, r"several\.kl of shape \(5,\)"),
        ({"event": np.array([1, 4, 7, 8, 10])}, "events with several minima in `several`"),
    ],
)
def test_what_means_nothing_is_an_error(changes: dict, words: str) -> None:
    with pytest.raises(GateError, match=words):
        made(single=SINGLE, several=some(**changes))


@pytest.mark.slow
def test_without_an_exact_density_there_is_no_kl_and_most_bounds_the_events() -> None:
    problem = pieces_problem()
    energy = Energy(problem.prior, problem.forward)
    _, events = problem.batch(jax.random.key(5), 6)
    analysis = Oracle(energy, starts=8, rounds=1)(events, key=jax.random.key(6))

    class Rough(eqx.Module):
        inner: PiecesHead

        def __call__(self, event: Event):
            q = self.inner(event)

            class Q(type(q)):
                exact_log_prob = False

            return Q(q.q, q.top)

    with jax.enable_x64(True):
        head = Rough(PiecesHead(problem.prior, jnp.asarray(1.0)))
        given = to_double((head, energy, events))
        settings = {"key": jax.random.key(7), "proposals": 2000, "draws": 200}
        found = judge_several(*given, analysis, most=2, **settings)
        assert found is not None
        assert found.event.size == 2
        assert found.kl is None
        assert judge_several(*given, analysis, most=0, **settings) is None
        alone = eqx.tree_at(lambda a: a.rise, analysis, np.full(6, np.inf))
        assert judge_several(*given, alone, **settings) is None


def test_the_lowest_minima_are_taken_and_those_too_high_are_not() -> None:
    from amortlib.calibration.several import NEAR, _minima

    heights = np.array([[5.0, 1.0, 1.0, 3.0, 1.0 + NEAR + 0.1]])
    zero = np.zeros(1)
    analysis = OracleAnalysis(
        mode=np.array([[9.0]]),
        energy=np.array([1.0]),
        covariance=np.ones((1, 1, 1)),
        gauss_newton_covariance=np.ones((1, 1, 1)),
        jacobian=np.zeros((1, 1, 1)),
        gain=np.zeros((1, 1, 1)),
        gradient_norm=zero,
        converged=zero == 0,
        hits=np.ones(1, int),
        minima=np.ones(1, int),
        rise=np.array([2.0]),
        unseen=zero,
        sure=zero == 0,
        starts=np.ones(1, int),
        ends=np.array([[[50.0], [10.0], [10.0], [30.0], [70.0]]]),
        end_energy=heights,
        distinct=np.array([[True, True, False, True, True]]),
    )
    modes, count = _minima(analysis, 0)
    assert count == 3
    assert modes[:, 0].tolist() == [9.0, 30.0, 50.0] + [9.0] * (MINIMA - 3)


@pytest.mark.slow
def test_the_classifier_agrees_with_that_of_scikit_learn() -> None:
    """On three pairs of samples of 1,000: the same, a larger sd, a piece missing."""
    from benchmarks.two_sample import c2st as other

    rng = np.random.default_rng(0)

    def draws(share: float = 0.5, sd: float = 0.3) -> np.ndarray:
        z = sd * rng.normal(size=(1000, 3))
        z[:, 0] += np.where(rng.random(1000) < share, 2.0, -2.0)
        z[:, 1] += 0.5 * z[:, 0] ** 2
        return z

    for settings, low, high in (
        ({}, 0.45, 0.55),
        ({"sd": 0.45}, 0.55, 0.7),
        ({"share": 1.0}, 0.7, 0.8),
    ):
        x, y = draws(), draws(**settings)
        score = float(c2st(jnp.asarray(x), jnp.asarray(y), key=jax.random.key(1)))
        assert low < score < high
        # Two classifiers with other first weights and folds differ by about as much as samples.
        assert abs(score - other(x, y, seed=1)) < 0.05


def test_the_classifier_refuses_what_it_cannot_learn_from() -> None:
    with pytest.raises(ValueError, match="two samples of one shape"):
        c2st(jnp.zeros((300, 2)), jnp.zeros((200, 2)), key=jax.random.key(0))
    with pytest.raises(ValueError, match="points to learn from"):
        c2st(jnp.zeros((50, 2)), jnp.zeros((50, 2)), key=jax.random.key(0))
