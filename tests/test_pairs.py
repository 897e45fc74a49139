"""Minibatches of pairs that exist already: shuffled, masked afresh, held out, and checked."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from amortlib.observation import AllMissing, Dropouts
from amortlib.pairs import InvalidPairsError, Pairs, _shuffled, from_pairs
from amortlib.training import fit
from amortlib.types import Event

KEY = jax.random.key(0)
N, T = 53, 4


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Each row holds its own number, so that a pair can be told from another."""
    x = np.arange(N, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    return x, 100.0 * np.arange(N, dtype=np.float32)[:, None] + np.arange(T, dtype=np.float32)


def made(batch: int = 8, **settings) -> tuple[Pairs, tuple | None]:
    return from_pairs(*arrays(), batch, key=KEY, **settings)


def rows(batch: tuple) -> np.ndarray:
    return np.asarray(batch[0][:, 0], int)


# --- the order --------------------------------------------------------------------------------


@cache
def shuffle(n: int):
    return jax.jit(jax.vmap(lambda key: _shuffled(jnp.arange(n), n, key=key)))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 101, 1000])
def test_every_shuffle_is_a_permutation(n):
    orders = np.asarray(shuffle(n)(jax.random.split(KEY, 8)))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(n), (8, 1)))


def test_shuffles_favour_no_place_and_no_neighbour():
    """Over 20,000 keys each of 7 numbers is equally likely at each place, and each pair of numbers
    at neighbouring places: four chi-square tests at 1e-6 each, and the key is fixed.
    """
    n, draws = 7, 20_000
    orders = np.asarray(shuffle(n)(jax.random.split(jax.random.key(1), draws)))
    for place in (0, 3, 6):
        assert scipy.stats.chisquare(np.bincount(orders[:, place], minlength=n)).pvalue > 1e-6
    both = np.bincount(n * orders[:, 2] + orders[:, 3], minlength=n * n)
    assert scipy.stats.chisquare(both[both > 0]).pvalue > 1e-6
    assert (both > 0).sum() == n * (n - 1)


def test_an_epoch_uses_each_pair_once_and_the_next_goes_another_way():
    pairs, _ = made(validation=0.1)
    assert len(pairs) == N - 5
    assert pairs.steps_per_epoch == 6
    epochs = [
        np.concatenate([rows(pairs.at(6 * epoch + i, key=KEY)) for i in range(6)])
        for epoch in range(2)
    ]
    for seen in epochs:
        assert len(set(seen)) == 48
    assert (epochs[0] != epochs[1]).mean() > 0.8
    assert (rows(pairs.at(0, key=KEY)) == epochs[0][:8]).all()
    assert (rows(pairs.at(0, key=jax.random.key(1))) != epochs[0][:8]).any()


def test_a_pair_stays_a_pair():
    pairs, (x, events) = made(validation=0.5)
    for states, seen in ((x, events), pairs.at(3, key=KEY)):
        np.testing.assert_array_equal(seen.y, 100.0 * states[:, :1] + np.arange(T))


def test_with_replacement_pairs_come_again():
    """48 steps of 8 draws from 48: the counts are multinomial (chi-square at 1e-6, fixed key)."""
    pairs, _ = made(replace=True)
    drawn = jax.jit(jax.vmap(lambda i: pairs.at(i, key=KEY)[0][:, 0]))(jnp.arange(48))
    counts = np.unique(np.asarray(drawn), return_counts=True)[1]
    assert counts.max() > 8
    full = np.zeros(48)
    full[: counts.size] = counts
    assert scipy.stats.chisquare(full).pvalue > 1e-6


# --- masks ------------------------------------------------------------------------------------


def test_masks_are_drawn_afresh_at_every_use_and_show_nothing_that_was_not_seen():
    x, y = arrays()
    y[:, 1] = np.nan
    pairs, held = from_pairs(x, y, 24, key=KEY, gaps=Dropouts(0.5), validation=0.1)
    assert not held[1].mask[:, 1].any()
    masks = {row: [] for row in range(N)}
    for step in range(8):
        batch = pairs.at(step, key=KEY)
        assert not batch[1].mask[:, 1].any()
        for row, mask in zip(rows(batch), np.asarray(batch[1].mask), strict=True):
            masks[row].append(mask)
    drawn = [np.stack(seen) for seen in masks.values() if seen]
    # Four draws of three entries: all the same in one pair of 512; of 48 pairs, most differ.
    assert sum((seen != seen[0]).any() for seen in drawn) > 40
    # 576 entries at one half: within 5 standard deviations (a false alarm in 6e-7, fixed key).
    share = np.concatenate(drawn)[:, [0, 2, 3]].mean()
    assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(576)


