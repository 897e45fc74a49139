"""One training loop. The objective is an argument; fresh minibatches are drawn on the device.

Steps run in compiled chunks, so that Python is not in the hot path. Between chunks Python looks
at the clock, the loss and the validation, writes the checkpoint, and moves the progress bar.
"""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from tqdm import tqdm

from amortlib.export import CheckpointError, load, read_settings, save
from amortlib.pairs import AbstractBatches, from_pairs
from amortlib.types import (
    Array,
    Event,
    Fixed,
    InvalidEventError,
    Key,
    PyTree,
    refuse_unusable,
)

__all__ = [
    "FitResult",
    "InvalidBatchError",
    "TrainingDivergedError",
    "fit",
    "from_pairs",
    "optimizer_state",
    "train_step",
    "trainable",
]

_Model = TypeVar("_Model", bound=eqx.Module)
Objective = Callable[[Any, Any, Key], Array]

_STREAM = 2**32 - 1
"""Folded into a run's key for a stream of minibatches: a number that no step has."""


class InvalidBatchError(ValueError):
    """A batch that no objective can take: the message says which part, and the key that drew it."""


class TrainingDivergedError(RuntimeError):
    """The loss, or the parameters that a step left, stopped being finite.

    Attributes:
        step: the first step whose loss is not finite, counted from 0; where every loss was
            finite and the parameters are not, the last step of the chunk.
        key: the key of that step, which draws the batch that did it.
        model: the model as it was at the last point where all was finite.
    """

    def __init__(self, message: str, *, step: int, key: Key, model: eqx.Module):
        super().__init__(message)
        self.step = step
        self.key = key
        self.model = model


class FitResult(eqx.Module, Generic[_Model]):
    """What [`fit`][] returns.

    Attributes:
        model: the trained model: with a validation batch the best one seen, else the last.
        loss: training loss of every step run, shape `(steps_run,)`.
        validation_step: steps at which validation was computed, `(checks,)`.
        validation_loss: its values.
        best_step: the step of the returned model.
        seconds: wall time of the steps and the validation, compilation and checkpoints left out,
            the time before a resume included.
        stopped: why it ended, in words.
    """

    model: _Model
    loss: np.ndarray
    validation_step: np.ndarray
    validation_loss: np.ndarray
    best_step: int
    seconds: float
    stopped: str


class _Carry(eqx.Module):
    """What a step changes."""

    params: PyTree
    opt_state: PyTree
    average: PyTree  # None without a moving average


class _State(eqx.Module):
    """All that a restart needs to go on to the same numbers."""

    carry: _Carry
    best: PyTree
    best_loss: Array
    best_step: Array
    step: Array
    since_best: Array
    seconds: np.ndarray
    loss: np.ndarray
    validation: np.ndarray


def trainable(model: PyTree) -> PyTree:
    """A filter over the leaves of `model`: true for float arrays outside [`Fixed`][]."""

    def mark(node: Any) -> Any:
        if isinstance(node, Fixed):
            return jax.tree.map(lambda _: False, node)
        return eqx.is_inexact_array(node)

    return jax.tree.map(mark, model, is_leaf=lambda node: isinstance(node, Fixed))


def optimizer_state(model: PyTree, optimizer: optax.GradientTransformation) -> PyTree:
    """The optimiser's state for the trainable leaves of `model`, to begin [`train_step`][] with."""
    return optimizer.init(eqx.filter(model, trainable(model)))


