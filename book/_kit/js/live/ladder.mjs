/** The way from network to solver: k damped steps on J from a head's guess, and the three gates. */

import { solveLower, solveUpper } from "../gaussian.mjs";
import { covarianceIn, fromBowl } from "../lorenz.mjs";
import { normals, uniforms } from "../noise.mjs";
import { loadPosterior } from "../posterior.mjs";
import { gapHandles, placeControls, placeOf } from "./gap_handles.mjs";
import { kernelAnswer, windowEvents } from "./window_events.mjs";

const MOST = 6;
const DRAWS = 49;
const BINS = 10;

/** Above this the sum of squares over ten bins has p < 1%. */
const CRITICAL = 21.666;

const D = 3;

/** Largest singular value of a matrix of three rows: power iteration on A A^T. */
export function norm2(a) {
  const n = a.length / D;
  const square = new Float64Array(9);
  for (let i = 0; i < D; i++) for (let j = 0; j < D; j++) for (let k = 0; k < n; k++) square[i * D + j] += a[i * n + k] * a[j * n + k];
  let z = [1, 0.9, 0.8];
  let size = 0;
  for (let k = 0; k < 200; k++) {
    const next = [0, 1, 2].map((i) => square[i * D] * z[0] + square[i * D + 1] * z[1] + square[i * D + 2] * z[2]);
    size = Math.hypot(...next);
    if (size === 0) return 0;
    z = next.map((x) => x / size);
  }
  return Math.sqrt(size);
}

/** norm2(got - want) / norm2(want) of Jacobians, three rows each; the mirror of `jacobian_error`. */
export function jacobianError(got, want) {
  const [size, error] = [norm2(want), norm2(got.map((x, i) => x - want[i]))];
  if (size > 0) return error / size;
  return error > 0 ? Infinity : 0;
}

/** d state / dy by the implicit function theorem at a bowl. */
export function implicitJacobian(energy, { v, low }) {
  const { jacobian } = energy.window.tangent(energy.state(v), energy.directions);
  const { mask, sd } = energy.event;
  const n = mask.length;
  const out = new Float64Array(D * n);
  for (let i = 0; i < n; i++) {
    if (!mask[i]) continue;
    const column = Float64Array.from([0, 1, 2], (j) => jacobian[i * D + j] / sd[i] ** 2);
    energy.scaled(solveUpper(low, solveLower(low, column, D), D)).forEach((x, r) => (out[r * n + i] = x));
  }
  return out;
}

/** d state / dy of anything that maps an event's `y` to a state, by central differences. */
export function differenceJacobian(event, map, h = 1e-4) {
  const n = event.mask.length;
  const out = new Float64Array(D * n);
  for (let i = 0; i < n; i++) {
    if (!event.mask[i]) continue;
    const ends = [h, -h].map((step) => {
      const y = Float64Array.from(event.y);
      y[i] += step;
      return map({ ...event, y });
    });
    for (let r = 0; r < D; r++) out[r * n + i] = (ends[0][r] - ends[1][r]) / (2 * h);
  }
  return out;
}

