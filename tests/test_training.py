"""The training loop: it finds known optima, resumes to the same bits, and says when it diverges."""

import functools
import itertools
import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import amortlib.training as training
from amortlib.export import CheckpointError, read_settings, save
from amortlib.gaussian import condition, kl
from amortlib.objectives import nll
from amortlib.observation import FixedMask
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import InverseProblem, ornstein_uhlenbeck
from amortlib.training import (
    FitResult,
    InvalidBatchError,
    TrainingDivergedError,
    fit,
    optimizer_state,
    train_step,
    trainable,
)
from amortlib.types import Fixed, InvalidEventError

KEY = jax.random.key(0)
SLOPE = np.array([1.5, -0.5], np.float32)


class Line(eqx.Module):
    """y = slope . x + offset, with things beside it that must not be trained."""

    slope: jax.Array
    offset: jax.Array
    fixed: Fixed
    count: jax.Array
    act: Callable = eqx.field(static=True)

    def __init__(self):
        self.slope = jnp.zeros(2)
        self.offset = jnp.ones(())
        self.fixed = Fixed({"scale": jnp.asarray(2.0), "name": "scale"})
        self.count = jnp.asarray(3)
        self.act = jnp.tanh

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.slope + self.offset


def batches(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Noiseless pairs of the line through the origin with the slope above."""
    x = jax.random.uniform(key, (16, 2), minval=-1.7, maxval=1.7)
    return x, x @ SLOPE


def squares(model: Line, batch: tuple, key: jax.Array) -> jax.Array:
    """Mean square. What is fixed enters too: were it trained, it would move."""
    del key
    x, y = batch
    return jnp.mean((model(x) - y) ** 2) + 0.1 * (model.fixed.tree["scale"] - 1.0) ** 2


def noisy(model: Line, batch: tuple, key: jax.Array) -> jax.Array:
    """An objective that uses its key, so that a wrong key changes every number."""
    return squares(model, batch, key) + 0.1 * jnp.sum(model.slope * jax.random.uniform(key, (2,)))


def in_place_of(objective: Callable) -> Callable[[Callable], Callable]:
    """Gives a function the name of another, as an edit of its body would leave it."""
    return functools.wraps(objective)


BASE = {"key": KEY, "steps": 40, "every": 10, "optimizer": optax.adam(0.1), "progress": False}
FULL = {"optimizer": optax.adam(optax.cosine_decay_schedule(0.1, 40)), "ema": 0.9}
"""A schedule and an average on top: what a resumed run has to carry on."""


def run(model: Line | None = None, objective: Callable = noisy, **changed) -> FitResult[Line]:
    return fit(Line() if model is None else model, objective, batches, **(BASE | changed))


def bits(result: FitResult) -> list[bytes]:
    """All that a run answers, as bytes."""
    arrays = [result.loss, result.validation_step, result.validation_loss, result.best_step]
    leaves = jax.tree.leaves(eqx.filter(result.model, eqx.is_array))
    return [np.asarray(leaf).tobytes() for leaf in [*arrays, *leaves]]


@pytest.fixture(scope="module")
def held_out() -> tuple:
    return batches(jax.random.key(99))


@pytest.fixture(scope="module")
def plain() -> FitResult[Line]:
    return run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> bytes:
    """The checkpoint of a finished run without validation."""
    path = tmp_path_factory.mktemp("finished") / "state"
    run(checkpoint=path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(held_out) -> FitResult[Line]:
    return run(validation=held_out, **FULL)


@pytest.fixture(scope="module")
def by_steps() -> tuple[list[float], list[np.ndarray]]:
    """Losses and slopes of ten steps of `train_step` with the keys of `fit`."""
    model, optimizer, losses, slopes = Line(), BASE["optimizer"], [], []
    opt_state = optimizer_state(model, optimizer)
    for i in range(10):
        k_batch, k_objective = jax.random.split(jax.random.fold_in(KEY, i))
        model, opt_state, loss = train_step(
            model, opt_state, batches(k_batch), k_objective, objective=noisy, optimizer=optimizer
        )
        losses.append(float(loss))
        slopes.append(np.asarray(model.slope, float))
    assert model.count == 3
    assert model.fixed.tree["scale"] == 2.0
    return losses, slopes


# --- it trains --------------------------------------------------------------------------------


def test_training_reaches_the_known_optimum():
    """Noiseless least squares has one optimum, which SGD approaches by a factor of about 0.6 a
    step (second moments near 1, rate 0.2): after 150 steps only rounding is left, far below 1e-4.
    """
    result = run(objective=squares, steps=150, every=50, optimizer=optax.sgd(0.2))
    np.testing.assert_allclose(result.model.slope, SLOPE, atol=1e-4)
    np.testing.assert_allclose(result.model.offset, 0.0, atol=1e-4)
    assert result.loss.shape == (150,)
    # What is left is the term of the fixed scale.
    np.testing.assert_allclose(result.loss[-1], 0.1, atol=1e-5)
    assert result.loss[0] > 1.0
    assert result.best_step == 150
    assert "150" in result.stopped


def test_one_step_is_the_optimizer_s_own():
    """The first step, and its randomness, written out by hand."""
    k_batch, k_objective = jax.random.split(jax.random.fold_in(KEY, 0))

    @jax.jit
    @jax.value_and_grad
    def by_hand(slope):
        model = eqx.tree_at(lambda m: m.slope, Line(), slope)
        return noisy(model, batches(k_batch), k_objective)

    loss, grads = by_hand(Line().slope)
    result = run(steps=1, optimizer=optax.sgd(0.2))
    np.testing.assert_allclose(result.loss, [loss], rtol=1e-6)
    np.testing.assert_allclose(result.model.slope, -0.2 * grads, rtol=1e-5)


def test_every_step_draws_its_own_batch():
    """With a model that stands still, the losses differ because the batches do."""
    result = run(objective=squares, steps=20, optimizer=optax.sgd(0.0))
    assert len(np.unique(result.loss)) == 20


def test_the_key_decides_everything(plain):
    assert bits(run()) == bits(plain)
    assert (run(key=jax.random.key(1)).loss != plain.loss).all()


@pytest.mark.slow
def test_the_length_of_a_chunk_changes_nothing(plain):
    """Chunks are a matter of speed; sums may round otherwise in another program: 1e-5."""
    for every in (7, 1000):
        np.testing.assert_allclose(run(every=every).loss, plain.loss, rtol=1e-5, atol=1e-6)


def test_what_is_fixed_is_not_trained_and_what_is_not_a_float_neither():
    before, after = Line(), run(objective=squares).model
    assert after.fixed.tree["scale"] == 2.0
    assert after.fixed.tree["name"] == "scale"
    assert after.count == 3
    assert after.act is jnp.tanh
    assert (after.slope != before.slope).all()
    assert after.offset != before.offset


def test_trainable_marks_floats_outside_fixed():
    marks = trainable(Line())
    assert (marks.slope, marks.offset, marks.count) == (True, True, False)
    assert marks.fixed == Fixed({"scale": False, "name": False})
    prior = ornstein_uhlenbeck(3).prior
    model = regression_posterior("information", key=KEY, prior=prior, width=4, features=3)
    marks = trainable(model)
    assert not any(jax.tree.leaves((marks.head.prior, marks.head.site)))
    assert all(jax.tree.leaves(eqx.filter(trainable(model.head.gain), eqx.is_array_like)))


def test_python_is_not_in_the_hot_path(held_out):
    """The objective's Python runs when a program is traced, and not once more for more steps."""
    calls = []

    def counted(model, batch, key):
        calls.append(None)
        return noisy(model, batch, key)

    counts = []
    for steps in (20, 25, 200):
        calls.clear()
        run(objective=counted, steps=steps, validation=held_out)
        counts.append(len(calls))
    assert len(set(counts)) == 1
    # One for a chunk, one for the validation; a second of each if a weak type became strong.
    assert 2 <= counts[0] <= 4


def test_a_loop_of_one_s_own_takes_the_same_steps(plain, by_steps):
    """Sums may round otherwise in another program: 1e-5."""
    np.testing.assert_allclose(by_steps[0], plain.loss[:10], rtol=1e-5)


def test_an_objective_of_more_than_one_number_is_refused():
    with pytest.raises(ValueError, match=r"return one number, got an array of shape \(2,\)"):
        run(objective=lambda model, batch, key: model.slope)


# --- the moving average -----------------------------------------------------------------------


def test_the_average_is_returned_without_the_bias_of_its_start(by_steps):
    """sum_i (1 - a) a^(n - i) p_i / (1 - a^n), by hand, over the parameters that steps left; the
    steps themselves do not see it.
    """
    result = run(steps=10, ema=0.9)
    weights = 0.1 * 0.9 ** np.arange(9, -1, -1)
    want = weights @ np.asarray(by_steps[1]) / weights.sum()
    np.testing.assert_allclose(result.model.slope, want, rtol=1e-5)
    np.testing.assert_allclose(result.loss, by_steps[0], rtol=1e-5)
    assert np.abs(want - by_steps[1][-1]).min() > 0.01


def test_the_average_is_what_is_validated(held_out, uninterrupted):
    value = uninterrupted.validation_loss.min()
    # The randomness of validation is its own, the same at every check.
    got = noisy(uninterrupted.model, held_out, jax.random.fold_in(KEY, 40))
    np.testing.assert_allclose(value, got, rtol=1e-5)


# --- the schedule -----------------------------------------------------------------------------


def test_a_resumed_run_goes_on_where_its_schedule_was(tmp_path, monkeypatch):
    """Down a slope of one the offset falls by the rate of each step: 1 minus the sum of rates."""
    rate = optax.linear_schedule(0.1, 0.0, 40)
    settings = {"optimizer": optax.sgd(rate), "checkpoint": tmp_path / "state"}
    down = lambda model, batch, key: model.offset  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(training, "save", saves_until(2))
        with pytest.raises(Stop):
            run(objective=down, **settings)
    result = run(objective=down, **settings, resume=True)
    fallen = np.cumsum([0.0, *(0.1 * (1 - i / 40) for i in range(39))])
    np.testing.assert_allclose(result.loss, 1.0 - fallen, rtol=1e-4, atol=1e-5)


# --- the budget -------------------------------------------------------------------------------


def test_a_run_stops_before_it_spends_more_than_its_budget(tmp_path, monkeypatch, plain):
    """By a clock that moves one second a chunk, and an hour whenever the objective is compiled.

    A chunk of ten steps at a time: the third would end at 3 s. Given more, the run goes on to
    the numbers of one without a budget.
    """
    ticks = itertools.count()
    hours = []
    monkeypatch.setattr(training, "perf_counter", lambda: next(ticks) + 3600.0 * len(hours))

    @in_place_of(noisy)
    def slow_to_compile(model, batch, key):
        hours.append(None)
        return noisy(model, batch, key)

    def spend(seconds):
        path = tmp_path / "state"
        return run(objective=slow_to_compile, checkpoint=path, resume=True, seconds=seconds)

    first = spend(2.5)
    assert hours
    assert (first.loss.size, first.seconds) == (20, 2.0)
    assert first.stopped == "the budget of 2.5 s was spent, 2 s of it in steps"
    compiled = len(hours)
    again = spend(2.5)
    assert (bits(again), again.stopped, len(hours)) == (bits(first), first.stopped, compiled)
    last = spend(4.0)
    assert last.seconds == 4.0
    assert last.stopped == "all 40 steps were run"
    assert bits(last) == bits(plain)


# --- validation -------------------------------------------------------------------------------


def test_validation_is_the_objective_on_the_held_out_batch(held_out):
    result = run(objective=squares, steps=25, every=10, validation=held_out)
    np.testing.assert_array_equal(result.validation_step, [10, 20, 25])
    assert result.validation_loss.shape == (3,)
    best = int(np.argmin(result.validation_loss))
    assert result.best_step == result.validation_step[best]
    np.testing.assert_allclose(
        result.validation_loss[best], squares(result.model, held_out, KEY), rtol=1e-5
    )


def away(model: Line, batch: tuple, key: jax.Array) -> jax.Array:
    """Falls on `batches`, and on the held-out batch has its least value at offset 0.55."""
    del key
    training, target = batch
    return jnp.where(training, model.offset, (model.offset - target) ** 2)


def away_batches(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    del key
    return jnp.asarray(True), jnp.asarray(0.55)


def test_patience_stops_the_run_and_the_best_model_is_kept():
    """The offset falls by 0.1 a step from 1: it is 0.6 after step 4, and then leaves 0.55."""
    result = fit(
        Line(),
        away,
        away_batches,
        **(BASE | {"steps": 60, "every": 4, "optimizer": optax.sgd(0.1)}),
        validation=(jnp.asarray(False), jnp.asarray(0.55)),
        patience=3,
    )
    np.testing.assert_array_equal(result.validation_step, [4, 8, 12, 16])
    np.testing.assert_allclose(
        result.validation_loss, [(0.6 - 0.1 * k - 0.55) ** 2 for k in (0, 4, 8, 12)], rtol=1e-4
    )
    assert result.loss.shape == (16,)
    assert result.best_step == 4
    np.testing.assert_allclose(result.model.offset, 0.6, rtol=1e-5)
    assert result.stopped == "validation did not improve in 3 checks"


def test_without_patience_the_best_model_is_kept_all_the_same():
    result = fit(
        Line(),
        away,
        away_batches,
        **(BASE | {"steps": 8, "every": 4, "optimizer": optax.sgd(0.1)}),
        validation=(jnp.asarray(False), jnp.asarray(0.55)),
    )
    assert result.best_step == 4
    np.testing.assert_allclose(result.model.offset, 0.6, rtol=1e-5)
    assert result.loss.shape == (8,)


# --- resuming ---------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for the machine that went away."""


def saves_until(chunks: int) -> Callable:
    """A `save` that works so often and then raises, before it writes."""
    done = []

    def limited(*args, **kwargs):
        if len(done) == chunks:
            raise Stop
        done.append(None)
        save(*args, **kwargs)

    return limited


def test_a_resumed_run_gives_the_same_bits(tmp_path, monkeypatch, held_out, uninterrupted):
    path = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(training, "save", saves_until(3))
        with pytest.raises(Stop):
            run(validation=held_out, **FULL, checkpoint=path)
    assert path.exists()
    result = run(validation=held_out, **FULL, checkpoint=path, resume=True)
    assert bits(result) == bits(uninterrupted)


@pytest.mark.slow
def test_a_run_stopped_twice_gives_the_same_bits(tmp_path, monkeypatch, held_out, uninterrupted):
    path = tmp_path / "state"
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(training, "save", saves_until(1))
            with pytest.raises(Stop):
                run(validation=held_out, **FULL, checkpoint=path, resume=True)
    assert bits(run(validation=held_out, **FULL, checkpoint=path, resume=True)) == bits(
        uninterrupted
    )


def test_a_resumed_run_does_not_repeat_what_was_done(tmp_path, monkeypatch, held_out):
    """The steps before the interruption are not run again: their losses are read, not computed."""
    path = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(training, "save", saves_until(2))
        with pytest.raises(Stop):
            run(checkpoint=path)
    higher = in_place_of(noisy)(lambda m, b, k: noisy(m, b, k) + 100.0)
    result = run(objective=higher, checkpoint=path, resume=True)
    assert (result.loss[:20] < 50).all()
    assert (result.loss[20:] > 50).all()


def test_patience_goes_on_counting_after_a_resume(tmp_path, monkeypatch):
    path = tmp_path / "state"
    settings = BASE | {"steps": 60, "every": 4, "optimizer": optax.sgd(0.1), "patience": 3}
    settings |= {"validation": (jnp.asarray(False), jnp.asarray(0.55)), "checkpoint": path}
    with monkeypatch.context() as patch:
        patch.setattr(training, "save", saves_until(3))
        with pytest.raises(Stop):
            fit(Line(), away, away_batches, **settings)
    result = fit(Line(), away, away_batches, **settings, resume=True)
    assert result.loss.shape == (16,)
    assert result.best_step == 4
    np.testing.assert_allclose(result.model.offset, 0.6, rtol=1e-5)
    # A run that had stopped stays stopped.
    again = fit(Line(), away, away_batches, **settings, resume=True)
    assert bits(again) == bits(result)
    assert again.stopped == result.stopped


def test_a_finished_run_is_not_run_again(tmp_path, held_out, uninterrupted):
    path = tmp_path / "state"
    run(validation=held_out, **FULL, checkpoint=path)
    before = path.read_bytes()

    def untouched(*_):
        raise AssertionError("expected no step to be run")

    result = run(
        objective=in_place_of(noisy)(untouched),
        validation=held_out,
        **FULL,
        checkpoint=path,
        resume=True,
    )
    assert bits(result) == bits(uninterrupted)
    assert path.read_bytes() == before


def test_resuming_without_a_file_starts_anew(tmp_path, held_out, uninterrupted):
    result = run(validation=held_out, **FULL, checkpoint=tmp_path / "state", resume=True)
    assert bits(result) == bits(uninterrupted)
    assert (tmp_path / "state").exists()


def test_without_resume_a_file_that_is_there_is_not_read(tmp_path, held_out, uninterrupted):
    (tmp_path / "state").write_bytes(b"old")
    result = run(validation=held_out, **FULL, checkpoint=tmp_path / "state")
    assert bits(result) == bits(uninterrupted)


@pytest.mark.slow
def test_a_run_resumes_in_double_precision_with_a_model_in_single(tmp_path, monkeypatch, x64):
    """The state keeps its types, whatever the objective returns."""
    path = tmp_path / "state"
    model = jax.tree.map(lambda a: a.astype(jnp.float32), eqx.filter(Line(), eqx.is_inexact_array))
    model = eqx.combine(model, Line())
    held = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), batches(jax.random.key(9)))

    def single(model, batch, key):
        return noisy(model, batch, key).astype(jnp.float32)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save", saves_until(2))
        with pytest.raises(Stop):
            run(model, single, validation=held, checkpoint=path)
    result = run(model, single, validation=held, checkpoint=path, resume=True)
    assert result.model.slope.dtype == jnp.float32
    assert np.isfinite(result.loss).all()


