/**
 * Amortized posteriors of the regression heads, and the exact posterior to hold them against.
 *
 * The mirror of `amortlib.encoders` and `amortlib.heads.regression`. An event is
 * `{ y, mask, sd }`, three arrays of one length; `mask[t]` is true where something was observed,
 * and whatever stands at the other entries is never read.
 */

import { flatContextOf } from "./encoder.mjs";
import { GaussMarkov, Gaussian } from "./gaussian.mjs";
import { layerOf, layersOf, linear, mlp } from "./mlp.mjs";
import { WeightFileError, readWeights } from "./weights.mjs";

const LOG_GAIN_BOUND = 10;
const FACTOR_BOUND = 2 ** 15;
const VALUE_BOUND = 2 ** 40;

/** x where it is small beside `bound`, and smoothly no larger than `bound` elsewhere. */
const bounded = (x, bound) => bound * Math.tanh(x / bound);

/** `mask`: true but for `length` entries from `start` on, cut at the end of the record. */
export const gap = (n, start, length) =>
  Array.from({ length: n }, (_, t) => t < start || t >= start + length);

const values = (event) => event.mask.map((seen, t) => (seen ? event.y[t] : 0));
const logSd = (event) => event.mask.map((seen, t) => (seen ? Math.log(event.sd[t]) : 0));
const channelsOf = (event, usesSd) => {
  const channels = [values(event), event.mask.map(Number)];
  return usesSd ? [...channels, logSd(event)] : channels;
};

/** Features of each observation, read with its neighbours: rows of `SiteEncoder`. */
function siteFeatures(net, event) {
  const { layers, radius, activation, usesSd } = net;
  const channels = channelsOf(event, usesSd);
  return Array.from(event.mask, (seen, t) => {
    if (!seen) return null;
    const window = [];
    for (let s = t - radius; s <= t + radius; s++) {
      for (const channel of channels) window.push(channel[s] ?? 0);
    }
    const raw = usesSd ? [channels[0][t], channels[2][t]] : [channels[0][t]];
    return Float64Array.from([...raw, ...mlp(layers, window, { activation })]);
  });
}

/** `FlatEncoder`: values, mask and log error bars, one after the other, through one net. */
function flatContext(net, event) {
  const { layers, activation, usesSd } = net;
  return mlp(layers, channelsOf(event, usesSd).flat(), { activation, final: activation });
}

/** `InformationHead`: each observation adds its message to the prior's natural parameters. */
function informationHead(tensors, prefix, settings) {
  const gain = layerOf(tensors, `${prefix}.gain`);
  const direction = layerOf(tensors, `${prefix}.direction`);
  const value = layerOf(tensors, `${prefix}.value`);
  const site = tensors[`${prefix}.site.tree`].data;
  const prior = priorOf(tensors, `${prefix}.prior.tree`);
  const [diag, lower] = prior.precisionBlocks();
  const { b } = prior;
  const rank = gain.bias.data.length;
  const factorBound = (t, i) =>
    b === 1 ? FACTOR_BOUND : prior.diag[site[t]][i * (b + 1)] / Math.sqrt(16 * b * rank * settings.eps);

  return (features) => {
    const precision = diag.slice();
    const eta = new Float64Array(prior.dim);
    features.forEach((row, t) => {
      if (row === null) return;
      const gains = linear(gain, row).map((x) => Math.exp(bounded(x, LOG_GAIN_BOUND)));
      const v = linear(value, row).map((x, r) => bounded(x * gains[r], VALUE_BOUND));
      const factor = linear(direction, row).map((x, k) =>
        bounded(x * gains[k % rank], factorBound(t, Math.floor(k / rank))),
      );
      for (let i = 0; i < b; i++) {
        for (let r = 0; r < rank; r++) {
          eta[site[t] * b + i] += factor[i * rank + r] * v[r];
          for (let j = 0; j < b; j++) {
            precision[(site[t] * b + i) * b + j] += factor[i * rank + r] * factor[j * rank + r];
          }
        }
      }
    });
    // The innovation form: work on x - x_b, so that a large mean costs no accuracy.
    const shifted = GaussMarkov.fromInformation(eta, precision, lower, b);
    shifted.loc.forEach((x, i) => (shifted.loc[i] = x + prior.loc[i]));
    return shifted;
  };
}