/** All that the widget computes. */
export function ladderNumbers(settings, bytes, head) {
  const numbers = windowEvents(settings, bytes);
  const guess = loadPosterior(head);
  const starting = (energy, event) => energy.control(guess(event).mean());

  return {
    ...numbers,
    /** The lowest minimum of an event, with its curvature and Jacobian, in pieces. */
    *oracle(energy) {
      const [lowest] = yield* energy.search(numbers.starts);
      const curvature = energy.bowlAt(lowest.v);
      const root = energy.rootOf(curvature);
      return {
        x: energy.state(lowest.v),
        cost: lowest.cost,
        spread: [0, 1, 2].map((i) => Math.sqrt(covarianceIn(root, i, i))),
        jacobian: implicitJacobian(energy, curvature),
      };
    },
    /** The looks of k steps from the guess. */
    steps: (energy, k) => energy.refine(starting(energy, energy.event), k),
    /** Distance from the oracle in standard deviations, the first gate's statistic. */
    distance: (x, { x: best, spread }) => Math.max(...spread.map((sd, i) => Math.abs(x[i] - best[i]) / sd)),
    /** Relative error of the Jacobian of the answer after k steps, the second gate's. */
    adjoint(energy, k, v, oracle, derivative) {
      if (k === 0) return jacobianError(differenceJacobian(energy.event, (event) => guess(event).mean()), oracle.jacobian);
      if (derivative === "implicit") return jacobianError(implicitJacobian(energy, energy.bowlAt(v)), oracle.jacobian);
      const unrolled = (event) => {
        const other = Object.assign(Object.create(Object.getPrototypeOf(energy)), energy, { event });
        const looks = other.refine(starting(other, event), k);
        return other.state(looks[looks.length - 1].v);
      };
      return jacobianError(differenceJacobian(energy.event, unrolled), oracle.jacobian);
    },
    /** Rank of J at the truth among draws of the answer: the head's own, or Laplace's at its end. */
    rank(energy, k, v, truth, noise, uniform) {
      const answer = k === 0 ? guess(energy.event) : energy.bowlAt(v);
      const here = energy.cost(energy.control(truth));
      let below = 0;
      for (let i = 0; i < DRAWS; i++) {
        const z = noise.subarray(D * i, D * i + D);
        const draw = k === 0 ? energy.control(answer.colour(z)) : fromBowl(answer, z, 1);
        const there = energy.cost(draw);
        if (there < here || (there === here && uniform() < 0.5)) below++;
      }
      return below;
    },
  };
}

const percent = (share) => `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)}%`;

