/**
 * A window of Lorenz-63 and its energy J: forecasts, tangent-linear model, minima, curvature, draws.
 *
 * The mirror of `_kit.windows.FixedSteps` and of `amortlib.energy.Energy` for three unknowns, with a
 * Gaussian background. Controls are v of x = x_b + B^{1/2} v.
 */

import { cholesky, solveLower, solveUpper } from "./gaussian.mjs";

const D = 3;

/**
 * The forward model of a window: `path(x0)` and `tangent(x0)`, what would be seen without noise.
 *
 * `sees`: either `{ components, stride }`, or `{ unit, stride }` for x at the first time and
 * x^2 / unit later, with z beside it. Observations are flat, time after time.
 */
export function lorenzWindow({ parameters, dt, states, substeps, sees }) {
  const [sigma, rho, beta] = parameters;
  const h = dt / substeps;
  const { stride } = sees;
  const times = Math.ceil(states / stride);
  const width = sees.components ? sees.components.length : 2;

  // All of it runs many times a frame: elements are read one by one, because taking arrays apart in
  // one statement goes through iterators, and buffers are kept.

  /** dx/dt of a state, and of three perturbations of it, nine numbers behind the state. */
  function slope(s, out, n) {
    const a = s[0];
    const b = s[1];
    const down = rho - s[2];
    out[0] = sigma * (b - a);
    out[1] = a * down - b;
    out[2] = a * b - beta * s[2];
    for (let j = 3; j < n; j += 3) {
      const p = s[j];
      const q = s[j + 1];
      const r = s[j + 2];
      out[j] = sigma * (q - p);
      out[j + 1] = p * down - a * r - q;
      out[j + 2] = p * b + a * q - beta * r;
    }
  }

  const [k1, k2, k3, k4, at, s] = Array.from({ length: 6 }, () => new Float64Array(12));

  /** One step of `s`, classical Runge-Kutta, in place. */
  function step(n) {
    slope(s, k1, n);
    for (let i = 0; i < n; i++) at[i] = s[i] + (h / 2) * k1[i];
    slope(at, k2, n);
    for (let i = 0; i < n; i++) at[i] = s[i] + (h / 2) * k2[i];
    slope(at, k3, n);
    for (let i = 0; i < n; i++) at[i] = s[i] + h * k3[i];
    slope(at, k4, n);
    for (let i = 0; i < n; i++) s[i] += (h / 6) * (k1[i] + 2 * (k2[i] + k3[i]) + k4[i]);
  }

  /** What is seen of `s`, and its derivative along each perturbation. */
  function see(time, clean, jacobian) {
    for (let w = 0; w < width; w++) {
      const row = time * width + w;
      const component = sees.components ? sees.components[w] : 2 * w;
      const squared = !sees.components && w === 0 && time > 0;
      clean[row] = squared ? s[0] ** 2 / sees.unit : s[component];
      if (!jacobian) continue;
      const factor = squared ? (2 * s[0]) / sees.unit : 1;
      for (let j = 0; j < D; j++) jacobian[row * D + j] = factor * s[D + D * j + component];
    }
  }

  /** Fill `clean`, and `jacobian` where there are directions. */
  function run(x0, clean, directions = null, jacobian = null) {
    const n = directions ? 12 : 3;
    s.set(x0);
    if (directions) s.set(directions, D);
    for (let i = 0; i < states; i++) {
      if (i % stride === 0) see(i / stride, clean, jacobian);
      if (i < states - 1) for (let j = 0; j < substeps; j++) step(n);
    }
    return clean;
  }

  return {
    times,
    width,
    /** Clean observations, in a new array or in the one given. */
    path: (x0, clean = new Float64Array(times * width)) => run(x0, clean),
    /** Clean observations, and their derivative along three directions, one after the other. */
    tangent(x0, directions, { clean, jacobian } = {}) {
      clean ??= new Float64Array(times * width);
      jacobian ??= new Float64Array(times * width * D);
      return { clean: run(x0, clean, directions, jacobian), jacobian };
    },
  };
}

/** What a generator returns, all pieces of its work at once. */
function finished(pieces) {
  for (;;) {
    const { done, value } = pieces.next();
    if (done) return value;
  }
}

const root = (a) => cholesky(a, D);
const finite = (a) => a.every(Number.isFinite);

/** J of one event `{ y, mask, sd }`, flat like the window's observations, in control variables. */
export class WindowEnergy {
  /** `prior`: `{ loc, chol }`, the background. */
  constructor(window, prior, event) {
    Object.assign(this, { window, prior, event });
    // The columns of B^{1/2}, one after the other: directions of the tangent-linear model.
    this.directions = Float64Array.from({ length: 9 }, (_, i) => prior.chol[(i % D) * D + Math.floor(i / D)]);
    // What a look needs on its way, and nobody keeps.
    const size = window.times * window.width;
    this.scratch = { x: new Float64Array(D), clean: new Float64Array(size), jacobian: new Float64Array(size * D) };
  }