def _step(
    params: PyTree,
    static: PyTree,
    opt_state: PyTree,
    batch: Any,
    key: Key,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[PyTree, PyTree, Array]:
    def loss_of(params: PyTree) -> Array:
        return _one_number(objective(eqx.combine(params, static), batch, key))

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def _one_number(loss: Any) -> Array:
    if jnp.shape(loss) != ():
        raise ValueError(
            f"expected the objective to return one number, got an array of shape {jnp.shape(loss)}"
        )
    return loss


@eqx.filter_jit
def train_step(
    model: _Model,
    opt_state: PyTree,
    batch: Any,
    key: Key,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[_Model, PyTree, Array]:
    """One step of minibatch training, for a loop of one's own.

        opt_state = optimizer_state(model, optimizer)
        for key in jax.random.split(key, steps):
            k_batch, k_step = jax.random.split(key)
            batch = problem.batch(k_batch, 256)
            model, opt_state, loss = train_step(
                model, opt_state, batch, k_step, objective=nll, optimizer=optimizer
            )

    It is the step of [`fit`][], which runs many in one compiled program. Compiled once for as
    long as `objective` and `optimizer` are the same objects and shapes stay.

    Args:
        model: any equinox module; float arrays are trained, but for those inside `Fixed`.
        opt_state: the optimiser's state: of [`optimizer_state`][], then that of the last step.
        batch: what the objective takes.
        key: the randomness of the objective.
        objective: maps (model, batch, key) to a number.
        optimizer: an optax optimiser.

    Returns:
        The model and the optimiser's state after the step, and the loss before it.
    """
    params, static = eqx.partition(model, trainable(model))
    params, opt_state, loss = _step(params, static, opt_state, batch, key, objective, optimizer)
    return eqx.combine(params, static), opt_state, loss


def fit(
    model: _Model,
    objective: Objective,
    batches: Callable[[Key], Any] | AbstractBatches,
    *,
    key: Key,
    steps: int,
    optimizer: optax.GradientTransformation,
    ema: float | None = None,
    validation: Any | None = None,
    patience: int | None = None,
    seconds: float | None = None,
    every: int = 100,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
) -> FitResult[_Model]:
    """Minimise `objective` over the trainable leaves of `model`.

    Step i draws its batch and its randomness from `key` folded with i: a run that was cut off and
    resumed gives the same numbers as one that was not.

    Args:
        model: any equinox module; float arrays are trained, but for those inside `Fixed`.
        objective: maps (model, batch, key) to a number.
        batches: maps a key to a batch; traced, so it runs on the device. For a fresh minibatch
            each step: `lambda key: problem.batch(key, 256)`. For an array of pairs:
            [`from_pairs`][amortlib.pairs.from_pairs].
        key: the randomness of the whole run.
        steps: how many steps in all, those before a resume included.
        optimizer: an optax optimiser, with its schedule, such as
            `optax.adam(optax.cosine_decay_schedule(1e-3, steps))`. The schedule's count is part
            of the state: a resumed run goes on where it was.
        ema: decay of an exponential moving average of the parameters, such as 0.999, without the
            bias of its start (Kingma and Ba 2015, section 3). The average is what is validated
            and returned; the steps themselves do not see it.
        validation: a fixed batch on which the objective is computed every `every` steps; the
            best model is kept and returned. To see how a model does in gaps that it has not been
            trained on, draw it under another pattern:
            `problem.with_gaps(PeriodicRevisit(4)).batch(key, 1024)`.
        patience: stop after so many checks without a better validation loss.
        seconds: stop before the chunk that would take the run past this wall time, at its speed
            so far; one chunk is always run. Steps and validation count, before a resume too;
            compilation, which is paid once, and writing the checkpoint do not. A resumed run may
            be given more. Where the budget ends before `steps`, so does the schedule.
        every: steps in a compiled chunk: between checks, checkpoints, and progress.
        checkpoint: a file to write the state to after every chunk.
        resume: go on from `checkpoint` where it exists; start anew where it does not.
        progress: show a bar with the loss and the time left, on standard error.

    Raises:
        ValueError: on settings that do not fit together, or an objective that returns more than
            one number. What the objective itself raises carries a note on the batch that it was
            given: its shapes, and its key.
        InvalidBatchError: before anything is compiled, on events whose mask is not boolean or of
            another shape than their values, or states that are not one row an event.
        TrainingDivergedError: after the first step, and then as soon as a chunk holds a loss that
            is not finite, or ends in parameters that are not. The last good state is in the
            checkpoint, the first one where there was no other. A batch that is not finite itself
            is named with its row.
        CheckpointError: on resuming from a file that is damaged or of another run: other steps,
            key, kind of random numbers, average, or a differently named objective, or an
            optimiser of other parts. Numbers inside an optimiser (its rate) cannot be told apart.
    """
    if steps < 1 or every < 1:
        raise ValueError(f"expected steps >= 1 and every >= 1, got {steps}, {every}")
    if patience is not None and validation is None:
        raise ValueError("expected a validation batch: patience waits for its loss to fall")
    if ema is not None and not 0.0 < ema < 1.0:
        raise ValueError(f"expected a decay 0 < ema < 1, got {ema}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"expected a budget of seconds > 0, got {seconds}")
    if resume and checkpoint is None:
        raise ValueError("expected the path of a checkpoint to resume from")

    params, static = eqx.partition(model, trainable(model))
    averaging = None if ema is None else optax.ema(ema)
    # Arrays of a stream (the pairs) are arguments of the program, not constants inside it.
    source, source_static = eqx.partition(batches, eqx.is_array)
    held, held_static = eqx.partition(validation, eqx.is_array)
    k_stream = jax.random.fold_in(key, _STREAM)

    def draw(source: PyTree, step: Array, key: Key) -> Any:
        batches = eqx.combine(source, source_static)
        if isinstance(batches, AbstractBatches):
            return batches.at(step, key=k_stream)
        return batches(key)

    def one_step(carry: _Carry, source: PyTree, step: Array) -> tuple[_Carry, Array]:
        k_batch, k_objective = jax.random.split(jax.random.fold_in(key, step))
        batch = draw(source, step, k_batch)
        params, opt_state, loss = _step(
            carry.params, static, carry.opt_state, batch, k_objective, objective, optimizer
        )
        average = carry.average
        if averaging is not None:
            _, average = averaging.update(params, average)
        return _Carry(params, opt_state, average), loss

    @jax.jit
    def answer(carry: _Carry) -> PyTree:
        """What is validated and returned: the parameters, or their average without its bias."""
        if ema is None:
            return carry.params
        count = carry.average.count
        free = optax.tree.bias_correction(carry.average.ema, ema, jnp.maximum(count, 1))
        return jax.tree.map(lambda p, a: jnp.where(count > 0, a, p), carry.params, free)

    def run(
        carry: _Carry, source: PyTree, start: Array, count: Array
    ) -> tuple[_Carry, PyTree, Array, Array]:
        def body(i: Array, loop: tuple[_Carry, Array]) -> tuple[_Carry, Array]:
            carry, losses = loop
            carry, loss = one_step(carry, source, start + i)
            return carry, losses.at[i].set(loss.astype(losses.dtype))

        # The number of steps is an argument, so that a short last chunk is no other program.
        losses = jnp.zeros(min(every, steps), float)
        after, losses = jax.lax.fori_loop(0, count, body, (carry, losses))
        return after, answer(after), losses, _went_bad(carry.params, after.params)

    def validate(params: PyTree, held: PyTree) -> Array:
        batch = eqx.combine(held, held_static)
        k_check = jax.random.fold_in(key, steps)
        return _one_number(objective(eqx.combine(params, static), batch, k_check))

    # A weak type would become strong on the way through a step, and be another program.
    params = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), params)
    carry = _Carry(
        params, optimizer.init(params), None if averaging is None else averaging.init(params)
    )
    state = _State(
        carry=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), carry),
        best=params,
        best_loss=jnp.asarray(jnp.inf),
        best_step=jnp.asarray(0),
        step=jnp.asarray(0),
        since_best=jnp.asarray(0),
        seconds=np.zeros(()),
        loss=np.full(steps, np.nan, np.float32),
        validation=np.full(math.ceil(steps / every), np.nan, np.float32),
    )
    run_settings = {
        "steps": steps,
        "every": every,
        "key": _key_words(key),
        "random": str(jax.random.key_impl(key)),
        "ema": ema,
        "objective": _name(objective),
        "optimizer": _parts(state.carry.opt_state),
    }
    if resume and checkpoint is not None and Path(checkpoint).exists():
        _same_run(checkpoint, read_settings(checkpoint), run_settings)
        state = load(checkpoint, state)

    def drawn(step: int) -> tuple[Any, Key]:
        """Shapes and dtypes of a step's batch, found without running anything, and its key."""
        k_batch, _ = jax.random.split(jax.random.fold_in(key, step))
        return jax.eval_shape(draw, source, jnp.asarray(step, jnp.int32), k_batch), k_batch

    def refuse_bad(start: int, losses: Float[np.ndarray, " n"], bad_params: Array) -> None:
        """Stop at numbers that are not finite, with the state as it was at step `start` saved."""
        finite = np.isfinite(losses)
        # The last update of a chunk is not in any of its losses: look at what it left.
        if finite.all() and not bool(bad_params):
            return
        bad = start + (len(losses) - 1 if finite.all() else int(np.argmin(finite)))
        k_bad = jax.random.fold_in(key, bad)
        if checkpoint is not None:
            save(checkpoint, state, settings=run_settings)
        what = "and the parameters it left not finite " if finite.all() else ""
        batch = draw(source, jnp.asarray(bad, jnp.int32), jax.random.split(k_bad)[0])
        raise TrainingDivergedError(
            f"the loss was {losses[bad - start]} {what}at step {bad}, with the key "
            f"{_key_words(k_bad)}; {_blame(batch)}the model of step {start} is in this "
            "error's `model`" + ("" if checkpoint is None else f" and its state in {checkpoint}"),
            step=bad,
            key=k_bad,
            model=eqx.combine(answer(state.carry), static),
        )

    stopped = f"all {steps} steps were run"
    compiled = check = None
    bar = tqdm(
        total=steps,
        initial=int(state.step),
        disable=not progress,
        unit="step",
        leave=False,
        bar_format="{desc}{percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    )
    with bar:
        while int(state.step) < steps:
            start = int(state.step)
            count = min(every, steps - start)
            if patience is not None and int(state.since_best) >= patience:
                stopped = f"validation did not improve in {patience} checks"
                break
            if seconds is not None and start > 0:
                spent = float(state.seconds)
                if spent * (start + count) / start > seconds:
                    stopped = f"the budget of {seconds:g} s was spent, {spent:.3g} s of it in steps"
                    break
            begin, number = jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32)
            if compiled is None:
                _refuse_misfits(*drawn(start))
                try:
                    compiled = jax.jit(run).lower(state.carry, source, begin, number).compile()
                except Exception as err:
                    err.add_note(_shapes(*drawn(start)))
                    raise
                if validation is not None:
                    check = jax.jit(validate).lower(params, held).compile()
                # One step alone: a fault that shows at once is told before a chunk of many.
                _, _, losses, bad_params = compiled(
                    state.carry, source, begin, jnp.asarray(1, jnp.int32)
                )
                refuse_bad(start, np.asarray(losses)[:1], bad_params)
            clock = perf_counter()
            carry, found, losses, bad_params = compiled(state.carry, source, begin, number)
            losses = np.asarray(losses)[:count]
            refuse_bad(start, losses, bad_params)
            value = None if check is None else float(check(found, held))
            took = perf_counter() - clock
            state = _advance(state, carry, found, losses, value, took, every)
            if checkpoint is not None:
                save(checkpoint, state, settings=run_settings)
            shown = losses.mean() if value is None else value
            bar.set_description_str(f"loss {shown:.4g} ")
            bar.update(count)

    last = int(state.step)
    done = math.ceil(last / every)
    return FitResult(
        model=eqx.combine(answer(state.carry) if validation is None else state.best, static),
        loss=state.loss[:last],
        validation_step=np.minimum(every * np.arange(1, done + 1), last)
        if validation is not None
        else np.zeros(0, int),
        validation_loss=state.validation[: done if validation is not None else 0],
        best_step=last if validation is None else int(state.best_step),
        seconds=float(state.seconds),
        stopped=stopped,
    )


