/**
 * Gaussian densities: dense, and Markov with a block-tridiagonal precision in O(n).
 *
 * The mirror of `amortlib.gaussian`. Matrices are flat `Float64Array`s in C order; a stack of n
 * blocks of size b lies block after block.
 */

const LOG_2PI = Math.log(2 * Math.PI);

/** Lower Cholesky factor of a symmetric matrix of size b; only its lower half is read. */
export function cholesky(a, b) {
  const low = new Float64Array(b * b);
  for (let i = 0; i < b; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = a[i * b + j];
      for (let k = 0; k < j; k++) sum -= low[i * b + k] * low[j * b + k];
      low[i * b + j] = i === j ? Math.sqrt(sum) : sum / low[j * b + j];
    }
  }
  return low;
}

/** X with L X = R, for R of `columns` columns; in place. */
export function solveLower(low, r, b, columns = 1) {
  for (let i = 0; i < b; i++) {
    for (let c = 0; c < columns; c++) {
      let sum = r[i * columns + c];
      for (let k = 0; k < i; k++) sum -= low[i * b + k] * r[k * columns + c];
      r[i * columns + c] = sum / low[i * b + i];
    }
  }
  return r;
}

/** X with L^T X = R; in place. */
export function solveUpper(low, r, b, columns = 1) {
  for (let i = b - 1; i >= 0; i--) {
    for (let c = 0; c < columns; c++) {
      let sum = r[i * columns + c];
      for (let k = i + 1; k < b; k++) sum -= low[k * b + i] * r[k * columns + c];
      r[i * columns + c] = sum / low[i * b + i];
    }
  }
  return r;
}

/** A B of two square matrices of size b, either of them transposed where asked. */
export function multiply(x, y, b, { transposeX = false, transposeY = false } = {}) {
  const out = new Float64Array(b * b);
  for (let i = 0; i < b; i++) {
    for (let j = 0; j < b; j++) {
      let sum = 0;
      for (let k = 0; k < b; k++) {
        sum += x[transposeX ? k * b + i : i * b + k] * y[transposeY ? j * b + k : k * b + j];
      }
      out[i * b + j] = sum;
    }
  }
  return out;
}

const identity = (b) => Float64Array.from({ length: b * b }, (_, i) => Number(i % (b + 1) === 0));
const transposed = (x, b) => x.map((_, i) => x[(i % b) * b + Math.floor(i / b)]);
const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);

/** N(loc, chol chol^T), dense; `chol` is lower triangular. */
export class Gaussian {
  constructor(loc, chol) {
    this.loc = loc;
    this.chol = chol;
    this.dim = loc.length;
  }

  mean() {
    return this.loc;
  }

  sd() {
    const { chol, dim } = this;
    return this.loc.map((_, i) => Math.sqrt(dot(chol.subarray(i * dim, (i + 1) * dim), chol.subarray(i * dim, (i + 1) * dim))));
  }

  /** loc + L v: a draw where v is standard normal. */
  colour(v) {
    const { chol, dim } = this;
    return this.loc.map((value, i) => value + dot(chol.subarray(i * dim, (i + 1) * dim), v));
  }

  /** v with x = loc + L v, the inverse of `colour`. */
  whiten(x) {
    return solveLower(this.chol, x.map((value, i) => value - this.loc[i]), this.dim);
  }

  mahalanobis(x) {
    const z = this.whiten(x);
    return dot(z, z);
  }

  /** Half the log-determinant of the precision. */
  halfLogDetPrecision() {
    let sum = 0;
    for (let i = 0; i < this.dim; i++) sum -= Math.log(this.chol[i * (this.dim + 1)]);
    return sum;
  }

  logProb(x) {
    return -0.5 * this.mahalanobis(x) + this.halfLogDetPrecision() - 0.5 * this.dim * LOG_2PI;
  }

  covariance() {
    return multiply(this.chol, this.chol, this.dim, { transposeY: true });
  }
}

