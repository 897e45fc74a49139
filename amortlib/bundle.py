"""Promotion: weights, the report of the gates they passed, the problem, and a guard, in one file.

Only a head whose gates all held becomes a bundle, and only a whole bundle, for the problem at hand,
becomes a head again. Nothing here is a signature in the sense of cryptography: it guards against
mistakes, and not against somebody who means to deceive.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp

from amortlib import export
from amortlib.calibration.fingerprint import fingerprint, problem_fingerprint
from amortlib.calibration.report import (
    ADJOINT,
    AGREEMENT,
    ALPHA,
    EVENTS,
    GateError,
    GateReport,
)
from amortlib.calibration.several import C2ST, WEIGHTS
from amortlib.energy import Energy
from amortlib.export import CheckpointError
from amortlib.gaussian import Gaussian, GaussMarkov
from amortlib.guard import Guard, GuardError, Signs, Thresholds
from amortlib.posterior import AmortizedPosterior
from amortlib.problems import InverseProblem

__all__ = ["Bundle", "PromotionError", "load_bundle", "promote"]

_KIND = "amortlib bundle"

LEFT_OUT = 0.01
"""Largest share of events that the gates may have left out because the oracle had no answer."""


class PromotionError(ValueError):
    """A head that may not be deployed: the message says why, and what would have to hold."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What was promoted.

    Attributes:
        posterior: the head, with the weights that passed.
        report: of the gates.
        settings: what `build` makes the untrained posterior of.
        versions: of amortlib and jax when the head was promoted.
        guard: as it was set when the head was promoted, around these weights; `None` where the
            head was promoted without one.
    """

    posterior: AmortizedPosterior
    report: GateReport
    settings: dict[str, Any]
    versions: dict[str, str]
    guard: Guard | None = None


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("amortlib", "jax")}


def _energy(problem: InverseProblem, energy: Energy | None) -> Energy:
    """The J that was given, or the one made of the problem."""
    if energy is None:
        if not isinstance(problem.prior, Gaussian | GaussMarkov):
            raise PromotionError(
                "expected a problem with a Gaussian prior to make J of, got "
                f"{type(problem.prior).__name__}; give the energy that the oracle minimised"
            )
        energy = Energy(problem.prior, problem.forward)
    return energy


def _check_gates(report: GateReport, where: str = "") -> None:
    """Refuse a report whose gates do not hold, or hold by being wider or by looking away."""
    failed = [gate for gate in (*report.gates, *report.several_gates) if not gate.passed]
    if failed:
        words = "; ".join(f"{gate.name}: {gate.words}" for gate in failed)
        raise PromotionError(f"{where}expected a report whose gates all hold, got {words}")
    given = report.thresholds
    upper = {"agreement": AGREEMENT, "adjoint": ADJOINT}
    if report.several_gates:
        upper |= {"c2st": C2ST, "weights": WEIGHTS}
    for name, limit in upper.items():
        if not given[name] <= limit:
            raise PromotionError(
                f"{where}expected the gate of {name} at {limit:g} or stricter, got {given[name]:g}"
            )
    if not given["sbc"] >= ALPHA:
        raise PromotionError(
            f"{where}expected the gate of sbc at p = {ALPHA:g} or stricter, got {given['sbc']:g}"
        )
    every = report.events + report.excluded
    if report.excluded > LEFT_OUT * every:
        raise PromotionError(
            f"{where}expected at most {100 * LEFT_OUT:g}% of events without an oracle's answer, "
            f"got {report.excluded} of {every}: on those nobody knows what the head does"
        )


def promote(
    path: str | os.PathLike,
    posterior: AmortizedPosterior,
    problem: InverseProblem,
    report: GateReport,
    *,
    settings: dict[str, Any] | None = None,
    energy: Energy | None = None,
    events: int = EVENTS,
    guard: Guard | None = None,
) -> Bundle:
    """Write a head and its report to one file, if the gates let it through.

    Args:
        path: where to; an existing file is replaced in one move, or not at all.
        posterior: the head.
        problem: what it answers for; its gaps and its way of drawing states do not count.
        report: of `run_gates` on this head and this problem.
        settings: what the posterior was built from, as JSON can hold it; `load_bundle` calls
            `build(**settings)`.
        energy: the J that the oracle minimised, where it is not the one made of `problem`.
        events: the fewest that the gates must have seen.
        guard: set with this head on this problem; its thresholds are written beside the weights.

    Raises:
        PromotionError: on a report that did not pass, that passed wider gates than the package's
            or with more than `LEFT_OUT` of the events left out, that was made for other weights,
            for another problem, by another release, or on too few events; on a guard of another
            head or another J. Nothing is written.
        amortlib.CheckpointError: on settings that JSON cannot hold.
    """
    _check_gates(report)
    if report.head != fingerprint(posterior):
        raise PromotionError(
            f"expected the report of these weights, {fingerprint(posterior)[:12]}, got one of "
            f"{report.head[:12]}: run the gates on the head that is to be deployed"
        )
    energy = _energy(problem, energy)
    here = problem_fingerprint(energy, problem.obs_noise)
    if report.problem != here:
        raise PromotionError(
            f"expected the report of this problem, {here[:12]}, got one of {report.problem[:12]}: "
            "the prior, the forward model or the noise is another"
        )
    if report.events < events:
        raise PromotionError(
            f"expected gates on at least {events} events, got {report.events}: with fewer a faulty "
            "head passes too often"
        )
    versions = _versions()
    if report.versions.get("amortlib") != versions["amortlib"]:
        raise PromotionError(
            f"expected a report made with amortlib {versions['amortlib']}, got one of "
            f"{report.versions.get('amortlib')}: run the gates again"
        )
    settings = {} if settings is None else settings
    header = {
        "kind": _KIND,
        "settings": settings,
        "report": report.to_json(),
        "versions": versions,
    }
    if guard is None:
        export.save(path, posterior, settings=header)
        return Bundle(posterior, report, settings, versions)
    with _guard_refused():
        guard.check()
        made = guard.thresholds.guard(posterior, energy)
    header["guard"] = _described(guard.thresholds)
    export.save(path, {"posterior": posterior, "guard": guard.thresholds}, settings=header)
    return Bundle(posterior, report, settings, versions, made)


@contextlib.contextmanager
def _guard_refused(where: str = "") -> Generator[None]:
    try:
        yield
    except GuardError as err:
        raise PromotionError(f"{where}the guard is not of this head and problem: {err}") from err


def _described(thresholds: Thresholds) -> dict[str, Any]:
    """What is not an array, and what the arrays have to be: those of a field are all alike."""
    fields = {f.name: getattr(thresholds, f.name) for f in dataclasses.fields(thresholds)}
    plain = {name: v for name, v in fields.items() if isinstance(v, str | bool | float)}
    leaves = {name: jax.tree.leaves(v)[0] for name, v in fields.items() if name not in plain}
    arrays = {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in leaves.items()}
    return {"plain": plain, "arrays": arrays, "digest": fingerprint(thresholds)}


def _template(described: dict[str, Any]) -> Thresholds:
    """Thresholds of the same sizes, for a file's arrays to be read into."""
    arrays = {name: jnp.zeros(*like) for name, like in described["arrays"].items()}
    one = Signs(**{name: jnp.zeros(()) for name in Signs.__dataclass_fields__})
    seen = jax.tree.map(lambda _: arrays["seen"], one)
    return Thresholds(**(described["plain"] | arrays | {"seen": seen}))


