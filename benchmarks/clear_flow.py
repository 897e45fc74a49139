"""What a flow reaches on the Lorenz-63 window where nothing is missing, for the bars of a flow.

    python -m benchmarks.clear_flow [--json FILE] [--quick]

The flow that pages load (`benchmarks.flow_lorenz63`) learns windows with and without gaps at once.
This one sees windows without gaps alone, as the prototypes did whose figures the bars are, and is
not shipped. Three parts, as there, with two differences.

Most posteriors are nearly Gaussian, and the few that are not make the divergence. J tells which
they are: those around whose refined points it is no parabola come up more often in training.
Choosing events by what was seen of them, and not by their states, leaves the best answer to each
event what it is. The hardest come with draws of their posterior, by importance sampling that
resamples: around Laplace's approximations alone draws of a bent ridge are too narrow, and so is
what learns them.

And the axes of the whitened coordinates are as wide as exp(-J) is along them.

Time is that of the process on the processor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from amortlib.energy import Energy
from amortlib.objectives import nll
from amortlib.observation import NoGaps
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem, lorenz63
from amortlib.solvers import population_sample
from amortlib.types import Array, Event, Key
from benchmarks import flow_lorenz63 as gappy
from benchmarks.report import Bar, arguments, finish, table

SEEDS = {"weights": 0, "guess": 1, "pool": 22, "draws": 23, "flow": 3, "held out": 41}
SIZES: dict[str, dict[str, Any]] = {
    "guess": gappy.GUESS,
    "refined": {"steps": 4, "starts": 3, "profile": True},
    "flow": gappy.SIZES,
}
GUESS_STEPS = 3000
EVENTS = 32 * 1024
DRAWN, PROPOSED, CENTRES, KEPT, WORTH = 4, 192, 16, 16, 24.0
"""One event in so many, the hardest, has draws: how many are proposed in a round, around how many
draws of the round before, how many are kept, and what they have to be worth, else none is."""
FLOW_STEPS = 7000


class Pool(eqx.Module):
    """Events to learn from, as the encoder sees them.

    Attributes:
        states: the state that made each event, and draws of its posterior, `(n, 1 + KEPT, d)`.
        contexts: with a leading axis of n.
        chance: cumulative, of an event to be the next in a minibatch, `(n,)`.
    """

    states: Array
    contexts: Any
    chance: Array

    def __call__(self, key: Key) -> tuple[Array, Any]:
        """A minibatch of states and contexts."""
        k_row, k_state = jax.random.split(key)
        n = gappy.FLOW_BATCH
        rows = jnp.searchsorted(self.chance, jax.random.uniform(k_row, (n,)))
        rows = jnp.minimum(rows, self.chance.size - 1)  # the last chance is one but for rounding
        which = jax.random.randint(k_state, (n,), 0, self.states.shape[1])
        return self.states[rows, which], jax.tree.map(lambda a: a[rows], self.contexts)


def draws_of(energy: Energy, x: Array, event: Event, points: Array, key: Key) -> Array:
    """`KEPT` draws of an event's posterior; where they are worth too little, `x` in their place."""
    k_draw, k_keep = jax.random.split(key)
    sample = population_sample(energy, event, points, PROPOSED, key=k_draw, centres=CENTRES)
    kept = sample.resample(KEPT, key=k_keep)
    return jnp.where(sample.effective_size > WORTH, kept, x)