@pytest.mark.parametrize(
    "changed",
    [
        {"key": jax.random.key(5)},
        {"key": jax.random.key(0, impl="rbg")},
        {"steps": 50},
        {"every": 20},
        {"ema": 0.9},
        {"objective": squares},
        {"optimizer": optax.sgd(0.1)},
        {"optimizer": optax.adam(optax.constant_schedule(0.1))},
    ],
    ids=["key", "random", "steps", "every", "average", "objective", "optimizer", "schedule"],
)
def test_a_run_with_other_settings_is_not_resumed(tmp_path, finished, changed):
    """And the message names the setting."""
    path = tmp_path / "state"
    path.write_bytes(finished)
    before = path.read_bytes()
    (name,) = changed
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}.*'{name}'"):
        run(checkpoint=path, resume=True, **changed)
    assert path.read_bytes() == before


def test_the_settings_of_another_run_are_named(tmp_path, finished):
    (tmp_path / "state").write_bytes(finished)
    assert read_settings(tmp_path / "state") == {
        "steps": 40,
        "every": 10,
        "key": [0, 0],
        "random": "threefry2x32",
        "ema": None,
        "objective": f"{__name__}.noisy",
        "optimizer": ["ScaleByAdamState", "EmptyState"],
    }
    with pytest.raises(CheckpointError, match=r"{'steps': 50}, got {'steps': 40}; .* same run"):
        run(checkpoint=tmp_path / "state", resume=True, steps=50)


