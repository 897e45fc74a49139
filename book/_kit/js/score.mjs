/**
 * The score head: a network that takes noise off, and the two roads that lead from noise to states.
 *
 * The mirror of `amortlib.heads.score` with EDM's noise levels and fixed steps: of Heun's method for the
 * flow ODE, of ShARK for the reverse SDE. Karras, Aittala, Aila and Laine (2022), arXiv:2206.00364,
 * algorithm 1 and table 1; Foster, dos Reis and Strange (2024), SIAM J. Numer. Anal. 62, equation 6.1.
 */

import { flatContextOf } from "./encoder.mjs";
import { logSumExp } from "./flow.mjs";
import { GaussMarkov } from "./gaussian.mjs";
import { ACTIVATIONS, layerOf, linear } from "./mlp.mjs";
import { WeightFileError, readWeights } from "./weights.mjs";

const FREQUENCIES = 4;

/** sigma(t) and its derivative, t from 0 at the largest level to 1 at the smallest. */
export function level({ sigma_min: low, sigma_max: high, rho }, t) {
  const [from, to] = [high ** (1 / rho), low ** (1 / rho)];
  const root = from + t * (to - from);
  return [root ** rho, rho * root ** (rho - 1) * (to - from)];
}

/** The network's prediction of the noise in `u`, in whitened coordinates. */
function predictor(tensors, { depth, width }) {
  const first = layerOf(tensors, "['score'].first");
  const last = layerOf(tensors, "['score'].last");
  const layers = Array.from({ length: depth - 1 }, (_, i) => layerOf(tensors, `['score'].layers[${i}]`));
  const weight = tensors["['score'].level.weight"];
  const ofLevel = { weight, bias: { data: new Float64Array(weight.shape[0]) } };
  const ofComponent = tensors["['score'].component"].data;
  const silu = (x, shift, from) => x.map((value, i) => ACTIVATIONS.silu(value + shift[from + i]));
  return (told, u, sigma, component) => {
    const at = Math.log(sigma) / 4;
    const waves = Array.from({ length: FREQUENCIES }, (_, j) => (at * Math.PI * 2 ** j) / 2);
    const said = linear(ofLevel, [at, ...waves.map(Math.sin), ...waves.map(Math.cos)]);
    const shift = said.map((value, i) => value + told[i] + ofComponent[component * depth * width + i]);
    const total = sigma ** 2 + 1;
    const scaled = u.map((value) => value / Math.sqrt(total));
    let h = silu(linear(first, scaled), shift, 0);
    layers.forEach((layer, i) => {
      const more = silu(linear(layer, h), shift, (i + 1) * width);
      h = h.map((value, j) => value + more[j]);
    });
    return linear(last, h).map((out, i) => (sigma / total) * u[i] - out / Math.sqrt(total));
  };
}

/**
 * A Brownian path over a time of one in equal steps, from `2 * steps * dim` standard normal numbers.
 *
 * Of each step the increment `w`, of variance h, and the space-time Lévy area `area`, of variance h / 12:
 * the mean over the step of what the path has beyond the straight line through its ends.
 */
export function brownianPath(z, steps) {
  const half = z.length / 2;
  const scale = Math.sqrt(1 / steps);
  return { steps, w: z.slice(0, half).map((x) => scale * x), area: z.slice(half).map((x) => (scale / Math.sqrt(12)) * x) };
}

/** The posterior of one event: a mixture of densities, each given by its score. */
export class ScorePosterior {
  /** `frames`: `{ frame, logWeight }`; `predict(u, sigma, k)` is the noise. */
  constructor(noise, frames, predict) {
    this.noise = noise;
    this.frames = frames;
    this.predict = predict;
    this.dim = frames[0].frame.dim;
  }

  /** A draw at the largest level, in whitened coordinates, from standard normal `z` of component k. */
  start(z, k) {
    const top = this.noise.sigma_max;
    const spread = Math.sqrt(1 + top ** 2);
    return this.predict(new Float64Array(this.dim), top, k).map((n, i) => -top * n + spread * z[i]);
  }