def pool_of(model: AmortizedPosterior, problem: InverseProblem, n: int) -> Pool:
    """`n` events, the hardest of them with draws."""
    energy = gappy.energy_of(problem)

    @eqx.filter_jit
    def some(key: Key) -> Any:
        x, events = problem.batch(key, min(n, 1024))
        return x, events, jax.vmap(model.encoder)(events)

    key = jax.random.key(SEEDS["pool"])
    parts = [some(jax.random.fold_in(key, i)) for i in range(max(1, n // 1024))]
    x, events, contexts = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    def hardness_of(context: Any) -> Array:
        return context.roughness()[jnp.argmax(context.log_weight[:-1])]

    hardness = np.asarray(jax.vmap(hardness_of)(contexts))
    chance = np.sqrt(np.maximum(hardness, 0.1))
    hardest = np.argsort(-hardness)[: x.shape[0] // DRAWN]

    @eqx.filter_jit
    def draw(x: Array, events: Event, points: Array, keys: Key) -> Array:
        one = lambda part: draws_of(energy, *part)  # noqa: E731
        return jax.lax.map(one, (x, events, points, keys), batch_size=256)

    # The last point is the guess, which is no minimum.
    of = jax.tree.map(lambda a: a[hardest], (x, events, contexts.loc[:, :-1]))
    drawn = draw(*of, jax.random.split(jax.random.key(SEEDS["draws"]), hardest.size))
    states = jnp.repeat(x[:, None], 1 + KEPT, axis=1).at[hardest, 1:].set(drawn)
    return Pool(states, contexts, jnp.asarray(np.cumsum(chance) / chance.sum(), x.dtype))


def train(*, quick: bool = False) -> tuple[AmortizedPosterior, dict[str, float]]:
    """The trained model, and the seconds of processor time of each part."""
    problem = lorenz63(gaps=NoGaps())
    model = gappy.build(SIZES, {})
    guess_steps, flow_steps = (20, 20) if quick else (GUESS_STEPS, FLOW_STEPS)
    seconds = {}
    guess, seconds["guess"] = gappy.fitted(
        model.encoder.guess.tree,  # ty: ignore[unresolved-attribute]
        nll,
        lambda key: problem.batch(key, gappy.GUESS_BATCH),
        seed=SEEDS["guess"],
        steps=guess_steps,
        rate=gappy.GUESS_RATE,
    )
    model = eqx.tree_at(lambda m: m.encoder.guess.tree, model, guess)
    start = time.process_time()
    pool = jax.block_until_ready(pool_of(model, problem, 256 if quick else EVENTS))
    seconds["pool"] = time.process_time() - start
    flow, seconds["flow"] = gappy.fitted(
        model.head,
        gappy.on_contexts,
        pool,
        seed=SEEDS["flow"],
        steps=flow_steps,
        rate=gappy.FLOW_RATE,
    )
    return eqx.tree_at(lambda m: m.head, model, flow), seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure beside the shipped flow, and say whether the bars hold."""
    args = arguments(__doc__.splitlines()[0], argv)
    model, seconds = train(quick=args.quick)
    total = sum(seconds.values())
    words = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    print(f"trained in {total:.0f} s of processor time: {words}", flush=True)
    events = 16 if args.quick else 384
    batch, sample, single = gappy.references(0.0, events, SEEDS["held out"])
    found = {
        name: gappy.summary(gappy.judge(answer, batch, sample), single)
        for name, answer in (("without gaps alone", model), ("all gaps, shipped", gappy.load()))
    }
    names = ("kl_mean", "kl_median", "kl_largest", "ess_mean", "ess_first_percentile")
    rows = [
        [name, *(f"{m[k]:.3f}" for k in names), f"{m['k_hat_above']:.3f}"]
        for name, m in found.items()
    ]
    head = ["trained on", "mean KL", "median", "largest", "ESS/N", "first percentile", "k-hat > .7"]
    print(table(head, rows))
    own = found["without gaps alone"]
    bars = [
        Bar.check("mean KL", own["kl_mean"], "<=", 0.03),
        Bar.check("mean ESS/N", own["ess_mean"], ">=", 0.95),
        Bar.check("first percentile of ESS/N", own["ess_first_percentile"], ">=", 0.45),
        Bar.check("seconds of training on one core", total, "<=", 180.0),
    ]
    results = found | {"seconds": seconds}
    return finish(args, name="clear_flow", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