def test_an_objective_is_known_by_where_it_is_defined():
    """A function, one whose arguments are filled in, or the class of an object."""
    assert training._name(functools.partial(noisy, key=KEY)) == f"{__name__}.noisy"
    assert training._name(Line()) == f"{__name__}.Line"


def test_another_model_s_state_and_a_damaged_state_are_not_resumed(tmp_path, finished):
    path = tmp_path / "state"
    path.write_bytes(finished)
    longer = eqx.tree_at(lambda m: m.slope, Line(), jnp.zeros(3))
    with pytest.raises(CheckpointError, match="slope"):
        run(longer, checkpoint=path, resume=True)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="digest"):
        run(checkpoint=path, resume=True)


# --- divergence -------------------------------------------------------------------------------


def falls_off(model: Line, batch: tuple, key: jax.Array) -> jax.Array:
    """The offset falls by 0.1 a step from 1.05, and below zero the loss is the log of it: NaN."""
    del batch, key
    return model.offset + 0.0 * jnp.log(model.offset)


def test_a_loss_that_is_not_finite_raises_with_step_key_and_model(tmp_path):
    path = tmp_path / "state"
    start = eqx.tree_at(lambda m: m.offset, Line(), jnp.asarray(1.05))
    settings = {"optimizer": optax.sgd(0.1), "every": 4, "checkpoint": path}
    with pytest.raises(TrainingDivergedError) as caught:
        run(start, falls_off, **settings)
    error = caught.value
    # 1.05 - 0.1 * 11 < 0: step 11 is the first with a negative offset, in the chunk from 8.
    assert error.step == 11
    assert jax.random.key_data(error.key).tolist() == (
        jax.random.key_data(jax.random.fold_in(KEY, 11)).tolist()
    )
    np.testing.assert_allclose(error.model.offset, 0.25, rtol=1e-5)
    assert error.model.act is jnp.tanh
    for part in ("nan", "step 11", str(jax.random.key_data(error.key).tolist()), str(path)):
        assert part in str(error)
    # The checkpoint holds step 8: a mended objective goes on from there.
    mended = in_place_of(falls_off)(lambda m, b, k: m.offset)
    result = run(start, mended, **settings, resume=True)
    assert np.isfinite(result.loss).all()
    np.testing.assert_allclose(result.loss[[0, 7, 8]], [1.05, 0.35, 0.25], rtol=1e-5)