  /** B^{1/2} v, in a new array or in the one given. */
  scaled(v, out = new Float64Array(D)) {
    const { chol } = this.prior;
    for (let i = 0; i < D; i++) out[i] = chol[i * D] * v[0] + chol[i * D + 1] * v[1] + chol[i * D + 2] * v[2];
    return out;
  }

  /** The state of a control. */
  state(v, out) {
    out = this.scaled(v, out);
    for (let i = 0; i < D; i++) out[i] += this.prior.loc[i];
    return out;
  }

  /** The control of a state. */
  control(x) {
    return solveLower(this.prior.chol, Float64Array.from(x, (value, i) => value - this.prior.loc[i]), D);
  }

  cost(v) {
    const clean = this.window.path(this.state(v, this.scratch.x), this.scratch.clean);
    const { y, mask, sd } = this.event;
    let sum = v[0] ** 2 + v[1] ** 2 + v[2] ** 2;
    for (let i = 0; i < clean.length; i++) if (mask[i]) sum += ((clean[i] - y[i]) / sd[i]) ** 2;
    return 0.5 * sum;
  }

  /** J, its slope, and its Gauss-Newton Hessian. */
  look(v) {
    const { clean, jacobian } = this.window.tangent(this.state(v, this.scratch.x), this.directions, this.scratch);
    const { y, mask, sd } = this.event;
    const gauss = Float64Array.of(1, 0, 0, 0, 1, 0, 0, 0, 1);
    const slope = Float64Array.from(v);
    let sum = v[0] ** 2 + v[1] ** 2 + v[2] ** 2;
    for (let i = 0; i < clean.length; i++) {
      if (!mask[i]) continue;
      const misfit = (clean[i] - y[i]) / sd[i];
      sum += misfit ** 2;
      for (let j = 0; j < D; j++) {
        const row = jacobian[i * D + j] / sd[i];
        slope[j] += row * misfit;
        for (let k = 0; k < D; k++) gauss[j * D + k] += (row * jacobian[i * D + k]) / sd[i];
      }
    }
    return { v, cost: 0.5 * sum, slope, gauss };
  }

  /** The full Hessian, by central differences of the slope. */
  hessian(v, h = 1e-4) {
    const out = new Float64Array(D * D);
    for (let j = 0; j < D; j++) {
      const [up, down] = [Float64Array.from(v), Float64Array.from(v)];
      up[j] += h;
      down[j] -= h;
      const [high, low] = [this.look(up).slope, this.look(down).slope];
      for (let i = 0; i < D; i++) out[i * D + j] = (high[i] - low[i]) / (2 * h);
    }
    for (let i = 0; i < D; i++) for (let j = 0; j < i; j++) out[i * D + j] = out[j * D + i] = 0.5 * (out[i * D + j] + out[j * D + i]);
    return out;
  }

  /** Curvature at a minimum: the full Hessian, or the Gauss-Newton one where that bends down. */
  bowlAt(v) {
    return bowl(v, this.hessian(v)) ?? bowl(v, this.look(v).gauss);
  }

  /** A root of the covariance of a bowl, of the state: B^{1/2} L^-T. */
  rootOf({ low }) {
    const root = new Float64Array(D * D);
    for (let k = 0; k < D; k++) {
      const unit = new Float64Array(D);
      unit[k] = 1;
      this.scaled(solveUpper(low, unit, D)).forEach((x, i) => (root[i * D + k] = x));
    }
    return root;
  }

  /**
   * Damped Gauss-Newton steps from a control; the mirror of `amortlib.refine`. The last of the
   * returned looks is where they end; a search stops early where the slope has gone, or where
   * `enough` of a look says so.
   */
  refine(v, steps, still = 0, enough = () => false) {
    const looks = [this.look(v)];
    let damping = 1e-3;
    for (let k = 0; k < steps; k++) {
      const here = looks[looks.length - 1];
      if (size(here.slope) <= still || enough(here)) break;
      const a = here.gauss.slice();
      for (let i = 0; i < D; i++) a[i * (D + 1)] *= 1 + damping;
      const low = root(a);
      const s = solveUpper(low, solveLower(low, here.slope.slice(), D), D);
      const there = this.look(here.v.map((value, i) => value - s[i]));
      const lower = there.cost <= here.cost;
      looks.push(lower ? there : here);
      damping *= lower ? 0.1 : 10;
    }
    return looks;
  }

  /** Where searches from `starts` end, distinct and lowest first: `{ v, cost }`. */
  minima(starts, settings) {
    return finished(this.search(starts, settings));
  }

