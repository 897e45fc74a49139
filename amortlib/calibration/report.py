"""What the gates found, for a person to read and a program to act on."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from amortlib.calibration.adjoint import ADJOINT
from amortlib.calibration.agreement import AGREEMENT
from amortlib.calibration.importance import KHAT
from amortlib.calibration.rates import Rates, rates
from amortlib.calibration.sbc import ALPHA, holm, uniformity_p
from amortlib.calibration.several import C2ST, WEIGHTS, SeveralMinima, weight_limit

__all__ = ["EVENTS", "GateError", "GateReport", "Verdict"]

EVENTS = 1000
"""Events for which the gates' power is stated, the default of everything here.

Chosen from the table that `python -m benchmarks.gates` makes: the fewest on its grid at which
every planted fault is caught with a probability of at least 0.99."""

_LEAST = 5
"""Expected count in a bin from which on the chi-square law may be used."""


class GateError(ValueError):
    """The gates cannot be judged: the message says what was expected and what came.

    Never a verdict. Where a number is missing or means nothing, no gate passes and none fails.
    """


def check_sizes(events: int, draws: int, bins: int) -> None:
    """Whether the ranks of so many events among so many draws may be judged in so many bins.

    Raises:
        GateError: where they may not.
    """
    if bins < 2 or (draws + 1) % bins:
        raise GateError(f"expected at least 2 bins that divide L + 1 = {draws + 1}, got {bins}")
    if events < _LEAST * bins:
        raise GateError(
            f"expected at least {_LEAST * bins} events for {bins} bins, got {events}; "
            "with fewer in a bin the chi-square law does not hold"
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One gate's answer.

    Attributes:
        name: of the gate.
        passed: whether it held.
        value: the largest statistic over events, or the smallest adjusted p.
        threshold: what `value` was held against.
        events: how many events were judged.
        failing: which events failed, by their number in the batch; empty for SBC, which judges
            all of them together.
        words: the same in a sentence.
    """

    name: str
    passed: bool
    value: float
    threshold: float
    events: int
    failing: tuple[int, ...]
    words: str


