"""The gap explorer in the kernel: its numbers, its traits, and what its display carries."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from _kit.figures import GapPicture, draw_gap
from _kit.heads import load_ou_head
from _kit.widgets import GapExplorer, gap_explorer, gap_picture
from bs4 import BeautifulSoup

from amortlib.energy import Energy
from amortlib.solvers import OptimalInterpolation as OI

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def explorer() -> GapExplorer:
    return gap_explorer(*load_ou_head())


def test_at_the_ends_of_every_control_the_picture_is_right(explorer: GapExplorer) -> None:
    """All 16 corners: the mask is the gap cut at the record's end, the head is at the exact
    posterior to the bar of the benchmark (0.1 nats), and the prior where nothing is seen."""
    ends = [(0, 31), (0, 32), explorer.noise_range, (0, explorer.events - 1)]
    for start, length, noise, event in itertools.product(*ends):
        explorer.start, explorer.length, explorer.noise, explorer.event = (
            start,
            length,
            noise,
            event,
        )
        picture = explorer.picture()
        at = np.arange(picture.mask.size)
        np.testing.assert_array_equal(picture.mask, (at < start) | (at >= start + length))
        np.testing.assert_array_equal(explorer.seen().mask, picture.mask)
        np.testing.assert_allclose(explorer.seen().y, picture.y, rtol=1e-6)
        assert 0 <= picture.kl < 0.1
        assert np.isfinite(picture.head_mean).all()
        assert (picture.head_sd > 0).all()
        missing = int((~picture.mask).sum())
        assert f"{missing} of {at.size} times are missing" in picture.words()
        if missing == at.size:
            prior = explorer.problem.prior
            np.testing.assert_allclose(picture.head_mean, prior.mean(), atol=1e-3)
            np.testing.assert_allclose(picture.head_sd, prior.sd(), rtol=1e-3)


def test_a_control_changes_one_thing_at_a_time(explorer: GapExplorer) -> None:
    def at(**change) -> GapPicture:
        settings = {"start": 5, "length": 8, "noise": 0.3, "event": 2} | change
        (posterior,) = explorer.posteriors.values()
        return gap_picture(posterior, explorer.problem, **settings)

    base = at()
    for moved in (at(start=9), at(length=20), at(noise=0.9)):
        np.testing.assert_array_equal(moved.truth, base.truth)
    np.testing.assert_array_equal(at(start=9).y, base.y)
    np.testing.assert_allclose((at(noise=0.9).y - base.truth) / 3, base.y - base.truth, atol=1e-5)
    assert not np.array_equal(at(event=3).truth, base.truth)


def test_the_display_has_two_homes(explorer: GapExplorer) -> None:
    """A view for a kernel; for a page the state in full, and a picture with its words."""
    explorer.start, explorer.length, explorer.noise, explorer.event = 4, 9, 0.5, 3
    bundle = explorer._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in data
    page = BeautifulSoup(data["text/html"], "html.parser")
    assert page.find("img")["alt"].endswith(explorer.picture().words())
    state = json.loads(page.find("script").string)
    assert state["kind"] == "gap"
    assert (state["start"], state["length"], state["noise"], state["event"]) == (4, 9, 0.5, 3)
    assert set(state["heads"]) == {"amortized"}
    assert not any(name.startswith("_") for name in state)


def test_a_closing_tag_in_the_state_does_not_end_the_script() -> None:
    posterior, problem = load_ou_head()
    explorer = gap_explorer({"</script><b>": posterior}, problem)
    page = BeautifulSoup(explorer.to_html(), "html.parser")
    assert page.find("b") is None
    assert json.loads(page.find("script").string)["head"] == "</script><b>"


def test_with_a_kernel_a_function_of_ones_own_is_drawn_beside(explorer: GapExplorer) -> None:
    """Optimal interpolation, asked at every position, answers as the exact posterior does."""
    problem = explorer.problem
    solver = OI(Energy(problem.prior, problem.forward))

    def by_oi(event):
        found = solver(event)
        return found.mode, found.covariance.diagonal() ** 0.5

    mine = gap_explorer(*load_ou_head(), compare=by_oi, label="OI")
    for start in (3, 20):
        mine.start = start
        picture = mine.picture()
        assert mine.overlay["label"] == "OI"
        np.testing.assert_allclose(mine.overlay["mean"], picture.exact_mean, atol=1e-3)
        np.testing.assert_allclose(mine.overlay["sd"], picture.exact_sd, rtol=1e-3)


def test_the_controls_compose_with_ipywidgets(explorer: GapExplorer) -> None:
    import ipywidgets

    slider = ipywidgets.IntSlider(0, 0, 20)
    link = ipywidgets.link((slider, "value"), (explorer, "length"))
    slider.value = 17
    assert explorer.length == 17
    link.unlink()


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"start": 32}, "0 <= start <= 31"), ({"length": -1}, "0 <= length <= 32"),
     ({"event": 20}, "0 <= event <= 19")],
)  # fmt: skip
def test_a_first_position_off_the_sliders_is_refused(bad: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"expected {words}, got"):
        gap_explorer(*load_ou_head(), **bad)


def test_drawing_leaves_no_figure_open(explorer: GapExplorer) -> None:
    before = plt.get_fignums()
    explorer.still()
    assert plt.get_fignums() == before


def test_the_exact_posterior_needs_a_prior(explorer: GapExplorer) -> None:
    blind = eqx.tree_at(lambda p: p.prior, explorer.problem, None)
    (posterior,) = explorer.posteriors.values()
    with pytest.raises(ValueError, match="expected a problem with its prior"):
        gap_picture(posterior, blind, start=0, length=1, noise=0.3, event=0)
    with pytest.raises(ValueError, match="expected a problem with its prior"):
        gap_explorer(posterior, blind)


def test_a_head_that_the_pages_do_not_know_is_refused() -> None:
    posterior, problem = load_ou_head()
    other = eqx.tree_at(lambda p: p.encoder.mlp.activation, posterior, jax.nn.elu)
    with pytest.raises(ValueError, match="expected an activation that the pages know"):
        gap_explorer(other, problem)


def test_the_drawing_takes_plain_arrays_and_knows_no_widget() -> None:
    n = 4
    ones = np.ones(n)
    mask = np.array([True, False, True, True])
    picture = GapPicture(np.arange(n), ones, ones, mask, ones, ones, ones, ones, 0.0)
    legend = draw_gap(picture).legends[0]
    labels = {text.get_text() for text in legend.get_texts()}
    assert {"gap", "truth", "observations", "exact, 95%", "amortized, 95%"} <= labels
    code = "import sys, _kit.figures; sys.exit('ipywidgets' in sys.modules or 'jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "book", check=True)