def _read(
    path: str | os.PathLike, posterior: AmortizedPosterior, described: dict[str, Any]
) -> tuple[AmortizedPosterior, Thresholds]:
    """The weights and the guard's thresholds that stand in one file."""
    # A guard that was set in double precision is one, whatever is switched on here.
    with jax.enable_x64(True):
        template: dict[str, Any] = {"posterior": posterior, "guard": _template(described)}
        loaded = export.load(path, template)
    if fingerprint(loaded["guard"]) != described["digest"]:
        raise CheckpointError(
            f"{path}: expected the guard that was promoted, got another: its thresholds were "
            "changed after it was written"
        )
    return loaded["posterior"], loaded["guard"]


def load_bundle(
    path: str | os.PathLike,
    build: Callable[..., AmortizedPosterior],
    problem: InverseProblem,
    *,
    energy: Energy | None = None,
) -> Bundle:
    """Read a promoted head back, and check that it is the one that passed, for this problem.

    Args:
        path: the file.
        build: `build(**settings)` is the untrained posterior.
        problem: what it is to answer for.
        energy: as for [`promote`][].

    Raises:
        amortlib.CheckpointError: on a file that is missing, damaged, of another version, or holds
            weights that were never promoted; on a `build` that makes another posterior; on a
            guard whose thresholds are not those that were promoted.
        PromotionError: on a bundle of another problem or another release, or whose report does not
            hold; on a guard of other weights or another J.
    """
    header = export.read_settings(path)
    if header.get("kind") != _KIND:
        raise CheckpointError(
            f"{path}: expected a promoted bundle, got weights that no gate has let through; "
            "run the gates and promote them"
        )
    try:
        report = GateReport.from_json(header["report"])
    except GateError as err:
        raise PromotionError(f"{path}: {err}") from err
    _check_gates(report, f"{path}: ")
    versions = header["versions"]
    installed = _versions()["amortlib"]
    if versions.get("amortlib") != installed:
        raise PromotionError(
            f"{path}: promoted with amortlib {versions.get('amortlib')}, and this is {installed}: "
            "run the gates again and promote anew"
        )
    energy = _energy(problem, energy)
    here = problem_fingerprint(energy, problem.obs_noise)
    if report.problem != here:
        raise PromotionError(
            f"{path}: promoted for problem {report.problem[:12]}, and this is {here[:12]}: the "
            "prior, the forward model or the noise is another"
        )
    settings = header["settings"]
    posterior, thresholds = build(**settings), None
    if "guard" in header:
        posterior, thresholds = _read(path, posterior, header["guard"])
    else:
        posterior = export.load(path, posterior)
    found = fingerprint(posterior)
    if found != report.head:
        raise CheckpointError(
            f"{path}: expected build(**settings) to make the posterior that passed, "
            f"{report.head[:12]}, got {found[:12]}: its parts differ although its arrays fit"
        )
    if thresholds is None:
        return Bundle(posterior, report, settings, versions)
    with _guard_refused(f"{path}: "):
        guard = thresholds.guard(posterior, energy)
    return Bundle(posterior, report, settings, versions, guard)
