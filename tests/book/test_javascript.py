"""The JavaScript of the live widgets: its unit tests, and its answers against amortlib's."""

from __future__ import annotations

import base64
import functools
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _kit.bundle import bundle
from _kit.heads import OU_NOISE, load_bimodal, load_lorenz63_flow, load_ou_head
from _kit.packing import pack, pack_flow, pack_posterior, pack_score, window_settings
from _kit.windows import FixedSteps

from amortlib import export
from amortlib.encoders import FlatEncoder, ScaledEncoder, SiteEncoder
from amortlib.energy import Energy
from amortlib.gaussian import Gaussian, GaussMarkov, condition, kl
from amortlib.heads import InformationHead
from amortlib.heads.score import FlowODE, ReverseSDE, ScoreDistribution
from amortlib.observation import Select
from amortlib.posterior import (
    AmortizedPosterior,
    flow_posterior,
    regression_posterior,
    score_posterior,
)
from amortlib.problems import InverseProblem, lorenz63, lorenz63_sign_lost, ornstein_uhlenbeck
from amortlib.refine import refine
from amortlib.types import Event, Fixed, to_double
from tools.node import find_node

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "js"
SOURCES = ROOT / "book" / "_kit" / "js"

HUGE = 1e6
"""How far some observations lie outside anything that the shipped head was trained on: its
messages are bounded, so that it answers even these."""
FAR = 3.0
"""Likewise for the others, whose answers to absurd values are nothing but rounding."""