export function ladder(stage) {
  const roles = stage.get("roles");
  const numbers = ladderNumbers(stage.get("window"), stage.get("data"), stage.get("guess"));
  const { times, window } = numbers;
  const events = stage.get("events");
  stage.slider({ name: "steps", label: "steps, k", min: 0, max: MOST });
  placeControls(stage, times);
  stage.choice({ name: "derivative", label: "derivative", options: { implicit: "implicit", unrolled: "unrolled" } });

  const path = stage.plot({
    label: "Forecasts of x over the window from the answers after 0 to k steps, and from the oracle's minimum",
    x: { label: "observation", from: -0.5, to: times - 0.5 },
    y: { label: "x", from: -24, to: 24 },
    height: 200,
    wide: true,
  });
  const fall = stage.plot({
    label: "J above the oracle's minimum after each step, on a logarithmic axis",
    x: { label: "steps, k", from: 0, to: MOST },
    y: { label: "J − J*, nats", from: 1e-8, to: 1e3, log: true },
    height: 220,
    left: 58,
  });
  const ranks = stage.plot({
    label: `Rank histogram of J over ${events} windows, with the band of an exact posterior`,
    x: { label: "rank of J at the truth", from: 0, to: 1 },
    y: { label: "windows", from: 0, to: events / 2 },
    height: 220,
    xTicks: [[0, "0"], [0.5, "L/2"], [1, "L"]],
  });
  const kernel = kernelAnswer(stage, path, numbers, [
    ["gap: drag it, or its edges", roles.gap, "box"],
    ["after k steps", roles.amortized, "line"],
    ["the guess, k = 0", roles.prior, "dash"],
    ["oracle", roles.exact, "dash"],
    ["observations", roles.obs, "dot"],
  ]);
  gapHandles(stage, path, times);
  const t = Array.from({ length: times }, (_, k) => k);
  const first = (clean) => t.map((k) => clean[k * window.width]);
  const noise = normals(9, D * DRAWS * events);
  const edges = Array.from({ length: BINS + 1 }, (_, i) => i / BINS);
  const half = 2.576 * Math.sqrt((events / BINS) * (1 - 1 / BINS));
  // Oracles of the last gap: steps and derivatives are changed more often than it.
  let kept = { key: "", oracles: [] };

  stage.watch("steps", "start", "length", "event", "derivative", "overlay");
  return function* () {
    const [k, derivative] = [stage.get("steps"), stage.get("derivative")];
    const { event, ...gap } = placeOf(stage);
    const key = `${gap.start}/${gap.length}`;
    if (key !== kept.key) kept = { key, oracles: new Array(events) };
    const { oracles } = kept;
    const energyOf = (event) => numbers.energy({ ...gap, event });
    const oracleOf = function* (event, energy) {
      return (oracles[event] ??= yield* numbers.oracle(energy));
    };

    const energy = energyOf(event);
    const oracle = yield* oracleOf(event, energy);
    yield;
    const looks = numbers.steps(energy, k);
    const states = looks.map(({ v }) => energy.state(v));
    const end = states[states.length - 1];
    const { y, mask } = energy.event;

    yield;
    kernel();
    path.line("oracle", t, first(window.path(oracle.x)), { color: roles.exact, width: 3.5, dash: "7 4" });
    path.line("guess", t, first(window.path(states[0])), { color: roles.prior, dash: "3 3" });
    path.line("now", t, first(window.path(end)), { color: roles.amortized });
    path.dots("obs", t, t.map((i) => (mask[i * window.width] ? y[i * window.width] : NaN)), { color: roles.obs, radius: 4 });
    const above = looks.map(({ cost }) => Math.min(Math.max(cost - oracle.cost, 1.2e-8), 9e2));
    const counts = looks.map((_, i) => i);
    fall.line("way", counts, above, { color: roles.amortized });
    fall.dots("steps", counts, above, { color: roles.amortized, radius: 4 });

    yield;
    const near = numbers.distance(end, oracle);
    const slope = numbers.adjoint(energy, k, looks[looks.length - 1].v, oracle, derivative);
    const said =
      `After ${k} ${k === 1 ? "step" : "steps"} this window's answer is ${near.toFixed(2)} sd from the oracle's ` +
      `(gate: 1), and its Jacobian is off by ${slope > 9.99 ? "more than 999" : (100 * slope).toFixed(1)}% (gate: 5%).`;

    const tally = { done: 0, near: 0, slope: 0, counts: new Array(BINS).fill(0) };
    const uniform = uniforms(10);
    const draw = () => {
      ranks.range({ y: { to: Math.max(events / 4, 1.1 * Math.max(...tally.counts)) } });
      const middle = tally.done / BINS;
      const width = half * Math.sqrt(tally.done / events);
      ranks.band("exact", [0, 1], [middle - width, middle - width], [middle + width, middle + width], { color: roles.gap, opacity: 1 });
      ranks.bars("counts", edges, tally.counts, { color: roles.amortized, opacity: 0.85, gap: 2 });
    };
    stage.later(
      function* () {
        for (let i = 0; i < events; i++) {
          const here = energyOf(i);
          const best = yield* oracleOf(i, here);
          const way = numbers.steps(here, k);
          const { v } = way[way.length - 1];
          if (numbers.distance(here.state(v), best) <= 1) tally.near++;
          yield;
          if (numbers.adjoint(here, k, v, best, derivative) < 0.05) tally.slope++;
          yield;
          const rank = numbers.rank(here, k, v, numbers.truth(i), noise.subarray(i * D * DRAWS), uniform);
          tally.counts[Math.floor((rank * BINS) / (DRAWS + 1))]++;
          tally.done++;
          yield;
        }
      },
      (done) => {
        draw();
        if (!done) return;
        const chi = tally.counts.reduce((sum, n) => sum + (n - events / BINS) ** 2, 0) / (events / BINS);
        stage.say(
          `${said} Of ${events} windows ${percent(tally.near / events)} pass agreement and ${percent(tally.slope / events)} ` +
            `the adjoint gate; the ranks of J are ${chi < CRITICAL ? "as flat as chance makes them" : "not flat"}.`,
        );
      },
      draw,
    );
    return said;
  };
}
