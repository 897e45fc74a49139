/**
 * Maps of one number: affine, and monotonic rational-quadratic splines.
 *
 * The mirror of the transformers of `amortlib.heads.flow`, which are flowjax's. Durkan, Bekasov,
 * Murray and Papamakarios (2019), arXiv:1906.04032, equations 4 to 8. Parameters are what a net
 * predicts; all zero is the identity.
 */

import { ACTIVATIONS } from "./mlp.mjs";

/** Bound on the log of an affine map's scale, as in `amortlib.heads.flow`. */
const LOG_SCALE_BOUND = 3;
const MIN_DERIVATIVE = 1e-3;
const MIN_WIDTH = 1e-3;
/** Softplus of this is the slope one, less the least one. */
const UNIT_SLOPE = Math.log(Math.expm1(1 - MIN_DERIVATIVE));

/** How many parameters a map takes. */
export const parametersOf = ({ transformer, knots }) => (transformer === "affine" ? 2 : 3 * knots + 6);

/** Increasing points from -interval to interval, from unbounded numbers. */
function increasing(raw, interval) {
  const top = Math.max(...raw);
  const weights = raw.map((x) => Math.exp(x - top));
  const total = weights.reduce((sum, w) => sum + w, 0);
  const free = 2 * interval - MIN_WIDTH * raw.length;
  const points = [-interval];
  weights.forEach((w, i) => points.push(points[i] + MIN_WIDTH + (free * w) / total));
  points[raw.length] = interval;
  return points;
}

/** The bin of `x` among increasing points: the last that begins below it. */
function bin(points, x) {
  let k = 0;
  while (k < points.length - 2 && points[k + 1] < x) k++;
  return k;
}

/**
 * The map with these parameters: `{ forward, inverse }`, each of one number, returning the image
 * and the logarithm of the slope of *forward* there.
 */
export function transformerOf(parameters, { transformer, knots, interval }) {
  const [shift, raw] = parameters;
  const logScale = LOG_SCALE_BOUND * Math.tanh(raw / LOG_SCALE_BOUND);
  const scale = Math.exp(logScale);
  if (transformer === "affine") {
    return {
      forward: (x) => [x * scale + shift, logScale],
      inverse: (y) => [(y - shift) / scale, logScale],
    };
  }
  const part = (start, length) => Array.from(parameters.slice(start, start + length));
  const xs = increasing(part(2, knots + 1), interval);
  const ys = increasing(part(3 + knots, knots + 1), interval);
  const slopes = part(4 + 2 * knots, knots + 2).map((d) => ACTIVATIONS.softplus(d + UNIT_SLOPE) + MIN_DERIVATIVE);
  const logSlope = (k, s, xi) => {
    const [low, high] = [slopes[k], slopes[k + 1]];
    const top = high * xi ** 2 + 2 * s * xi * (1 - xi) + low * (1 - xi) ** 2;
    return 2 * Math.log(s) + Math.log(top) - 2 * Math.log(s + (high + low - 2 * s) * xi * (1 - xi));
  };
  const bend = (x) => {
    if (Math.abs(x) > interval) return [x, 0];
    const k = bin(xs, x);
    const xi = (x - xs[k]) / (xs[k + 1] - xs[k]);
    const rise = ys[k + 1] - ys[k];
    const s = rise / (xs[k + 1] - xs[k]);
    const top = s * xi ** 2 + slopes[k] * xi * (1 - xi);
    const y = ys[k] + (rise * top) / (s + (slopes[k + 1] + slopes[k] - 2 * s) * xi * (1 - xi));
    return [y, logSlope(k, s, xi)];
  };
  const unbend = (y) => {
    if (Math.abs(y) > interval) return [y, 0];
    const k = bin(ys, y);
    const rise = ys[k + 1] - ys[k];
    const s = rise / (xs[k + 1] - xs[k]);
    const away = y - ys[k];
    const common = away * (slopes[k + 1] + slopes[k] - 2 * s);
    const a = rise * (s - slopes[k]) + common;
    const b = rise * slopes[k] - common;
    const c = -s * away;
    const xi = (2 * c) / (-b - Math.sqrt(b * b - 4 * a * c));
    return [xs[k] + xi * (xs[k + 1] - xs[k]), logSlope(k, s, xi)];
  };
  return {
    forward: (x) => {
      const [y, log] = bend(x * scale + shift);
      return [y, log + logScale];
    },
    inverse: (y) => {
      const [x, log] = unbend(y);
      return [(x - shift) / scale, log + logScale];
    },
  };
}