  /** The same in pieces, a start at a time. */
  *search(starts, { steps = 40, still = 1e-5, reach = 1e-2 } = {}) {
    const ends = [];
    // A search that has come to the floor of a bowl found before would end there too.
    const known = ({ v, cost }) => ends.some((end) => cost < end.cost + 1e-4 && distance(end.v, v) < 0.1 * reach);
    for (const start of starts) {
      const looks = this.refine(start, steps, still, known);
      const end = looks[looks.length - 1];
      if (!known(end) && Number.isFinite(end.cost) && size(end.slope) < 1e-2) ends.push(end);
      yield;
    }
    ends.sort((a, b) => a.cost - b.cost);
    const kept = [];
    for (const end of ends) {
      const near = reach * (1 + size(end.v));
      if (kept.every((other) => distance(other.v, end.v) > near)) kept.push(end);
    }
    return kept;
  }
}

/** Entry (i, j) of the covariance with a root: B too, whose root is its Cholesky factor. */
export function covarianceIn(root, i, j) {
  return root[i * D] * root[j * D] + root[i * D + 1] * root[j * D + 1] + root[i * D + 2] * root[j * D + 2];
}

const size = (a) => Math.sqrt(a[0] ** 2 + a[1] ** 2 + a[2] ** 2);

export const distance = (a, b) => size([a[0] - b[0], a[1] - b[1], a[2] - b[2]]);

/** A Gaussian around a minimum, in control variables, from a Hessian: null where J bends down. */
export function bowl(v, hessian) {
  const low = root(hessian);
  if (!finite(low)) return null;
  return { v, low, logDet: 2 * Math.log(low[0] * low[4] * low[8]) };
}

/** Draw: v + scale L^-T z. */
export function fromBowl({ v, low }, z, scale) {
  const out = solveUpper(low, [z[0], z[1], z[2]], D);
  for (let i = 0; i < D; i++) out[i] = v[i] + scale * out[i];
  return out;
}

/** |x - v|^2 in the metric of the Hessian. */
export function squaredIn({ v, low }, x) {
  const [a, b, c] = [x[0] - v[0], x[1] - v[1], x[2] - v[2]];
  return (low[0] * a + low[3] * b + low[6] * c) ** 2 + (low[4] * b + low[7] * c) ** 2 + (low[8] * c) ** 2;
}

/**
 * Importance sampling of exp(-J), a slice at a time: `more(count)` draws, `sum()` says what there is.
 *
 * The proposal is a mixture: around each bowl at two scales, by its weight under Laplace, and the
 * background with one draw of ten, so that weights stay bounded.
 */
export function sampler(energy, bowls, noise) {
  const SCALES = [1.1, 2];
  const lowest = Math.min(...bowls.map(({ cost }) => cost));
  const raw = bowls.map(({ cost, logDet }) => Math.exp(lowest - cost - 0.5 * logDet));
  const total = raw.reduce((sum, w) => sum + w, 0);
  // No piece goes without draws, even where Laplace thinks nothing of it.
  const shares = raw.map((w) => 0.5 * (w / total) + 0.5 / raw.length);
  const background = bowls.length ? 0.1 : 1;
  const draws = [];
  let next = 0;
  const z = () => {
    if (next + 3 > noise.length) next = 0;
    return noise.subarray(next, (next += 3));
  };
  function density(x) {
    let sum = background * Math.exp(-0.5 * (x[0] ** 2 + x[1] ** 2 + x[2] ** 2));
    for (let k = 0; k < bowls.length; k++) {
      const square = squaredIn(bowls[k], x);
      for (let n = 0; n < SCALES.length; n++) {
        const scale = SCALES[n];
        const height = Math.exp(0.5 * bowls[k].logDet - (0.5 * square) / scale ** 2) / scale ** 3;
        sum += ((1 - background) * shares[k] * height) / SCALES.length;
      }
    }
    return Math.log(sum);
  }
  return {
    /** `uniform()` is a number from 0 to 1. */
    more(count, uniform) {
      for (let i = 0; i < count; i++) {
        let u = uniform();
        let x;
        if (u < background) x = [...z()];
        else {
          u = (u - background) / (1 - background);
          let k = 0;
          while (k < shares.length - 1 && u >= shares[k]) u -= shares[k++];
          x = fromBowl(bowls[k], z(), SCALES[uniform() < 0.5 ? 0 : 1]);
        }
        const cost = energy.cost(x);
        if (Number.isFinite(cost)) draws.push({ x, logWeight: -cost - density(x) });
      }
      return draws.length;
    },
    /** Weights that sum to one, and what the draws are worth. */
    weighted() {
      const top = Math.max(...draws.map(({ logWeight }) => logWeight));
      const weights = draws.map(({ logWeight }) => Math.exp(logWeight - top));
      const sum = weights.reduce((a, b) => a + b, 0);
      const share = weights.map((w) => w / sum);
      return { draws, weights: share, effective: 1 / share.reduce((a, w) => a + w * w, 0) };
    },
    /** `count` draws of equal weight, by systematic resampling. */
    resample(count) {
      const { weights } = this.weighted();
      const out = [];
      let [sum, i] = [weights[0], 0];
      for (let j = 0; j < count; j++) {
        while (sum < (j + 0.5) / count && i < weights.length - 1) sum += weights[++i];
        out.push(draws[i].x);
      }
      return out;
    },
  };
}