def test_the_key_in_the_error_draws_the_batch_that_did_it():
    """One batch in many holds an infinity; the error's key makes it again."""

    def poisoned(key):
        x, y = batches(key)
        return x, jnp.where(jax.random.uniform(key) < 0.05, jnp.inf, y)

    with pytest.raises(TrainingDivergedError) as caught:
        fit(Line(), squares, poisoned, **(BASE | {"steps": 400, "every": 50}))
    assert "the batch that this key draws is not finite itself" in str(caught.value)
    assert re.search(r"inf at index \(0,\) of batch\[1\]", str(caught.value))
    k_batch, _ = jax.random.split(caught.value.key)
    assert np.isinf(poisoned(k_batch)[1]).all()
    for step in range(caught.value.step):
        k_batch, _ = jax.random.split(jax.random.fold_in(KEY, step))
        assert np.isfinite(poisoned(k_batch)[1]).all()


def bad_gradient(model: Line, batch: tuple, key: jax.Array) -> jax.Array:
    """A loss that is finite at 1 and at 0, and whose slope at 0 is not: step 1 leaves NaN."""
    del batch, key
    return model.offset + jnp.abs(jnp.sqrt(jnp.abs(model.offset)) * 0.0)


@pytest.mark.parametrize("steps", [2, 6])
def test_a_last_update_that_is_not_finite_is_not_returned_and_the_good_state_is_saved(
    tmp_path, steps
):
    """The loss of the chunk's last step is finite, what its update leaves is not."""
    path = tmp_path / "state"
    settings = {"optimizer": optax.sgd(1.0), "steps": steps, "every": 2, "checkpoint": path}
    with pytest.raises(TrainingDivergedError, match="parameters") as caught:
        run(objective=bad_gradient, **settings)
    assert caught.value.step == 1
    assert caught.value.model.offset == 1.0
    # The good state that was left is the one before any step: a mended objective starts there.
    mended = in_place_of(bad_gradient)(lambda model, batch, key: model.offset)
    result = run(objective=mended, **settings, resume=True)
    np.testing.assert_array_equal(result.loss, 1.0 - np.arange(steps))


