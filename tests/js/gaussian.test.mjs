import assert from "node:assert/strict";
import test from "node:test";
import { GaussMarkov, Gaussian, cholesky, kl, multiply, solveLower, solveUpper } from "../../book/_kit/js/gaussian.mjs";

/** Numbers that look random and are the same on every run. */
function numbers(count, seed = 1) {
  let state = seed;
  return Float64Array.from({ length: count }, () => {
    state = (state * 48271) % 2147483647;
    return state / 2147483647 - 0.5;
  });
}

const close = (got, wanted, tolerance = 1e-12) => {
  assert.equal(got.length, wanted.length);
  got.forEach((value, i) => assert.ok(Math.abs(value - wanted[i]) <= tolerance, `${i}: ${value}, ${wanted[i]}`));
};

/** A Markov density with n blocks of b, and its precision as a dense matrix. */
function example(n, b, seed = 1) {
  const diag = numbers(n * b * b, seed);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < b; j++) {
      for (let k = j + 1; k < b; k++) diag[i * b * b + j * b + k] = 0;
      diag[i * b * b + j * (b + 1)] = 1 + Math.abs(diag[i * b * b + j * (b + 1)]);
    }
  }
  const made = new GaussMarkov(numbers(n * b, seed + 1), diag, numbers((n - 1) * b * b, seed + 2), b);
  const factor = new Float64Array((n * b) ** 2);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < b; j++) {
      for (let k = 0; k < b; k++) {
        factor[(i * b + j) * n * b + i * b + k] = made.diag[i][j * b + k];
        if (i > 0) factor[(i * b + j) * n * b + (i - 1) * b + k] = made.off[i - 1][j * b + k];
      }
    }
  }
  return [made, multiply(factor, factor, n * b, { transposeY: true })];
}

const SHAPES = [[1, 1], [5, 1], [1, 4], [4, 3]];

test("the Cholesky factor and its solves", () => {
  const x = numbers(16);
  const a = multiply(x, x, 4, { transposeY: true });
  for (let i = 0; i < 4; i++) a[i * 5] += 1;
  const low = cholesky(a, 4);
  close(multiply(low, low, 4, { transposeY: true }), a);
  close(solveUpper(low, solveLower(low, a.slice(), 4, 4), 4, 4), [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]);
});

test("the blocks of the precision are those of the dense matrix", () => {
  for (const [n, b] of SHAPES) {
    const [made, dense] = example(n, b);
    const [diag, lower] = made.precisionBlocks();
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < b * b; j++) {
        const at = (i * b + Math.floor(j / b)) * n * b + (j % b);
        close([diag[i * b * b + j]], [dense[at + i * b]]);
        if (i > 0) close([lower[(i - 1) * b * b + j]], [dense[at + (i - 1) * b]]);
      }
    }
  }
});

test("covariance times precision is the identity", () => {
  for (const [n, b] of SHAPES) {
    const [made, dense] = example(n, b);
    const product = multiply(made.covariance(), dense, n * b);
    close(product, product.map((_, i) => Number(i % (n * b + 1) === 0)));
  }
});

test("the blocks of the covariance are those of the dense one", () => {
  const [made] = example(4, 3);
  const dense = made.covariance();
  const [own, lag] = made.covarianceBlocks();
  const block = (i, j) => Float64Array.from({ length: 9 }, (_, k) => dense[(3 * i + Math.floor(k / 3)) * 12 + 3 * j + (k % 3)]);
  own.forEach((got, i) => close(got, block(i, i)));
  lag.forEach((got, i) => close(got, block(i + 1, i)));
  close(made.sd(), made.loc.map((_, i) => Math.sqrt(dense[i * 13])));
});

test("natural parameters lead back to the density", () => {
  for (const [n, b] of SHAPES) {
    const [made, dense] = example(n, b);
    const eta = made.loc.map((_, i) => dense.subarray(i * n * b, (i + 1) * n * b).reduce((sum, p, j) => sum + p * made.loc[j], 0));
    const again = GaussMarkov.fromInformation(eta, ...made.precisionBlocks(), b);
    close(again.loc, made.loc, 1e-10);
    close(again.covariance(), made.covariance(), 1e-10);
  }
});

test("a draw from noise v has whitened norm |v|", () => {
  const [made] = example(4, 3);
  const v = numbers(12, 9);
  close([made.mahalanobis(made.colour(v))], [v.reduce((sum, x) => sum + x * x, 0)]);
  close(made.colour(new Float64Array(12)), made.loc);
});

test("the density of one component is the textbook's", () => {
  const one = new GaussMarkov(Float64Array.of(1), Float64Array.of(2), new Float64Array(0), 1);
  const wanted = -0.5 * (0.5 / 0.5) ** 2 - Math.log(0.5) - 0.5 * Math.log(2 * Math.PI);
  close([one.logProb(Float64Array.of(1.5))], [wanted]);
  const dense = new Gaussian(Float64Array.of(1), Float64Array.of(0.5));
  close([dense.logProb(Float64Array.of(1.5))], [wanted]);
  close(dense.sd(), [0.5]);
  close(dense.colour([2]), [2]);
});

test("the dense and the Markov form agree", () => {
  const [made] = example(4, 3);
  const dense = new Gaussian(made.loc, cholesky(made.covariance(), 12));
  const x = numbers(12, 5);
  close([dense.logProb(x)], [made.logProb(x)], 1e-10);
  close(dense.sd(), made.sd());
});

test("the divergence: zero from itself, the textbook's for one component, one road as the other", () => {
  const [p] = example(4, 3, 1);
  const [q] = example(4, 3, 20);
  close([kl(p, p)], [0]);
  const dense = (markov) => new Gaussian(markov.loc, cholesky(markov.covariance(), markov.dim));
  close([kl(p, q)], [kl(dense(p), dense(q))], 1e-10);
  close([kl(p, q)], [kl(p, dense(q))], 1e-10);
  const scalar = (loc, sd) => new Gaussian(Float64Array.of(loc), Float64Array.of(sd));
  close([kl(scalar(0, 1), scalar(1, 2))], [Math.log(2) + (1 + 1) / 8 - 0.5]);
  assert.throws(() => kl(p, scalar(0, 1)), /expected densities of one dimension, got 12, 1/);
});
