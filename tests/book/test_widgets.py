"""The gap explorer at the ends of every slider, and what its display carries."""

import base64
import itertools
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import matplotlib.pyplot as plt
import numpy as np
import pytest
from _kit.figures import GapPicture, draw_gap
from _kit.heads import load_ou_head
from _kit.widgets import GapExplorer, gap_explorer, gap_picture

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def explorer() -> GapExplorer:
    return gap_explorer(*load_ou_head())


def ends(slider) -> tuple:
    return slider.min, slider.max


def test_every_slider_at_both_ends_gives_a_right_picture(explorer: GapExplorer) -> None:
    """All 16 corners: the mask is the gap cut at the record's end, the head is at the exact
    posterior to the bar of the benchmark (0.1 nats), and the prior where nothing is seen."""
    for start, length, noise, event in itertools.product(*map(ends, explorer.controls)):
        explorer.start.value, explorer.length.value = start, length
        explorer.noise.value, explorer.event.value = noise, event
        picture = explorer.picture()
        at = np.arange(picture.mask.size)
        np.testing.assert_array_equal(picture.mask, (at < start) | (at >= start + length))
        assert 0 <= picture.kl < 0.1
        assert np.isfinite(picture.head_mean).all()
        assert (picture.head_sd > 0).all()
        assert bytes(explorer.image.value).startswith(PNG)
        missing = int((~picture.mask).sum())
        assert f"{missing} of {at.size} times are missing" in explorer.words.value
        if missing == at.size:
            prior = explorer.problem.prior
            np.testing.assert_allclose(picture.head_mean, prior.mean(), atol=1e-3)
            np.testing.assert_allclose(picture.head_sd, prior.sd(), rtol=1e-3)


@pytest.mark.parametrize("name", ["start", "length", "noise", "event"])
def test_moving_a_slider_redraws(explorer: GapExplorer, name: str) -> None:
    explorer.start.value, explorer.length.value = 5, 8
    explorer.noise.value, explorer.event.value = 0.3, 0
    slider = getattr(explorer, name)
    image, words = explorer.image.value, explorer.words.value
    slider.value = slider.max
    assert explorer.image.value != image
    if name in ("length", "noise"):  # the others may leave its numbers as they were
        assert explorer.words.value != words


def test_a_slider_changes_one_thing_at_a_time(explorer: GapExplorer) -> None:
    def at(**change) -> GapPicture:
        settings = {"start": 5, "length": 8, "noise": 0.3, "event": 2} | change
        return gap_picture(explorer.posterior, explorer.problem, **settings)

    base = at()
    for moved in (at(start=9), at(length=20), at(noise=0.9)):
        np.testing.assert_array_equal(moved.truth, base.truth)
    np.testing.assert_array_equal(at(start=9).y, base.y)
    np.testing.assert_allclose((at(noise=0.9).y - base.truth) / 3, base.y - base.truth, atol=1e-5)
    assert not np.array_equal(at(event=3).truth, base.truth)


def test_the_display_carries_a_picture_for_pages_without_a_kernel(explorer: GapExplorer) -> None:
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == explorer.image.value


def test_sliders_are_labelled_and_the_noise_one_can_be_left_out(explorer: GapExplorer) -> None:
    assert all(control.description for control in explorer.controls)
    fixed = gap_explorer(explorer.posterior, explorer.problem, noise_range=None)
    assert fixed.noise not in fixed.children
    assert len(fixed.controls) == 3


def test_moving_leaves_no_figure_open(explorer: GapExplorer) -> None:
    before = plt.get_fignums()
    for start in range(8):
        explorer.start.value = start
    assert plt.get_fignums() == before


def test_the_exact_posterior_needs_a_prior(explorer: GapExplorer) -> None:
    blind = eqx.tree_at(lambda p: p.prior, explorer.problem, None)
    with pytest.raises(ValueError, match="expected a problem with its prior"):
        gap_picture(explorer.posterior, blind, start=0, length=1, noise=0.3, event=0)


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