# --- a simulator that is broken ---------------------------------------------------------------

SITES = 3
SIMULATOR = ornstein_uhlenbeck(SITES, noise=0.3)
SEEN = jnp.array([True, True, False])


@pytest.fixture(scope="module")
def small() -> AmortizedPosterior:
    return regression_posterior(
        "diagonal", key=KEY, prior=SIMULATOR.prior, features=4, width=4, depth=1
    )


def broken(**changed: Callable) -> Callable:
    """Batches of a person's simulator, of which some functions are not as documented."""
    own = {name: getattr(SIMULATOR, name) for name in ("prior_sample", "forward", "obs_noise")}
    problem = InverseProblem(**(own | {"gaps": FixedMask(SEEN)} | changed))
    return lambda key: problem.batch(key, 8)


def masked_by(change: Callable) -> Callable:
    """Batches of a person's own code; the tests' type checks would refuse to build such events."""

    def draw(key):
        x, events = SIMULATOR.batch(key, 8)
        return x, eqx.tree_at(lambda e: e.mask, events, change(events.mask))

    return draw


@pytest.mark.parametrize(
    ("simulator", "error", "message"),
    [
        (
            masked_by(lambda mask: 1.0 * mask),
            InvalidBatchError,
            r"drawn with the key KEY, at batch\[1\]: expected a boolean mask",
        ),
        (
            masked_by(lambda mask: mask[:, :2]),
            InvalidBatchError,
            r"drawn with the key KEY, at batch\[1\]: expected a mask of the shape of y, \(8, 3\)",
        ),
        (
            broken(prior_sample=lambda key: jax.random.normal(key), forward=lambda x: x * SEEN),
            InvalidBatchError,
            r"drawn with the key KEY: expected states \(n, d\).*shape \(8,\)",
        ),
        (
            lambda key: (SIMULATOR.batch(key, 4)[0], SIMULATOR.batch(key, 8)[1]),
            InvalidBatchError,
            r"drawn with the key KEY: expected states \(n, d\).*\(4, 3\).*\(8, 3\)",
        ),
        (
            broken(
                prior_sample=lambda key: jax.random.normal(key, (1,)), forward=lambda x: x * SEEN
            ),
            ValueError,
            r"expected a state of shape \(3,\), got \(1,\).*batch\[0\] float32\(8, 1\).*key KEY",
        ),
        (
            broken(forward=lambda x: x[:2], gaps=FixedMask(SEEN[:2])),
            InvalidEventError,
            r"an event of shape \(3,\), got \(2,\).*batch\[1\].y float32\(8, 2\).*key KEY",
        ),
    ],
    ids=["mask of numbers", "mask's shape", "no axis", "rows", "one component", "observations"],
)
def test_a_simulator_of_wrong_shapes_is_refused_with_the_key(small, simulator, error, message):
    """Before anything runs. Each was made by the first step's key for batches."""
    k_batch, _ = jax.random.split(jax.random.fold_in(KEY, 0))
    words = re.escape(str(jax.random.key_data(k_batch).tolist()))
    with pytest.raises(error, match="(?s)" + message.replace("KEY", words)):
        fit(small, nll, simulator, **BASE)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_value_that_is_not_finite_stops_the_first_step(small, value):
    """And not the end of the first chunk: one batch is drawn, and once more to be looked at."""
    drawn = []

    def forward(x):
        jax.debug.callback(lambda: drawn.append(None))
        return x.at[1].set(value)

    simulator = broken(forward=forward)
    with pytest.raises(TrainingDivergedError) as caught:
        fit(small, nll, lambda key: simulator(key), **(BASE | {"every": 40}))
    jax.effects_barrier()
    assert len(drawn) == 2
    assert caught.value.step == 0
    words = str(jax.random.key_data(jax.random.fold_in(KEY, 0)).tolist())
    assert f"at step 0, with the key {words}; the batch that this key draws" in str(caught.value)
    assert f"{value} at index (0, 1) of batch[1][0]" in str(caught.value)


