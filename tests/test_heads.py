"""Every head, held to the same properties; the information head, held to Bayes' rule."""

from collections.abc import Callable, Sequence
from functools import cache

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from amortlib.encoders import FlatEncoder, SiteContext, SiteEncoder
from amortlib.gaussian import AbstractDistribution, GaussMarkov, condition
from amortlib.heads.regression import CholeskyHead, DiagonalHead, InformationHead
from amortlib.objectives import nll
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import ornstein_uhlenbeck
from amortlib.training import trainable
from amortlib.types import Event

KEY = jax.random.key(0)
CONDITION = jax.jit(condition)
SIZES = {"width": 6, "depth": 1, "features": 4}
DRAWS = 20_000


def scattered(model: eqx.Module, seed: int, spread: float = 0.3) -> eqx.Module:
    """Moves every trained number away from where it starts, as training would."""
    marked, rest = eqx.partition(model, trainable(model))
    leaves, treedef = jax.tree.flatten(marked)
    rng = np.random.default_rng(seed)
    moved = [
        leaf + spread * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves
    ]
    return eqx.combine(jax.tree.unflatten(treedef, moved), rest)


def block_prior(sites: int, block: int, seed: int = 0) -> GaussMarkov:
    """A correlated block-tridiagonal prior with a mean that is not zero, from a random factor."""
    rng = np.random.default_rng(seed)
    own = np.tril(0.3 * rng.normal(size=(sites, block, block)), -1)
    own[:, np.arange(block), np.arange(block)] = rng.uniform(0.8, 1.6, (sites, block))
    off = 0.4 * rng.normal(size=(sites - 1, block, block))
    mean = rng.normal(size=sites * block)
    return GaussMarkov(*(jnp.asarray(a, jnp.float32) for a in (mean, own, off)))


def event_of(t: int, seed: int = 0) -> Event:
    """Some of it observed and some not, with error bars that differ."""
    rng = np.random.default_rng(seed)
    mask = np.arange(t) % 3 != 1
    return Event(
        jnp.asarray(rng.normal(size=t), jnp.float32),
        jnp.asarray(mask),
        jnp.asarray(rng.uniform(0.2, 0.8, t), jnp.float32),
    )


def flat(kind: str) -> AmortizedPosterior:
    return regression_posterior(kind, key=KEY, prior=block_prior(5, 1), **SIZES)


def information(
    sites: int, block: int, rank: int, *, uses_sd: bool = False, site: np.ndarray | None = None
) -> AmortizedPosterior:
    encoder = SiteEncoder(key=KEY, uses_sd=uses_sd, **SIZES)
    head = InformationHead(encoder.size, block_prior(sites, block), key=KEY, rank=rank, site=site)
    return AmortizedPosterior(encoder, head)


CASES: dict[str, Callable[[], AmortizedPosterior]] = {
    "diagonal": lambda: flat("diagonal"),
    "cholesky": lambda: flat("cholesky"),
    "information": lambda: information(5, 1, 1),
    "information, error bars": lambda: information(5, 1, 1, uses_sd=True),
    "information, blocks": lambda: information(3, 2, 2),
    "information, crowded": lambda: information(
        3, 2, 1, uses_sd=True, site=np.array([0, 0, 2, 2, 2])
    ),
}
INFORMATION = [name for name in CASES if name.startswith("information")]
# "crowded" has blocks and error bars too: the two cases between are for the whole suite.
BETWEEN = ("information, error bars", "information, blocks")


def cases(names: Sequence[str]) -> pytest.MarkDecorator:
    marks = {name: [pytest.mark.slow] if name in BETWEEN else [] for name in names}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[name]) for name in names]
    )


every_head = cases(list(CASES))
every_information_head = cases(INFORMATION)


@cache
def made(name: str) -> tuple[AmortizedPosterior, Event]:
    """A posterior with scattered weights, and an event for it."""
    model = scattered(CASES[name](), seed=1)
    head = model.head
    t = head.site.tree.shape[0] if isinstance(head, InformationHead) else 5
    return model, event_of(t)


# The weights are arguments, so that other weights need no new program; and what is asked of a
# density is compiled once for all that have the same form.
ANSWER = eqx.filter_jit(lambda model, given: model(given))
MOMENTS = jax.jit(lambda density: (density.mean(), density.sd(), density.covariance()))