def test_held_out_pairs_may_have_gaps_of_their_own():
    pairs, (_, events) = made(gaps=None, validation_gaps=AllMissing())
    assert not events.mask.any()
    assert pairs.at(0, key=KEY)[1].mask.all()


def test_held_out_pairs_are_not_trained_on_and_the_key_chooses_them():
    x, y = arrays()
    held = {}
    for seed in (0, 1):
        pairs, (x_held, _) = from_pairs(x, y, 8, key=jax.random.key(seed), validation=0.2)
        held[seed] = set(np.asarray(x_held[:, 0], int))
        assert len(held[seed]) == 11
        assert held[seed].isdisjoint(np.asarray(pairs.x[:, 0], int))
        assert held[seed] | set(np.asarray(pairs.x[:, 0], int)) == set(range(N))
    assert held[0] != held[1]
    assert made(validation=0.0)[1] is None


# --- in the loop ------------------------------------------------------------------------------


class Mean(eqx.Module):
    """One number, to be put where the states are."""

    at: jax.Array


def spread(model: Mean, batch: tuple, key: jax.Array) -> jax.Array:
    del key
    return jnp.mean((batch[0] - model.at) ** 2)


def test_training_goes_through_the_pairs_and_stops_before_it_learns_them_by_heart():
    """Losses are those of the epochs' minibatches, by hand, and patience waits for the held out."""
    pairs, held = made(validation=0.2)
    settings = {"key": KEY, "steps": 18, "every": 6, "optimizer": optax.sgd(0.0)}
    result = fit(
        Mean(jnp.zeros(())), spread, pairs, validation=held, patience=1, progress=False, **settings
    )
    assert result.stopped == "validation did not improve in 1 checks"
    k_stream = jax.random.fold_in(KEY, 2**32 - 1)
    want = [np.mean(rows(pairs.at(i, key=k_stream)) ** 2.0) for i in range(12)]
    np.testing.assert_allclose(result.loss, want, rtol=1e-5)
    np.testing.assert_allclose(result.validation_loss, np.mean(rows(held) ** 2.0), rtol=1e-5)


def test_pairs_are_arguments_of_the_compiled_program():
    """As constants inside it they would be copied, and folded, at every compilation."""
    x, y = (jnp.asarray(a) for a in arrays())
    pairs, _ = from_pairs(x, y, 8, key=KEY)
    text = jax.jit(lambda pairs, key: pairs.at(0, key=key)).lower(pairs, KEY).as_text()
    assert 'dense<"0x' not in text


# --- what does not fit ------------------------------------------------------------------------


def spoilt(name: str, row: int, value: float) -> dict:
    x, y = arrays()
    {"x": x, "y": y}[name][row, 1] = value
    return {"x": x, "events": Event(jnp.asarray(y), jnp.ones(y.shape, bool))}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (spoilt("x", 7, np.nan), r"finite values in x, got \[ *7\. nan\] in row 7 \(1 such rows\)"),
        (spoilt("y", 9, np.inf), r"first index is the row: .*got inf at index \(9, 1\)"),
        ({"x": np.zeros(N, np.float32)}, r"x of shape \(n, d\) and of floats, got float32\(53,\)"),
        ({"x": np.zeros((N, 2), int)}, r"of floats, got int64\(53, 2\)"),
        ({"x": np.zeros((5, 2), np.float32)}, r"each of the 5 rows of x, got y of shape \(53, 4\)"),
        ({"events": np.zeros(N)}, r"expected y of shape \(n, \.\.\.\), got \(53,\)"),
        ({"events": "words"}, r"real numbers in y"),
        ({"events": np.full((N, T), np.inf)}, r"got inf at index \(0, 0\)"),
        ({"batch": 49}, r"1 <= batch <= 48, .* left of 53 when 5 are held out, got 49"),
        ({"batch": 0}, "1 <= batch <= 48"),
        ({"validation": 1.0}, "0 <= validation < 1, got 1.0"),
        ({"validation": -0.1}, "0 <= validation < 1"),
        (
            {"gaps": lambda key, shape: jnp.ones(shape[0])},
            r"gaps\(key, shape\) to return booleans of shape \(4,\), got float32",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_refused_with_their_row(changed, message):
    x, y = arrays()
    arguments = {"x": x, "events": y, "batch": 8, "key": KEY} | changed
    with pytest.raises(InvalidPairsError, match=message):
        from_pairs(**arguments)


def test_what_stands_under_a_mask_does_not_matter():
    x, y = arrays()
    y[3, 2] = np.nan
    seen = jnp.ones(y.shape, bool).at[3, 2].set(False)
    pairs, _ = from_pairs(x, Event(jnp.asarray(y), seen), 8, key=KEY, validation=0.0)
    assert np.isfinite(pairs.events.y).all()
    assert int((~pairs.events.mask).sum()) == 1
