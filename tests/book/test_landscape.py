"""The energy landscape at the ends of every slider, and what its display carries."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from _kit.figures import draw_landscape
from _kit.landscape import EnergyLandscape, _survey, energy_landscape, landscape_picture
from _kit.windows import FixedSteps
from bs4 import BeautifulSoup
from safetensors.numpy import load

from amortlib.energy import Energy
from amortlib.observation import Select
from amortlib.problems import InverseProblem, lorenz63, ornstein_uhlenbeck
from amortlib.types import Event, to_double

ROOT = Path(__file__).resolve().parents[2]
N = 6


def window() -> InverseProblem:
    """Six states with large steps: a small window whose J may have more than one minimum."""
    problem = lorenz63(states=N, dt=0.08, substeps=1, noise=2.0, operator=Select((0, 1)))
    return FixedSteps.in_place(problem)


@pytest.fixture(scope="module")
def explorer() -> EnergyLandscape:
    return energy_landscape(window(), length=3)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled while a test runs."""
    seen: list[str] = []

    def listen(name: str, _: float, **__: object) -> None:
        if name.endswith("backend_compile_duration"):
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_every_slider_at_both_ends_gives_a_right_picture(explorer: EnergyLandscape) -> None:
    """All 8 corners: the mask is the gap, the curve is lowest at the minimum and says J there,
    and where nothing is seen the one minimum is the background, with Laplace exact."""
    problem = explorer.problem
    for start, length, event in itertools.product((0, N - 1), (0, N), (0, explorer.events - 1)):
        explorer.start, explorer.length, explorer.event = start, length, event
        p = explorer.picture()
        at = np.arange(N)
        np.testing.assert_array_equal(p.mask, (at < start) | (at >= start + length))
        missing = int((~p.mask).sum())
        words = p.words()
        assert f"{missing} of {N} times are missing" in words
        assert (p.line > -1e-6).all()
        assert abs(p.line[np.abs(p.at).argmin()]) < 1e-6
        assert 0 <= p.inside <= 1
        assert (len(p.modes) == 2) == (p.minima > 1) == (p.rise <= 20)
        found = re.search(r"has (\d+) minima .* second (\d+\.\d) nats", words)
        assert (found is None) == (p.minima == 1)
        if found:
            assert (int(found[1]), float(found[2])) == (p.minima, round(p.rise, 1))
            np.testing.assert_allclose(p.line[np.abs(p.at - 1).argmin()], p.rise, atol=1e-6)
        if missing == N:
            assert p.minima == 1
            np.testing.assert_allclose(
                p.modes[0], problem.prior.mean()[np.array([0, 2])], atol=1e-5
            )
            np.testing.assert_allclose(p.covariances[0], p.background_covariance, atol=1e-3)
            np.testing.assert_allclose(p.line, p.at**2 / 2, atol=1e-6)
            # 4,000 draws of a proposal near the posterior: five standard errors, and their weights.
            assert abs(p.inside - 0.95) < 10 * np.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.slow
def test_the_minima_are_minima_of_j(explorer: EnergyLandscape) -> None:
    """By the gradient of J and the inverse of its Hessian, made anew: some event with two."""
    explorer.start, explorer.length = 0, N - 1
    for event in range(20):
        explorer.event = event
        p = explorer.picture()
        if p.minima > 1:
            break
    assert p.minima > 1
    with jax.enable_x64(True):
        problem = to_double(explorer.problem)
        energy = Energy(problem.prior, problem.forward)
        _, drawn = problem.simulate(jax.random.key(event))
        mask = np.broadcast_to(p.mask[:, None], drawn.y.shape)
        seen = Event(drawn.y, jax.numpy.asarray(mask), drawn.sd)
        full = _survey(problem, *(np.int64(a) for a in (event, 0, N - 1)))["modes"]
        slope = jax.jit(jax.vmap(jax.grad(energy), in_axes=(0, None)))(full, seen)
        root = np.asarray(problem.prior.chol)
        assert np.abs(np.asarray(slope) @ root).max() < 1e-2
        values = np.asarray(jax.jit(jax.vmap(energy, in_axes=(0, None)))(full, seen))
        assert values[1] - values[0] == pytest.approx(p.rise, abs=1e-6)
        curvature = np.asarray(jax.jit(jax.hessian(energy))(full[0], seen))
    plane = np.ix_([0, 2], [0, 2])
    np.testing.assert_allclose(p.covariances[0], np.linalg.inv(curvature)[plane], rtol=1e-5)


