"""Nothing is compiled again when the mask, the event, or the number of events changes."""

import logging
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.encoders import FlatEncoder
from amortlib.heads import MixtureHead
from amortlib.posterior import (
    AmortizedPosterior,
    flow_posterior,
    in_buckets,
    regression_posterior,
    score_posterior,
)
from amortlib.problems import ornstein_uhlenbeck
from amortlib.types import Array, Event, Key

SITES = 8
REGRESSION = ("information", "cholesky", "diagonal")
OTHERS = ("mixture", "flow", "score")
SMALL = {"features": 4, "encoder_width": 4, "encoder_depth": 1, "width": 4, "depth": 1}


def built(kind: str) -> AmortizedPosterior:
    """Of the smallest size: what is counted does not depend on it."""
    prior, key = ornstein_uhlenbeck(SITES).prior, jax.random.key(0)
    if kind in REGRESSION:
        return regression_posterior(kind, key=key, prior=prior)
    if kind == "mixture":
        flat = FlatEncoder((SITES,), key=key, features=4, width=4, depth=1)
        units = {"centre": prior.loc, "scale": prior.sd()}
        return AmortizedPosterior(flat, MixtureHead(4, SITES, key=key, components=2, **units))
    shared = {"key": key, "prior": prior, "obs_shape": (SITES,), "components": 2, **SMALL}
    return (
        flow_posterior(layers=1, transformer="affine", **shared)
        if kind == "flow"
        else score_posterior(**shared)
    )


@pytest.fixture(scope="module", params=REGRESSION)
def posterior(request: pytest.FixtureRequest) -> AmortizedPosterior:
    return built(request.param)


class Draws(eqx.Module):
    """What is asked of an event and a key: the model is data, as it is in a method of it."""

    model: AmortizedPosterior

    def __call__(self, event: Event, key: Key) -> Array:
        return self.model.sample(event, 3, key=key)


def _events(n: int, seed: int) -> Event:
    """With masks of every kind, in numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    mask = rng.random((n, SITES)) < rng.random((n, 1))
    y = rng.normal(size=(n, SITES)).astype(np.float32)
    return Event(jnp.asarray(np.where(mask, y, np.nan)), jnp.asarray(mask))


def _compiled(run: Callable[[], object], caplog: pytest.LogCaptureFixture) -> list[str]:
    """Names of the programs that XLA compiles while `run` runs."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run()
    return [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


def test_the_counter_counts(caplog: pytest.LogCaptureFixture) -> None:
    program = jax.jit(lambda x: x + 1.0)
    assert len(_compiled(lambda: program(np.ones(3)), caplog)) == 1
    assert _compiled(lambda: program(np.zeros(3)), caplog) == []
    assert len(_compiled(lambda: program(np.zeros(4)), caplog)) == 1


def test_a_bucket_is_compiled_once(
    posterior: AmortizedPosterior, caplog: pytest.LogCaptureFixture
) -> None:
    events = {n: _events(n, seed=n) for n in (8, 5, 6, 7, 9)}
    first = _compiled(lambda: in_buckets(posterior.mean, events[5]), caplog)
    assert any("_mapped" in name for name in first)
    for n in (5, 6, 7, 8):
        assert _compiled(lambda n=n: in_buckets(posterior.mean, events[n]), caplog) == []
    trained = jax.tree.map(lambda a: 1.01 * a if eqx.is_inexact_array(a) else a, posterior)
    assert _compiled(lambda: in_buckets(trained.mean, events[6]), caplog) == []
    assert _compiled(lambda: in_buckets(posterior.mean, events[9]), caplog) != []


def test_one_event_is_compiled_once_whatever_its_mask(
    posterior: AmortizedPosterior, caplog: pytest.LogCaptureFixture
) -> None:
    program = eqx.filter_jit(lambda model, event, key: model.sample(event, 3, key=key))
    events = [jax.tree.map(lambda leaf: leaf[0], _events(1, seed=seed)) for seed in range(5)]
    key = jax.random.key(1)
    program(posterior, events[0], key)
    assert _compiled(lambda: [program(posterior, e, key) for e in events], caplog) == []


@pytest.mark.parametrize("kind", OTHERS)
def test_heads_that_are_no_gaussian_are_compiled_once_for_a_bucket_and_for_an_event(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Masks, events, weights and their number within the bucket change; draws have to, too."""
    model = built(kind)
    trained = jax.tree.map(lambda a: 1.01 * a if eqx.is_inexact_array(a) else a, model)
    inputs = [
        (which, _events(n, seed=n), jax.random.split(jax.random.key(n), 4)[:n])
        for which, n in ((Draws(model), 4), (Draws(model), 3), (Draws(trained), 4))
    ]
    ask, events, keys = inputs[0]
    first = _compiled(lambda: in_buckets(ask, events, keys), caplog)
    assert sum("_mapped" in name for name in first) == 1
    drawn = []
    rest = [lambda given=given: drawn.append(in_buckets(*given)) for given in inputs]
    assert [_compiled(run, caplog) for run in rest] == [[]] * len(inputs)
    assert [len(x) for x in drawn] == [4, 3, 4]
    assert (drawn[0] != drawn[2]).any()

    program = eqx.filter_jit(lambda ask, event, key: ask(event, key))
    singles = [jax.tree.map(lambda leaf: leaf[0], _events(1, seed=seed)) for seed in range(3)]
    assert len({e.mask.tobytes() for e in map(jax.device_get, singles)}) == 3
    program(ask, singles[0], keys[0])
    assert _compiled(lambda: [program(ask, e, keys[0]) for e in singles], caplog) == []


def test_padding_does_not_change_an_answer(posterior: AmortizedPosterior) -> None:
    events, keys = _events(3, seed=3), jax.random.split(jax.random.key(3), 3)

    def draw(event, key):
        return posterior.sample(event, 2, key=key), posterior.sd(event)

    want = jax.jit(jax.vmap(draw))(events, keys)
    got = in_buckets(draw, events, keys)
    for a, b in zip(want, got, strict=True):
        assert isinstance(b, np.ndarray)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_batches_that_do_not_fit_are_refused(posterior: AmortizedPosterior) -> None:
    events = _events(3, seed=0)
    with pytest.raises(ValueError, match="one leading axis"):
        in_buckets(posterior.mean, jax.tree.map(lambda leaf: leaf[:0], events))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        in_buckets(lambda event, key: event.y, events, jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"got shapes \[\(\)\]"):
        in_buckets(jnp.sin, jnp.asarray(1.0))
