/** The calibration widget: break a posterior, and see what ranks, coverage and the gate say. */

import { normals } from "../noise.mjs";
import { kernelLegend } from "./kernel.mjs";

const EVENTS = 1000;
const DRAWS = 99;
const BINS = 10;
const CORRELATION = 0.7;
const TRUTH_SEED = 1;
const DRAWS_SEED = 2;

/** Above this the sum of squares over ten bins closes the gate: one of two at 1%, after Holm. */
const CRITICAL = 23.589;

const [truthNoise, drawNoise] = [normals(TRUTH_SEED, 2 * EVENTS), normals(DRAWS_SEED, 2 * EVENTS * DRAWS)];
const LEVELS = Array.from({ length: 21 }, (_, i) => i / 20);

/** J of a pair of numbers, from the exact mean. */
const energy = (a, b) => (0.5 * (a * a - 2 * CORRELATION * a * b + b * b)) / (1 - CORRELATION ** 2);

/** Rank histograms of a component and of J, and coverage, in pieces; the mirror of `fault_picture`. */
export function* faultPicture({ bias, width, correlation }) {
  const [component, ofEnergy] = [new Array(BINS).fill(0), new Array(BINS).fill(0)];
  const covered = new Array(LEVELS.length).fill(0);
  const other = Math.sqrt(1 - correlation ** 2);
  const truthOther = Math.sqrt(1 - CORRELATION ** 2);
  for (let i = 0, k = 0; i < EVENTS; i++) {
    const a = truthNoise[2 * i];
    const truth = energy(a, CORRELATION * a + truthOther * truthNoise[2 * i + 1]);
    let [rank, rankOfEnergy] = [0, 0];
    for (let j = 0; j < DRAWS; j++, k += 2) {
      const z = drawNoise[k];
      const x = bias + width * z;
      if (x < a) rank++;
      if (energy(x, bias + width * (correlation * z + other * drawNoise[k + 1])) < truth) rankOfEnergy++;
    }
    component[Math.floor((rank * BINS) / (DRAWS + 1))]++;
    ofEnergy[Math.floor((rankOfEnergy * BINS) / (DRAWS + 1))]++;
    // The smallest central interval of the draws that holds the truth.
    const needed = Math.abs((2 * rank + 1) / (DRAWS + 1) - 1);
    LEVELS.forEach((level, l) => (covered[l] += needed <= level ? 1 : 0));
    if (i % 250 === 249) yield;
  }
  return { component, energy: ofEnergy, coverage: covered.map((n) => n / EVENTS) };
}

/** A word for a rank histogram; the mirror of `shape_of`. */
export function shapeOf(counts) {
  const total = (part) => part.reduce((sum, count) => sum + count, 0);
  const n = total(counts);
  const fifth = Math.floor(counts.length / 5);
  const [left, right] = [total(counts.slice(0, fifth)) / n, total(counts.slice(-fifth)) / n];
  const part = fifth / counts.length;
  const tilt = (right - left) / Math.sqrt((2 * part) / n);
  const ends = (left + right - 2 * part) / Math.sqrt((2 * part * (1 - 2 * part)) / n);
  if (Math.abs(tilt) > 3 && Math.abs(tilt) > Math.abs(ends)) return tilt > 0 ? "sloped to the right" : "sloped to the left";
  if (ends > 3) return "U-shaped";
  if (ends < -3) return "humped";
  const [low, high] = band(n, counts.length, 3.5);
  return low <= Math.min(...counts) && Math.max(...counts) <= high ? "flat" : "uneven";
}

/** Where most counts of one bin lie for uniform ranks. */
function band(n, bins, z = 2.576) {
  const half = z * Math.sqrt((n / bins) * (1 - 1 / bins));
  return [n / bins - half, n / bins + half];
}

/** Whether the simulation-based calibration gate stays open: both statistics uniform. */
export function passes({ component, energy: ofEnergy }) {
  const chi = (counts) => counts.reduce((sum, count) => sum + (count - EVENTS / BINS) ** 2, 0) / (EVENTS / BINS);
  return Math.max(chi(component), chi(ofEnergy)) < CRITICAL;
}

