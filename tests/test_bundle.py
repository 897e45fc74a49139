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
from amortlib.calibration import GateReport, fingerprint, run_gates
from amortlib.export import CheckpointError
from amortlib.observation import GaussianNoise
from amortlib.posterior import AmortizedPosterior, regression_posterior
from amortlib.problems import InverseProblem, ornstein_uhlenbeck

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