def node(*arguments: str | Path) -> str:
    """Run node and return what it prints."""
    run = subprocess.run(
        [find_node(), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_unit_tests_of_the_library() -> None:
    """Every file of tests runs, and node counts at least as many tests as the files name."""
    files = sorted(SCRIPTS.glob("*.test.mjs"))
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    named = len(re.findall(r"^test\(", sources, flags=re.MULTILINE))
    report = node("--test", "--test-reporter=tap", *files)
    counts = {
        name: int(n) for name, n in re.findall(r"^# (\w+) (\d+)$", report, flags=re.MULTILINE)
    }
    assert named > 0
    assert counts["pass"] >= named
    assert counts["fail"] == counts["skipped"] == counts["todo"] == 0


def test_both_sides_read_the_same_version() -> None:
    text = (SOURCES / "weights.mjs").read_text(encoding="utf-8")
    assert f'FORMAT_VERSION = "{export.FORMAT_VERSION}"' in text


# --- parity with amortlib ---


Compare = Callable[[bytes, bytes], dict[str, Any]]
"""From weights, and events with answers, to the worst difference of each quantity."""


def in_node(folder: Path) -> Compare:
    def compare(weights: bytes, answered: bytes) -> dict[str, Any]:
        (folder / "weights").write_bytes(weights)
        (folder / "vectors").write_bytes(answered)
        return json.loads(node(SCRIPTS / "run_parity.mjs", folder / "weights", folder / "vectors"))

    return compare


IN_A_PAGE = """files => live.compare(...files.map(
  (file) => Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0))))"""


def in_a_page(folder: Path, page: Any) -> Compare:
    """The same functions as the pages have them: bundled, and opened from disk."""
    script = bundle("tests/js/parity.mjs", ROOT)
    path = folder / "parity.html"
    path.write_text(f'<meta charset="utf-8"><script>{script}</script>', encoding="utf-8")
    page.goto(path.as_uri())

    def compare(*files: bytes) -> dict[str, Any]:
        return page.evaluate(IN_A_PAGE, [base64.b64encode(file).decode("ascii") for file in files])

    return compare


@pytest.fixture(params=["node", pytest.param("Chromium", marks=pytest.mark.slow)])
def compare(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Compare]:
    """Runs the JavaScript in each of the two."""
    if request.param == "node":
        yield in_node(tmp_path)
        return
    page = request.getfixturevalue("browser").new_page()
    yield in_a_page(tmp_path, page)
    page.close()


def contiguous(n: int) -> np.ndarray:
    """Every contiguous gap, everything seen and nothing seen among them."""
    start, length, at = np.ix_(np.arange(n), np.arange(n + 1), np.arange(n))
    return np.unique(((at < start) | (at >= start + length)).reshape(-1, n), axis=0)


def masks(n: int) -> np.ndarray:
    """Every contiguous gap, everything seen, nothing seen, single entries, and random patterns."""
    alone = np.eye(n, dtype=bool)
    rng = np.random.default_rng(0)
    patterns = rng.random((200, n)) < rng.random((200, 1))
    return np.concatenate([contiguous(n), alone, patterns])


def events(prior: GaussMarkov, far: float) -> dict[str, np.ndarray]:
    """Observations under every mask, with errors from one end of the range to the other.

    Some are far outside of training, and masked entries hold what records hold there.
    """
    seen = masks(prior.loc.size)
    rng = np.random.default_rng(7)
    shape = seen.shape
    ends = np.where(rng.random((shape[0], 1)) < 0.5, *OU_NOISE)
    sd = np.where(rng.random((shape[0], 1)) < 0.5, rng.uniform(*OU_NOISE, shape), ends)
    chol = np.linalg.cholesky(np.asarray(prior.covariance(), float))
    y = rng.normal(size=shape) @ chol.T + sd * rng.normal(size=shape)
    y[rng.random(shape[0]) < 0.05] *= far
    y = np.where(seen, y, np.where(rng.random(shape) < 0.5, np.nan, -999.0))
    return {"y": y, "mask": seen, "sd": np.where(seen, sd, np.nan), "z": rng.normal(size=shape)}


@eqx.filter_jit
def answers(posterior: AmortizedPosterior, prior: GaussMarkov | None, given: dict) -> dict:
    """What amortlib makes of the events: moments, a draw from given noise, densities."""

    def one(y, mask, sd, z):
        event = Event(y, mask, sd)
        shape = getattr(posterior.encoder, "obs_shape", None) or y.shape
        q = posterior(jax.tree.map(lambda entries: entries.reshape(shape), event))
        draw = q.colour(z)
        x = q.mean() + 0.5 * z * q.sd()
        found = {
            "mean": q.mean(),
            "spread": q.sd(),
            "sample": draw,
            "x": x,
            "log_prob": q.log_prob(x)[None],
        }
        if prior is not None:
            exact = condition(prior, jnp.eye(y.size), event)
            found |= {"exact_mean": exact.mean(), "exact_sd": exact.sd()}
            found["kl"] = kl(exact, q)[None]
        return found

    return jax.vmap(one)(given["y"], given["mask"], given["sd"], given["z"])


def shaken(posterior: AmortizedPosterior, seed: int) -> AmortizedPosterior:
    """The posterior with random weights of a size that makes its answers differ between events."""
    trainable, rest = eqx.partition(
        posterior, eqx.is_inexact_array, is_leaf=lambda tree: isinstance(tree, Fixed)
    )
    leaves, treedef = jax.tree.flatten(trainable)
    rng = np.random.default_rng(seed)
    new = [leaf + 0.2 * rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return eqx.combine(jax.tree.unflatten(treedef, new), rest)


Case = tuple[AmortizedPosterior, GaussMarkov | None, dict[str, np.ndarray]]
"""A posterior, the prior that its exact answers follow from, where there are any, and events."""


def shipped() -> Case:
    posterior, problem = load_ou_head()
    return posterior, problem.prior, events(problem.prior, HUGE)


def plain(kind: str) -> Case:
    prior = ornstein_uhlenbeck(9, timescale=3.0, loc=0.7, noise=OU_NOISE).prior
    made = regression_posterior(
        kind, key=jax.random.key(1), prior=prior, uses_sd=True, features=8, width=16
    )
    return shaken(made, 2), prior, events(prior, FAR)


def neighbours() -> Case:
    """Messages about blocks of two, read with neighbours, without error bars."""
    rng = np.random.default_rng(3)
    n, block = 7, 2
    diag = np.tril(rng.normal(size=(n, block, block)))
    diag[:, range(block), range(block)] = 1.0 + rng.random((n, block))
    prior = GaussMarkov(
        jnp.asarray(rng.normal(size=n * block), jnp.float32),
        jnp.asarray(diag, jnp.float32),
        jnp.asarray(0.5 * rng.normal(size=(n - 1, block, block)), jnp.float32),
    )
    encoder = SiteEncoder(key=jax.random.key(4), radius=2, features=4, width=8)
    site = jnp.asarray(rng.integers(0, n, 2 * n))
    head = InformationHead(encoder.size, prior, key=jax.random.key(5), site=site, rank=2)
    return shaken(AmortizedPosterior(encoder, head), 6), None, events(prior, FAR)


def guess() -> Case:
    """The head that the steps of the ladder start from, on windows like those of its training."""
    posterior = load_lorenz63_flow()[0]
    problem = FixedSteps.in_place(lorenz63(substeps=2))  # as the widget's
    seen = masks(int(np.prod(problem.shapes()[1])))
    x, drawn = jax.device_get(problem.batch(jax.random.key(13), len(seen)))
    y = np.where(seen, drawn.y.reshape(seen.shape), np.nan)
    z = np.random.default_rng(14).normal(size=x.shape)
    given = {"y": y, "mask": seen, "sd": np.ones(seen.shape), "z": z}
    return posterior.encoder.guess.tree, None, given


def one_hole_regression() -> Case:
    """The regression head of one hole, two answers, which reads in units of its own."""
    seen = np.concatenate([np.repeat(contiguous(5), 2, axis=1), masks(10)])  # times, then entries
    batch = lorenz63_sign_lost().batch(jax.random.key(15), len(seen))
    x, drawn = jax.device_get(batch)
    y = np.where(seen, drawn.y.reshape(seen.shape), np.nan)
    z = np.random.default_rng(16).normal(size=x.shape)
    given = {"y": y, "mask": seen, "sd": np.ones(seen.shape), "z": z}
    return load_bimodal("regression")[0], None, given


CASES: dict[str, Callable[[], Case]] = {
    "shipped": shipped,
    "cholesky": lambda: plain("cholesky"),
    "diagonal": lambda: plain("diagonal"),
    "blocks with neighbours": neighbours,
    "guess of the ladder": guess,
    "regression of one hole": one_hole_regression,
}


def vectors(
    posterior: AmortizedPosterior, prior: GaussMarkov | None, given: dict
) -> tuple[bytes, bytes]:
    """The two files that the JavaScript is given: the weights, and the events with answers."""
    dtype = jax.tree.leaves(eqx.filter(posterior, eqx.is_inexact_array))[0].dtype
    given = {k: v if v.dtype == bool else jnp.asarray(v, dtype) for k, v in given.items()}
    found = answers(posterior, prior, given)
    tree = jax.tree.map(jnp.asarray, given | found) | ({} if prior is None else {"prior": prior})
    return pack_posterior(posterior), pack(tree)


@functools.cache
def make(name: str, *, double: bool) -> tuple[bytes, bytes]:
    """Made once: node and Chromium are given the same."""
    posterior, prior, given = CASES[name]()
    if not double:
        # In single precision the answers to absurd values are dominated by rounding.
        usual = np.nanmax(np.abs(np.where(given["mask"], given["y"], 0)), axis=1) < HUGE / 100
        given = {key: value[usual] for key, value in given.items()}
        return vectors(posterior, prior, given)
    with jax.enable_x64(True):
        posterior, prior = to_double((posterior, prior))
        return vectors(posterior, prior, given)


@pytest.mark.parametrize("name", CASES)
def test_the_same_answers_in_double_precision(compare: Compare, name: str) -> None:
    """Both compute with 53 bits: what is left is rounding, far below the bar of 1e-5."""
    worst = compare(*make(name, double=True))
    print(name, worst)
    assert worst.pop("events") >= 200
    assert {"mean", "sd", "sample", "log_prob"} <= set(worst)
    assert max(worst.values()) <= 1e-8, worst


def test_the_same_answers_as_the_head_that_is_shipped(compare: Compare) -> None:
    """Against single precision, which is what the chapters run: the bar of the book."""
    worst = compare(*make("shipped", double=False))
    print(worst)
    assert worst.pop("events") > 600
    assert max(worst.values()) <= 1e-5, worst


# --- flows and scores ---


def small_flow(kind: str, transformer: str, dim: int) -> AmortizedPosterior:
    """A flow on a fixed base with random weights, large enough to bend what it maps."""
    key = jax.random.key(8)
    chol = jnp.eye(dim) + 0.3 * jnp.tril(jnp.ones((dim, dim)), -1)
    flat = FlatEncoder((2, 2), key=key, features=8, width=16, depth=1)
    made = flow_posterior(
        "prior",
        key=key,
        prior=Gaussian(jnp.arange(1.0, dim + 1.0), chol),
        obs_shape=(2, 2),
        encoder=ScaledEncoder(flat, 0.3, 1.7),
        kind=kind,
        transformer=transformer,
        layers=3,
        condition=6,
        features=8,
        width=12,
        knots=5,
        points=2 * dim,
    )
    return shaken(made, 9)


def small_score(components: int) -> AmortizedPosterior:
    """A score head of another shape than the shipped one, with random weights."""
    made = score_posterior(
        key=jax.random.key(17),
        prior=Gaussian(jnp.arange(1.0, 5.0), jnp.eye(4) + 0.3 * jnp.tril(jnp.ones((4, 4)), -1)),
        obs_shape=(3, 1),
        components=components,
        obs_centre=0.3,
        obs_scale=1.7,
        features=8,
        encoder_width=16,
        encoder_depth=1,
        width=12,
        depth=3,
        sampler=ReverseSDE(11),
    )
    return shaken(made, 18)


MIXTURES: dict[str, Callable[[], AmortizedPosterior]] = {
    "flow, shipped": lambda: load_bimodal("flow")[0],
    "score, shipped": lambda: load_bimodal("score")[0],
    "score, three components": lambda: small_score(3),
    "coupling splines": lambda: small_flow("coupling", "spline", 4),
    "coupling, odd": lambda: small_flow("coupling", "affine", 3),
    "autoregressive splines": lambda: small_flow("autoregressive", "spline", 3),
    "autoregressive, one number": lambda: small_flow("autoregressive", "spline", 1),
}


@eqx.filter_jit
def mixture_answers(posterior: AmortizedPosterior, given: dict, shape: tuple[int, ...]) -> dict:
    """Weights, a draw of each component from given noise, and the log-density where exact.

    For a score the draws of the ODE, and those of the SDE with the path that diffrax drew.
    """

    def one(y, mask, z, key):
        q = posterior(Event(y.reshape(shape), mask.reshape(shape)))
        found = {"log_weight": q.log_weight}
        if isinstance(q, ScoreDistribution):
            sde = q.sampler if isinstance(q.sampler, ReverseSDE) else ReverseSDE()
            found |= path_of(sde, q, z, key)
        for k in range(q.log_weight.size):
            if isinstance(q, ScoreDistribution):
                frame = q.at(jnp.asarray(k))
                trip = q.carry(FlowODE(), z, jnp.asarray(k), key=key)
                found[f"sample_{k}"] = frame.colour(trip.u)
                trip = q.carry(sde, z, jnp.asarray(k), key=key)
                found[f"by_sde_{k}"] = frame.colour(trip.u)
            else:
                found[f"sample_{k}"] = q.from_noise(z, k)
        if not isinstance(q, ScoreDistribution):
            found["x"] = q.from_noise(0.8 * z, 0)
            found["log_prob"] = q.log_prob(found["x"])[None]
        return found

    keys = jax.random.split(jax.random.key(19), len(given["y"]))
    return jax.vmap(one)(given["y"], given["mask"], given["z"], keys)


def path_of(sde: ReverseSDE, q: ScoreDistribution, z: jax.Array, key: jax.Array) -> dict:
    """The increments and areas of the path that diffrax integrates along, step after step."""
    _, control = sde.terms(q.noise, lambda u, sigma: u, z, key=key).terms
    grid = jnp.linspace(0.0, 1.0, sde.steps + 1, dtype=z.dtype)
    each = jax.vmap(lambda t0, t1: control.contr(t0, t1, use_levy=True))(grid[:-1], grid[1:])
    return {"w": each.W.reshape(-1), "area": each.H.reshape(-1)}


@functools.cache
def make_mixture(name: str, n: int) -> tuple[bytes, bytes]:
    """Weights, and `n` events with answers in double precision; some of their noise is far out,
    beyond where splines bend."""
    posterior = MIXTURES[name]()
    scaled = posterior.encoder
    assert isinstance(scaled, ScaledEncoder)
    shape = scaled.inner.obs_shape
    assert shape is not None
    size = int(np.prod(shape))
    rng = np.random.default_rng(10)
    mask = rng.random((n, size)) < rng.random((n, 1))
    gaps = np.repeat(contiguous(shape[0]), size // shape[0], axis=1)
    mask[: len(gaps)] = gaps
    spread = np.broadcast_to(np.asarray(scaled.scale.value, float), shape).reshape(-1)
    middle = np.broadcast_to(np.asarray(scaled.centre.value, float), shape).reshape(-1)
    y = middle + spread * rng.normal(size=(n, size))
    if "shipped" in name:
        # Where it was never trained a flow can be so steep that rounding decides.
        y = np.asarray(lorenz63_sign_lost().batch(jax.random.key(11), n)[1].y, float).reshape(n, -1)
    y = np.where(mask, y, np.nan)
    with jax.enable_x64(True):
        posterior = to_double(posterior)
        q = eqx.filter_eval_shape(posterior, Event(jnp.zeros(shape), jnp.ones(shape, bool)))
        base = q.frame if isinstance(q, ScoreDistribution) else q.base
        z = rng.normal(size=(n, base.loc.shape[-1])) * np.where(rng.random((n, 1)) < 0.2, 3.0, 1.0)
        given = {"y": jnp.asarray(y), "mask": jnp.asarray(mask), "z": jnp.asarray(z)}
        found = mixture_answers(posterior, given, shape)
        pack_it = pack_score if isinstance(q, ScoreDistribution) else pack_flow
        return pack_it(posterior), pack(given | found)


SLOWEST = {"score, three components"}
"""Whose answers take more than ten seconds to compile; the score that is shipped is asked, too."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOWEST else []) for n in MIXTURES],
)
def test_flows_and_scores_give_the_same_in_double_precision(compare: Compare, name: str) -> None:
    """The same noise gives the same draw, through splines, layers and the steps of ODE and SDE."""
    worst = compare(*make_mixture(name, 60))
    print(name, worst)
    assert worst.pop("events") == 60
    kinds = {"sample", "by_sde"} if "score" in name else {"sample", "log_prob"}
    assert {"log_weight"} | kinds == set(worst)
    # flowjax holds the parameter of a slope of one in single precision, off by 3e-8 of it.
    assert max(worst.values()) <= 1e-6, worst


WINDOWS: dict[str, Callable[[], InverseProblem]] = {
    "x and y": lambda: lorenz63(states=7, substeps=2, operator=Select((0, 1))),
    "z at every third": lambda: lorenz63(states=7, substeps=3, operator=Select((2,), stride=3)),
    "sign lost": lambda: lorenz63_sign_lost(),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_energy_of_a_window_and_its_derivatives(tmp_path: Path, name: str) -> None:
    """J, its slope and both Hessians at random controls, and where three damped steps lead."""
    with jax.enable_x64(True):
        problem = FixedSteps.in_place(to_double(WINDOWS[name]()))
        energy = Energy(problem.prior, problem.forward)

        @jax.jit
        def one(key):
            k_pair, k_v = jax.random.split(key)
            _, event = problem.simulate(k_pair)
            v = jax.random.normal(k_v, (3,))
            cost = lambda v: energy(energy.prior.colour(v), event)  # noqa: E731
            jacobian = jax.jacobian(lambda v: energy.residual(v, event))(v)
            return {
                "y": event.y,
                "mask": event.mask,
                "sd": jnp.broadcast_to(problem.obs_noise.sd, event.y.shape),
                "v": v,
                "path": problem.forward(energy.prior.colour(v)),
                "cost": cost(v)[None],
                "slope": jax.grad(cost)(v),
                "gauss": jacobian.T @ jacobian,
                "hessian": jax.hessian(cost)(v),
                "refined": refine(energy, v, event, steps=3),
            }

        found = jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *[one(key) for key in jax.random.split(jax.random.key(12), 50)],
        )
        settings = window_settings(problem)
        loc, chol = problem.prior.loc, problem.prior.chol
    (tmp_path / "settings").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "vectors").write_bytes(pack(found | {"loc": loc, "chol": chol}))
    script = SCRIPTS / "run_window.mjs"
    worst = json.loads(node(script, tmp_path / "settings", tmp_path / "vectors"))
    print(name, worst)
    assert worst.pop("events") == 50
    # By central differences: their error is of the square of a ten-thousandth.
    assert worst.pop("hessian") <= 1e-5
    # Three steps of a chaotic search enlarge rounding.
    assert worst.pop("refined") <= 1e-6
    assert max(worst.values()) <= 1e-9, worst


def test_a_window_that_the_pages_do_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="expected FixedSteps of Lorenz63, got Window"):
        window_settings(lorenz63())


def test_a_file_of_another_head_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(pack_posterior(load_ou_head()[0]))
    script = tmp_path / "load.mjs"
    lines = [
        'import { readFileSync } from "node:fs";',
        f'import {{ loadFlow }} from "{(SOURCES / "flow.mjs").as_uri()}";',
        f'try {{ loadFlow(readFileSync("{weights}")); }} catch (e) {{ console.log(e.message); }}',
    ]
    script.write_text("\n".join(lines), encoding="utf-8")
    assert node(script).strip() == "expected a flow, got information"
