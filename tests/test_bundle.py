"""What may be promoted, and what may be loaded: every way in which a bundle can be wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from _kit.exact import exact_analysis

from amortlib import export
from amortlib.bundle import Bundle, PromotionError, load_bundle, promote
from amortlib.calibration import GateReport, SeveralMinima, fingerprint, run_gates
from amortlib.energy import Energy
from amortlib.export import CheckpointError
from amortlib.guard import Guard, GuardError, Thresholds, calibrate
from amortlib.observation import GaussianNoise
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import InverseProblem, ornstein_uhlenbeck
from amortlib.types import Fixed

N = 4


def problem() -> InverseProblem:
    return ornstein_uhlenbeck(N, timescale=8.0, noise=0.3)


def build(kind: str = "information", seed: int = 0) -> AmortizedPosterior:
    return regression_posterior(kind, key=jax.random.key(seed), prior=problem().prior)


@pytest.fixture(scope="module")
def failing() -> tuple[AmortizedPosterior, GateReport]:
    """An untrained head and its report, which fails."""
    made, model = problem(), build()
    truths, events = made.batch(jax.random.key(1), 200)
    analysis = exact_analysis(made, events)
    report = run_gates(
        model, made, events, np.asarray(truths), analysis, key=jax.random.key(2), bins=10, draws=99
    )
    return model, report


@pytest.fixture(scope="module")
def passing(failing: tuple[AmortizedPosterior, GateReport]) -> GateReport:
    """The same report, as it would be if every gate had held."""
    report = failing[1]
    flat = np.tile(np.arange(100), 2)
    return dataclasses.replace(
        report,
        agreement=np.zeros(200),
        adjoint=np.zeros(200),
        ranks=np.stack([flat] * (N + 1), axis=1),
    )


def test_a_head_that_failed_is_refused_and_nothing_is_written(
    failing: tuple[AmortizedPosterior, GateReport], tmp_path: Path
) -> None:
    model, report = failing
    assert not report.passed
    with pytest.raises(PromotionError, match=r"gates all hold, got (agreement|adjoint)"):
        promote(tmp_path / "head", model, problem(), report, events=200)
    assert list(tmp_path.iterdir()) == []


def other_weights(report: GateReport) -> dict[str, Any]:
    return {"posterior": build(seed=1)}


def other_problem(report: GateReport) -> dict[str, Any]:
    return {"problem": eqx.tree_at(lambda p: p.obs_noise, problem(), GaussianNoise(0.4))}


def too_few(report: GateReport) -> dict[str, Any]:
    return {"events": 1000}


def other_release(report: GateReport) -> dict[str, Any]:
    return {"report": dataclasses.replace(report, versions={"amortlib": "0.0.1"})}


def wider(name: str, limit: float) -> Any:
    def change(report: GateReport) -> dict[str, Any]:
        wide = dataclasses.replace(report, thresholds=report.thresholds | {name: limit})
        assert wide.passed
        return {"report": wide}

    return change


def many_left_out(report: GateReport) -> dict[str, Any]:
    return {"report": dataclasses.replace(report, excluded=3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, "report of these weights"),
        (other_problem, "prior, the forward model or the noise"),
        (too_few, "at least 1000 events, got 200"),
        (other_release, "got one of 0.0.1"),
        (wider("agreement", 2.0), "gate of agreement at 1 or stricter, got 2"),
        (wider("adjoint", 0.2), r"gate of adjoint at 0\.05 or stricter, got 0\.2"),
        (wider("sbc", 1e-6), r"gate of sbc at p = 0\.01 or stricter, got 1e-06"),
        (many_left_out, "at most 1% of events without an oracle's answer, got 3 of 203"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_report_that_is_not_of_this_head_and_problem_is_refused(
    passing: GateReport, tmp_path: Path, change: Any, words: str
) -> None:
    given = {"posterior": build(), "problem": problem(), "report": passing, "events": 200}
    with pytest.raises(PromotionError, match=words):
        promote(tmp_path / "head", **(given | change(passing)))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def file(passing: GateReport, tmp_path: Path) -> Path:
    path = tmp_path / "head.safetensors"
    settings = {"kind": "information"}
    made = promote(path, build(), problem(), passing, settings=settings, events=200)
    assert isinstance(made, Bundle)
    return path


def test_what_was_promoted_comes_back(file: Path, passing: GateReport) -> None:
    def elsewhere(kind: str) -> AmortizedPosterior:
        return build(kind, seed=9)  # the weights are the file's

    found = load_bundle(file, elsewhere, problem())
    assert fingerprint(found.posterior) == fingerprint(build())
    assert found.report.to_dict() == passing.to_dict()
    assert found.settings == {"kind": "information"}
    assert set(found.versions) == {"amortlib", "jax"}


def test_another_problem_is_refused(file: Path) -> None:
    other = ornstein_uhlenbeck(N, timescale=4.0, noise=0.3)
    with pytest.raises(PromotionError, match="promoted for problem"):
        load_bundle(file, build, other)


def test_a_build_of_another_head_is_refused(file: Path) -> None:
    def wider(kind: str) -> AmortizedPosterior:
        return regression_posterior("cholesky", key=jax.random.key(0), prior=problem().prior)

    with pytest.raises(CheckpointError, match="arrays of the template"):
        load_bundle(file, wider, problem())


def test_a_damaged_file_is_refused(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged|not readable"):
        load_bundle(file, build, problem())


def test_weights_that_no_gate_has_seen_are_refused(tmp_path: Path) -> None:
    export.save(tmp_path / "plain", build(), settings={"kind": "information"})
    with pytest.raises(CheckpointError, match="no gate has let through"):
        load_bundle(tmp_path / "plain", build, problem())


def rewritten(file: Path, **changes: Any) -> None:
    """Write the file anew with another header, its digest in order."""
    header = export.read_settings(file) | changes
    export.save(file, build(), settings=header)


def test_a_report_that_was_changed_is_refused(file: Path) -> None:
    data = json.loads(export.read_settings(file)["report"])
    data["agreement"][3] = 7.0
    rewritten(file, report=json.dumps(data))
    with pytest.raises(PromotionError, match="changed after it was written"):
        load_bundle(file, build, problem())
    data["passed"] = False
    rewritten(file, report=json.dumps(data))
    with pytest.raises(PromotionError, match="gates all hold, got agreement"):
        load_bundle(file, build, problem())


def test_a_report_whose_gates_were_made_wider_is_refused(file: Path) -> None:
    report = GateReport.from_json(export.read_settings(file)["report"])
    wide = wider("adjoint", 0.2)(report)["report"]
    rewritten(file, report=wide.to_json())
    with pytest.raises(PromotionError, match="gate of adjoint"):
        load_bundle(file, build, problem())


def test_weights_that_were_swapped_are_refused(file: Path) -> None:
    header = export.read_settings(file)
    export.save(file, build(seed=5), settings=header)
    with pytest.raises(CheckpointError, match="the posterior that passed"):
        load_bundle(file, build, problem())


def test_a_bundle_of_another_release_is_refused(file: Path) -> None:
    rewritten(file, versions={"amortlib": "0.0.1", "jax": "0.9"})
    with pytest.raises(PromotionError, match=r"promoted with amortlib 0\.0\.1"):
        load_bundle(file, build, problem())


# --- the guard beside the weights -----------------------------------------------------------------


@pytest.fixture(scope="module")
def guard() -> Guard:
    """Set with the untrained head, on those of many events on which it happens to be right."""
    made = problem()
    _, events = made.batch(jax.random.key(3), 1000)
    energy = Energy(made.prior, made.forward)
    return calibrate(build(), energy, events, key=jax.random.key(4), rate=0.05)


@pytest.fixture
def guarded(passing: GateReport, guard: Guard, tmp_path: Path) -> Path:
    path = tmp_path / "guarded.safetensors"
    settings = {"kind": "information"}
    made = promote(path, build(), problem(), passing, settings=settings, events=200, guard=guard)
    assert made.guard is not None
    return path


def test_a_guard_comes_back_and_judges_as_before(guarded: Path, guard: Guard) -> None:
    found = load_bundle(guarded, lambda kind: build(kind, seed=9), problem())
    assert found.guard is not None
    assert found.guard.thresholds.level == guard.thresholds.level
    assert found.guard.thresholds.rate == guard.thresholds.rate
    assert fingerprint(found.guard.thresholds) == fingerprint(guard.thresholds)
    assert fingerprint(found.posterior) == fingerprint(build())
    _, events = problem().batch(jax.random.key(8), 20)
    keys = jax.random.split(jax.random.key(9), 20)
    judge = eqx.filter_jit(lambda g: jax.vmap(lambda e, k: g(e, key=k))(events, keys))
    for a, b in zip(
        jax.tree.leaves(judge(guard)), jax.tree.leaves(judge(found.guard)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_bundle_without_a_guard_has_none(file: Path) -> None:
    assert "guard" not in export.read_settings(file)  # as files were before
    assert load_bundle(file, build, problem()).guard is None


def test_a_report_of_the_first_version_is_still_a_bundle(file: Path) -> None:
    data = json.loads(export.read_settings(file)["report"])
    del data["several"], data["rates"]
    data["version"] = 1
    data["thresholds"] = {k: data["thresholds"][k] for k in ("agreement", "adjoint", "sbc")}
    rewritten(file, report=json.dumps(data))
    assert load_bundle(file, build, problem()).report.passed


def test_a_guard_is_of_its_own_head_and_its_own_energy(guard: Guard) -> None:
    made = problem()
    energy = Energy(made.prior, made.forward)
    kept = guard.thresholds
    assert kept.guard(build(), energy).thresholds.level == kept.level
    with pytest.raises(GuardError, match="head that the guard was set with"):
        kept.guard(build(seed=1), energy)
    other = ornstein_uhlenbeck(N, timescale=4.0, noise=0.3)
    with pytest.raises(GuardError, match="J that the guard was set with"):
        kept.guard(build(), Energy(other.prior, other.forward))
    moved = eqx.tree_at(lambda g: g.posterior, guard, Fixed(build(seed=1)))
    with pytest.raises(GuardError, match="head that the guard was set with"):
        moved.check()
    moved = eqx.tree_at(lambda g: g.energy, guard, Fixed(Energy(other.prior, other.forward)))
    with pytest.raises(GuardError, match="J that the guard was set with"):
        moved.check()


@pytest.mark.parametrize("of", ["head", "energy"])
def test_a_guard_of_another_head_or_energy_is_not_promoted(
    passing: GateReport, guard: Guard, tmp_path: Path, of: str
) -> None:
    other = ornstein_uhlenbeck(N, timescale=4.0, noise=0.3)
    wrong = {
        "head": dataclasses.replace(
            guard, thresholds=dataclasses.replace(guard.thresholds, head="00" * 32)
        ),
        "energy": dataclasses.replace(guard, energy=Fixed(Energy(other.prior, other.forward))),
    }[of]
    with pytest.raises(PromotionError, match="guard is not of this head and problem"):
        promote(tmp_path / "head", build(), problem(), passing, events=200, guard=wrong)
    assert list(tmp_path.iterdir()) == []


def tampered(path: Path, kept: Thresholds, digest: str | None = None, **plain: Any) -> None:
    """The file anew, with other thresholds, its digest in order."""
    settings = export.read_settings(path)
    settings["guard"]["plain"] |= plain
    settings["guard"]["digest"] = digest or settings["guard"]["digest"]
    export.save(path, {"posterior": build(), "guard": kept}, settings=settings)


def test_thresholds_that_were_changed_are_refused(guarded: Path, guard: Guard) -> None:
    kept = guard.thresholds
    tampered(guarded, eqx.tree_at(lambda t: t.seen.high, kept, kept.seen.high + 1.0))
    with pytest.raises(CheckpointError, match="thresholds were changed"):
        load_bundle(guarded, build, problem())
    for name, value in {"level": kept.level / 2, "head": "11" * 32, "rate": 0.5}.items():
        tampered(guarded, kept, **{name: value})
        with pytest.raises(CheckpointError, match="thresholds were changed"):
            load_bundle(guarded, build, problem())
        tampered(guarded, kept, **{name: getattr(kept, name)})
    assert load_bundle(guarded, build, problem()).guard is not None


def test_a_guard_of_other_weights_in_the_file_is_refused(guarded: Path, guard: Guard) -> None:
    """Its own digest is in order: it is whole, and of another head."""
    other = dataclasses.replace(guard.thresholds, head="11" * 32)
    tampered(guarded, other, digest=fingerprint(other), head=other.head)
    with pytest.raises(PromotionError, match="guard is not of this head"):
        load_bundle(guarded, build, problem())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: dataclasses.replace(t, level=1.5), "between 0 and 1"),
        (lambda t: eqx.tree_at(lambda t: t.seen.fall, t, t.seen.fall[::-1]), "'fall' in rising"),
        (lambda t: eqx.tree_at(lambda t: t.seen.low, t, t.seen.low * np.nan), "'low' in rising"),
    ],
)
def test_thresholds_that_no_guard_has_are_refused(guard: Guard, change: Any, words: str) -> None:
    energy = Energy(problem().prior, problem().forward)
    with pytest.raises(GuardError, match=words):
        change(guard.thresholds).guard(build(), energy)


def test_a_head_that_fails_where_there_are_several_minima_is_refused(
    passing: GateReport, tmp_path: Path
) -> None:
    one = np.zeros(1)
    found = SeveralMinima(
        event=np.array([3]),
        minima=np.array([2]),
        reference=one + 5000,
        c2st=one + 0.5,
        weight_error=one + 0.4,
        weight_floor=one + 0.01,
        kl=None,
        draws=1000,
    )
    report = dataclasses.replace(passing, several=found, single=np.arange(200) != 3)
    with pytest.raises(PromotionError, match="gates all hold, got weights: the weights of the"):
        promote(tmp_path / "head", build(), problem(), report, events=200)
    wide = dataclasses.replace(report, thresholds=report.thresholds | {"weights": 1e3})
    assert wide.passed
    with pytest.raises(PromotionError, match="gate of weights at 2 or stricter, got 1000"):
        promote(tmp_path / "head", build(), problem(), wide, events=200)