def ask(model: eqx.Module, given: Event | SiteContext) -> tuple[jax.Array, ...]:
    """Mean, sd and covariance."""
    return MOMENTS(ANSWER(model, given))


@jax.jit
def study(density: AbstractDistribution, points: jax.Array) -> dict[str, jax.Array]:
    """All that a density says."""
    return {
        "mean": density.mean(),
        "mode": density.mode(),
        "slope": jax.grad(density.log_prob)(density.mode()),
        "covariance": density.covariance(),
        "sd": density.sd(),
        "draws": density.sample(DRAWS, key=jax.random.key(3)),
        "log_prob": jax.vmap(density.log_prob)(points),
        "points": points,
    }


@cache
def answers(name: str) -> dict[str, np.ndarray]:
    """What a posterior says of one event."""
    density = ANSWER(*made(name))
    points = np.random.default_rng(2).normal(size=(4, density.loc.size))
    return jax.tree.map(np.asarray, study(density, jnp.asarray(points, jnp.float32)))


# --- every head -------------------------------------------------------------------------------


@every_head
def test_log_prob_is_that_of_scipy_s_normal(name):
    """Single precision against double: 1e-4 of the log-density's size."""
    said = answers(name)
    density = scipy.stats.multivariate_normal(
        said["mean"].astype(float), said["covariance"].astype(float)
    )
    np.testing.assert_allclose(
        said["log_prob"], density.logpdf(said["points"]), rtol=1e-4, atol=1e-3
    )


@every_head
def test_the_mode_is_the_mean_and_the_gradient_vanishes_there(name):
    said = answers(name)
    np.testing.assert_array_equal(said["mode"], said["mean"])
    np.testing.assert_allclose(said["slope"], 0.0, atol=1e-3)


@every_head
def test_the_covariance_is_symmetric_positive_definite_and_holds_the_sd(name):
    said = answers(name)
    cov = said["covariance"].astype(float)
    np.testing.assert_allclose(cov, cov.T, atol=1e-5 * cov.max())
    assert np.linalg.eigvalsh(cov).min() > 0
    np.testing.assert_allclose(said["sd"], np.sqrt(np.diagonal(cov)), rtol=1e-4)
    off = np.abs(cov - np.diag(np.diagonal(cov))).max()
    assert (off == 0) == (name == "diagonal")


@every_head
def test_draws_have_the_mean_and_the_covariance(name):
    """Within 5.5 standard errors an entry: a false alarm in fewer than one of 10^5 keys, and the
    key is fixed.
    """
    said = answers(name)
    draws, cov = said["draws"].astype(float), said["covariance"].astype(float)
    error = 5.5 * said["sd"] / np.sqrt(DRAWS)
    assert (np.abs(draws.mean(0) - said["mean"]) < error).all()
    var = np.diagonal(cov)
    error = 5.5 * np.sqrt((np.outer(var, var) + cov**2) / DRAWS)
    assert (np.abs(np.cov(draws.T) - cov) < error).all()


@cache
def learning(name: str) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """Loss, its gradients in the weights and in y, and the answer, as a program of y and sd."""
    model, event = made(name)
    x = jnp.asarray(answers(name)["points"][0])
    params, static = eqx.partition(model, trainable(model))

    @jax.jit
    def run(y: jax.Array, sd: jax.Array) -> dict[str, jax.Array]:
        def loss_of(params, y):
            batch = jax.tree.map(lambda a: a[None], (x, Event(y, event.mask, sd)))
            return nll(eqx.combine(params, static), batch, KEY)

        loss, (slopes, slope_of_y) = jax.value_and_grad(loss_of, argnums=(0, 1))(params, y)
        return {
            "loss": loss,
            "slopes": jax.flatten_util.ravel_pytree(slopes)[0],
            "slope_of_y": slope_of_y,
            "mean": model.mean(Event(y, event.mask, sd)),
        }

    return run


