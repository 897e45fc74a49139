/**
 * The score head: a network that takes noise off, and the flow ODE that carries noise to states.
 *
 * The mirror of `amortlib.heads.score` with EDM's noise levels and fixed steps of Heun's method.
 * Karras, Aittala, Aila and Laine (2022), arXiv:2206.00364, algorithm 1 and table 1.
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

/** The posterior of one event: a mixture of densities, each given by its score. */
export class ScorePosterior {
  /** `frames`: `{ frame, logWeight }`; `predict(u, sigma, k)` is the noise. */
  constructor(noise, frames, predict) {
    this.noise = noise;
    this.frames = frames;
    this.predict = predict;
    this.dim = frames[0].frame.dim;
  }

  /** Where the flow ODE takes standard normal `z` of component k, by `steps` steps of Heun's. */
  fromNoise(z, k, steps = 24) {
    const top = this.noise.sigma_max;
    const origin = new Float64Array(this.dim);
    const spread = Math.sqrt(1 + top ** 2);
    let u = this.predict(origin, top, k).map((n, i) => -top * n + spread * z[i]);
    for (let i = 0; i < steps; i++) {
      const [h, here, there] = [1 / steps, level(this.noise, i / steps), level(this.noise, (i + 1) / steps)];
      const slope = this.predict(u, here[0], k).map((n) => here[1] * n);
      const ahead = u.map((value, j) => value + h * slope[j]);
      const next = this.predict(ahead, there[0], k).map((n) => there[1] * n);
      u = u.map((value, j) => value + 0.5 * h * (slope[j] + next[j]));
    }
    return this.frames[k].frame.colour(u);
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
