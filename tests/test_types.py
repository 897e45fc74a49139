"""Events: what is accepted, what is refused, and with what message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from amortlib.types import Event, InvalidEventError, as_event

NAN = float("nan")


def test_signatures_are_checked_in_this_suite():
    """Every other test leans on this: a wrong shape or type inside amortlib is an error."""
    with pytest.raises(TypeCheckError):
        Event(jnp.zeros(3), jnp.ones(2, bool))
    with pytest.raises(TypeCheckError):
        Event(jnp.zeros(3), jnp.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": []}, r"at least one entry in y.*shape \(0,\)"),
        ({"y": np.zeros((0, 3))}, r"at least one entry in y.*shape \(0, 3\)"),
        ({"y": "a word"}, r"real numbers in y, got dtype <U6"),
        ({"y": [None, 1.0]}, r"real numbers in y, got dtype object"),
        ({"y": [[1.0], [1.0, 2.0]]}, r"numbers in y, got list"),
        ({"y": [1.0 + 2.0j]}, r"real numbers in y, got dtype complex"),
        ({"y": [1.0, 2.0], "shape": (3,)}, r"expected y of shape \(3,\), got \(2,\)"),
        ({"y": [1.0, 2.0], "mask": [1, 0]}, r"boolean mask.*got dtype int64.*astype\(bool\)"),
        ({"y": [1.0, 2.0], "mask": [1.0, 0.0]}, r"boolean mask.*got dtype float64"),
        ({"y": [1.0, 2.0], "mask": [True]}, r"mask of the shape of y, \(2,\), got \(1,\)"),
        ({"y": [1.0, NAN], "mask": [True, True]}, r"got nan at index \(1,\) \(1 such"),
        (
            {"y": [[0.0, np.inf], [-np.inf, 0.0]]},
            r"finite values at observed entries, got inf at index \(0, 1\) \(2 such entries\)",
        ),
        ({"y": [1e39]}, r"finite values at observed entries, got inf at index \(0,\)"),
        ({"y": [1.0], "sd": 0.0}, r"positive, finite sd.*got 0.0 at index \(0,\)"),
        ({"y": [1.0], "sd": -1.0}, r"positive, finite sd.*got -1.0"),
        ({"y": [1.0], "sd": 1e-60}, r"positive, finite sd.*got 0.0"),
        ({"y": [1.0, 2.0], "sd": [1.0, NAN]}, r"positive, finite sd.*got nan at index \(1,\)"),
        ({"y": [1.0, 2.0], "sd": [1.0, np.inf]}, r"positive, finite sd.*got inf at index \(1,\)"),
        ({"y": [1.0, 2.0], "sd": [1.0]}, r"number or of the shape of y, \(2,\), got \(1,\)"),
        ({"y": [1.0], "sd": "wide"}, r"real numbers in sd"),
        ({"y": [1.0, 2.0], "time": [1.0]}, r"time of the shape of y, \(2,\), got \(1,\)"),
        ({"y": [1.0, 2.0], "time": [0.0, NAN]}, r"finite times at observed.*nan at index \(1,\)"),
        ({"y": [1.0], "time": "noon"}, r"real numbers in time"),
    ],
)
def test_bad_input_is_refused_with_its_reason(arguments, message):
    with pytest.raises(InvalidEventError, match=message):
        as_event(**arguments)


def test_nothing_bad_survives_at_masked_entries():
    y = [1.0, NAN, np.inf, -999.0]
    sd = [0.5, NAN, 0.0, -1.0]
    event = as_event(y, [True, False, False, False], sd, time=[3.0, NAN, np.inf, 9.0])
    np.testing.assert_array_equal(event.mask, [True, False, False, False])
    np.testing.assert_array_equal(event.y, [1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(event.sd, [0.5, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(event.time, [3.0, 0.0, 0.0, 0.0])


def test_without_a_mask_nan_means_missing():
    event = as_event([[1.0, NAN], [NAN, 4.0]], sd=2)
    np.testing.assert_array_equal(event.mask, [[True, False], [False, True]])
    np.testing.assert_array_equal(event.values, [[1.0, 0.0], [0.0, 4.0]])
    np.testing.assert_array_equal(event.sd, [[2.0, 1.0], [1.0, 2.0]])


def test_everything_missing_is_an_event():
    event = as_event([NAN, NAN])
    assert not event.mask.any()
    assert event.sd is None


@pytest.mark.parametrize("y", [[1, 2], (1, 2), np.array([1, 2], np.int8), np.array([1, 2], ">f8")])
def test_numbers_of_any_kind_become_floats(y):
    event = as_event(y)
    assert event.y.dtype == jnp.float32
    np.testing.assert_array_equal(event.y, [1.0, 2.0])


def test_double_precision_is_kept_where_jax_has_it(x64):
    third = 1.0 / 3.0
    assert float(as_event([third]).y[0]) == third


def test_a_masked_array_keeps_its_mask():
    y = np.ma.masked_array([1.0, -999.0, 3.0], [False, True, False])
    np.testing.assert_array_equal(as_event(y).mask, [True, False, True])
    both = as_event(y, [True, True, False])
    np.testing.assert_array_equal(both.mask, [True, False, False])


def test_values_and_error_bars_are_safe_to_differentiate():
    """Through `values` and `error_sd` a NaN at a masked entry reaches neither value nor slope."""
    mask = jnp.array([True, False])
    given = (jnp.array([1.0, NAN]), jnp.array([2.0, NAN]), jnp.array([3.0, NAN]))

    def cost(y, sd, time):
        seen = Event(y, mask, sd, time)
        return jnp.sum((seen.values / seen.error_sd) ** 2 + seen.when**2)

    value, slopes = jax.value_and_grad(cost, argnums=(0, 1, 2))(*given)
    assert float(value) == 9.25
    np.testing.assert_allclose(slopes[0], [0.5, 0.0])
    np.testing.assert_allclose(slopes[1], [-0.25, 0.0])
    np.testing.assert_allclose(slopes[2], [6.0, 0.0])
    bare = Event(given[0], mask)
    assert bare.error_sd is None
    assert bare.when is None