@dataclasses.dataclass(frozen=True)
class GateReport:
    """The three gates, event by event, and the diagnostics beside them.

    Only what was measured is stored; verdicts and p-values are made from it. `str(report)` is for
    people, `to_json` for programs.

    Attributes:
        agreement: mode distance in posterior standard deviations, `(e,)`.
        adjoint: relative error of the Jacobian, `(e,)`.
        single: whether the event has a single minimum; the first two gates judge only these.
        sure: whether the oracle was sure to have found every minimum that counts.
        names: of the statistics of SBC, the components of the state and then `J`.
        ranks: of the truth among `draws` draws, `(e, k)`.
        draws: L.
        bins: of the rank histograms.
        tarp: ranks of the distance to a random point, `(e,)`.
        coverage: ranks of the density, `(e,)`; `None` where q has no exact density.
        average: bin counts of the data-averaged posterior against the prior, `(d + 1, bins)`.
        kl: KL(p || q) in nats by importance sampling, `(e,)`; `None` likewise.
        ess: effective share of `importance_draws`, `(e,)`; `None` likewise.
        khat: Pareto k-hat of the weights, `(e,)`; `None` likewise.
        importance_draws: draws behind `kl`, `ess` and `khat`.
        excluded: events left out before, because the oracle did not converge on them.
        head: digest of the head's weights.
        problem: digest of prior, forward model and noise.
        versions: of amortlib and jax.
        thresholds: of the gates: `agreement`, `adjoint`, `sbc`; on events with several minima
            `c2st` and `weights`, which is in times of the Monte Carlo floor.
        several: what was found on the first of the events with several minima, `None` where there
            are none or nobody looked.
    """

    agreement: np.ndarray
    adjoint: np.ndarray
    single: np.ndarray
    sure: np.ndarray
    names: tuple[str, ...]
    ranks: np.ndarray
    draws: int
    bins: int
    tarp: np.ndarray
    coverage: np.ndarray | None
    average: np.ndarray
    kl: np.ndarray | None
    ess: np.ndarray | None
    khat: np.ndarray | None
    importance_draws: int
    excluded: int
    head: str
    problem: str
    versions: dict[str, str]
    thresholds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {
            "agreement": AGREEMENT,
            "adjoint": ADJOINT,
            "sbc": ALPHA,
            "c2st": C2ST,
            "weights": WEIGHTS,
        }
    )
    several: SeveralMinima | None = None

    FORMAT: ClassVar[int] = 2
    """Version of the file that `to_json` writes. In the first nothing was said of several minima;
    it is read, too."""

    def __post_init__(self):
        n = self.agreement.size
        if n == 0:
            raise GateError("expected at least one event, got none: an empty sample passes nothing")
        for name in ("agreement", "adjoint", "kl", "ess", "khat"):
            values = getattr(self, name)
            if values is None:
                continue
            if values.shape != (n,):
                raise GateError(f"expected {name} of shape {(n,)}, got {values.shape}")
            bad = np.flatnonzero(np.isnan(values))
            if bad.size:
                raise GateError(
                    f"expected numbers in {name}, got NaN at {bad.size} of {n} events, "
                    f"the first of them event {bad[0]}"
                )
        for name in ("single", "sure", "tarp"):
            if getattr(self, name).shape != (n,):
                raise GateError(f"expected {name} of shape {(n,)}, got {getattr(self, name).shape}")
        if self.ranks.shape != (n, len(self.names)):
            raise GateError(
                f"expected ranks of shape {(n, len(self.names))}, got {self.ranks.shape}"
            )
        for name in ("ranks", "tarp", "coverage"):
            ranks = getattr(self, name)
            if ranks is not None and (ranks.min() < 0 or ranks.max() > self.draws):
                raise GateError(f"expected {name} from 0 to {self.draws}, got others")
        check_sizes(n, self.draws, self.bins)
        self._check_several()
        if not self.single.any():
            raise GateError(
                f"expected at least one event with a single minimum, got none of {n}: on the "
                "others the first two gates have no single right answer"
            )

    def _check_several(self) -> None:
        found = self.several
        if found is None:
            return
        size = found.event.size
        if size == 0 or not np.isin(found.event, np.flatnonzero(~self.single)).all():
            raise GateError("expected events with several minima in `several`, got others or none")
        for field in dataclasses.fields(found):
            values = getattr(found, field.name)
            if not isinstance(values, np.ndarray):
                continue
            if values.shape != (size,):
                raise GateError(
                    f"expected several.{field.name} of shape {(size,)}, got {values.shape}"
                )
            bad = np.flatnonzero(np.isnan(values))
            if bad.size:
                raise GateError(
                    f"expected numbers in several.{field.name}, got NaN at event "
                    f"{found.event[bad[0]]}"
                )

    # --- what is made from it -----------------------------------------------------------------

    @property
    def events(self) -> int:
        """How many events."""
        return self.agreement.size

    def histogram(self, name: str) -> np.ndarray:
        """Counts of the ranks of one statistic, `(bins,)`.

        Args:
            name: one of `names`, or `"coverage"` or `"tarp"`.

        Raises:
            KeyError: on another name, or one that was not measured.
        """
        if name in self.names:
            return self._counts(self.ranks[:, self.names.index(name)])
        ranks = {"coverage": self.coverage, "tarp": self.tarp}.get(name)
        if ranks is None:
            raise KeyError(f"expected one of {[*self.names, 'coverage', 'tarp']}, got {name!r}")
        return self._counts(ranks)

    def _counts(self, ranks: np.ndarray) -> np.ndarray:
        which = ranks * self.bins // (self.draws + 1)
        return np.bincount(which, minlength=self.bins)

    @property
    def sbc_p(self) -> dict[str, float]:
        """p of each statistic of SBC, not adjusted for their number."""
        counts = np.stack([self.histogram(name) for name in self.names])
        return dict(zip(self.names, _p(counts).tolist(), strict=True))

    @property
    def sbc_adjusted(self) -> dict[str, float]:
        """The same, adjusted by [`holm`][amortlib.calibration.sbc.holm]."""
        raw = self.sbc_p
        return dict(zip(raw, holm(np.array(list(raw.values()))).tolist(), strict=True))

    @property
    def diagnostics(self) -> dict[str, float]:
        """p of what stands beside the gates: TARP, coverage, the data-averaged posterior.

        Each for itself; the last is the smallest over components, adjusted for their number.
        """
        out = {"tarp": float(_p(self.histogram("tarp")[None])[0])}
        if self.coverage is not None:
            out["coverage"] = float(_p(self.histogram("coverage")[None])[0])
        out["average"] = float(holm(_p(self.average)).min())
        return out

    @property
    def rates(self) -> Rates:
        """How often gates of these sizes err: false alarms, and planted faults that they catch."""
        return rates(self.events, int(self.single.sum()), self.draws, self.bins)

    @property
    def gates(self) -> tuple[Verdict, Verdict, Verdict]:
        """The three verdicts."""
        return (
            self._per_event("agreement", self.agreement, "posterior sd", strict=False),
            self._per_event("adjoint", self.adjoint, "relative error", strict=True),
            self._sbc(),
        )

    @property
    def several_gates(self) -> tuple[Verdict, ...]:
        """The verdicts on events with several minima: C2ST and the weights of the pieces.

        Empty where there are no such events, where nobody looked, or where no reference was worth
        its draws.
        """
        found = self.several
        if found is None or not found.judged.any():
            return ()
        some, n = found.judged, int(found.judged.sum())
        score, limit = found.c2st[some], self.thresholds["c2st"]
        words = (
            f"a classifier tells q from the reference in {100 * score.mean():.1f}% of cases in the "
            f"mean of {n} events with several minima, at most {100 * limit:g}% allowed; worst "
            f"{100 * score.max():.1f}%, on event {found.event[some][score.argmax()]}"
        )
        first = Verdict(
            "c2st", bool(score.mean() <= limit), float(score.mean()), limit, n, (), words
        )
        # `weight_limit` is for the package's own threshold, and another scales with it.
        times = weight_limit(n) * self.thresholds["weights"] / WEIGHTS
        error, floor = found.weight_error[some], float(found.weight_floor[some].mean())
        words = (
            f"the weights of the pieces are off by {error.mean():.3g} in the mean of {n} events, "
            f"{times:g} times the Monte Carlo floor of {floor:.3g} allowed; worst "
            f"{error.max():.3g}, on event {found.event[some][error.argmax()]}"
        )
        fine = bool(error.mean() <= times * floor)
        return first, Verdict("weights", fine, float(error.mean()), times * floor, n, (), words)

    @property
    def passed(self) -> bool:
        """Whether all three gates hold, and what was asked of events with several minima."""
        return all(gate.passed for gate in (*self.gates, *self.several_gates))

    @property
    def failing(self) -> tuple[int, ...]:
        """Events that fail one of the first two gates, by their number in the batch."""
        agreement, adjoint, _ = self.gates
        return tuple(sorted({*agreement.failing, *adjoint.failing}))

    def _per_event(self, name: str, values: np.ndarray, unit: str, *, strict: bool) -> Verdict:
        limit = self.thresholds[name]
        fine = values < limit if strict else values <= limit
        failing = tuple(int(i) for i in np.flatnonzero(self.single & ~fine))
        judged = values[self.single]
        n = judged.size
        words = (
            f"{n - len(failing)} of {n} single-minimum events within {limit:g} ({unit}); "
            f"median {np.median(judged):.3g}, largest {judged.max():.3g}"
        )
        if not failing:
            # Clopper and Pearson's bound for no failure in n.
            share = 1.0 - 0.05 ** (1.0 / n)
            words += f"; with 95% confidence at most {100 * share:.2g}% of such events fail"
        return Verdict(name, not failing, float(judged.max()), limit, n, failing, words)

    def _sbc(self) -> Verdict:
        limit, adjusted = self.thresholds["sbc"], self.sbc_adjusted
        worst = min(adjusted, key=adjusted.__getitem__)
        failed = [name for name, p in adjusted.items() if p <= limit]
        words = (
            f"{len(self.names)} statistics over {self.events} events, {self.draws} draws, "
            f"{self.bins} bins; smallest adjusted p {adjusted[worst]:.2g}, of {worst}"
        )
        if failed:
            words += f"; not uniform: {', '.join(failed)}"
        return Verdict("sbc", not failed, adjusted[worst], limit, self.events, (), words)

    # --- words --------------------------------------------------------------------------------

    def __str__(self) -> str:
        """The report in plain words."""
        verdict = "all three gates hold" if self.passed else "NOT every gate holds"
        lines = [f"Gates on {self.events} events: {verdict}."]
        for gate in (*self.gates, *self.several_gates):
            lines.append(f"  {gate.name:10s} {'pass' if gate.passed else 'FAIL'}  {gate.words}.")
        if self.failing:
            some = ", ".join(map(str, self.failing[:10]))
            more = "" if len(self.failing) <= 10 else f" and {len(self.failing) - 10} more"
            lines.append(f"  Failing events: {some}{more}.")
        lines += [f"  {line}" for line in self._words_on_several()]
        if not self.sure.all():
            lines.append(
                f"  On {int((~self.sure).sum())} events the oracle is not sure that it found "
                "every minimum that counts."
            )
        if self.excluded:
            lines.append(f"  {self.excluded} more events were left out: no oracle's answer.")
        lines.append(f"  {self.rates.words}")
        if self.events < EVENTS:
            lines.append(
                f"  With fewer than {EVENTS} events a small fault may pass SBC: "
                "the power of the gates is stated for that many."
            )
        lines.append("Beside the gates:")
        words = {
            "tarp": "distance to random points (TARP)",
            "coverage": "expected coverage",
            "average": "data-averaged posterior against the prior",
        }
        for name, p in self.diagnostics.items():
            lines.append(f"  {words[name]}: p = {p:.2g}.")
        if self.kl is None or self.ess is None or self.khat is None:
            lines.append("  q has no exact density: no coverage, KL, ESS or k-hat.")
        else:
            low, high = np.quantile(self.kl, [0.5, 0.95])
            lines.append(
                f"  KL(p || q): mean {self.kl.mean():.3g}, median {low:.3g}, 95% below "
                f"{high:.3g} nats, from {self.importance_draws} draws of q."
            )
            low, mid = np.quantile(self.ess, [0.05, 0.5])
            lines.append(
                f"  ESS/N: mean {self.ess.mean():.3g}, median {mid:.3g}, 95% above {low:.3g}."
            )
            lines.append(
                f"  Pareto k-hat: mean {self.khat.mean():.2f}, 95% below "
                f"{np.quantile(self.khat, 0.95):.2f}, above {KHAT:g} on "
                f"{100 * np.mean(self.khat > KHAT):.1f}% of events."
            )
        lines.append(f"Weights {self.head[:12]}, problem {self.problem[:12]}.")
        return "\n".join(lines)

    def _words_on_several(self) -> list[str]:
        several, found = ~self.single, self.several
        if not several.any():
            return ["Every event has a single minimum."]
        lines = [
            f"{int(several.sum())} events have several minima, where the first two gates have no "
            f"right answer: the mode distance is {np.median(self.agreement[several]):.3g} in the "
            f"median, the Jacobian's error {np.median(self.adjoint[several]):.3g}."
        ]
        if found is None:
            return [*lines, "None of them was held against a reference: they count in SBC alone."]
        lines.append(
            f"The first {found.event.size} of them were held against a reference, worth "
            f"{found.reference.min():.0f} to {found.reference.max():.0f} draws of the posterior."
        )
        lost = int((~found.judged).sum())
        if lost:
            lines.append(
                f"On {lost} of these it is worth fewer than {found.draws}, and nothing is judged."
            )
        if found.kl is not None:
            low, high = np.median(found.kl), found.kl.max()
            lines.append(f"KL(p || q) there: median {low:.3g}, largest {high:.3g} nats.")
        return lines

    # --- files --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it: what was measured, and the verdicts for programs."""
        data: dict[str, Any] = {"format": "amortlib gate report", "version": self.FORMAT}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value = _listed(value)
            if isinstance(value, SeveralMinima):
                value = {
                    part.name: _listed(entry) if isinstance(entry, np.ndarray) else entry
                    for part in dataclasses.fields(value)
                    for entry in [getattr(value, part.name)]
                }
            data[field.name] = list(value) if isinstance(value, tuple) else value
        data["passed"] = self.passed
        data["gates"] = [
            {**dataclasses.asdict(gate), "value": _listed(np.array(gate.value))}
            for gate in (*self.gates, *self.several_gates)
        ]
        data["rates"] = dataclasses.asdict(self.rates)
        data["sbc_p"], data["diagnostics"] = self.sbc_p, self.diagnostics
        return data

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """The report as JSON, written to `path` where one is given."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            target = Path(path)
            temporary = target.with_name(target.name + ".part")
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, target)
        return text

    @classmethod
    def from_json(cls, text: str) -> "GateReport":
        """Read what `to_json` returned.

        Raises:
            GateError: on text that is no report, is of another version, lacks something, or whose
                verdict is not the one that its numbers give.
        """
        try:
            data = json.loads(text)
        except ValueError as err:
            raise GateError(f"expected a gate report in JSON: {err}") from err
        if not isinstance(data, dict) or data.get("format") != "amortlib gate report":
            raise GateError("expected a report written by GateReport.to_json")
        if data.get("version") == 1:
            data = {**data, "several": None}
        elif data.get("version") != cls.FORMAT:
            raise GateError(
                f"expected version {cls.FORMAT} of the report, got {data.get('version')}; "
                "run the gates again with this release"
            )
        given: dict[str, Any] = {}
        try:
            for field in dataclasses.fields(cls):
                given[field.name] = _read(field.name, data[field.name])
            report = cls(**given)
        except (KeyError, TypeError, ValueError) as err:
            raise GateError(f"expected a whole report: {type(err).__name__}: {err}") from err
        if data.get("passed") is not report.passed:
            raise GateError(
                f"the report says passed={data.get('passed')}, its numbers say {report.passed}: "
                "it was changed after it was written"
            )
        return report


_TYPES: dict[str, type] = {
    **dict.fromkeys(("single", "sure"), bool),
    **dict.fromkeys(("ranks", "tarp", "coverage", "average", "event", "minima"), int),
    **dict.fromkeys(("agreement", "adjoint", "kl", "ess", "khat"), float),
    **dict.fromkeys(("reference", "c2st", "weight_error", "weight_floor"), float),
}
"""Of the arrays, those of events with several minima among them."""


def _read(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name == "names":
        return tuple(value)
    if name == "several":
        return SeveralMinima(**{part: _read(part, entry) for part, entry in value.items()})
    return np.array(value, _TYPES[name]) if name in _TYPES else value


def _p(counts: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(uniformity_p(jax.numpy.asarray(counts)))


def _listed(values: np.ndarray) -> Any:
    """Lists and numbers; infinite ones in words, which `float` reads back."""
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        return (
            [float(v) if math.isfinite(v) else str(float(v)) for v in values.reshape(-1)]
            if values.ndim
            else str(float(values))
        )
    return values.tolist()
