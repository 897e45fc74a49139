/**
 * What the JavaScript makes of events that amortlib answered: the largest relative differences.
 *
 * A difference is divided by the largest number of the event's own answer, so that a component
 * that happens to be near zero is held to the scale of its neighbours.
 */

import { loadFlow } from "../../book/_kit/js/flow.mjs";
import { kl } from "../../book/_kit/js/gaussian.mjs";
import { exactPosterior, loadPosterior, priorOf } from "../../book/_kit/js/posterior.mjs";
import { loadScore } from "../../book/_kit/js/score.mjs";
import { readWeights } from "../../book/_kit/js/weights.mjs";

/** Row `i` of a tensor `(N, k)`. */
const row = (tensor, i) => {
  const k = tensor.shape[1];
  return tensor.data.subarray(i * k, (i + 1) * k);
};

/** Largest difference of two arrays over the largest entry of the second, or over `floor`. */
export function difference(got, wanted, floor = 0) {
  const scale = Math.max(floor, ...wanted.map(Math.abs));
  const worst = Math.max(...wanted.map((value, i) => Math.abs(got[i] - value)));
  if (got.length !== wanted.length || Number.isNaN(worst)) return Infinity;
  return scale === 0 ? worst : worst / scale;
}

/** Run every event; returns the worst difference of each quantity. */
function parity(weights, vectors) {
  const posterior = loadPosterior(weights);
  const { tensors } = readWeights(vectors);
  const prior = "['prior'].loc" in tensors ? priorOf(tensors, "['prior']") : null;
  const get = (name) => tensors[`['${name}']`];
  const worst = { events: 0 };
  const note = (name, got, wanted, floor) => {
    worst[name] = Math.max(worst[name] ?? 0, difference(got, wanted, floor));
  };
  for (let i = 0; i < get("y").shape[0]; i++) {
    const event = { y: row(get("y"), i), mask: Array.from(row(get("mask"), i), Boolean), sd: row(get("sd"), i) };
    const q = posterior(event);
    note("mean", q.mean(), row(get("mean"), i));
    note("sd", q.sd(), row(get("spread"), i));
    note("sample", q.colour(row(get("z"), i)), row(get("sample"), i));
    // In nats: sums of one term of order one a component, which may cancel to nothing.
    note("log_prob", [q.logProb(row(get("x"), i))], row(get("log_prob"), i), q.dim);
    if (prior) {
      const exact = exactPosterior(prior, event);
      note("exact mean", exact.mean(), row(get("exact_mean"), i));
      note("exact sd", exact.sd(), row(get("exact_sd"), i));
      note("kl", [kl(exact, q)], row(get("kl"), i), q.dim);
    }
    worst.events += 1;
  }
  return worst;
}

/** The same for flows and scores: draws from given noise and paths, weights, a flow's log-density. */
function mixtureParity(weights, vectors) {
  const kind = readWeights(weights).settings.head;
  const posterior = { flow: loadFlow, score: loadScore }[kind](weights);
  const { tensors } = readWeights(vectors);
  const get = (name) => tensors[`['${name}']`];
  const worst = { events: 0 };
  const note = (name, got, wanted, floor) => {
    worst[name] = Math.max(worst[name] ?? 0, difference(got, wanted, floor));
  };
  for (let i = 0; i < get("y").shape[0]; i++) {
    const q = posterior({ y: row(get("y"), i), mask: Array.from(row(get("mask"), i), Boolean) });
    const parts = q.components ?? q.frames;
    note("log_weight", parts.map((part) => part.logWeight), row(get("log_weight"), i), 1);
    const z = row(get("z"), i);
    parts.forEach((_, k) => note("sample", q.fromNoise(z, k), row(get(`sample_${k}`), i)));
    if (kind === "score") {
      const [w, area] = [row(get("w"), i), row(get("area"), i)];
      const path = { steps: w.length / q.dim, w, area };
      parts.forEach((_, k) => note("by_sde", q.fromPath(z, k, path), row(get(`by_sde_${k}`), i)));
    }
    if (kind === "flow") note("log_prob", [q.logProb(row(get("x"), i))], row(get("log_prob"), i), q.dim);
    worst.events += 1;
  }
  return worst;
}

/** Whichever of the two the weights are for. */
export function compare(weights, vectors) {
  const { head } = readWeights(weights).settings;
  return (["flow", "score"].includes(head) ? mixtureParity : parity)(weights, vectors);
}
