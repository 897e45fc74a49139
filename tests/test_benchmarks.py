"""The benchmarks run, and the default head holds the bars that its table states."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.energy import Energy
from amortlib.gaussian import Gaussian
from amortlib.observation import ContiguousGaps
from amortlib.problems import ornstein_uhlenbeck
from amortlib.types import Event
from benchmarks import encoders, make_weights, widgets
from benchmarks.clear_flow import KEPT, Pool, draws_of
from benchmarks.flow_lorenz63 import FLOW_BATCH
from benchmarks.regression_ou import (
    FRACTIONS,
    MEDIAN_KL,
    PRIOR_UNITS,
    WORST_KL,
    measure,
    train,
)

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def test_the_default_head_holds_the_bars() -> None:
    """512 held-out events at each gap fraction, as `benchmarks.regression_ou` trains the head."""
    problem = ornstein_uhlenbeck(32, noise=0.3)
    model, _ = train("information", problem, steps=3000, rate=1e-2)
    for fraction in FRACTIONS:
        figures = measure(model, problem, ContiguousGaps(fraction, max_gaps=3), events=512)
        assert np.median(figures["kl"]) <= MEDIAN_KL
        assert figures["kl"].max() <= WORST_KL
        assert figures["jacobian"].max() < 0.05
        if fraction == 1.0:
            assert figures["from_prior"].max() <= PRIOR_UNITS


def test_the_exact_answer_at_irregular_times_and_the_paths_seen_there() -> None:
    """`benchmarks.encoders`: at the grid's own times its formula is the regular one, by numpy. Of
    20,000 paths, products of the first observation with every state and with itself average to
    the covariances of the process, within five standard errors."""
    rng = np.random.default_rng(0)
    y, seen = rng.normal(size=encoders.SITES), rng.random(encoders.SITES) < 0.5
    kernel = np.exp(-np.abs(encoders.GRID[:, None] - encoders.GRID) / encoders.TIMESCALE)
    known = kernel[np.ix_(seen, seen)] + encoders.NOISE**2 * np.eye(seen.sum())
    gain = np.linalg.solve(known, kernel[seen]).T
    event = Event(*map(jnp.asarray, (y.astype(np.float32), seen)), None, jnp.asarray(encoders.GRID))
    got = jax.jit(encoders.exact_anywhere)(event)
    np.testing.assert_allclose(got.loc, gain @ y[seen], atol=1e-4)
    np.testing.assert_allclose(got.chol @ got.chol.T, kernel - gain @ kernel[seen], atol=1e-4)
    x, events = map(jax.device_get, encoders.anywhere(jax.random.key(1), 20_000))
    first, when = events.y[:, :1], events.time[:, :1]
    products = first * x - np.exp(-np.abs(when - encoders.GRID) / encoders.TIMESCALE)
    assert (np.abs(products.mean(0)) < 5.0 * products.std(0) / np.sqrt(20_000)).all()
    assert abs((first**2).mean() - 1.0 - encoders.NOISE**2) < 5.0 * (first**2).std() / 141.0


def test_the_draws_that_a_flow_is_trained_on_are_of_the_posterior() -> None:
    """Where J is a parabola its posterior is known: 400 events' draws have its mean within five
    standard errors, and its variance within a tenth. Where the proposals miss it, none is kept."""
    energy = Energy(Gaussian(jnp.zeros(3), jnp.eye(3)), lambda x: x, obs_sd=0.5)
    event = Event(jnp.array([1.0, -2.0, 0.5]), jnp.ones(3, bool))
    mode, x = 0.8 * event.y, jnp.array([9.0, 9.0, 9.0])
    drawn = jax.jit(jax.vmap(lambda key: draws_of(energy, x, event, mode[None], key)))
    states = np.asarray(drawn(jax.random.split(jax.random.key(0), 400)))
    assert states.shape == (400, KEPT, 3)
    means = states.mean(1)
    error = means.std(0) / np.sqrt(400)
    assert (np.abs(means.mean(0) - mode) < 5.0 * error).all()
    np.testing.assert_allclose(states.reshape(-1, 3).var(0), 0.2, rtol=0.1)
    sharp = Energy(energy.prior, lambda x: x, obs_sd=1e-3)
    lost = jax.jit(lambda key: draws_of(sharp, x, event, 0.0 * mode[None], key))
    assert (np.asarray(lost(jax.random.key(1))) == 9.0).all()


def test_a_minibatch_takes_events_by_their_chance_and_their_states_evenly() -> None:
    """Of three events with chances .1, .6 and .3, two states each: counts within five standard
    deviations (false alarm 6e-7 each), and contexts stay with their states."""
    pool = Pool(jnp.arange(6.0).reshape(3, 2, 1), jnp.arange(3), jnp.array([0.1, 0.7, 1.0]))
    x, contexts = map(np.asarray, jax.jit(jax.vmap(pool))(jax.random.split(jax.random.key(0), 100)))
    n = 100 * FLOW_BATCH
    assert contexts.size == n
    assert (x[..., 0] // 2 == contexts).all()
    share = np.array([0.1, 0.1, 0.6, 0.6, 0.3, 0.3]) / 2
    counts = np.bincount(x.ravel().astype(int), minlength=6) / n
    assert (np.abs(counts - share) < 5.0 * np.sqrt(share * (1 - share) / n)).all()


def kept_programs() -> dict[str, str]:
    """For another process: this one's folder of compiled programs, which quick runs share."""
    return {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


QUICK = [
    ("regression_ou", "KL"),
    ("make_weights", "KL"),
    ("fourdvarnet", "plain on J"),
    ("gates", "one piece missing"),
    ("throughput", "of matrix rate"),
    ("widgets", "gap explorer"),
]
"""Benchmarks, and a column of the table that each prints."""

if os.environ.get("AMORTLIB_ALL"):
    # They compile for minutes, and their parts have tests of their own.
    QUICK += [
        ("ladder", "multi-start 4DVar"),
        ("expressiveness", "spline flow"),
        ("refinement", "both gates"),
        ("one_pass", "taught by"),
        ("search_gates", "caught"),
        ("nested", "one minimum"),
        ("several", "one piece missing"),
        ("alarms", "called faulty"),
        ("clear_flow", "first percentile"),
        ("bimodal", "mode weight"),
    ]


@pytest.mark.parametrize(("name", "column"), QUICK)
def test_a_quick_run_prints_its_table_and_writes_its_data(
    name: str, column: str, tmp_path: Path
) -> None:
    files = sorted(make_weights.FILE.parent.iterdir())
    before = [file.read_bytes() for file in files]
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(out)]
    environment = os.environ | kept_programs()
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert out.exists(), run.stdout + run.stderr
    assert "measured  holds" in run.stdout
    assert column in run.stdout
    data = json.loads(out.read_text(encoding="utf-8"))
    assert {"machine", "versions", "seeds", "bars"} <= set(data)
    for bar in data["bars"]:
        assert {"name", "value", "bar", "holds"} <= set(bar)
        assert isinstance(bar["holds"], bool)
    assert data["bars"]
    assert [file.read_bytes() for file in files] == before, "a quick run writes no weights"
    slow = [
        bar["name"] for bar in data["bars"] if "over that of" in bar["name"] and not bar["holds"]
    ]
    assert name != "widgets" or slow == []


@pytest.mark.parametrize("name", widgets.USUAL)
def test_a_widget_that_is_ten_times_slower_is_told(name: str) -> None:
    """By the ratios of one run; nothing is told of the usual ones, or of a machine that is slow."""
    draw = {"break-even": 1.0, "gap explorer": 2.7}
    draw |= {n: usual for n, (other, usual) in widgets.USUAL.items() if other == "break-even"}
    found = {n: {"draw_median": 0.3 * value} for n, value in draw.items()}
    assert all(bar.holds for bar in widgets.speeds(found))
    assert all(
        bar.holds for bar in widgets.speeds({n: {"draw_median": 9 * v} for n, v in draw.items()})
    )
    found[name]["draw_median"] *= 10
    told = [bar.name for bar in widgets.speeds(found) if not bar.holds]
    assert [n for n in told if n.startswith(f"{name}: ")] == told
    assert told
