"""Time to quality on two public tasks, beside the libraries that people use.

    python -m benchmarks.peers [--task two_moons] [--json FILE] [--quick]
        [--save-pairs FILE] [--peer-results FILE]

Every method trains on the same 10,000 simulated pairs and is judged on observations 1 to 5 of the
public benchmark (Lueckmann et al. 2021, arXiv:2101.04653): 2,000 draws against 2,000 exact ones,
by the classifier two-sample score. amortlib's flow head and flowjax's own loop are always run;
sbi and BayesFlow where they can be imported, and a line says so where they cannot. Both are in the
extra `bench`. Where they live in an environment of their own,

    python benchmarks/peer_methods.py PAIRS.npz PEERS.npz

runs them there on the pairs that `--save-pairs` wrote, and `--peer-results` reads what came out.
To compare on one core, set `OMP_NUM_THREADS=1` and
`XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"`, and pin the
process to it (`taskset -c 0`). Compilation counts as training. Time of the process on the core
stands beside wall time: the first grows less when others use the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import equinox as eqx
import flowjax.bijections as bij
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow
from flowjax.train import fit_to_data
from jax.scipy.special import ndtr, ndtri

from amortlib.gaussian import Gaussian
from amortlib.objectives import nll
from amortlib.posterior import AmortizedPosterior, flow_posterior
from amortlib.training import fit, trainable
from amortlib.types import Array, Event, Key
from benchmarks.peer_methods import METHODS, inside, missing, why_left_out
from benchmarks.report import Bar, finish, parser, table
from benchmarks.tasks import TASKS, Task
from benchmarks.two_sample import c2st

SEEDS = {"pairs": 0, "weights": 1, "training": 2, "reference": 3, "draws": 4, "classifier": 5}
PAIRS, DRAWS = 10_000, 2000

Sampler = Callable[[np.ndarray, int, int], np.ndarray]
"""(observation, n, seed) -> draws in the prior's box, shape `(n, d)`."""


@dataclass(frozen=True)
class Trained:
    """What a method makes of the pairs.

    Attributes:
        sampler: draws from its posterior.
        wall: seconds of training, compilation included.
        cpu: seconds of the process on the core.
        epochs: passes through the pairs.
        parameters: trained numbers.
    """

    sampler: Sampler
    wall: float
    cpu: float
    epochs: float
    parameters: int


@dataclass
class Result:
    """One row of the table."""

    method: str
    task: str
    wall_s: float
    cpu_s: float
    epochs: float
    parameters: int
    c2st: list[float] = field(default_factory=list)
    one_by_1000_s: float = float("nan")

    @property
    def mean(self) -> float:
        """Mean score over the observations."""
        return float(np.mean(self.c2st))