/**
 * A Gaussian whose precision is block tridiagonal: n sites of b components, held by its block
 * Cholesky factor, `diag[i]` = L_ii and `off[i]` = L_{i+1,i}. Rue and Held (2005), chapter 2.
 */
export class GaussMarkov {
  /** `loc` is flat, n b numbers; `diag` holds n blocks and `off` n - 1. */
  constructor(loc, diag, off, b) {
    this.loc = loc;
    this.b = b;
    this.n = loc.length / b;
    this.dim = loc.length;
    const block = (x, i) => x.subarray(i * b * b, (i + 1) * b * b);
    this.diag = Array.from({ length: this.n }, (_, i) => block(diag, i));
    this.off = Array.from({ length: this.n - 1 }, (_, i) => block(off, i));
  }

  /** From natural parameters: P mean = `eta`, P_ii = `diag[i]` and P_{i+1,i} = `lower[i]`. */
  static fromInformation(eta, diag, lower, b) {
    const n = eta.length / b;
    const made = new GaussMarkov(new Float64Array(eta.length), new Float64Array(diag.length), new Float64Array(lower.length), b);
    const block = (x, i) => x.slice(i * b * b, (i + 1) * b * b);
    for (let i = 0; i < n; i++) {
      const here = block(diag, i);
      if (i > 0) {
        // L_{i,i-1} = P_{i,i-1} L_{i-1,i-1}^-T, solved for its transpose.
        const off = transposed(solveLower(made.diag[i - 1], transposed(block(lower, i - 1), b), b, b), b);
        made.off[i - 1].set(off);
        multiply(off, off, b, { transposeY: true }).forEach((value, k) => (here[k] -= value));
      }
      made.diag[i].set(cholesky(here, b));
    }
    made.loc.set(made.solveBackward(made.solveForward(eta)));
    return made;
  }

  /** Blocks of the precision, flat: on the diagonal, and below it. */
  precisionBlocks() {
    const { n, b } = this;
    const diag = new Float64Array(n * b * b);
    const lower = new Float64Array((n - 1) * b * b);
    for (let i = 0; i < n; i++) {
      const here = multiply(this.diag[i], this.diag[i], b, { transposeY: true });
      if (i > 0) {
        multiply(this.off[i - 1], this.off[i - 1], b, { transposeY: true }).forEach((value, k) => (here[k] += value));
        lower.set(multiply(this.off[i - 1], this.diag[i - 1], b, { transposeY: true }), (i - 1) * b * b);
      }
      diag.set(here, i * b * b);
    }
    return [diag, lower];
  }

  /** z with L z = r. */
  solveForward(r) {
    const { n, b } = this;
    const z = Float64Array.from(r);
    for (let i = 0; i < n; i++) {
      const here = z.subarray(i * b, (i + 1) * b);
      if (i > 0) subtractProduct(here, this.off[i - 1], z.subarray((i - 1) * b, i * b), b, false);
      solveLower(this.diag[i], here, b);
    }
    return z;
  }

  /** x with L^T x = r. */
  solveBackward(r) {
    const { n, b } = this;
    const x = Float64Array.from(r);
    for (let i = n - 1; i >= 0; i--) {
      const here = x.subarray(i * b, (i + 1) * b);
      if (i < n - 1) subtractProduct(here, this.off[i], x.subarray((i + 1) * b, (i + 2) * b), b, true);
      solveUpper(this.diag[i], here, b);
    }
    return x;
  }

  mean() {
    return this.loc;
  }

  /** loc + L^-T v: a draw where v is standard normal. */
  colour(v) {
    return this.solveBackward(v).map((value, i) => value + this.loc[i]);
  }

