import assert from "node:assert/strict";
import { test } from "node:test";
import { WindowEnergy, bowl, distance, fromBowl, lorenzWindow, sampler, squaredIn } from "../../book/_kit/js/lorenz.mjs";
import { normals, uniforms } from "../../book/_kit/js/noise.mjs";

const SETTINGS = { parameters: [10, 28, 8 / 3], dt: 0.05, states: 6, substeps: 2, sees: { components: [0, 1], stride: 1 } };
const window = lorenzWindow(SETTINGS);
const prior = { loc: Float64Array.of(0, 0, 23.5), chol: Float64Array.of(8, 0, 0, 7.8, 4.5, 0, 0, 0, 8.6) };
const truth = Float64Array.of(3, 4, 20);
const y = window.path(truth);
const everything = new WindowEnergy(window, prior, { y, mask: new Array(12).fill(true), sd: new Float64Array(12).fill(0.5) });
const nothing = new WindowEnergy(window, prior, { y: new Float64Array(12).fill(NaN), mask: new Array(12).fill(false), sd: new Float64Array(12).fill(NaN) });

test("states at rest stay", () => {
  const r = Math.sqrt((8 / 3) * 27);
  const path = window.path([r, r, 27]);
  assert.ok(path.every((value) => Math.abs(value - r) < 1e-9));
});

test("with everything seen and no error the search ends near the truth", () => {
  const looks = everything.refine([0, 0, 0], 40, 1e-8);
  const end = looks[looks.length - 1];
  assert.ok(Math.hypot(...end.slope) <= 1e-8);
  assert.ok(distance(everything.state(end.v), truth) < 0.5);
  for (let k = 1; k < looks.length; k++) assert.ok(looks[k].cost <= looks[k - 1].cost, "J never rises");
});

test("where nothing is seen the background is the one minimum, and what hides there is not read", () => {
  const found = nothing.minima([Float64Array.of(1, -1, 2), Float64Array.of(0, 0, 0), Float64Array.of(-3, 1, 1)]);
  assert.equal(found.length, 1);
  assert.ok(distance(found[0].v, [0, 0, 0]) < 1e-4);
  assert.ok(nothing.hessian([0, 0, 0]).every((h, i) => Math.abs(h - (i % 4 === 0 ? 1 : 0)) < 1e-6));
});

test("a bowl that bends down is none, and a draw of one has its spread", () => {
  assert.equal(bowl([0, 0, 0], Float64Array.of(1, 0, 0, 0, -1, 0, 0, 0, 1)), null);
  const one = bowl([1, 2, 3], Float64Array.of(4, 0, 0, 0, 9, 0, 0, 0, 16));
  assert.deepEqual(Array.from(fromBowl(one, [1, 1, 1], 2)), [2, 2 + 2 / 3, 3.5]);
  assert.ok(Math.abs(squaredIn(one, fromBowl(one, [1, 2, 2], 1)) - 9) < 1e-12);
  assert.ok(Math.abs(one.logDet - Math.log(4 * 9 * 16)) < 1e-12);
});

test("the sampler's draws have the moments of a Gaussian posterior", () => {
  // Nothing seen: exp(-J) is the standard normal. Five standard errors.
  const draws = sampler(nothing, [{ cost: 0, ...bowl([0, 0, 0], Float64Array.of(1, 0, 0, 0, 1, 0, 0, 0, 1)) }], normals(1, 30000));
  draws.more(6000, uniforms(2));
  const { draws: all, weights, effective } = draws.weighted();
  assert.ok(effective > 3000);
  const mean = (f) => all.reduce((sum, { x }, i) => sum + weights[i] * f(x), 0);
  const error = 5 / Math.sqrt(effective);
  for (const k of [0, 1, 2]) {
    assert.ok(Math.abs(mean((x) => x[k])) < error);
    assert.ok(Math.abs(mean((x) => x[k] ** 2) - 1) < error * Math.SQRT2);
  }
  const again = draws.resample(1000);
  assert.equal(again.length, 1000);
  assert.ok(Math.abs(again.reduce((sum, x) => sum + x[0] ** 2, 0) / 1000 - 1) < 0.3);
});

test("without a minimum the sampler draws from the background", () => {
  const draws = sampler(nothing, [], normals(3, 3000));
  draws.more(500, uniforms(4));
  assert.ok(draws.weighted().effective > 499.999);
});

test("a search on its way to a minimum that is known is not taken to the end again", () => {
  const start = Float64Array.of(0.3, -0.2, 0.1);
  const near = Float64Array.of(0.31, -0.2, 0.1);
  const [once] = everything.minima([start]);
  const { tangent } = window;
  const count = (starts) => {
    let looks = 0;
    window.tangent = (...given) => (looks++, tangent(...given));
    try {
      return [everything.minima(starts), looks];
    } finally {
      window.tangent = tangent;
    }
  };
  const [alone, looks] = count([start]);
  const [both, more] = count([start, near]);
  assert.equal(alone.length, 1);
  assert.equal(both.length, 1);
  assert.ok(more < 2 * looks, `${more} looks for two starts, ${looks} for one`);
  assert.ok(distance(both[0].v, once.v) < 1e-9);
});