def test_what_stands_at_masked_entries_is_no_fault(small):
    simulator = broken(forward=lambda x: x.at[2].set(jnp.nan))
    assert np.isfinite(fit(small, nll, simulator, **BASE).loss).all()


def test_a_simulator_that_fails_later_is_named_and_the_good_state_saved(small, tmp_path):
    """One draw in some hundreds is infinite: the step and the key are those that drew it, and a
    mended simulator goes on from the state that was saved.
    """

    def forward(x):
        return x.at[0].set(jnp.where(x[0] > 2.3, jnp.inf, x[0]))

    settings = BASE | {"steps": 60, "every": 5, "checkpoint": tmp_path / "state"}
    with pytest.raises(TrainingDivergedError) as caught:
        fit(small, nll, broken(forward=forward), **settings)
    error = caught.value
    assert error.step >= 5
    words = str(jax.random.key_data(error.key).tolist())
    for part in (f"at step {error.step}, with the key {words}; the batch", "inf at", "batch[1][0]"):
        assert part in str(error)
    draw = jax.jit(broken(forward=forward))
    for step in range(error.step + 1):
        k_batch, _ = jax.random.split(jax.random.fold_in(KEY, step))
        assert np.isinf(draw(k_batch)[1].y).any() == (step == error.step)
    result = fit(small, nll, broken(), **settings, resume=True)
    assert np.isfinite(result.loss).all()