@every_head
def test_what_lies_under_the_mask_changes_not_a_bit(name):
    """NaN, infinity or -999 in y and in its error bar: the same loss, gradients and answer."""
    _, event = made(name)
    expected = learning(name)(event.values, event.error_sd)
    assert all(np.isfinite(a).all() for a in expected.values())
    assert (np.asarray(expected["slopes"]) != 0).mean() > 0.5
    for under in (np.nan, np.inf, -999.0):
        got = learning(name)(
            jnp.where(event.mask, event.y, under), jnp.where(event.mask, event.sd, under)
        )
        for part, values in got.items():
            assert np.asarray(values).tobytes() == np.asarray(expected[part]).tobytes(), part


@every_head
def test_an_observation_moves_the_answer_and_a_masked_one_does_not(name):
    _, event = made(name)
    slope = learning(name)(event.y, event.sd)["slope_of_y"]
    np.testing.assert_array_equal(slope != 0, event.mask)


@pytest.mark.parametrize("head", [DiagonalHead, CholeskyHead])
def test_a_head_in_the_prior_s_units_starts_near_the_prior(head):
    """Another centre and scale move and stretch the same answer."""
    context = jnp.asarray([0.3, -0.2, 0.5])
    centre, scale = jnp.asarray([10.0, -5.0]), jnp.asarray([100.0, 0.01])
    plain = head(3, 2, key=KEY)(context)
    moved = head(3, 2, key=KEY, centre=centre, scale=scale)(context)
    np.testing.assert_allclose(moved.mean(), centre + scale * plain.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        moved.covariance(), jnp.outer(scale, scale) * plain.covariance(), rtol=1e-5
    )
    np.testing.assert_allclose(plain.mean(), 0.0, atol=0.2)
    np.testing.assert_allclose(plain.sd(), 1.0, atol=0.2)


# --- the information head ---------------------------------------------------------------------


def dense(prior: GaussMarkov) -> tuple[np.ndarray, np.ndarray]:
    """Mean and dense precision in double precision, from the blocks."""
    diag, lower = (np.asarray(a, float) for a in prior.precision_blocks())
    n, block = prior.shape
    out = np.zeros((n * block, n * block))
    for i in range(n):
        own = slice(i * block, (i + 1) * block)
        out[own, own] = diag[i]
        if i:
            left = slice((i - 1) * block, i * block)
            out[own, left], out[left, own] = lower[i - 1], lower[i - 1].T
    return np.asarray(prior.loc, float), out