  /** v = L^T (x - loc), the inverse of `colour`. */
  whiten(x) {
    const { n, b } = this;
    const away = x.map((value, i) => value - this.loc[i]);
    const out = new Float64Array(this.dim);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < b; j++) {
        let z = 0;
        for (let k = 0; k < b; k++) {
          z += this.diag[i][k * b + j] * away[i * b + k];
          if (i < n - 1) z += this.off[i][k * b + j] * away[(i + 1) * b + k];
        }
        out[i * b + j] = z;
      }
    }
    return out;
  }

  /** |x - loc|^2 in the metric of the precision. */
  mahalanobis(x) {
    const z = this.whiten(x);
    return dot(z, z);
  }

  /** Half the log-determinant of the precision. */
  halfLogDetPrecision() {
    let sum = 0;
    for (const block of this.diag) {
      for (let j = 0; j < this.b; j++) sum += Math.log(block[j * (this.b + 1)]);
    }
    return sum;
  }

  logProb(x) {
    return -0.5 * this.mahalanobis(x) + this.halfLogDetPrecision() - 0.5 * this.dim * LOG_2PI;
  }

  /** Blocks S_ii and S_{i+1,i} of the covariance: the recursion of Takahashi et al. (1973). */
  covarianceBlocks() {
    const { n, b } = this;
    const own = new Array(n);
    const lag = new Array(n - 1);
    for (let i = n - 1; i >= 0; i--) {
      const inverse = solveLower(this.diag[i], identity(b), b, b);
      own[i] = multiply(inverse, inverse, b, { transposeX: true });
      if (i < n - 1) {
        const gain = multiply(this.off[i], inverse, b);
        const ahead = multiply(own[i + 1], gain, b);
        multiply(gain, ahead, b, { transposeX: true }).forEach((value, k) => (own[i][k] += value));
        lag[i] = ahead.map((value) => -value);
      }
    }
    return [own, lag];
  }

  sd() {
    const { b } = this;
    const [own] = this.covarianceBlocks();
    return this.loc.map((_, i) => Math.sqrt(own[Math.floor(i / b)][(i % b) * (b + 1)]));
  }

  /** The covariance, dense. */
  covariance() {
    const out = new Float64Array(this.dim * this.dim);
    for (let i = 0; i < this.dim; i++) {
      const unit = new Float64Array(this.dim);
      unit[i] = 1;
      out.set(this.solveBackward(this.solveForward(unit)), i * this.dim);
    }
    return out;
  }
}

/** here -= M x, or M^T x, of one block. */
function subtractProduct(here, matrix, x, b, transpose) {
  for (let j = 0; j < b; j++) {
    for (let k = 0; k < b; k++) here[j] -= matrix[transpose ? k * b + j : j * b + k] * x[k];
  }
}

/** KL(p || q) in nats; two Markov densities with the same blocks cost O(n), any other O(d^3). */
export function kl(p, q) {
  if (p.dim !== q.dim) throw new Error(`expected densities of one dimension, got ${p.dim}, ${q.dim}`);
  let trace = 0;
  if (p instanceof GaussMarkov && q instanceof GaussMarkov && p.b === q.b) {
    const [own, lag] = p.covarianceBlocks();
    const [diag, lower] = q.precisionBlocks();
    const size = p.b * p.b;
    own.forEach((block, i) => (trace += dot(block, diag.subarray(i * size, (i + 1) * size))));
    lag.forEach((block, i) => (trace += 2 * dot(block, lower.subarray(i * size, (i + 1) * size))));
  } else {
    // trace(P_q S_p) = |L_q^-1 chol(S_p)|^2, with L_q the factor of q's covariance.
    const dense = q instanceof Gaussian ? q.chol : cholesky(q.covariance(), q.dim);
    const ratio = solveLower(dense, cholesky(p.covariance(), p.dim), p.dim, p.dim);
    trace = dot(ratio, ratio);
  }
  const logDets = p.halfLogDetPrecision() - q.halfLogDetPrecision();
  return 0.5 * (trace + q.mahalanobis(p.mean()) - p.dim) + logDets;
}