# --- settings that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps >= 1 and every >= 1, got 0, 10"),
        ({"steps": -3}, "steps >= 1"),
        ({"every": 0}, "every >= 1, got 40, 0"),
        ({"patience": 2}, "a validation batch"),
        ({"resume": True}, "path of a checkpoint"),
        ({"ema": 1.0}, "0 < ema < 1, got 1.0"),
        ({"ema": 0.0}, "0 < ema < 1, got 0.0"),
        ({"seconds": 0.0}, "seconds > 0, got 0.0"),
        ({"seconds": float("nan")}, "seconds > 0, got nan"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_runs(changed, message):
    def untouched(*_):
        raise AssertionError("expected nothing to run")

    with pytest.raises(ValueError, match=message):
        run(objective=untouched, **changed)


# --- progress ---------------------------------------------------------------------------------


def test_the_bar_shows_loss_and_time_left_on_standard_error(capfd):
    result = run(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"loss {result.loss[-10:].mean():.4g} " in err
    assert re.search(r"\[\d\d:\d\d<(\d\d:\d\d|\?)\]", err)
    for count in ("0/40", "10/40", "30/40"):
        assert f" {count} " in err


def test_without_progress_nothing_is_written(capsys):
    """Nothing of ours: XLA writes to the descriptor where it reads programs of another machine."""
    run(progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_bar_of_a_resumed_run_starts_where_it_was(tmp_path, monkeypatch, capfd):
    path = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(training, "save", saves_until(3))
        with pytest.raises(Stop):
            run(checkpoint=path)
    run(checkpoint=path, resume=True, progress=True)
    err = capfd.readouterr().err
    assert "30/40" in err
    assert "0/40" not in err.replace("30/40", "").replace("40/40", "")


# --- a posterior ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["information", "cholesky"])
def test_a_trained_posterior_comes_near_the_exact_one(kind):
    """Mean KL to the exact posterior, in nats, on 64 events: training starts near the prior
    (several tenths of a nat) and must come below a tenth of what the prior has. Keys are fixed.
    """
    problem = ornstein_uhlenbeck(4, noise=0.3)
    made = regression_posterior(kind, key=KEY, prior=problem.prior, features=16, width=32, depth=1)
    result = fit(
        made,
        nll,
        lambda key: problem.batch(key, 128),
        key=jax.random.key(1),
        steps=1500,
        every=500,
        optimizer=optax.adam(optax.cosine_decay_schedule(5e-3, 1500)),
        progress=False,
    )
    _, events = problem.batch(jax.random.key(2), 64)

    def mean_kl(answer):
        exact = lambda event: condition(problem.prior, jnp.eye(4), event)  # noqa: E731
        return float(jax.jit(jax.vmap(lambda e: kl(exact(e), answer(e))))(events).mean())

    prior = mean_kl(lambda _: problem.prior)
    assert result.loss[-100:].mean() < result.loss[:100].mean()
    assert mean_kl(result.model) < 0.1 * prior
