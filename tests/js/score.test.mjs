import assert from "node:assert/strict";
import { test } from "node:test";
import { Gaussian } from "../../book/_kit/js/gaussian.mjs";
import { normals } from "../../book/_kit/js/noise.mjs";
import { ScorePosterior, brownianPath, level } from "../../book/_kit/js/score.mjs";

const near = (got, wanted, tolerance = 1e-9) => assert.ok(Math.abs(got - wanted) <= tolerance, `${got} is not ${wanted}`);

test("noise levels fall from the largest to the smallest, and their slope is that of a difference", () => {
  const noise = { sigma_min: 0.01, sigma_max: 20, rho: 7 };
  near(level(noise, 0)[0], 20);
  near(level(noise, 1)[0], 0.01);
  const h = 1e-6;
  const slope = (level(noise, 0.5 + h)[0] - level(noise, 0.5 - h)[0]) / (2 * h);
  near(level(noise, 0.5)[1], slope, 1e-5);
});

const MEAN = [1.5, -2];
const SD = [0.4, 0.7];

/** The posterior N(MEAN, SD^2), whose best guess of the noise is known, in coordinates of unit size. */
function exact(sigma_min = 1e-4) {
  const predict = (u, sigma) => u.map((value, i) => (sigma * (value - MEAN[i])) / (SD[i] ** 2 + sigma ** 2));
  const frame = new Gaussian(Float64Array.of(0, 0), Float64Array.of(1, 0, 0, 1));
  return new ScorePosterior({ sigma_min, sigma_max: 20, rho: 7 }, [{ frame, logWeight: 0 }], predict);
}

test("the flow ODE of a Gaussian's exact score ends at that Gaussian", () => {
  for (const z of [-1.3, 0, 0.8]) {
    const end = exact().fromNoise([z, -z], 0, 400);
    near(end[0], MEAN[0] + SD[0] * z, 3e-3);
    near(end[1], MEAN[1] - SD[1] * z, 3e-3);
  }
});

/** Mean and variance of numbers. */
function moments(x) {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  return [mean, x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (x.length - 1)];
}

test("a path's increments have the variance of a step, its areas a twelfth of it", () => {
  // Five standard errors of the mean and of the variance, four numbers: one false alarm in 400,000.
  const n = 20000;
  const { steps, w, area } = brownianPath(normals(1, 2 * n), 40);
  assert.equal(steps, 40);
  for (const [numbers, variance] of [[w, 1 / 40], [area, 1 / 480]]) {
    assert.equal(numbers.length, n);
    const [mean, found] = moments(numbers);
    near(mean, 0, 5 * Math.sqrt(variance / n));
    near(found, variance, 5 * variance * Math.sqrt(2 / n));
  }
});

test("draws of the reverse SDE have the moments of the Gaussian whose score it follows", () => {
  // Five standard errors, four numbers: one false alarm in 400,000; and the error of 96 steps.
  const [n, steps] = [4000, 96];
  const q = exact(0.01);
  const ends = [[], []];
  for (let i = 0; i < n; i++) {
    const z = normals(2 + i, 2 + 4 * steps);
    q.fromPath(z.subarray(0, 2), 0, brownianPath(z.subarray(2), steps)).forEach((x, j) => ends[j].push(x));
  }
  ends.forEach((x, j) => {
    const [mean, variance] = moments(x);
    near(mean, MEAN[j], (5 * SD[j]) / Math.sqrt(n) + 2e-3);
    near(variance, SD[j] ** 2, 5 * SD[j] ** 2 * Math.sqrt(2 / n) + 2e-3);
  });
});

/** The same path in half as many steps: increments add up, areas by their definition as an integral. */
function coarser({ steps, w, area }, dim) {
  const half = steps / 2;
  const path = { steps: half, w: new Float64Array(half * dim), area: new Float64Array(half * dim) };
  for (let i = 0; i < half; i++) {
    for (let j = 0; j < dim; j++) {
      const [a, b, to] = [2 * i * dim + j, (2 * i + 1) * dim + j, i * dim + j];
      path.w[to] = w[a] + w[b];
      path.area[to] = (area[a] + area[b]) / 2 + (w[a] - w[b]) / 4;
    }
  }
  return path;
}

test("along one path the reverse SDE converges with an order of one and a half", () => {
  const q = exact(0.05);
  const fine = 1024;
  const errors = { 32: [], 64: [], 128: [] };
  for (let i = 0; i < 60; i++) {
    const z = normals(90000 + i, 2 + 4 * fine);
    const start = z.subarray(0, 2);
    let path = brownianPath(z.subarray(2), fine);
    const right = q.fromPath(start, 0, path);
    while (path.steps > 32) {
      path = coarser(path, 2);
      const end = q.fromPath(start, 0, path);
      if (path.steps in errors) errors[path.steps].push(Math.hypot(end[0] - right[0], end[1] - right[1]));
    }
  }
  const size = (steps) => Math.sqrt(moments(errors[steps].map((x) => x ** 2))[0]);
  // An order of one and a half divides the error by 2.8 at each doubling; of one, by 2.
  for (const steps of [32, 64]) assert.ok(size(steps) / size(2 * steps) > 2.4, `${size(steps)} at ${steps}, ${size(2 * steps)} at twice as many`);
});
