"""How right can one forward pass be? The Jacobian of networks taught by simulation and by a solver.

    python -m benchmarks.one_pass [--json FILE] [--quick] [--keep FOLDER]

On Lorenz-63 windows without gaps, with no step on J after the network. One network, four lessons:
simulated states by maximum likelihood; the solver's modes; modes and their Jacobians (Sobolev
training); the same for a network that looks at J once: its own first guess, the residual there and
the slope of J are features beside its context. The solver is the search of
`benchmarks.refinement` from the shipped network's starts, and its time counts.

Judged by the first two gates against the oracle in double precision, on the windows that
`benchmarks.refinement` reports. Seconds are those of the process on the processor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from amortlib.encoders import AbstractEncoder, FlatEncoder, ScaledEncoder
from amortlib.energy import Energy
from amortlib.heads import CholeskyHead
from amortlib.laplace import laplace
from amortlib.objectives import Lesson, ModeMatch, nll
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem
from amortlib.training import fit
from amortlib.types import Array, Event, Fixed, Key
from benchmarks import refinement
from benchmarks.flow_lorenz63 import energy_of, from_pool, optimizer
from benchmarks.report import Bar, finish, parser, table

SEEDS = {"weights": 0, "lessons": 61, "training": 62, "report": refinement.SEEDS["report"]}
LESSONS = 128 * 1024
"""Events that the solver answers, once, for all networks it teaches."""
FIELD = refinement.FIELDS["search, k = 6"]
STEPS = (1000, 4000, 16000)
LONGEST, LOOKING = (*STEPS, 48000), STEPS[:2]
"""Steps for the lesson that teaches most, and for the network that a look at J makes slow."""
WIDTH, FEATURES, DEPTH = 256, 96, 3
RATE, BATCH, PROBES = 2e-3, 256, 2


class LookingEncoder(AbstractEncoder):
    """A context, and what J says at a first guess that is learned with it.

    Attributes:
        encoder: event -> context.
        guess: context -> control variable.
        energy: J, held fixed.
    """

    encoder: AbstractEncoder
    guess: eqx.nn.Linear
    energy: Fixed
    obs_shape: tuple[int, ...] | None = eqx.field(static=True)
    uses_sd: bool = eqx.field(static=True)

    def __init__(self, encoder: AbstractEncoder, features: int, energy: Energy, *, key: Key):
        """Set the parts."""
        self.encoder, self.energy = encoder, Fixed(energy)
        self.guess = eqx.nn.Linear(features, energy.prior.loc.size, key=key)
        self.obs_shape, self.uses_sd = encoder.obs_shape, encoder.uses_sd

    def __call__(self, event: Event) -> Array:
        """Context, guess, residual and slope; the last two pressed together, for they are large."""
        context = self.encoder(event)
        v = self.guess(context)
        r, pull = jax.vjp(lambda v: self.energy.value.residual(v, event), v)
        return jnp.concatenate([context, v, jnp.arcsinh(r), jnp.arcsinh(pull(r)[0])])


class DeepCholeskyHead(eqx.Module):
    """A net before a Gaussian head: features of J have to be worked with."""

    net: eqx.nn.MLP
    head: CholeskyHead

    def __call__(self, context: Array) -> Any:
        """The Gaussian for one context."""
        return self.head(self.net(context))


def build(problem: InverseProblem, *, looks: bool) -> AmortizedPosterior:
    """The untrained network."""
    prior = problem.prior
    assert prior is not None
    k_encoder, k_guess, k_net, k_head = jax.random.split(jax.random.key(SEEDS["weights"]), 4)
    shape, energy = problem.shapes()[1], energy_of(problem)
    flat = FlatEncoder(shape, key=k_encoder, features=FEATURES, width=WIDTH, depth=DEPTH - looks)
    encoder = ScaledEncoder(flat, 0.0, 10.0)
    head = CholeskyHead(FEATURES, 3, key=k_head, centre=prior.loc, scale=prior.sd())
    if not looks:
        return AmortizedPosterior(encoder, head)
    encoder = LookingEncoder(encoder, FEATURES, energy, key=k_guess)
    size = FEATURES + 3 + 3 + (3 + shape[0] * shape[1])
    net = eqx.nn.MLP(size, FEATURES, WIDTH, 1, jax.nn.gelu, jax.nn.gelu, key=k_net)
    return AmortizedPosterior(encoder, DeepCholeskyHead(net, head))


def teach(problem: InverseProblem, n: int) -> tuple[tuple[Lesson, Event], float]:
    """`n` events with what the search has to say of them, and the seconds that it took."""
    model, energy = refinement.load(), energy_of(problem)
    solve = refinement.searched(FIELD, "implicit")

    @eqx.filter_jit
    def some(key: Key) -> tuple[Lesson, Event]:
        _, events = problem.batch(key, min(n, 1024))

        def one(event: Event) -> Lesson:
            def mode(y: Array) -> tuple[Array, Array]:
                x = solve(model, energy, eqx.tree_at(lambda e: e.y, event, y))
                return x, x

            jacobian, x = jax.jacfwd(mode, has_aux=True)(event.y)
            return Lesson(x, laplace(energy, x, event).chol, jacobian)

        return jax.lax.map(one, events, batch_size=128), events

    start = time.process_time()
    key = jax.random.key(SEEDS["lessons"])
    parts = [some(jax.random.fold_in(key, i)) for i in range(max(1, n // 1024))]
    lessons, events = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    # Where the search has not arrived at a minimum the full Hessian may have no factor.
    good = jnp.isfinite(lessons.chol).all((1, 2)) & jnp.isfinite(lessons.jacobian).all((1, 2, 3))
    kept = jax.tree.map(lambda a: a[good], (lessons, events))
    return kept, time.process_time() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Teach, judge, compare."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--keep", type=Path, metavar="FOLDER", help="store the oracle's answers")
    args = options.parse_args(argv)
    problem = refinement.problem(0.0)
    n = 16 if args.quick else refinement.EVENTS
    events, analysis = refinement.solved("report", 0.0, n, args.keep)
    taught, spent = teach(problem, 1024 if args.quick else LESSONS)
    print(f"{taught[0].mode.shape[0]} lessons in {spent:.0f} s of processor time", flush=True)
    lessons = from_pool(taught, BATCH)
    sobolev = ModeMatch(1.0, PROBES)
    ways: dict[str, tuple[Any, Any, tuple[int, ...], float]] = {
        "simulation": (nll, lambda key: problem.batch(key, BATCH), STEPS, 0.0),
        "modes": (ModeMatch(0.0), lessons, STEPS, spent),
        "modes and Jacobians": (sobolev, lessons, LONGEST, spent),
        "modes and Jacobians, one look at J": (sobolev, lessons, LOOKING, spent),
    }
    judge = refinement.judge_of(refinement.network)
    found = []
    for name, (objective, batches, counts, before) in ways.items():
        for steps in (20,) if args.quick else counts:
            start = time.process_time()
            model = fit(
                build(problem, looks="look" in name),
                objective,
                batches,
                key=jax.random.key(SEEDS["training"]),
                steps=steps,
                optimizer=optimizer(RATE, steps),
                every=max(1, steps // 10),
                progress=False,
            ).model
            seconds = time.process_time() - start
            row = judge(model, events, analysis)
            spans = {"seconds": seconds, "before": before}
            found.append({"lesson": name, "steps": steps, **spans, **row})
            print(found[-1], flush=True)

    head = ["taught by", "steps", "s", "agreement, %", "adjoint, %"]
    rows = [
        [r["lesson"], r["steps"], f"{r['seconds']:.0f}"]
        + [f"{r[gate]:.1f}" for gate in ("agreement", "adjoint")]
        for r in found
    ]
    print(table(head, rows))
    alone = [row for row in found if "look" not in row["lesson"]]
    bars = [
        Bar.check("one pass: agreement, %", max(r["agreement"] for r in alone), ">=", 99.0),
        Bar.check("one pass: adjoint, %", max(r["adjoint"] for r in alone), ">=", 8.0),
    ]
    results = {"rows": found, "events": n, "lessons": int(taught[0].mode.shape[0])}
    return finish(args, name="one_pass", results=results, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