def by_hand(
    head: InformationHead, prior: GaussMarkov, site: np.ndarray, context: SiteContext
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance from P_b + sum C C^T and sum C v, observation by observation."""
    mean, prec = dense(prior)
    block, eta = prior.shape[1], np.zeros(mean.size)
    nets = {
        name: (np.asarray(net.weight, float), np.asarray(net.bias, float))
        for name, net in (("g", head.gain), ("d", head.direction), ("v", head.value))
    }
    for t in np.flatnonzero(np.asarray(context.mask)):
        row = np.asarray(context.features[t], float)
        said = {name: weight @ row + bias for name, (weight, bias) in nets.items()}
        gain = np.exp(10.0 * np.tanh(said["g"] / 10.0))
        factor = said["d"].reshape(block, head.rank) * gain
        own = slice(site[t] * block, (site[t] + 1) * block)
        prec[own, own] += factor @ factor.T
        eta[own] += factor @ (said["v"] * gain)
    cov = np.linalg.inv(prec)
    return mean + cov @ eta, cov


def agrees(answer: tuple[jax.Array, ...], mean: np.ndarray, cov: np.ndarray) -> None:
    """To single precision: 1e-3 of a standard deviation, 1e-4 of the largest variance."""
    sd = np.sqrt(np.diagonal(cov))
    np.testing.assert_allclose((answer[0] - mean) / sd, 0.0, atol=1e-3)
    np.testing.assert_allclose(answer[1], sd, rtol=1e-3)
    np.testing.assert_allclose(answer[2], cov, atol=1e-4 * cov.max())


@every_information_head
def test_the_posterior_is_the_prior_s_numbers_plus_the_messages(name):
    model, event = made(name)
    head = model.head
    context = model.encoder(event)
    mean, cov = by_hand(head, head.prior.tree, np.asarray(head.site.tree), context)
    agrees(ask(model, event), mean, cov)
    assert np.abs(mean - np.asarray(head.prior.tree.loc)).max() > 0.05


@every_information_head
def test_a_value_far_outside_gets_a_finite_answer(name):
    model, event = made(name)
    for value in (1e6, 1e12, 1e30, -1e30):
        for where in (jnp.arange(event.y.size) == 0, event.mask):
            mean, sd, _ = ask(model, Event(jnp.where(where, value, event.y), event.mask, event.sd))
            assert np.isfinite(mean).all()
            assert np.isfinite(sd).all()
            assert (np.asarray(sd) > 0).all()


@every_information_head
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_with_nothing_observed_the_answer_is_the_prior_whatever_was_trained(name, spread):
    model, event = made(name)
    model = scattered(model, seed=4, spread=spread)
    prior = model.head.prior.tree
    nothing = Event(jnp.full_like(event.y, jnp.nan), jnp.zeros_like(event.mask), event.sd)
    mean, sd, cov = ask(model, nothing)
    np.testing.assert_array_equal(mean, prior.mean())
    # The factor is computed again from the precision: equal to rounding.
    _, prec = dense(prior)
    expected = np.linalg.inv(prec)
    np.testing.assert_allclose(cov, expected, atol=1e-5 * expected.max())
    np.testing.assert_allclose(sd, np.sqrt(np.diagonal(expected)), rtol=1e-5)


@every_information_head
def test_an_observation_more_never_makes_the_answer_less_sure(name):
    """Messages only add to the precision: no variance grows when the mask does."""
    model, event = made(name)

    def run(mask):
        return ask(model, Event(event.y, mask, event.sd))[1]

    order = np.random.default_rng(5).permutation(event.y.size)
    mask = np.zeros(event.y.size, bool)
    before = np.asarray(run(jnp.asarray(mask)))
    for t in order:
        mask[t] = True
        after = np.asarray(run(jnp.asarray(mask)))
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum()
        before = after


def linear(net: eqx.nn.Linear, weight: np.ndarray, bias: np.ndarray) -> eqx.nn.Linear:
    """The same layer with weights written by hand."""
    assert net.weight.shape == np.shape(weight)
    new = (jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32))
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), net, new)


def gain_for(sd: np.ndarray) -> np.ndarray:
    """What the gain net must say for a gain of 1 / sd, through the bound."""
    return 10.0 * np.arctanh(-np.log(sd) / 10.0)


def test_exact_messages_give_the_exact_posterior():
    """With C = 1 / sd and v = (y - x_b) / sd the head is the Gaussian-process formula, for error
    bars that differ and a mean that does.
    """
    prior, event = block_prior(5, 1), event_of(5)
    head = InformationHead(2, prior, key=KEY)
    head = eqx.tree_at(
        lambda h: (h.gain, h.direction, h.value),
        head,
        (
            linear(head.gain, [[1.0, 0.0]], [0.0]),
            linear(head.direction, [[0.0, 0.0]], [1.0]),
            linear(head.value, [[0.0, 1.0]], [0.0]),
        ),
    )
    features = jnp.stack([jnp.asarray(gain_for(np.asarray(event.sd))), event.y - prior.loc], axis=1)
    answer = ask(head, SiteContext(features, event.mask))
    exact = CONDITION(prior, jnp.eye(5), event)
    agrees(answer, np.asarray(exact.mean(), float), np.asarray(exact.covariance(), float))


def test_exact_messages_about_a_block_give_the_exact_posterior():
    """Two observations at each of three sites, one of a component, one of a mixture of two."""
    prior = block_prior(3, 2)
    rows = np.array([[1.0, 0.0], [0.6, -1.3]])
    operator = np.kron(np.eye(3), rows)
    event = event_of(6)
    mask = jnp.repeat(jnp.asarray([True, False, True]), 2)  # a site is seen or not
    event = Event(event.y, mask, jnp.tile(event.sd[:2], 3))
    head = InformationHead(2, prior, key=KEY, rank=2)
    head = eqx.tree_at(
        lambda h: (h.gain, h.direction, h.value),
        head,
        (
            linear(head.gain, np.zeros((2, 2)), gain_for(np.asarray(event.sd[:2]))),
            linear(head.direction, np.zeros((4, 2)), rows.T.reshape(-1)),
            linear(head.value, np.eye(2), np.zeros(2)),
        ),
    )
    innovation = event.y - jnp.asarray(operator, jnp.float32) @ prior.loc
    answer = ask(head, SiteContext(innovation.reshape(3, 2), mask[::2]))
    exact = CONDITION(prior, jnp.asarray(operator, jnp.float32), event)
    agrees(answer, np.asarray(exact.mean(), float), np.asarray(exact.covariance(), float))


def test_a_posterior_whose_net_is_exact_is_exact_from_the_event_on():
    """Encoder and head together: the raw value stands first among the features."""
    problem = ornstein_uhlenbeck(6, noise=0.3, loc=2.0)
    model = regression_posterior("information", key=KEY, prior=problem.prior, **SIZES)
    only_raw = np.eye(1, 5)
    model = eqx.tree_at(
        lambda m: (m.head.gain, m.head.direction, m.head.value),
        model,
        (
            linear(model.head.gain, 0 * only_raw, gain_for(np.array([0.3]))),
            linear(model.head.direction, 0 * only_raw, [1.0]),
            linear(model.head.value, only_raw, [-2.0]),
        ),
    )
    event = event_of(6)
    exact = CONDITION(problem.prior, jnp.eye(6), Event(event.y, event.mask, jnp.full(6, 0.3)))
    answer = ask(model, Event(event.y, event.mask))
    agrees(answer, np.asarray(exact.mean(), float), np.asarray(exact.covariance(), float))
    # The mode moves with y as the exact one does, by the gain: covariance H^T R^-1.
    gain = np.asarray(exact.covariance()) * np.asarray(event.mask) / 0.3**2
    jacobian = jax.jit(lambda y: model.mode_jacobian(Event(y, event.mask)))(event.y)
    np.testing.assert_allclose(jacobian, gain, atol=1e-3)


@pytest.mark.parametrize(
    "site", [pytest.param(None, marks=pytest.mark.slow), np.array([6, 0, 3, 3])]
)
def test_another_prior_keeps_the_messages(site):
    """On a longer grid, and with observations elsewhere on it, Bayes' rule holds as before."""
    model, _ = made("information, blocks")
    prior = block_prior(7, 2, seed=8)
    moved = model.head.with_prior(prior, site)
    where = np.arange(7) if site is None else site
    context = model.encoder(event_of(len(where), seed=9))
    mean, cov = by_hand(model.head, prior, where, context)
    agrees(ask(moved, context), mean, cov)
    # The head it came from is as it was.
    assert model.head.prior.tree.shape == (3, 2)


def test_another_prior_must_have_blocks_of_the_same_size():
    model, _ = made("information, blocks")
    with pytest.raises(ValueError, match="blocks of size 2, got 1"):
        model.head.with_prior(block_prior(7, 1))


@pytest.mark.parametrize("site", [[0, 5], [-1, 0], [7]])
def test_a_site_that_is_not_on_the_grid_is_refused(site):
    """Without the check jax would drop the message of such a site without a word."""
    with pytest.raises(ValueError, match="sites from 0 to 4"):
        InformationHead(3, block_prior(5, 1), key=KEY, site=np.asarray(site))
    head = InformationHead(3, block_prior(3, 1), key=KEY)
    with pytest.raises(ValueError, match="sites from 0 to 4"):
        head.with_prior(block_prior(5, 1), np.asarray(site))


@pytest.mark.parametrize("rank", [0, -1, 3])
def test_a_rank_beyond_the_block_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank from 1 to the block size 2, got {rank}"):
        InformationHead(3, block_prior(3, 2), key=KEY, rank=rank)


@pytest.mark.parametrize("t", [1, 4, 6])
def test_another_number_of_observations_is_refused(t):
    model, _ = made("information")
    with pytest.raises(ValueError, match=f"expected 5 observations, got {t}; with_prior"):
        model(event_of(t))


def test_a_flat_encoder_and_an_information_head_of_other_lengths_say_so():
    prior = block_prior(5, 1)
    model = regression_posterior("cholesky", key=KEY, prior=prior, **SIZES)
    assert isinstance(model.encoder, FlatEncoder)
    with pytest.raises(ValueError, match=r"shape \(5,\), got \(4,\)"):
        model(event_of(4))
    with pytest.raises(ValueError, match="'information', 'cholesky' or 'diagonal', got 'full'"):
        regression_posterior("full", key=KEY, prior=prior)