def _went_bad(before: PyTree, after: PyTree) -> Array:
    """Whether anything that was finite is so no longer."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    bad = [jnp.any(jnp.isfinite(a) & ~jnp.isfinite(b)) for a, b in pairs]
    return jnp.any(jnp.array(bad, bool))


def _advance(
    state: _State,
    carry: _Carry,
    found: PyTree,
    losses: Float[np.ndarray, " n"],
    value: float | None,
    seconds: float,
    every: int,
) -> _State:
    start = int(state.step)
    end = start + len(losses)
    loss, validation = state.loss.copy(), state.validation.copy()
    loss[start:end] = losses
    best, best_loss, best_step, since = (
        state.best,
        state.best_loss,
        state.best_step,
        state.since_best,
    )
    if value is not None:
        validation[start // every] = value
        if value < float(best_loss):
            best, best_loss = found, jnp.asarray(value, best_loss.dtype)
            best_step, since = jnp.asarray(end), jnp.asarray(0)
        else:
            since = since + 1
    return _State(
        carry=carry,
        best=best,
        best_loss=best_loss,
        best_step=best_step,
        step=jnp.asarray(end),
        since_best=since,
        seconds=np.asarray(state.seconds + seconds),
        loss=loss,
        validation=validation,
    )


def _key_words(key: Key) -> list[int]:
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return [int(word) for word in np.asarray(data).reshape(-1)]


# --- a resumed run is the same run ------------------------------------------------------------


def _name(objective: Any) -> str:
    """Where an objective is defined: a function, or the class of an object that is called."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}.{named.__qualname__}"


