/** When amortizing pays: what N events cost by a solver, and by a head that was trained first. */

import { kernelLegend } from "./kernel.mjs";

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

/** The break-even number, of seconds of training and seconds saved an event; infinite where it never pays. */
export const breakEvenNumber = (training, saved) => (saved > 0 ? training / saved : Infinity);

/**
 * A method that a kernel measured: its break-even point, where that is on the plot, and its words. What
 * was trained is held against the solver, and what was not is a solver, and has the head held against it.
 */
function answerOf(own, { training, solver, head }) {
  const trained = own.training > 0;
  const even = trained ? breakEvenNumber(own.training, solver - own.seconds) : breakEvenNumber(training, own.seconds - head);
  const crossing = even >= 1 && even < 1e7 ? [even, own.training + even * own.seconds] : null;
  const costs = `“${own.label}”: ${duration(own.seconds)} an event${trained ? `, ${duration(own.training)} of training` : ""}`;
  const from = Number.isFinite(even) ? `from ${grouped(Math.ceil(even))} events on` : "at no number of events";
  return { crossing, words: `${costs}; ${trained ? "it is ahead of the solver" : "the head is ahead of it"} ${from}.` };
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
  const legend = [
    ["solver", roles.exact, "line"],
    ["head, training included", roles.amortized, "line"],
    ["your number of events", roles.prior, "dash"],
    ["break-even", roles.obs, "dot"],
  ];
  const kernel = kernelLegend(stage, legend, [roles.truth, "dash"]);
  const grid = Array.from({ length: 71 }, (_, i) => 10 ** (i / 10));
  stage.watch("events", "solver", "head", "training", "share", "overlay");
  return function* () {
    const [training, solver] = [ten("training"), ten("solver")];
    // With the events that go to the solver after all.
    const head = ten("head") + stage.get("share") * solver;
    const bySolver = (n) => n * solver;
    const byHead = (n) => training + n * head;
    const n = ten("events");
    const even = breakEvenNumber(training, solver - head);
    plot.line("solver", grid, grid.map(bySolver), { color: roles.exact });
    plot.line("head", grid, grid.map(byHead), { color: roles.amortized });
    plot.line("now", [n, n], [plot.y.from, plot.y.to], { color: roles.prior, width: 1.4, dash: "5 3" });
    plot.dots("even", [even], [even < 1e7 ? bySolver(even) : NaN], { color: roles.obs, radius: 5 });
    yield;
    const own = kernel();
    const theirs = own.label ? answerOf(own, { training, solver, head }) : null;
    plot.line("kernel", theirs ? grid : [], grid.map((n) => own.training + n * own.seconds), { color: roles.truth, dash: "2 4", width: 2.5 });
    const [at, total] = theirs?.crossing ?? [1, NaN];
    plot.dots("kernel even", [at], [total], { color: roles.obs, radius: 5 });
    const [a, b] = [bySolver(n), byHead(n)];
    const many = grouped(Number(n.toPrecision(2)));
    const first = Number.isFinite(even)
      ? `Training has paid from ${grouped(Math.ceil(even))} events on.`
      : "The head costs as much an event as the solver: training never pays.";
    const second = a < b ? `the solver is ahead, by ${duration(b - a)}` : `the head is ahead, by ${duration(a - b)}`;
    return `${first} For ${many} events the solver takes ${duration(a)} and the head ${duration(b)}: ${second}. ${theirs?.words ?? ""}`.trim();
  };
}
