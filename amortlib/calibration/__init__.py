"""Gates: posterior agreement, adjoint calibration, simulation-based calibration, and a report.

A head is held against an oracle on fresh events. [`run_gates`][] returns a [`GateReport`][]; each
gate is a small function of one event that can be used alone.
"""

from amortlib.calibration.adjoint import (
    ADJOINT,
    NormBounds,
    Products,
    jacobian_error,
    mode_products,
    norm_bounds,
    oracle_products,
    probe_adjoint,
)
from amortlib.calibration.agreement import AGREEMENT, mode_distance
from amortlib.calibration.coverage import (
    coverage_curve,
    curve_band,
    density_rank,
    prior_pit,
    tarp_rank,
)
from amortlib.calibration.fingerprint import fingerprint, problem_fingerprint
from amortlib.calibration.gates import IMPORTANCE_DRAWS, run_gates
from amortlib.calibration.importance import (
    KHAT,
    ImportanceFigures,
    importance_figures,
    pareto_khat,
)
from amortlib.calibration.rates import FALSE_ALARM, Rates, rates
from amortlib.calibration.report import EVENTS, GateError, GateReport, Verdict
from amortlib.calibration.sbc import (
    ALPHA,
    BINS,
    DRAWS,
    bin_counts,
    holm,
    rank,
    uniform_p,
    uniformity_p,
)
from amortlib.calibration.several import SEVERAL, SeveralMinima, judge_several
from amortlib.calibration.two_sample import c2st

__all__ = [
    "ADJOINT",
    "AGREEMENT",
    "ALPHA",
    "BINS",
    "DRAWS",
    "EVENTS",
    "FALSE_ALARM",
    "IMPORTANCE_DRAWS",
    "KHAT",
    "SEVERAL",
    "GateError",
    "GateReport",
    "ImportanceFigures",
    "NormBounds",
    "Products",
    "Rates",
    "SeveralMinima",
    "Verdict",
    "bin_counts",
    "c2st",
    "coverage_curve",
    "curve_band",
    "density_rank",
    "fingerprint",
    "holm",
    "importance_figures",
    "jacobian_error",
    "judge_several",
    "mode_distance",
    "mode_products",
    "norm_bounds",
    "oracle_products",
    "pareto_khat",
    "prior_pit",
    "probe_adjoint",
    "problem_fingerprint",
    "rank",
    "rates",
    "run_gates",
    "tarp_rank",
    "uniform_p",
    "uniformity_p",
]