def simulate(task: Task, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs: parameters `(n, d)` and what was seen `(n, *obs)`."""
    x, events = task.problem.batch(jax.random.key(SEEDS["pairs"]), n)
    return np.asarray(x), np.asarray(events.y)


class Stopwatch:
    """Wall time, and time of this process on the core."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Both, since it was made."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


# --- amortlib ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the flow head is trained on one kind of task.

    Attributes:
        normal_scores: work on the normal scores of the parameters, in which the uniform prior is
            N(0, I) and the box has no edge; else on the parameters, scaled.
        pieces: components of the mixture, each with a Gaussian of its own from the context; 0
            for a flow on a fixed N(0, I).
        kind: of the layers.
        layers: how many.
        width: of their nets.
        encoder: width of the encoder's two hidden layers.
        rate: largest learning rate; it falls to zero as a cosine.
        decay: weight decay.
        batch: pairs a step.
        epochs: passes through the pairs.
        members: models trained from different weights, whose equal mixture is the answer.
    """

    normal_scores: bool
    pieces: int
    kind: str
    layers: int = 4
    width: int = 64
    knots: int = 8
    condition: int = 32
    encoder: int = 256
    rate: float = 3e-3
    decay: float = 1e-3
    batch: int = 256
    epochs: int = 60
    members: int = 1


RECIPES = {
    "two_moons": Recipe(normal_scores=False, pieces=2, kind="coupling", batch=100, epochs=60),
    "slcp": Recipe(normal_scores=True, pieces=0, kind="autoregressive", epochs=80, rate=4e-3),
}


def to_line(task: Task, theta: Array, normal_scores: bool) -> Array:
    """Parameters in the coordinates of the flow."""
    share = (theta - task.low) / (task.high - task.low)
    if normal_scores:
        return ndtri(jnp.clip(share, 1e-6, 1 - 1e-6))
    return (share - 0.5) * np.sqrt(12.0)


def from_line(task: Task, u: Array, normal_scores: bool) -> Array:
    """The inverse of [`to_line`][]."""
    share = ndtr(u) if normal_scores else u / np.sqrt(12.0) + 0.5
    return task.low + share * (task.high - task.low)


def build(dim: int, obs_shape: tuple[int, ...], recipe: Recipe, *, key: Key) -> AmortizedPosterior:
    """The untrained posterior."""
    return flow_posterior(
        "gaussian" if recipe.pieces else "prior",
        key=key,
        prior=Gaussian(jnp.zeros(dim), jnp.eye(dim)),
        obs_shape=obs_shape,
        components=max(1, recipe.pieces),
        features=recipe.encoder // 2,
        encoder_width=recipe.encoder,
        kind=recipe.kind,
        layers=recipe.layers,
        width=recipe.width,
        knots=recipe.knots,
        condition=recipe.condition,
    )


def amortlib_flow(
    task: Task, theta: np.ndarray, y: np.ndarray, recipe: Recipe | None = None
) -> Trained:
    """The flow head; a tenth of the pairs is held out and the best model on them is kept."""
    watch = Stopwatch()
    recipe = RECIPES[task.name] if recipe is None else recipe
    centre, scale = y.mean(0), y.std(0)
    u = to_line(task, jnp.asarray(theta), recipe.normal_scores)
    z = jnp.asarray((y - centre) / scale)
    events = Event(z, jnp.ones(z.shape, bool))
    held = len(u) // 10
    validation = jax.tree.map(lambda leaf: leaf[:held], (u, events))
    pairs = jax.tree.map(lambda leaf: leaf[held:], (u, events))
    spe = (len(u) - held) // recipe.batch
    steps = recipe.epochs * spe

    def batches(key: Key) -> tuple[Array, Event]:
        rows = jax.random.randint(key, (recipe.batch,), 0, len(u) - held)
        return jax.tree.map(lambda leaf: leaf[rows], pairs)

    models, run = [], 0
    for member in range(recipe.members):
        k_weights, k_training = (
            jax.random.fold_in(jax.random.key(SEEDS[name]), member)
            for name in ("weights", "training")
        )
        result = fit(
            build(u.shape[1], z.shape[1:], recipe, key=k_weights),
            nll,
            batches,
            key=k_training,
            steps=steps,
            optimizer=optax.chain(
                optax.clip_by_global_norm(5.0),
                optax.adamw(
                    optax.cosine_decay_schedule(recipe.rate, steps), weight_decay=recipe.decay
                ),
            ),
            validation=validation,
            every=2 * spe,
            progress=False,
        )
        models.append(result.model)
        run += len(result.loss)
    wall, cpu = watch.read()

    @eqx.filter_jit
    def draw(model: AmortizedPosterior, y: Array, n: int, key: Key) -> Array:
        event = Event((y - centre) / scale, jnp.ones(y.shape, bool))
        return from_line(task, model.sample(event, n, key=key), recipe.normal_scores)

    def sampler(y: np.ndarray, n: int, seed: int) -> np.ndarray:
        parts = []
        for i, model in enumerate(models):
            key = jax.random.fold_in(jax.random.key(seed), i)
            share = n // len(models) + (i < n % len(models))
            y_here = jnp.asarray(y, jnp.float32)

            def more(attempt: int, model=model, key=key, y_here=y_here) -> np.ndarray:
                return np.asarray(draw(model, y_here, n, jax.random.fold_in(key, attempt)))

            parts.append(inside(task.low, task.high, more, share))
        return np.concatenate(parts)

    count = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(models, trainable(models))))
    return Trained(sampler, wall, cpu, run * recipe.batch / (len(u) - held), int(count))


# --- the others -------------------------------------------------------------------------------


def flowjax_loop(
    task: Task, theta: np.ndarray, y: np.ndarray, *, epochs: int = 200, patience: int = 10
) -> Trained:
    """flowjax as its documentation uses it: a coupling flow of splines, and its `fit_to_data`."""
    watch = Stopwatch()
    x_mean, x_sd, y_mean, y_sd = theta.mean(0), theta.std(0), y.mean(0), y.std(0)
    k_flow, k_fit = jax.random.split(jax.random.key(SEEDS["weights"]))
    flow = coupling_flow(
        k_flow,
        base_dist=Normal(jnp.zeros(theta.shape[1])),
        transformer=bij.RationalQuadraticSpline(knots=8, interval=4),
        cond_dim=y.shape[1],
        flow_layers=5,
    )
    data = ((theta - x_mean) / x_sd, (y - y_mean) / y_sd)
    flow, losses = fit_to_data(
        k_fit, flow, data, max_epochs=epochs, max_patience=patience, show_progress=False
    )
    wall, cpu = watch.read()

    @eqx.filter_jit
    def draw(flow: eqx.Module, y: Array, n: int, key: Key) -> Array:
        return flow.sample(key, (n,), condition=(y - y_mean) / y_sd) * x_sd + x_mean

    def sampler(y: np.ndarray, n: int, seed: int) -> np.ndarray:
        y_here, key = jnp.asarray(y, jnp.float32), jax.random.key(seed)
        return inside(
            task.low,
            task.high,
            lambda attempt: np.asarray(draw(flow, y_here, n, jax.random.fold_in(key, attempt))),
            n,
        )

    count = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(flow, eqx.is_inexact_array)))
    return Trained(sampler, wall, cpu, float(len(losses["train"])), int(count))


def with_peer(
    task: Task, theta: np.ndarray, y: np.ndarray, method: str, epochs: int | None
) -> Trained:
    """A method of sbi or of BayesFlow, at its defaults."""
    got = METHODS[method](theta, y, task.low, task.high, seed=SEEDS["weights"], max_epochs=epochs)
    return Trained(got["sampler"], got["wall_s"], got["cpu_s"], got["epochs"], got["parameters"])


def from_file(file: Path, task: Task, *, draws: int, observations: int) -> list[Result]:
    """Rows of methods that were trained elsewhere, judged here by the same classifier.

    Raises:
        ValueError: where they were trained on other pairs than these.
    """
    rows = []
    with np.load(file, allow_pickle=False) as data:
        names = sorted({n.rsplit("|", 1)[0] for n in data.files if n.startswith(task.name + "|")})
        for name in names:
            theta = simulate(task, int(data[f"{name}|pairs"]))[0]
            if not np.array_equal(theta[:100], data[f"{name}|first_pairs"]):
                raise ValueError(f"{file}: {name} was trained on other pairs; make them anew")
            wall, cpu, epochs, parameters, one = data[f"{name}|figures"].tolist()
            row = Result(name.split("|")[1], task.name, wall, cpu, epochs, int(parameters))
            row.one_by_1000_s = one
            row.c2st = [
                _score(task, i, data[f"{name}|draws"][i], draws) for i in range(observations)
            ]
            rows.append(row)
    return rows


def _score(task: Task, observation: int, draws: np.ndarray, n: int) -> float:
    exact = task.reference(observation, n, seed=SEEDS["reference"])
    return c2st(exact, draws[:n], seed=SEEDS["classifier"] + observation)


def judge(method: str, task: Task, trained: Trained, *, draws: int, observations: int) -> Result:
    """Score the draws of a trained method, and time a thousand of one observation, warm."""
    row = Result(method, task.name, trained.wall, trained.cpu, trained.epochs, trained.parameters)
    for i in range(observations):
        y = task.observations[i]
        row.c2st.append(_score(task, i, trained.sampler(y, draws, SEEDS["draws"] + i), draws))
    times = []
    trained.sampler(task.observations[0], 1000, 0)
    for seed in range(3):
        start = time.perf_counter()
        trained.sampler(task.observations[0], 1000, seed)
        times.append(time.perf_counter() - start)
    row.one_by_1000_s = float(np.median(times))
    return row


OURS = "amortlib flow"


def bars(rows: Sequence[Result]) -> list[Bar]:
    """No worse than the best of the others, in less time than the fastest that is as good.

    As good means within 0.01 of the best of the others: two standard errors of a mean over five
    scores, of 2,000 draws each.
    """
    out = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = next(row for row in rows if row.task == task and row.method == OURS)
        others = [row for row in rows if row.task == task and row.method != OURS]
        best = min(row.mean for row in others)
        fastest = min((row for row in others if row.mean <= best + 0.01), key=lambda r: r.cpu_s)
        label = f"{task}: C2ST, best of the others"
        out.append(Bar.check(label, mine.mean, "<=", round(best, 4)))
        label = f"{task}: core seconds, {fastest.method}"
        out.append(Bar.check(label, mine.cpu_s, "<=", round(fastest.cpu_s, 1)))
    return out


def save_pairs(file: Path, tasks: Sequence[Task], n: int) -> None:
    """What `benchmarks/peer_methods.py` needs, in one file."""
    arrays = {}
    for task in tasks:
        theta, y = simulate(task, n)
        parts = {"theta": theta, "y": y, "observations": task.observations}
        parts |= {"low": task.low, "high": task.high}
        arrays |= {f"{task.name}|{name}": value for name, value in parts.items()}
    np.savez_compressed(file, **arrays)


def run(
    tasks: Sequence[Task], *, quick: bool = False, peer_results: Path | None = None
) -> list[Result]:
    """Train and judge every method on every task."""
    pairs, draws, observations = (500, 200, 1) if quick else (PAIRS, DRAWS, 5)
    rows = []
    for task in tasks:
        theta, y = simulate(task, pairs)
        recipe = replace(RECIPES[task.name], epochs=2) if quick else RECIPES[task.name]
        methods = {
            OURS: lambda task, theta, y, recipe=recipe: amortlib_flow(task, theta, y, recipe),
            "flowjax coupling": lambda task, theta, y: flowjax_loop(
                task, theta, y, epochs=2 if quick else 200
            ),
        }
        for name in METHODS:
            if missing(name):
                print(f"{task.name}, {why_left_out(name)}", file=sys.stderr, flush=True)
                continue
            methods[name] = lambda task, theta, y, name=name: with_peer(
                task, theta, y, name, 2 if quick else None
            )
        for name, method in methods.items():
            trained = method(task, theta, y)
            rows.append(judge(name, task, trained, draws=draws, observations=observations))
            print(f"{task.name}, {name}: {rows[-1].mean:.3f}", file=sys.stderr, flush=True)
        if peer_results is not None:
            rows += from_file(peer_results, task, draws=draws, observations=observations)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--task", choices=list(TASKS), help="one task; by default both")
    flags.add_argument("--save-pairs", type=Path, metavar="FILE", help="write the pairs and stop")
    flags.add_argument("--peer-results", type=Path, metavar="FILE", help="figures made elsewhere")
    args = flags.parse_args(argv)
    tasks = [TASKS[args.task]] if args.task else list(TASKS.values())
    if args.save_pairs is not None:
        save_pairs(args.save_pairs, tasks, PAIRS)
        return 0
    rows = run(tasks, quick=args.quick, peer_results=args.peer_results)
    head = ["task", "method", "wall s", "core s", "epochs", "parameters", "C2ST", "1 x 1000 s"]
    print(
        table(
            head,
            [
                [
                    row.task,
                    row.method,
                    f"{row.wall_s:.1f}",
                    f"{row.cpu_s:.1f}",
                    f"{row.epochs:.0f}",
                    row.parameters,
                    f"{row.mean:.3f}",
                    f"{row.one_by_1000_s:.4f}",
                ]
                for row in rows
            ],
        )
    )
    results = [asdict(row) | {"mean": row.mean} for row in rows]
    return finish(
        args,
        name="peers",
        results=results,
        bars=bars(rows),
        seeds=SEEDS,
        also=("sbi", "torch", "bayesflow", "keras"),
    )


if __name__ == "__main__":
    sys.exit(main())
