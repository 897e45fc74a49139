"""Encoders are blind to what lies under the mask, bit for bit, and see everything else."""

from collections.abc import Callable
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amortlib.encoders import (
    AbstractEncoder,
    ConvEncoder,
    FlatEncoder,
    ScaledEncoder,
    SetEncoder,
    SiteContext,
    SiteEncoder,
)
from amortlib.types import Event, InvalidEventError, as_event, stack_events

KEY = jax.random.key(0)
T = 6
SIZES = {"width": 8, "depth": 1, "features": 5}

CASES: dict[str, Callable[[], AbstractEncoder]] = {
    "flat": lambda: FlatEncoder((T,), key=KEY, **SIZES),
    "flat, error bars": lambda: FlatEncoder((T,), key=KEY, uses_sd=True, **SIZES),
    "flat, two axes": lambda: FlatEncoder((3, 2), key=KEY, uses_sd=True, **SIZES),
    "site": lambda: SiteEncoder(key=KEY, **SIZES),
    "site, error bars": lambda: SiteEncoder(key=KEY, uses_sd=True, **SIZES),
    "site, neighbours": lambda: SiteEncoder(key=KEY, uses_sd=True, radius=2, **SIZES),
    "conv": lambda: ConvEncoder((T,), key=KEY, **SIZES),
    "conv, two axes": lambda: ConvEncoder((3, 2), key=KEY, uses_sd=True, **SIZES),
    "set": lambda: SetEncoder(key=KEY, **SIZES),
    "set, error bars": lambda: SetEncoder(key=KEY, uses_sd=True, **SIZES),
    "set, two instruments": lambda: SetEncoder(key=KEY, channels=2, uses_sd=True, **SIZES),
    "scaled set": lambda: ScaledEncoder(SetEncoder(key=KEY, uses_sd=True, **SIZES), 0.3, 1.7),
}
every_encoder = pytest.mark.parametrize("name", CASES)
every_site_encoder = pytest.mark.parametrize("name", [n for n in CASES if n.startswith("site")])


@cache
def made(name: str) -> AbstractEncoder:
    return CASES[name]()