def _parts(opt_state: Any) -> list[str]:
    """The parts of an optimiser, by the names of their states, in the order of the chain."""
    if not isinstance(opt_state, tuple):
        return []
    own = [type(opt_state).__name__] if hasattr(opt_state, "_fields") else []
    return own + [name for part in opt_state for name in _parts(part)]


def _same_run(path: str | os.PathLike, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differ = [name for name in expected if found.get(name) != expected[name]]
    if differ:
        raise CheckpointError(
            f"{path}: expected the state of a run with "
            f"{ {name: expected[name] for name in differ} }, "
            f"got { {name: found.get(name) for name in differ} }; "
            "a resumed run must be the same run"
        )


# --- whose fault it was -----------------------------------------------------------------------


def _refuse_misfits(batch: Any, key: Key) -> None:
    """Refuse a batch by the shapes and dtypes of its events, and of the states beside them."""
    where = f"the batch that is drawn with the key {_key_words(key)}"
    leaves = jax.tree_util.tree_flatten_with_path(batch, is_leaf=lambda n: isinstance(n, Event))[0]
    for path, event in leaves:
        if not isinstance(event, Event):
            continue
        try:
            refuse_unusable(event)
        except InvalidEventError as err:
            raise InvalidBatchError(
                f"{where}, at batch{jax.tree_util.keystr(path)}: {err}"
            ) from err
    match batch:
        case (jax.ShapeDtypeStruct() as x, Event() as events):
            if len(x.shape) < 2 or x.shape[:1] != events.y.shape[:1]:
                raise InvalidBatchError(
                    f"{where}: expected states (n, d) and an event for each, got states of shape "
                    f"{x.shape} and events of shape {events.y.shape}; "
                    "`problem.check` looks at each function of a simulator"
                )


def _shapes(batch: Any, key: Key) -> str:
    """What was drawn, for a person whose objective could not take it."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    each = [f"batch{jax.tree_util.keystr(p)} {leaf.dtype}{leaf.shape}" for p, leaf in leaves]
    return (
        f"This came of a batch of {', '.join(each)}, drawn with the key {_key_words(key)}. Where "
        "a shape is not as meant, `problem.check` looks at each function of a simulator."
    )


def _blame(batch: Any) -> str:
    """A clause on the first values of a batch that are not finite, or nothing."""
    readable = jax.tree.map(
        lambda node: (node.values, node.error_sd, node.when) if isinstance(node, Event) else node,
        batch,
        is_leaf=lambda node: isinstance(node, Event),
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(readable)[0]:
        if not eqx.is_inexact_array(leaf):
            continue
        bad = ~np.isfinite(np.asarray(leaf))
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            return (
                f"the batch that this key draws is not finite itself, "
                f"{np.asarray(leaf)[at]} at index {at} of batch{jax.tree_util.keystr(path)}, "
                "where the first index is the row; "
            )
    return ""