/** The picture in words; the same as `FaultPicture.words`. */
export function faultWords(found) {
  const at95 = (100 * found.coverage[19]).toFixed(0);
  return (
    `The histogram of the component is ${shapeOf(found.component)}, that of the energy ` +
    `${shapeOf(found.energy)}. Of intervals said to hold 95% of the truths, ${at95}% do. ` +
    `The gate ${passes(found) ? "stays open" : "closes"}.`
  );
}

export function faults(stage) {
  const roles = stage.get("roles");
  const said = (value) => value.toFixed(2).replace("-", "−");
  stage.slider({ name: "bias", label: "bias (sd)", min: -1, max: 1, step: 0.05, said });
  stage.slider({ name: "width", label: "stated sd / exact", min: 0.5, max: 2, step: 0.05, said });
  stage.slider({ name: "correlation", label: "stated correlation", min: -0.95, max: 0.95, step: 0.05, said });

  const edges = Array.from({ length: BINS + 1 }, (_, i) => i / BINS);
  const histogram = (what) =>
    stage.plot({
      label: `Rank histogram of ${what}, with the band of an exact posterior`,
      x: { label: `rank of the truth by ${what}`, from: 0, to: 1 },
      y: { label: "events", from: 0, to: 250 },
      height: 220,
      xTicks: [[0, "0"], [0.5, "L/2"], [1, "L"]],
    });
  const panels = [histogram("a component"), histogram("the energy")];
  const coverage = stage.plot({
    label: "Observed against stated coverage of central intervals",
    x: { label: "stated coverage", from: 0, to: 1 },
    y: { label: "observed", from: 0, to: 1 },
    height: 220,
  });
  const legend = [
    ["the head", roles.amortized, "box"],
    ["99% of an exact posterior's bars", roles.gap, "box"],
    ["exact", roles.exact, "dash"],
  ];
  const kernel = kernelLegend(stage, legend, [roles.truth, "line"]);
  // The outline of a histogram: each count over both edges of its bin.
  const outline = edges.flatMap((edge, i) => (i === 0 || i === BINS ? [edge] : [edge, edge]));
  const [low, high] = band(EVENTS, BINS);
  stage.watch("bias", "width", "correlation", "overlay");
  return function* () {
    const found = yield* faultPicture({ bias: stage.get("bias"), width: stage.get("width"), correlation: stage.get("correlation") });
    const { counts: theirs = [], coverage: covered = [], said = "" } = kernel();
    const most = 1.05 * Math.max(...found.component, ...found.energy, ...theirs.flat());
    // A few heights: an axis that follows every move is hard to read, and slow to draw.
    const top = [250, 400, 600].find((height) => most <= height) ?? 1.05 * EVENTS;
    for (const [i, counts] of [found.component, found.energy].entries()) {
      const panel = panels[i];
      panel.range({ y: { to: top } });
      panel.band("exact", [0, 1], [low, low], [high, high], { color: roles.gap, opacity: 1 });
      panel.bars("ranks", edges, counts, { color: roles.amortized, opacity: 0.85, gap: 2 });
      panel.line("even", [0, 1], [EVENTS / BINS, EVENTS / BINS], { color: roles.exact, width: 1.2, dash: "5 3" });
      const other = theirs[i] ?? [];
      panel.line("kernel", other.length ? outline : [], other.flatMap((n) => [n, n]), { color: roles.truth });
      yield;
    }
    const half = LEVELS.map((level) => 2.576 * Math.sqrt((level * (1 - level)) / EVENTS));
    coverage.band("exact", LEVELS, LEVELS.map((l, i) => l - half[i]), LEVELS.map((l, i) => l + half[i]), { color: roles.gap, opacity: 1 });
    coverage.line("ideal", LEVELS, LEVELS, { color: roles.exact, width: 1.2, dash: "5 3" });
    coverage.line("seen", LEVELS, found.coverage, { color: roles.amortized });
    coverage.line("kernel", LEVELS.slice(0, covered.length), covered, { color: roles.truth });
    return `${faultWords(found)} ${said}`.trim();
  };
}