/** `DiagonalHead`: mean and standard deviation of every component. */
function diagonalHead(tensors, prefix) {
  const layer = layerOf(tensors, `${prefix}.linear`);
  const centre = tensors[`${prefix}.centre.tree`].data;
  const scale = tensors[`${prefix}.scale.tree`].data;
  const dim = centre.length;
  return (context) => {
    const out = linear(layer, context);
    const chol = new Float64Array(dim * dim);
    for (let i = 0; i < dim; i++) chol[i * (dim + 1)] = scale[i] * Math.exp(out[dim + i]);
    return new Gaussian(centre.map((c, i) => c + scale[i] * out[i]), chol);
  };
}

/** `CholeskyHead`: mean and every entry of the factor of the precision; a single site of size d. */
export function choleskyHead(tensors, prefix) {
  const layer = layerOf(tensors, `${prefix}.linear`);
  const centre = tensors[`${prefix}.centre.tree`].data;
  const scale = tensors[`${prefix}.scale.tree`].data;
  const dim = centre.length;
  return (context) => {
    const out = linear(layer, context);
    const low = new Float64Array(dim * dim);
    let next = 2 * dim;
    for (let i = 0; i < dim; i++) {
      for (let j = 0; j < i; j++) low[i * dim + j] = out[next++] / scale[i];
      low[i * (dim + 1)] = Math.exp(out[dim + i]) / scale[i];
    }
    const loc = centre.map((c, i) => c + scale[i] * out[i]);
    return new GaussMarkov(loc, low, new Float64Array(0), dim);
  };
}

const HEADS = { information: informationHead, diagonal: diagonalHead, cholesky: choleskyHead };

/** A Markov density whose tensors are named `PREFIX.loc`, `.diag` and `.off`. */
export function priorOf(tensors, prefix) {
  const [loc, diag, off] = ["loc", "diag", "off"].map((name) => tensors[`${prefix}.${name}`]);
  return new GaussMarkov(loc.data, diag.data, off.data, diag.shape[1]);
}

/**
 * The posterior in a weight file, as a function of an event.
 *
 * Throws a `WeightFileError` where the file cannot be used.
 */
export function loadPosterior(bytes) {
  const { tensors, settings } = readWeights(bytes);
  if (!(settings.head in HEADS)) {
    throw new WeightFileError(`expected a head of ${Object.keys(HEADS)}, got ${settings.head}`);
  }
  // An encoder that reads in units of its own is packed as it is for flows and scores.
  const head = HEADS[settings.head](tensors, settings.scaled ? "['head']" : ".head", settings);
  if (settings.scaled) {
    const context = flatContextOf(tensors, settings);
    return (event) => head(context(event));
  }
  const net = {
    layers: layersOf(tensors, ".encoder.mlp"),
    activation: settings.activation,
    radius: settings.radius,
    usesSd: settings.uses_sd,
  };
  const encode = settings.head === "information" ? siteFeatures : flatContext;
  return (event) => head(encode(net, event));
}

/**
 * The exact posterior where every site of a scalar Markov prior (an Ornstein-Uhlenbeck path) is
 * observed with independent errors: each observation adds 1 / sd^2 to the precision.
 */
export function exactPosterior(prior, event) {
  if (prior.b !== 1) throw new Error(`expected a scalar path, got blocks of size ${prior.b}`);
  const [diag, lower] = prior.precisionBlocks();
  const eta = new Float64Array(prior.dim);
  event.mask.forEach((seen, t) => {
    if (!seen) return;
    diag[t] += event.sd[t] ** -2;
    eta[t] = (event.y[t] - prior.loc[t]) / event.sd[t] ** 2;
  });
  const shifted = GaussMarkov.fromInformation(eta, diag, lower, 1);
  shifted.loc.forEach((x, i) => (shifted.loc[i] = x + prior.loc[i]));
  return shifted;
}
