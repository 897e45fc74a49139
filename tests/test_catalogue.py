"""The catalogue and the alert: nothing is lost, and nothing depends on how the work is shared."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amortlib.alert import Alert
from amortlib.catalogue import Catalogue, Status, reprocess, unusable
from amortlib.export import CheckpointError
from amortlib.types import Event, InvalidEventError
from tests.stand_ins import EVENTS, make_answer, make_events, solve

KEY = jax.random.key(3)


def _run(directory: Path, **changes: object) -> Catalogue:
    given = {"key": KEY, "fallback": solve, "block": 8, "chunk": 64, "progress": False}
    arguments = {"answer": make_answer(), "events": make_events(), "directory": directory}
    return reprocess(**(arguments | given | changes))  # ty: ignore[missing-argument]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Catalogue]:
    directory = tmp_path_factory.mktemp("whole")
    return directory, _run(directory)


def test_every_event_has_the_answer_it_would_have_alone(whole: tuple[Path, Catalogue]) -> None:
    _, found = whole
    answer, events = make_answer(), make_events()
    assert found.status.shape == (EVENTS,)
    assert set(np.flatnonzero(found.status == Status.REFUSED)) == {7, 200}
    for i in (0, 1, 63, 64, EVENTS - 1):
        alone = answer(jax.tree.map(lambda a, i=i: a[i], events), jax.random.fold_in(KEY, i))
        solved = alone["status"] == Status.DISTRUSTED
        assert found.status[i] == (Status.SOLVED if solved else Status.TRUSTED)
        if not solved:
            np.testing.assert_allclose(found.answers["mode"][i], alone["mode"], atol=1e-5)
            np.testing.assert_array_equal(found.answers["draw"][i], alone["draw"])
    by_solver = found.answers["mode"][found.status == Status.SOLVED]
    assert len(by_solver) > 20
    assert (by_solver > 50).all()
    assert (found.answers["mode"][~found.answered] == 0).all()
    assert f"{int((found.status == Status.SOLVED).sum()):>8,}  the solver's answer" in (
        found.summary()
    )


def test_a_run_that_was_cut_off_goes_on(
    whole: tuple[Path, Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import amortlib.catalogue as module

    written: list[str] = []
    real = module.save

    def cut(path: Path, *args: object, **kwargs: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        real(path, *args, **kwargs)  # ty: ignore[invalid-argument-type]
        written.append(path.name)

    monkeypatch.setattr(module, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2

    again: list[str] = []
    monkeypatch.setattr(
        module, "save", lambda path, *a, **k: (real(path, *a, **k), again.append(path.name))
    )
    found = _run(tmp_path)
    assert not set(again) & set(written)
    assert len(again) == 3
    _same(found, whole[1])

    # A damaged file is made again, and nothing else is.
    again.clear()
    part = tmp_path / written[1]
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="answered again"):
        found = _run(tmp_path)
    assert again == [written[1]]
    _same(found, whole[1])


def test_chunks_and_how_they_are_cut_do_not_matter(
    whole: tuple[Path, Catalogue], tmp_path: Path
) -> None:
    _same(_run(tmp_path, chunk=200), whole[1])


def _same(a: Catalogue, b: Catalogue) -> None:
    np.testing.assert_array_equal(a.status, b.status)
    assert a.answers.keys() == b.answers.keys()
    for name in a.answers:
        np.testing.assert_array_equal(a.answers[name], b.answers[name])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"key": jax.random.key(4)}, "another key"),
        ({"answer": eqx.tree_at(lambda a: a.limit, make_answer(), 0.4)}, "another answer"),
        ({"events": jax.tree.map(lambda a: a[:-1], make_events())}, "another events, number"),
    ],
)
def test_another_run_is_not_mixed_in(
    whole: tuple[Path, Catalogue], changes: dict[str, object], what: str
) -> None:
    with pytest.raises(CheckpointError, match=what):
        _run(whole[0], **changes)


def test_what_stands_at_masked_entries_is_no_other_run(whole: tuple[Path, Catalogue]) -> None:
    events = make_events()
    other = jnp.where(events.mask, events.y, 5.0)
    _same(_run(whole[0], events=Event(other, events.mask)), whole[1])


def test_bad_input_is_named(tmp_path: Path) -> None:
    events = make_events()
    with pytest.raises(InvalidEventError, match="at least one event"):
        _run(tmp_path, events=jax.tree.map(lambda a: a[:0], events))
    with pytest.raises(InvalidEventError, match="boolean mask"):
        _run(tmp_path, events=eqx.tree_at(lambda e: e.mask, events, events.mask.astype(int)))
    with pytest.raises(ValueError, match="block >= 1"):
        _run(tmp_path, block=0)
    with pytest.raises(ValueError, match="with a `status`"):
        _run(tmp_path, answer=lambda event, key: {"mode": event.values})
    with pytest.raises(ValueError, match="expected the fallback to return mode"):
        _run(tmp_path, fallback=lambda events, answers, keys: {"draw": answers["draw"]})


def test_an_answer_that_is_not_finite_is_a_failure_of_that_event_alone(tmp_path: Path) -> None:
    def answer(event: Event, key: jax.Array) -> dict[str, jax.Array]:
        first = event.values[0]
        return {"mode": 1.0 / first, "status": (0 * first).astype(int)}

    events = Event(jnp.ones((5, 2)).at[3, 0].set(0.0), jnp.ones((5, 2), bool))
    found = _run(tmp_path, answer=answer, events=events, fallback=None)
    assert found.status.tolist() == [0, 0, 0, Status.FAILED, 0]


def test_error_bars_and_times_count_too() -> None:
    ones, mask = jnp.ones((3, 2)), jnp.array([[True, False]] * 3)
    sd = ones.at[0, 0].set(0.0).at[1, 1].set(0.0)
    events = Event(ones, mask, sd, ones.at[2, 0].set(jnp.nan))
    assert unusable(events).tolist() == [True, False, True]


@pytest.mark.slow
def test_devices_and_processes_share_the_work_and_change_nothing(tmp_path: Path) -> None:
    """Through a promoted bundle, with its guard and the solver where that says so.

    What the head has answered is the same to the last bit. What is refined, or solved, is the same
    but for its rounding: a process asks the solver about all of its own events at once, and the
    compiler lays the steps on J out anew for another number of blocks.

    All of them could be wrong alike, in the key above all: so they are held against head, guard and
    solver that are asked about one event at a time, without the catalogue.
    """
    bundle = tmp_path / "path.safetensors"
    whole = _elsewhere([[bundle, tmp_path / "1", tmp_path / "1.npz", 1]])[0]
    assert whole.pop("devices") == 1
    counts = {status: int((whole["status"] == status).sum()) for status in Status}
    assert counts[Status.REFUSED] == 2
    assert counts[Status.TRUSTED] > 200
    assert counts[Status.SOLVED] > 5
    eight, alone = _elsewhere(
        [
            [bundle, tmp_path / "8", tmp_path / "8.npz", 8],
            [bundle, "alone", tmp_path / "alone.npz", 1],
        ]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = [tmp_path / f"2-{i}.npz" for i in range(2)]
    two = _elsewhere([[bundle, tmp_path / "2", out[i], 2, port, i, 2] for i in range(2)])
    assert eight["devices"] == 8
    assert [int(run["devices"]) for run in two] == [4, 4]
    for process in range(2):
        assert len(list((tmp_path / "2").glob(f"*.{process:04d}.safetensors"))) == 5
    for run in (eight, *two):
        np.testing.assert_array_equal(run["status"], whole["status"])
        steps = np.isin(whole["status"], (Status.REFINED, Status.SOLVED))
        for name, array in whole.items():
            np.testing.assert_array_equal(run[name][~steps], array[~steps])
            np.testing.assert_allclose(run[name][steps], array[steps], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole["status"], alone["status"])
    assert {"mode", "sd", "draw"} <= whole.keys() <= alone.keys()
    solved = whole["status"] == Status.SOLVED
    for name in ("mode", "sd", "draw"):
        np.testing.assert_allclose(whole[name][~solved], alone[name][~solved], rtol=1e-5, atol=1e-5)
        # The solver stops where J, here below 250, would fall by less than its own rounding, 1.2e-7
        # of it: up to sqrt(2 * 250 * 1.2e-7) = 0.008 sd from the minimum, on either side of it.
        off = np.abs(whole[name] - alone[name])[solved] / alone["sd"][solved]
        assert off.max() < 0.016


def _elsewhere(arguments: list[list[object]]) -> list[dict[str, np.ndarray]]:
    """Run in processes of their own, at the same time."""
    root = Path(__file__).resolve().parents[1]
    own = [str(root), str(root / "book")]
    path = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    commands = [
        [sys.executable, str(root / "tests/promoted_run.py"), *map(str, a)] for a in arguments
    ]
    running = [
        subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return [dict(np.load(str(a[2]))) for a in arguments]


class _Clock:
    """Goes on by itself a little with every look, and by `jump` where the solver is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def test_the_alert_asks_the_solver_where_there_is_time() -> None:
    answer, events, clock = make_answer(), make_events(), _Clock()

    def slow_solver(events: Event, answers: dict, keys: jax.Array) -> dict:
        clock.now += 1.0
        return solve(events, answers, keys)

    batch = jax.vmap(answer)(events, jax.vmap(lambda i: jax.random.fold_in(KEY, i))(np.arange(301)))
    unsure = int(np.flatnonzero((batch["status"] == Status.DISTRUSTED) & ~unusable(events))[0])
    sure = int(np.flatnonzero((batch["status"] == Status.TRUSTED) & ~unusable(events))[0])
    one = lambda i: jax.tree.map(lambda a: a[i], events)  # noqa: E731

    def alert(budget: float) -> Alert:
        return Alert(answer, one(0), key=KEY, budget=budget, fallback=slow_solver, clock=clock)

    patient, hasty = alert(5.0), alert(1.2)
    assert 1.0 < patient.solver_seconds < 1.01
    reply = patient(one(unsure))
    assert reply.status == Status.SOLVED
    assert reply.answer["mode"][0] > 50
    assert reply.in_time
    assert reply.seconds > 1.0
    reply = hasty(one(unsure))  # 1.5 times the solver's second does not fit
    assert reply.status == Status.DISTRUSTED
    assert reply.in_time
    assert reply.seconds < 0.1
    np.testing.assert_allclose(reply.answer["mode"], batch["mode"][unsure], atol=1e-5)
    assert patient(one(sure)).status == Status.TRUSTED
    assert patient(one(7)).status == Status.REFUSED
    assert not alert(1e-4)(one(sure)).in_time
    with pytest.raises(InvalidEventError, match="expected an event of shapes"):
        patient(jax.tree.map(lambda a: a[:3], one(0)))
    with pytest.raises(ValueError, match="budget of seconds"):
        alert(0.0)