def event_of(name: str, seed: int, mask: np.ndarray | None = None, t: int = T) -> Event:
    shape = made(name).obs_shape or ((t // 2, 2) if "two instruments" in name else (t,))
    rng = np.random.default_rng(seed)
    y, sd = rng.normal(size=shape), rng.uniform(0.2, 0.8, shape)
    seen = rng.random(shape) < 0.5 if mask is None else mask.reshape(shape)
    time = rng.uniform(0.0, 2.0, shape)
    y, sd, time = (jnp.asarray(a, jnp.float32) for a in (y, sd, time))
    return Event(y, jnp.asarray(seen), sd, time)


def numbers_of(context: jax.Array | SiteContext) -> jax.Array:
    return context.features if isinstance(context, SiteContext) else context


@cache
def program(name: str) -> Callable[[Event], tuple[jax.Array, jax.Array, jax.Array]]:
    """The context, and its derivatives in y and in sd."""

    @jax.jit
    def run(event: Event) -> tuple[jax.Array, jax.Array, jax.Array]:
        def encode(y, sd):
            return numbers_of(made(name)(Event(y, event.mask, sd, event.time)))

        slopes = jax.jacrev(encode, argnums=(0, 1))(event.y, event.sd)
        return encode(event.y, event.sd), *slopes

    return run


JUNK = st.sampled_from([np.nan, np.inf, -np.inf, -999.0, 0.0, 1e38, -1e-38])
OTHER = st.one_of(JUNK, st.floats(-1e6, 1e6, width=32))


# --- blind to gaps ----------------------------------------------------------------------------


@every_encoder
@given(
    seed=st.integers(0, 1000),
    mask=st.lists(st.booleans(), min_size=T, max_size=T).map(np.array),
    under=st.lists(st.tuples(OTHER, OTHER), min_size=T, max_size=T).map(np.array),
)
def test_what_lies_under_the_mask_moves_nothing(name, seed, mask, under):
    """Context and derivatives are the same bits; those by a masked entry are exactly zero."""
    event = event_of(name, seed, mask)
    y, sd = (jnp.asarray(column.reshape(event.y.shape), jnp.float32) for column in under.T)
    changed = Event(
        jnp.where(event.mask, event.y, y),
        event.mask,
        jnp.where(event.mask, event.sd, sd),
        jnp.where(event.mask, event.time, y),
    )
    for got, want in zip(program(name)(changed), program(name)(event), strict=True):
        assert np.isfinite(want).all()
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    for slope in program(name)(changed)[1:]:
        assert not np.asarray(slope)[..., ~np.asarray(event.mask)].any()


@pytest.mark.parametrize(
    "name", ["flat, error bars", "site, neighbours", "conv, two axes", "set, error bars"]
)
def test_nothing_is_moved_where_the_mask_is_known_to_the_compiler(name):
    """XLA makes a selection of a product with booleans, and NaN times zero is zero, unless it
    knows the mask when it compiles: then, a product would be NaN. Another program rounds
    otherwise: 1e-5.
    """
    event = event_of(name, 0, np.arange(T) % 3 != 1)
    hidden = [jnp.where(event.mask, a, jnp.nan) for a in (event.y, event.sd)]
    time = jnp.where(event.mask, event.time, jnp.nan)

    @jax.jit
    def run(y, sd):
        encode = lambda y, sd: numbers_of(made(name)(Event(y, event.mask, sd, time)))  # noqa: E731
        return encode(y, sd), *jax.jacrev(encode, argnums=(0, 1))(y, sd)

    for got, want in zip(run(*hidden), program(name)(event), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@every_encoder
def test_what_was_observed_moves_the_context(name):
    """Every observed value does, and every error bar where those are read."""
    event = event_of(name, 0, np.arange(T) % 3 != 1)
    _, by_y, by_sd = program(name)(event)
    inner = tuple(range(by_y.ndim - event.y.ndim))
    np.testing.assert_array_equal(np.abs(by_y).max(inner) > 1e-4, event.mask)
    reads_sd = np.abs(by_sd).max(inner) > 1e-4
    np.testing.assert_array_equal(reads_sd, event.mask & made(name).uses_sd)


@every_encoder
def test_a_zero_that_was_observed_is_not_a_gap(name):
    seen = np.ones(T, bool)
    gap = seen & (np.arange(T) != 2)
    zero = event_of(name, 1, seen)
    y = zero.y.reshape(-1).at[2].set(0.0).reshape(zero.y.shape)
    zero = Event(y, zero.mask, zero.sd, zero.time)
    missed = Event(y, jnp.asarray(gap.reshape(y.shape)), zero.sd, zero.time)
    context, other = program(name)(zero)[0], program(name)(missed)[0]
    assert np.abs(np.asarray(context - other)).max() > 1e-4


@every_encoder
def test_without_error_bars_an_encoder_reads_none_or_says_so(name):
    event = event_of(name, 2)
    bare = Event(event.y, event.mask, time=event.time)
    if made(name).uses_sd:
        with pytest.raises(ValueError, match="uses_sd=True; give the event an sd"):
            made(name)(bare)
    else:
        want = eqx.filter_jit(made(name))(event)
        assert eqx.tree_equal(eqx.filter_jit(made(name))(bare), want)


@every_encoder
def test_a_batch_is_the_events_one_by_one(name):
    """Sums may round otherwise in another program: 1e-5."""
    events = [event_of(name, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *events)
    together = jax.jit(jax.vmap(lambda event: numbers_of(made(name)(event))))(stacked)
    for one, event in zip(together, events, strict=True):
        np.testing.assert_allclose(one, program(name)(event)[0], rtol=1e-5, atol=1e-6)


# --- what each is -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("flat")])
def test_a_flat_context_is_one_row_and_its_encoder_has_one_shape(name):
    event = event_of(name, 3)
    assert program(name)(event)[0].shape == (5,)
    assert made(name).obs_shape == event.y.shape


@every_site_encoder
def test_a_site_context_has_a_row_an_entry_with_the_raw_observation_first(name):
    event, encoder = event_of(name, 4), made(name)
    context = eqx.filter_jit(encoder)(event)
    assert encoder.obs_shape is None
    assert context.features.shape == (T, encoder.size)
    np.testing.assert_array_equal(context.mask, event.mask)
    np.testing.assert_array_equal(context.features[:, 0], event.values)
    if encoder.uses_sd:
        want = np.where(event.mask, np.log(np.asarray(event.sd)), 0.0)
        np.testing.assert_allclose(context.features[:, 1], want, rtol=1e-5)
    assert not np.asarray(context.features)[~np.asarray(event.mask)].any()
    assert np.asarray(context.features)[np.asarray(event.mask)].all()


@every_site_encoder
def test_a_site_reads_its_neighbours_as_far_as_the_radius_and_no_further(name):
    _, by_y, _ = program(name)(event_of(name, 5, np.ones(T, bool)))
    distance = np.abs(np.arange(T)[:, None] - np.arange(T)[None, :])
    np.testing.assert_array_equal(np.abs(by_y).max(1) != 0, distance <= made(name).radius)


@every_site_encoder
def test_the_net_is_the_same_everywhere_and_reads_longer_records(name):
    """A record within a longer one, between gaps as wide as the radius, has the same rows."""
    event, lead, tail = event_of(name, 6), 4, 3
    pad = lambda a, fill: jnp.pad(a, (lead, tail), constant_values=fill)  # noqa: E731
    longer = Event(pad(event.y, 9.0), pad(event.mask, False), pad(event.sd, 9.0))
    short = eqx.filter_jit(made(name))(event).features
    long = eqx.filter_jit(made(name))(longer).features
    assert long.shape[0] == lead + T + tail
    np.testing.assert_allclose(long[lead:-tail], short, rtol=1e-5, atol=1e-6)
    assert not np.asarray(long[:lead]).any()


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_a_site_encoder_refuses_other_axes(shape):
    event = Event(jnp.zeros(shape), jnp.ones(shape, bool))
    with pytest.raises(ValueError, match=r"y of shape \(t,\), got \("):
        made("site")(event)


def test_the_key_decides_the_weights():
    event = event_of("flat", 7)
    same, other = (FlatEncoder((T,), key=jax.random.key(k), **SIZES)(event) for k in (0, 1))
    assert eqx.tree_equal(same, made("flat")(event))
    assert not eqx.tree_equal(same, other)


# --- convolutions -----------------------------------------------------------------------------


def test_a_convolution_reads_as_far_as_its_reach_and_no_further():
    encoder = ConvEncoder((16,), key=KEY, width=4, depth=2, features=3)
    event = Event(jnp.linspace(-1.0, 1.0, 16), jnp.ones(16, bool))
    rows = lambda y: encoder.rows(Event(y, event.mask))  # noqa: E731
    slope = np.abs(jax.jit(jax.jacrev(rows))(event.y)).max(axis=0)
    distance = np.abs(np.arange(16)[:, None] - np.arange(16)[None, :])
    assert encoder.reach == 7
    np.testing.assert_array_equal(slope[distance > encoder.reach], 0.0)
    assert (slope[distance == encoder.reach] > 0).all()


def test_a_convolution_says_the_same_of_a_pattern_wherever_it_is():
    """Away from the ends by more than the reach; sums may round otherwise: 1e-5."""
    encoder = ConvEncoder((24,), key=KEY, width=4, depth=1, features=3, uses_sd=True)
    rng = np.random.default_rng(0)
    y, seen = np.zeros((3, 24), np.float32)[0], np.zeros(24, bool)
    y[8:12], seen[8:12] = rng.normal(size=4), [True, False, True, True]
    rows = []
    for shift in (0, 4):
        event = Event(
            jnp.asarray(np.roll(y, shift)), jnp.asarray(np.roll(seen, shift)), 0.5 * jnp.ones(24)
        )
        rows.append(np.asarray(encoder.rows(event)))
    near = slice(8 - encoder.reach, 12 + encoder.reach)
    moved = slice(12 - encoder.reach, 16 + encoder.reach)
    np.testing.assert_allclose(rows[1][:, moved], rows[0][:, near], rtol=1e-5, atol=1e-6)
    assert np.abs(rows[0][:, near] - rows[0][:, :1]).max() > 0.01


# --- sets -------------------------------------------------------------------------------------

SETS = ["set", "set, error bars", "scaled set"]


@pytest.mark.parametrize("name", SETS)
def test_the_order_of_the_observations_does_not_matter(name):
    event = event_of(name, 8, np.arange(T) % 3 != 1)
    want = program(name)(event)[0]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(T)
        turned = jax.tree.map(lambda leaf, order=order: leaf[order], event)
        np.testing.assert_allclose(program(name)(turned)[0], want, rtol=1e-4, atol=1e-5)
    swapped = Event(event.y[::-1], event.mask[::-1], event.sd[::-1], event.time)
    assert np.abs(np.asarray(program(name)(swapped)[0] - want)).max() > 1e-3, "time is read"


def test_rows_of_two_instruments_have_no_order_and_the_instruments_are_told_apart():
    name = "set, two instruments"
    event = event_of(name, 9, np.arange(T) % 3 != 1)
    want = program(name)(event)[0]
    turned = jax.tree.map(lambda leaf: leaf[::-1], event)
    np.testing.assert_allclose(program(name)(turned)[0], want, rtol=1e-4, atol=1e-5)
    crossed = jax.tree.map(lambda leaf: leaf[:, ::-1], event)
    assert np.abs(np.asarray(program(name)(crossed)[0] - want)).max() > 1e-3


@pytest.mark.parametrize("name", SETS)
def test_any_number_of_observations_is_read_and_padding_says_nothing(name):
    encode = eqx.filter_jit(made(name))
    events = [event_of(name, seed, np.ones(n, bool), n) for seed, n in enumerate((1, 3, 7))]
    together = stack_events(events)
    assert together.y.shape == (3, 8)
    padded = eqx.filter_jit(eqx.filter_vmap(made(name)))(together)
    for context, event in zip(padded, events, strict=True):
        np.testing.assert_allclose(context, encode(event), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_nothing_seen_is_one_context_whatever_the_length(name):
    encode = eqx.filter_jit(made(name))
    contexts = [encode(event_of(name, n, np.zeros(n, bool), n)) for n in (1, 4, 9)]
    assert np.isfinite(contexts[0]).all()
    for context in contexts[1:]:
        np.testing.assert_allclose(context, contexts[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_every_time_that_was_seen_moves_the_context_and_no_other_does(name):
    event = event_of(name, 10, np.arange(T) % 3 != 1)

    def encode(time):
        return made(name)(Event(event.y, event.mask, event.sd, time))

    slope = np.abs(jax.jit(jax.jacrev(encode))(event.time)).max(axis=0)
    np.testing.assert_array_equal(slope > 1e-4, event.mask)
    np.testing.assert_array_equal(slope[~np.asarray(event.mask)], 0.0)


def test_times_in_other_units_are_the_same_times():
    event = event_of("set", 11)
    hours = Event(event.y, event.mask, event.sd, 24.0 * event.time)
    encoder = SetEncoder(key=KEY, time_scale=24.0, **SIZES)
    np.testing.assert_allclose(encoder(hours), made("set")(event), rtol=1e-4, atol=1e-5)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (ConvEncoder, {"obs_shape": ()}, "times as its first axis"),
        (ConvEncoder, {"obs_shape": (0,)}, "times as its first axis"),
        (ConvEncoder, {"obs_shape": (4,), "radius": 0}, "radius >= 1"),
        (SetEncoder, {"channels": 0}, "channels, features"),
        (SetEncoder, {"width": 10, "heads": 4}, "width that 4 heads divide, got 10"),
        (SetEncoder, {"time_scale": 0.0}, "positive time_scale, got 0.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind, given, message):
    with pytest.raises(ValueError, match=message):
        kind(key=KEY, **given)


def test_a_set_without_times_or_of_another_shape_is_refused():
    event = event_of("set", 12)
    with pytest.raises(ValueError, match="time of each entry"):
        made("set")(Event(event.y, event.mask))
    with pytest.raises(ValueError, match=r"y of shape \(n,\), got \(3, 2\)"):
        made("set")(jax.tree.map(lambda leaf: leaf.reshape(3, 2), event))
    with pytest.raises(ValueError, match=r"y of shape \(n, 2\), got \(6,\)"):
        made("set, two instruments")(event)


@pytest.mark.parametrize(
    ("events", "length", "message"),
    [
        ([], None, "at least one event"),
        ([as_event(1.0)], None, "got a number"),
        ([as_event([1.0]), as_event([1.0], sd=0.1)], None, "in all or in none"),
        ([as_event([1.0]), as_event([[1.0]])], None, "same axes after the first"),
        ([as_event([1.0, 2.0, 3.0])], 2, "at least 3, got 2"),
    ],
)
def test_events_that_do_not_stack_are_refused(events, length, message):
    with pytest.raises(InvalidEventError, match=message):
        stack_events(events, length=length)
