/** Windows of Lorenz-63 that a page was given: events with gaps, their energies, and their minima. */

import { WindowEnergy, lorenzWindow } from "../lorenz.mjs";
import { gap } from "../posterior.mjs";
import { readWeights } from "../weights.mjs";
import { kernelLegend } from "./kernel.mjs";

/** Nats: a minimum higher than this above the lowest is no rival. */
const RIVAL = 20;

/**
 * States that a kernel answers with: their paths of x beside the page's own, and their name in the
 * legend. Returns what draws them.
 */
export function kernelAnswer(stage, plot, { times, xOf }, entries) {
  const { truth } = stage.get("roles");
  const answer = kernelLegend(stage, entries, [truth, "dash"]);
  const t = Array.from({ length: times }, (_, k) => k);
  return () => {
    const { states = [] } = answer();
    const ys = states.flatMap((state) => [...xOf(state), NaN]);
    plot.line("kernel", states.flatMap(() => [...t, NaN]), ys, { color: truth, dash: "2 4", width: 2.5 });
  };
}

/** From the settings of a window, and what `packed_events` packed: background, events, starts. */
export function windowEvents(settings, bytes) {
  const { tensors } = readWeights(bytes);
  const window = lorenzWindow(settings);
  const prior = { loc: tensors["['loc']"].data, chol: tensors["['chol']"].data };
  const row = (name, i, size) => tensors[`['${name}']`].data.subarray(i * size, (i + 1) * size);
  const starts = Array.from({ length: tensors["['starts']"].shape[0] }, (_, i) => row("starts", i, 3));
  const { times, width } = window;
  const firstComponent = lorenzWindow({ ...settings, sees: { components: [0], stride: settings.sees.stride } });
  return {
    times,
    window,
    prior,
    starts,
    truth: (event) => row("truth", event, 3),
    /** x of a state at the observed times, whatever the window sees of it. */
    xOf: (x0) => Array.from(firstComponent.path(x0)),
    energy({ start, length, event }) {
      const seen = gap(times, start, length);
      const mask = Array.from({ length: times * width }, (_, i) => seen[Math.floor(i / width)]);
      const sd = new Float64Array(times * width).fill(settings.noise);
      return new WindowEnergy(window, prior, { y: row("y", event, times * width), mask, sd });
    },
    /** Minima within reach of the lowest, with their curvature, in pieces. */
    *survey(energy) {
      const found = yield* energy.search(starts);
      return found.filter(({ cost }) => cost <= found[0].cost + RIVAL).map(({ v, cost }) => ({ cost, ...energy.bowlAt(v) }));
    },
  };
}
