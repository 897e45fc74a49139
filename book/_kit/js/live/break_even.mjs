/** When amortizing pays: what N events cost by a solver, and by a head that was trained first. */

const COMMA = /\B(?=(\d{3})+$)/g;

/** A whole number with its thousands apart. */
export const grouped = (n) => String(Math.round(n)).replace(COMMA, ",");

/** Seconds, in the unit that reads best. */
export function duration(seconds) {
  for (const [unit, size] of [["days", 86400], ["h", 3600], ["min", 60], ["s", 1], ["ms", 1e-3]]) {
    if (seconds >= size * (unit === "days" ? 2 : 1)) return `${short(seconds / size)} ${unit}`;
  }
  return `${short(seconds * 1e6)} µs`;
}

const short = (x) => (x >= 99.5 ? grouped(x) : String(Number(x.toPrecision(2))));

/**
 * The break-even number; infinite where it never pays. `share` of the events go to the solver after
 * all. Costs in seconds.
 */
export function breakEvenNumber({ training, solver, head, share }) {
  const saved = solver - head - share * solver;
  return saved > 0 ? training / saved : Infinity;
}

export function breakEven(stage) {
  const roles = stage.get("roles");
  const ten = (name) => 10 ** stage.get(name);
  const log = (name, label, min, max, said) => stage.slider({ name, label, min, max, step: 0.05, said: (k) => said(10 ** k) });
  log("events", "events", 0, 7, (n) => grouped(Number(n.toPrecision(2))));
  log("solver", "solver, an event", -5, 4, duration);
  log("head", "head, an event", -7, 0, duration);
  log("training", "training", 0, 6, duration);
  stage.slider({ name: "share", label: "back to the solver", min: 0, max: 0.5, step: 0.01, said: (p) => `${Math.round(100 * p)}%` });
  const plot = stage.plot({
    label: "Total seconds against the number of events, for a solver and for a head with its training",
    x: { label: "events", from: 1, to: 1e7, log: true },
    y: { label: "seconds", from: 1e-3, to: 1e8, log: true },
    height: 280,
  });
  stage.legend([
    ["solver", roles.exact, "line"],
    ["head, training included", roles.amortized, "line"],
    ["your number of events", roles.prior, "dash"],
    ["break-even", roles.obs, "dot"],
  ]);
  const grid = Array.from({ length: 71 }, (_, i) => 10 ** (i / 10));
  stage.watch("events", "solver", "head", "training", "share");
  return () => {
    const cost = { training: ten("training"), solver: ten("solver"), head: ten("head"), share: stage.get("share") };
    const bySolver = (n) => n * cost.solver;
    const byHead = (n) => cost.training + n * (cost.head + cost.share * cost.solver);
    const n = ten("events");
    const even = breakEvenNumber(cost);
    plot.line("solver", grid, grid.map(bySolver), { color: roles.exact });
    plot.line("head", grid, grid.map(byHead), { color: roles.amortized });
    plot.line("now", [n, n], [plot.y.from, plot.y.to], { color: roles.prior, width: 1.4, dash: "5 3" });
    plot.dots("even", [even], [even < 1e7 ? bySolver(even) : NaN], { color: roles.obs, radius: 5 });
    const [a, b] = [bySolver(n), byHead(n)];
    const many = grouped(Number(n.toPrecision(2)));
    const first = Number.isFinite(even)
      ? `Training has paid from ${grouped(Math.ceil(even))} events on.`
      : "The head costs as much an event as the solver: training never pays.";
    const second = a < b ? `the solver is ahead, by ${duration(b - a)}` : `the head is ahead, by ${duration(a - b)}`;
    return `${first} For ${many} events the solver takes ${duration(a)} and the head ${duration(b)}: ${second}.`;
  };
}
