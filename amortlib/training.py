"""One training loop. The objective is an argument; fresh minibatches are drawn on the device.

Steps run in compiled chunks (`jax.lax.scan`), so that Python is not in the hot path. Between
chunks Python looks at the clock, the loss and the validation, writes the checkpoint, and moves
the progress bar.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from tqdm import tqdm

from amortlib.export import CheckpointError, load, read_settings, save
from amortlib.types import Array, Fixed, Key, PyTree

__all__ = ["FitResult", "TrainingDivergedError", "fit", "trainable"]

_Model = TypeVar("_Model", bound=eqx.Module)
Objective = Callable[[Any, Any, Key], Array]


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
        stopped: why it ended, in words.
    """

    model: _Model
    loss: np.ndarray
    validation_step: np.ndarray
    validation_loss: np.ndarray
    best_step: int
    stopped: str


class _State(eqx.Module):
    """All that a restart needs to go on to the same numbers."""

    params: PyTree
    opt_state: PyTree
    best: PyTree
    best_loss: Array
    best_step: Array
    step: Array
    since_best: Array
    loss: np.ndarray
    validation: np.ndarray


def trainable(model: PyTree) -> PyTree:
    """A filter over the leaves of `model`: true for float arrays outside [`Fixed`][]."""

    def mark(node: Any) -> Any:
        if isinstance(node, Fixed):
            return jax.tree.map(lambda _: False, node)
        return eqx.is_inexact_array(node)

    return jax.tree.map(mark, model, is_leaf=lambda node: isinstance(node, Fixed))


def fit(
    model: _Model,
    objective: Objective,
    batches: Callable[[Key], Any],
    *,
    key: Key,
    steps: int,
    optimizer: optax.GradientTransformation,
    validation: Any | None = None,
    patience: int | None = None,
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
            each step: `lambda key: problem.batch(key, 256)`.
        key: the randomness of the whole run.
        steps: how many steps in all, those before a resume included.
        optimizer: an optax optimiser, with its schedule.
        validation: a fixed batch on which the objective is computed every `every` steps; the
            best model is kept and returned.
        patience: stop after so many checks without a better validation loss.
        every: steps in a compiled chunk: between checks, checkpoints, and progress.
        checkpoint: a file to write the state to after every chunk.
        resume: go on from `checkpoint` where it exists; start anew where it does not.
        progress: show a bar with the loss and the time left, on standard error.

    Raises:
        ValueError: on settings that do not fit together.
        TrainingDivergedError: as soon as a chunk holds a loss that is not finite, or ends in
            parameters that are not. The checkpoint still holds the last good state.
        CheckpointError: on resuming from a file that is damaged or of another run.
    """
    if steps < 1 or every < 1:
        raise ValueError(f"expected steps >= 1 and every >= 1, got {steps}, {every}")
    if patience is not None and validation is None:
        raise ValueError("expected a validation batch: patience waits for its loss to fall")
    if resume and checkpoint is None:
        raise ValueError("expected the path of a checkpoint to resume from")

    params, static = eqx.partition(model, trainable(model))

    def loss_of(params: PyTree, batch: Any, key: Key) -> Array:
        return objective(eqx.combine(params, static), batch, key)

    def one_step(carry: tuple[PyTree, PyTree], i: Array) -> tuple[tuple[PyTree, PyTree], Array]:
        params, opt_state = carry
        k_batch, k_objective = jax.random.split(jax.random.fold_in(key, i))
        loss, grads = jax.value_and_grad(loss_of)(params, batches(k_batch), k_objective)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def run(
        carry: tuple[PyTree, PyTree], indices: Array
    ) -> tuple[tuple[PyTree, PyTree], Array, Array]:
        after, losses = jax.lax.scan(one_step, carry, indices)
        return after, losses, _went_bad(carry[0], after[0])

    @jax.jit
    def validate(params: PyTree) -> Array:
        return loss_of(params, validation, jax.random.fold_in(key, steps))

    checks = math.ceil(steps / every)
    state = _State(
        params=params,
        opt_state=optimizer.init(params),
        best=params,
        best_loss=jnp.asarray(jnp.inf),
        best_step=jnp.asarray(0),
        step=jnp.asarray(0),
        since_best=jnp.asarray(0),
        loss=np.full(steps, np.nan, np.float32),
        validation=np.full(checks, np.nan, np.float32),
    )
    run_settings = {"steps": steps, "every": every, "key": _key_words(key)}
    if resume and checkpoint is not None and Path(checkpoint).exists():
        found = read_settings(checkpoint)
        if found != run_settings:
            raise CheckpointError(
                f"{checkpoint}: expected the state of a run with {run_settings}, got {found}; "
                "a resumed run must be the same run"
            )
        state = load(checkpoint, state)

    stopped = f"all {steps} steps were run"
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
            if patience is not None and int(state.since_best) >= patience:
                stopped = f"validation did not improve in {patience} checks"
                break
            start = int(state.step)
            count = min(every, steps - start)
            (params, opt_state), losses, bad_params = run(
                (state.params, state.opt_state), jnp.arange(start, start + count)
            )
            losses = np.asarray(losses)
            finite = np.isfinite(losses)
            # The last update of a chunk is not in any of its losses: look at what it left.
            if not finite.all() or bool(bad_params):
                bad = start + (count - 1 if finite.all() else int(np.argmin(finite)))
                what = "and the parameters it left not finite " if finite.all() else ""
                raise TrainingDivergedError(
                    f"the loss was {losses[bad - start]} {what}at step {bad}, with the key "
                    f"{_key_words(jax.random.fold_in(key, bad))}; the model of step {start} is in "
                    "this error's `model`"
                    + ("" if checkpoint is None else f" and its state in {checkpoint}"),
                    step=bad,
                    key=jax.random.fold_in(key, bad),
                    model=eqx.combine(state.params, static),
                )
            check = validate if validation is not None else None
            state = _advance(state, params, opt_state, losses, check, every)
            if checkpoint is not None:
                save(checkpoint, state, settings=run_settings)
            shown = losses.mean() if validation is None else state.validation[start // every]
            bar.set_description_str(f"loss {shown:.4g} ")
            bar.update(count)

    last = int(state.step)
    done = math.ceil(last / every)
    return FitResult(
        model=eqx.combine(state.params if validation is None else state.best, static),
        loss=state.loss[:last],
        validation_step=np.minimum(every * np.arange(1, done + 1), last)
        if validation is not None
        else np.zeros(0, int),
        validation_loss=state.validation[: done if validation is not None else 0],
        best_step=last if validation is None else int(state.best_step),
        stopped=stopped,
    )


def _went_bad(before: PyTree, after: PyTree) -> Array:
    """Whether anything that was finite is so no longer."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    bad = [jnp.any(jnp.isfinite(a) & ~jnp.isfinite(b)) for a, b in pairs]
    return jnp.any(jnp.array(bad, bool))


def _advance(
    state: _State,
    params: PyTree,
    opt_state: PyTree,
    losses: Float[np.ndarray, " n"],
    validate: Callable[[PyTree], Array] | None,
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
    if validate is not None:
        value = validate(params).astype(best_loss.dtype)
        validation[start // every] = float(value)
        if value < best_loss:
            best, best_loss, best_step, since = params, value, jnp.asarray(end), jnp.asarray(0)
        else:
            since = since + 1
    return _State(
        params, opt_state, best, best_loss, best_step, jnp.asarray(end), since, loss, validation
    )


def _key_words(key: Key) -> list[int]:
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return [int(word) for word in np.asarray(data).reshape(-1)]
