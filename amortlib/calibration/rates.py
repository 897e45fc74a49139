"""What the gates' own errors are: how often an exact posterior fails, how often a fault passes.

Measured by `python -m benchmarks.gates` and `python -m benchmarks.alarms`, whose records in
`book/data` a test holds these figures against.
"""

import dataclasses

__all__ = ["FALSE_ALARM", "MEASURED_ALARMS", "POWER", "Rates", "rates"]

FALSE_ALARM = 0.0125
"""An exact posterior fails the gates in at most this share of samples: the stated rate.

Agreement and adjoint calibration have nothing random in them that an exact posterior could fail by.
Simulation-based calibration asks for an adjusted p above 0.01, which by the exact law of the
multinomial and Bonferroni's bound is missed in at most 1.01% of samples of 1,000 events with five
statistics in 10 bins (Pearson's chi-square law is only close: 1.07% with 60 events). The rest of it
is room for what is not known better than by measurement, see `MEASURED_ALARMS`."""

MEASURED_ALARMS = (155, 16_000)
"""Alarms, and samples, of an exact posterior of a path of four times: 0.97%, and with 95%
confidence at most 1.11%. The first 4,000 of them had 53, which is 1.3% (p = 0.05 against 1%, two
sided); 12,000 fresh ones, made to find out whether that was luck, had 102, which is 0.85%."""

_SETTINGS = (99, 10)
"""Draws and bins for which the power is known."""

POWER: dict[str, dict[int, float]] = {
    "variance x 0.8": {250: 0.758, 500: 0.990, 1000: 1.0, 2000: 1.0},
    "variance x 1.25": {250: 0.634, 500: 0.984, 1000: 1.0, 2000: 1.0},
    "mean + 0.5 sd": {250: 0.998, 500: 1.0, 1000: 1.0, 2000: 1.0},
    "no correlations": {250: 0.952, 500: 1.0, 1000: 1.0, 2000: 1.0},
    "prior": {250: 1.0, 500: 1.0, 1000: 1.0, 2000: 1.0},
    "one piece missing": {250: 1.0, 500: 1.0, 1000: 1.0, 2000: 1.0},
}
"""Share of 500 samples in which simulation-based calibration catches a planted fault, by events."""

JACOBIAN: tuple[str, ...] = (
    "Jacobian x 1.1",
    "Jacobian, one row's sign",
    "Jacobian x 1.1, 1 in 100",
)
"""Faults that adjoint calibration catches. The first two it sees on every event with a single
minimum; the last it misses where it strikes none of them."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """Error rates of the gates at the sizes of one report.

    Attributes:
        false_alarm: an exact posterior fails in at most this share of samples.
        power: share of samples in which each planted fault is caught, as measured with at most as
            many events as there were; `None` where that was never measured for so few events, or
            for other numbers of draws and bins.
        events: how many events the powers were measured with, `None` likewise.
    """

    false_alarm: float
    power: dict[str, float] | None
    events: int | None

    @property
    def words(self) -> str:
        """The same in a sentence."""
        alarms, samples = MEASURED_ALARMS
        text = (
            f"An exact posterior fails in at most {100 * self.false_alarm:g}% of samples "
            f"(measured: {alarms} of {samples:,})"
        )
        if self.power is None:
            return f"{text}; what faults are caught at these sizes was not measured."
        least = min(self.power, key=self.power.__getitem__)
        return (
            f"{text}; of {len(self.power)} planted faults each is caught in at least "
            f"{100 * self.power[least]:.1f}% of samples (of {self.events} events; the hardest: "
            f"{least})."
        )


def rates(events: int, single: int, draws: int, bins: int) -> Rates:
    """The rates at some sizes.

    Args:
        events: that are ranked.
        single: that the first two gates judge.
        draws: L.
        bins: of the rank histograms.
    """
    known = [n for n in next(iter(POWER.values())) if n <= events]
    if not known or (draws, bins) != _SETTINGS:
        return Rates(FALSE_ALARM, None, None)
    at = max(known)
    power = {name: by_events[at] for name, by_events in POWER.items()}
    everywhere, also, rare = JACOBIAN
    power |= {everywhere: 1.0, also: 1.0, rare: 1.0 - 0.99**single}
    return Rates(FALSE_ALARM, power, at)
