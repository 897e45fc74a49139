"""How close regression heads come to the exact posterior of an Ornstein-Uhlenbeck path with gaps.

    python -m benchmarks.regression_ou [--json FILE] [--quick]

Three heads are trained on the same simulator for the same number of examples, and each is held
against the exact posterior on 512 fresh events at each of five gap fractions: KL divergence, error
of the Jacobian of the mode (operator norm, relative), and distance of the modes in exact standard
deviations. One more head is trained on error bars that differ between events.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from amortlib.gaussian import condition, kl
from amortlib.objectives import nll
from amortlib.observation import AbstractGaps, ContiguousGaps
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import InverseProblem, ornstein_uhlenbeck
from amortlib.training import fit
from amortlib.types import Event, to_double
from benchmarks.report import Bar, arguments, finish, table

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
EVENTS = 512
SEEDS = {"weights": 0, "training": 1, "events": 2}
DECAY = 0.1
SD_DECAY = 0.01
"""Less for a head that reads error bars: its answer bends with them, and decay flattens it."""
MEDIAN_KL, WORST_KL, PRIOR_UNITS = 0.01, 0.1, 1e-3


def train(
    kind: str, problem: InverseProblem, *, steps: int, rate: float, uses_sd: bool = False
) -> tuple[AmortizedPosterior, float]:
    """Train one head; returns it and the seconds that took, compilation included."""
    model = regression_posterior(
        kind, key=jax.random.key(SEEDS["weights"]), prior=problem.prior, uses_sd=uses_sd
    )
    start = time.perf_counter()
    result = fit(
        model,
        nll,
        lambda key: problem.batch(key, 256),
        key=jax.random.key(SEEDS["training"]),
        steps=steps,
        # Values in the far tail are rare: without decay the net's answer there is left to chance.
        optimizer=optax.adamw(
            optax.cosine_decay_schedule(rate, steps), weight_decay=SD_DECAY if uses_sd else DECAY
        ),
        every=min(500, steps),
        progress=sys.stderr.isatty(),
    )
    return result.model, time.perf_counter() - start


@eqx.filter_jit
def _against_exact(
    model: AmortizedPosterior, problem: InverseProblem, events: Event
) -> dict[str, jax.Array]:
    identity = jnp.eye(problem.prior.loc.size)

    def one(event: Event) -> dict[str, jax.Array]:
        exact = condition(problem.prior, identity, event)
        q = model(event)

        def exact_mode(y: jax.Array) -> jax.Array:
            return condition(problem.prior, identity, Event(y, event.mask, event.sd)).loc

        want, got = jax.jacfwd(exact_mode)(event.y), model.mode_jacobian(event)
        size = jnp.linalg.norm(want, 2)
        error = jnp.linalg.norm(got - want, 2)
        prior = problem.prior
        return {
            "kl": kl(exact, q),
            # With nothing observed both are zero, and the error is too.
            "jacobian": jnp.where(size > 0, error / jnp.maximum(size, 1e-30), error),
            "mode": jnp.max(jnp.abs(q.mode() - exact.loc) / exact.sd()),
            "from_prior": jnp.maximum(
                jnp.max(jnp.abs(q.mean() - prior.loc) / prior.sd()),
                jnp.max(jnp.abs(q.sd() - prior.sd()) / prior.sd()),
            ),
        }

    # In slices: a thousand Jacobians at once take a gigabyte.
    return jax.lax.map(one, events, batch_size=32)


def measure(
    model: AmortizedPosterior,
    problem: InverseProblem,
    gaps: AbstractGaps,
    *,
    events: int = EVENTS,
    seed: int = SEEDS["events"],
) -> dict[str, np.ndarray]:
    """Per-event figures on fresh events under one gap pattern, in double precision.

    The head runs in the precision it was trained in; the reference and the comparison do not
    add rounding of their own.
    """
    seen = eqx.tree_at(lambda p: p.gaps, problem, gaps)
    _, batch = seen.batch(jax.random.key(seed), events)
    with jax.enable_x64(True):
        model, problem, batch = to_double((model, problem, batch))
        return {name: np.asarray(v) for name, v in _against_exact(model, problem, batch).items()}


def summary(figures: dict[str, np.ndarray]) -> dict[str, float]:
    """Median and worst of each figure."""
    out = {}
    for name, values in figures.items():
        out[f"{name}_median"] = float(np.median(values))
        out[f"{name}_worst"] = float(np.max(values))
    return out


def run(*, quick: bool = False) -> tuple[list[dict], list[Bar]]:
    """Train and measure everything; returns rows and bars."""
    fixed = ornstein_uhlenbeck(32, noise=0.3)
    varied = ornstein_uhlenbeck(32, noise=(0.1, 1.0))
    plan = [
        ("information", "information", fixed, 3000, 1e-2, False),
        ("plain Cholesky", "cholesky", fixed, 6000, 1e-3, False),
        ("diagonal", "diagonal", fixed, 6000, 1e-3, False),
        ("information, any noise", "information", varied, 8000, 1e-2, True),
    ]
    rows, bars = [], []
    for name, kind, problem, steps, rate, uses_sd in plan:
        steps = steps // 100 if quick else steps
        model, seconds = train(kind, problem, steps=steps, rate=rate, uses_sd=uses_sd)
        for fraction in FRACTIONS:
            figures = measure(
                model, problem, ContiguousGaps(fraction, max_gaps=3), events=32 if quick else EVENTS
            )
            row = {"head": name, "missing": fraction, "train_s": seconds, **summary(figures)}
            rows.append(row)
            if name != "information":
                continue
            at = f"{name}, {100 * fraction:.0f}% missing:"
            bars.append(Bar.check(f"{at} median KL", row["kl_median"], "<=", MEDIAN_KL))
            bars.append(Bar.check(f"{at} worst KL", row["kl_worst"], "<=", WORST_KL))
            if fraction == 1.0:
                off = row["from_prior_worst"]
                bars.append(Bar.check(f"{at} distance from the prior", off, "<=", PRIOR_UNITS))
    return rows, bars


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    args = arguments(__doc__.splitlines()[0], argv)
    rows, bars = run(quick=args.quick)
    head = [
        "head",
        "missing",
        "train s",
        "KL median",
        "KL worst",
        "Jac. median",
        "Jac. worst",
        "mode worst",
    ]
    print(
        table(
            head,
            [
                [
                    row["head"],
                    f"{100 * row['missing']:.0f}%",
                    f"{row['train_s']:.0f}",
                    f"{row['kl_median']:.5f}",
                    f"{row['kl_worst']:.4f}",
                    f"{row['jacobian_median']:.4f}",
                    f"{row['jacobian_worst']:.4f}",
                    f"{row['mode_worst']:.3f}",
                ]
                for row in rows
            ],
        )
    )
    return finish(args, name="regression_ou", results=rows, bars=bars, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