  /** du/dt of the flow ODE. */
  slope(u, t, k) {
    const [sigma, rate] = level(this.noise, t);
    return this.predict(u, sigma, k).map((n) => rate * n);
  }

  /** Step `i` of `steps` of the flow ODE, by Heun's method. */
  odeStep(u, k, i, steps) {
    const h = 1 / steps;
    const here = this.slope(u, i / steps, k);
    const ahead = u.map((value, j) => value + h * here[j]);
    const there = this.slope(ahead, (i + 1) / steps, k);
    return u.map((value, j) => value + 0.5 * h * (here[j] + there[j]));
  }

  /** Step `i` of the reverse SDE along a path of `brownianPath`, by ShARK: the drift is twice the slope. */
  sdeStep(u, k, i, { steps, w, area }) {
    const [h, at] = [1 / steps, i * this.dim];
    const spread = (t) => {
      const [sigma, rate] = level(this.noise, t);
      return Math.sqrt(-2 * sigma * rate);
    };
    const [before, after] = [spread(i / steps), spread((i + 1) / steps)];
    const first = this.slope(u.map((value, j) => value + before * area[at + j]), i / steps, k);
    const ahead = u.map((value, j) => value + (5 / 3) * h * first[j] + before * ((5 / 6) * w[at + j] + area[at + j]));
    const second = this.slope(ahead, (i + 5 / 6) / steps, k);
    return u.map((value, j) => {
      const drift = h * (0.8 * first[j] + 1.2 * second[j]);
      // The second term is what a spread that changes within the step adds.
      return value + drift + before * w[at + j] + 0.5 * (after - before) * (w[at + j] - 2 * area[at + j]);
    });
  }

  /** The state that whitened coordinates of component k stand for. */
  colour(u, k) {
    return this.frames[k].frame.colour(u);
  }

  /** Where the flow ODE takes standard normal `z` of component k, by `steps` steps. */
  fromNoise(z, k, steps = 24) {
    let u = this.start(z, k);
    for (let i = 0; i < steps; i++) u = this.odeStep(u, k, i, steps);
    return this.colour(u, k);
  }

  /** Where the reverse SDE takes standard normal `z` of component k along a path of `brownianPath`. */
  fromPath(z, k, path) {
    let u = this.start(z, k);
    for (let i = 0; i < path.steps; i++) u = this.sdeStep(u, k, i, path);
    return this.colour(u, k);
  }
}

/** The posterior in a file of `pack_score`: a function of an event that returns a `ScorePosterior`. */
export function loadScore(bytes) {
  const { tensors, settings } = readWeights(bytes);
  if (settings.head !== "score") throw new WeightFileError(`expected a score, got ${settings.head}`);
  const encode = flatContextOf(tensors, settings);
  const base = layerOf(tensors, "['base'].linear");
  const centre = tensors["['base'].centre.tree"].data;
  const scale = tensors["['base'].scale.tree"].data;
  const tell = layerOf(tensors, "['score'].context");
  const predict = predictor(tensors, settings);
  const d = centre.length;
  const each = 1 + (d * (d + 3)) / 2;
  return (event) => {
    const context = encode(event);
    const said = linear(base, context);
    const weights = Array.from({ length: settings.components }, (_, k) => said[k * each]);
    const total = logSumExp(weights);
    const frames = weights.map((weight, k) => {
      const out = said.subarray(k * each + 1, (k + 1) * each);
      const low = new Float64Array(d * d);
      let next = 2 * d;
      for (let i = 0; i < d; i++) {
        for (let j = 0; j < i; j++) low[i * d + j] = out[next++] / scale[i];
        low[i * (d + 1)] = Math.exp(out[d + i]) / scale[i];
      }
      const loc = centre.map((c, i) => c + scale[i] * out[i]);
      return { frame: new GaussMarkov(loc, low, new Float64Array(0), d), logWeight: weight - total };
    });
    const told = linear(tell, context);
    return new ScorePosterior(settings.noise, frames, (u, sigma, k) => predict(told, u, sigma, k));
  };
}