@pytest.mark.slow
def test_a_slider_changes_one_thing_at_a_time(explorer: EnergyLandscape) -> None:
    def at(**change):
        return landscape_picture(
            explorer.problem, **({"start": 1, "length": 2, "event": 2} | change)
        )

    base, later, other = at(), at(start=3), at(event=3)
    np.testing.assert_array_equal(later.true_path, base.true_path)
    both = base.mask & later.mask
    np.testing.assert_array_equal(later.y[both], base.y[both])
    assert not np.array_equal(other.true_path, base.true_path)


@pytest.mark.slow
def test_moving_compiles_nothing_and_leaves_no_figure_open(
    explorer: EnergyLandscape, compilations: list[str]
) -> None:
    """One program for all gaps and events; a problem of another shape shows that it is counted."""
    explorer.event = 5
    explorer.still()
    before = plt.get_fignums()
    compilations.clear()
    for start, length, event in [(0, 0, 1), (2, 3, 4), (N - 1, N, 7)]:
        explorer.start, explorer.length, explorer.event = start, length, event
        explorer.still()
    assert compilations == []
    assert plt.get_fignums() == before
    jax.jit(lambda x: x * 3.0 + N)(np.zeros(17)).block_until_ready()
    assert compilations


@pytest.mark.slow
def test_the_display_carries_the_events_and_a_picture(explorer: EnergyLandscape) -> None:
    """The page is given the pairs that the kernel draws, in double precision."""
    page = BeautifulSoup(explorer.to_html(), "html.parser")
    assert page.find("img")["alt"].endswith(explorer.picture().words())
    state = json.loads(page.find("script").string)
    assert state["window"]["noise"] == 2.0
    assert state["window"]["sees"] == {"components": [0, 1], "stride": 1}
    with jax.enable_x64(True):
        problem = to_double(explorer.problem)
        truth, event = problem.simulate(jax.random.key(3))
    arrays = load(explorer.data)
    np.testing.assert_allclose(arrays["['truth']"][3], truth, rtol=1e-12)
    np.testing.assert_allclose(arrays["['y']"][3], event.y, rtol=1e-12)


@pytest.mark.slow
def test_the_drawing_labels_what_it_shows(explorer: EnergyLandscape) -> None:
    legend = draw_landscape(explorer.picture()).legends[0]
    labels = {text.get_text() for text in legend.get_texts()}
    assert {"truth", "observations", "posterior", "lowest minimum"} <= labels


@pytest.mark.slow
def test_the_plain_loop_stands_in_for_the_window(x64: None) -> None:
    """Of order four: halving its steps divides the difference to fine steps of diffrax by 16."""
    fine = to_double(lorenz63(states=4, dt=0.1, substeps=32).forward)
    start = jax.numpy.array([1.5, -1.5, 25.0])
    want = np.asarray(eqx.filter_jit(fine.trajectory)(start))
    off = []
    for substeps in (8, 16):
        loop = FixedSteps(fine.dynamics, fine.operator, fine.dt, fine.states, substeps)
        got, seen, one = jax.jit(lambda x, w=loop: (w.trajectory(x), w(x), w.model(x)))(start)
        off.append(np.abs(np.asarray(got) - want).max())
        np.testing.assert_array_equal(seen, np.asarray(got)[::2, :2])
        np.testing.assert_allclose(one, got[1], rtol=1e-12)
    assert 12 < off[0] / off[1] < 20
    assert FixedSteps.like(fine).substeps == 32


def test_a_problem_that_does_not_fit_is_refused() -> None:
    place = {"start": 0, "length": 1, "event": 0}
    blind = eqx.tree_at(lambda p: p.prior, window(), None)
    with pytest.raises(ValueError, match="expected a problem with its prior"):
        landscape_picture(blind, **place)
    with pytest.raises(ValueError, match=r"expected observations of shape \(times, components\)"):
        landscape_picture(ornstein_uhlenbeck(4), **place)


def test_the_drawing_knows_no_widget_and_no_jax() -> None:
    code = "import sys, _kit.figures; sys.exit('ipywidgets' in sys.modules or 'jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "book", check=True)


@pytest.mark.slow
def test_a_kernel_answers_at_every_position() -> None:
    """The oracle, solved live, stands in the minimum of the picture, wherever the sliders are."""
    problem = window()
    mine = energy_landscape(problem, compare="oracle", label="oracle")
    for start, length in ((0, 0), (2, 5)):
        mine.start, mine.length = start, length
        assert mine.overlay["label"] == "oracle"
        states, best = np.array(mine.overlay["states"]), mine.picture().modes[0]
        assert np.abs(states[:, [0, 2]] - best).sum(axis=1).min() < 1e-3


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 3, 3)])
def test_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected states of shape \(n, 3\), got"):
        energy_landscape(window(), compare=lambda event: np.zeros(shape))


def test_an_answer_that_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a function of an event or .oracle., got 'orcale'"):
        energy_landscape(window(), compare="orcale")
