"""Time to quality: a quick run writes its data, peers get the same pairs, bars the right rows."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import peer_methods
from benchmarks.peer_methods import METHODS, NEEDS, missing
from benchmarks.peers import OURS, Result, bars

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_quick_run_writes_its_data(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    full = [sys.executable, "-m", "benchmarks.peers", "--quick", "--json", str(out)]
    full += ["--task", "two_moons"]
    run = subprocess.run(full, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["bars"]
    rows = {row["method"] for row in data["results"]}
    assert rows >= {OURS, "flowjax coupling"}
    assert data["versions"].keys() >= {"sbi", "torch", "bayesflow", "keras", "jax"}
    for method in METHODS:
        assert method in rows if not missing(method) else f"{method}: expected" in run.stderr


def test_every_library_can_be_had_by_the_extra() -> None:
    assert {method.split()[0] for method in METHODS} == NEEDS.keys() == {"sbi", "BayesFlow"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {line.split(">")[0] for line in extras["optional-dependencies"]["bench"]}
    assert names == {library.lower() for library in NEEDS}


def test_a_method_that_cannot_run_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"keras", "jax", "sbi", "torch"}
    find = SimpleNamespace(util=SimpleNamespace(find_spec=lambda n: n if n in here else None))
    monkeypatch.setattr(peer_methods, "importlib", find)
    assert missing("sbi NPSE") == []
    assert missing("BayesFlow flow matching") == ["bayesflow"]
    command = ["peer_methods.py", "in.npz", "out.npz", "--methods", "BayesFlow flow matching"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        peer_methods.main()
    said = capsys.readouterr().err
    assert "expected bayesflow to be installed" in said
    assert "amortlib[bench]" in said


class FakeBayesFlow:
    """What BayesFlow is asked for, and draws of which a half lies outside the box."""

    def __init__(self, backend: str = "jax"):
        self.calls: dict[str, Any] = {}
        self.seeds: list[int] = []
        self.networks = SimpleNamespace(
            CouplingFlow=lambda **settings: ("CouplingFlow", settings),
            FlowMatching=lambda **settings: ("FlowMatching", settings),
        )
        self.keras = SimpleNamespace(
            backend=SimpleNamespace(backend=lambda: backend),
            utils=SimpleNamespace(set_random_seed=lambda seed: self.calls.update(seed=seed)),
        )
        self.approximator = SimpleNamespace(trainable_weights=[np.zeros((2, 3)), np.zeros(4)])

    def BasicWorkflow(self, **settings: Any) -> "FakeBayesFlow":
        self.calls["workflow"] = settings
        return self

    def fit_offline(self, data: dict[str, np.ndarray], **settings: Any) -> SimpleNamespace:
        self.calls |= {"data": data, "fit": settings}
        return SimpleNamespace(history={"loss": [0.0] * settings.get("epochs", 100)})

    def sample(
        self, *, num_samples: int, conditions: dict[str, np.ndarray], seed: int
    ) -> dict[str, np.ndarray]:
        self.seeds.append(seed)
        assert conditions["y"].shape == (1, 3)
        rng = np.random.default_rng(seed)
        return {"theta": rng.uniform(-2.0, 2.0, (1, num_samples, 1))}


def _fake(monkeypatch: pytest.MonkeyPatch, backend: str = "jax") -> FakeBayesFlow:
    fake = FakeBayesFlow(backend)
    monkeypatch.setitem(sys.modules, "bayesflow", fake)
    monkeypatch.setitem(sys.modules, "keras", fake.keras)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    return fake


@pytest.mark.parametrize(
    ("method", "network"),
    [
        ("BayesFlow spline coupling", ("CouplingFlow", {"transform": "spline"})),
        ("BayesFlow flow matching", ("FlowMatching", {})),
    ],
)
def test_bayesflow_gets_all_the_pairs_and_its_defaults(
    method: str, network: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _fake(monkeypatch)
    theta, y = np.arange(8.0)[:, None], np.arange(24.0).reshape(8, 3)
    low, high = np.array([-1.0]), np.array([1.0])
    got = METHODS[method](theta, y, low, high, seed=7)
    assert os.environ["KERAS_BACKEND"] == "jax"
    assert fake.calls["seed"] == 7
    assert fake.calls["workflow"]["inference_network"] == network
    assert fake.calls["fit"] == {"verbose": 0}
    np.testing.assert_array_equal(fake.calls["data"]["theta"], theta)
    np.testing.assert_array_equal(fake.calls["data"]["y"], y)
    assert (got["epochs"], got["parameters"]) == (100.0, 10)
    assert METHODS[method](theta, y, low, high, seed=7, max_epochs=3)["epochs"] == 3.0

    draws = got["sampler"](y[0], 50, 4)
    assert draws.shape == (50, 1)
    assert (np.abs(draws) <= 1.0).all()
    assert fake.seeds[0] == 4
    assert len(set(fake.seeds)) == len(fake.seeds) > 1
    np.testing.assert_array_equal(draws, got["sampler"](y[0], 50, 4))


def test_bayesflow_on_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch it would switch gradients off, and sbi after it could not be trained."""
    _fake(monkeypatch, "torch")
    with pytest.raises(RuntimeError, match="expected keras on its JAX backend, got torch"):
        METHODS["BayesFlow flow matching"](
            np.zeros((8, 1)), np.zeros((8, 3)), np.zeros(1), np.ones(1), seed=0
        )


def _row(method: str, core: float, score: float) -> Result:
    return Result(method, "slcp", core, core, 1.0, 1, [score])


def test_bars_compare_with_the_best_and_with_the_fastest_as_good() -> None:
    """A fast method that is worse than the best does not count for the time."""
    others = [_row("good", 100.0, 0.80), _row("as good", 50.0, 0.805), _row("fast", 1.0, 0.9)]
    quality, speed = bars([_row(OURS, 40.0, 0.79), *others])
    assert (quality.bar, speed.bar) == (0.80, 50.0)
    assert quality.holds
    assert speed.holds
    quality, speed = bars([_row(OURS, 60.0, 0.81), *others])
    assert not quality.holds
    assert not speed.holds
