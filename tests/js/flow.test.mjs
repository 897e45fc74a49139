import assert from "node:assert/strict";
import { test } from "node:test";
import { Flow, logSumExp } from "../../book/_kit/js/flow.mjs";
import { Gaussian } from "../../book/_kit/js/gaussian.mjs";
import { parametersOf, transformerOf } from "../../book/_kit/js/splines.mjs";

const SPLINE = { transformer: "spline", knots: 5, interval: 4 };
const POINTS = [-9, -4, -3.7, -1.2, 0, 0.3, 2.9, 4, 7];
const near = (got, wanted, tolerance = 1e-9) => assert.ok(Math.abs(got - wanted) <= tolerance, `${got} is not ${wanted}`);

/** Parameters that differ from each other, the same at every call. */
const some = (count) => Array.from({ length: count }, (_, i) => 1.5 * Math.sin(3 * i + 1));

test("parameters of zero are the identity", () => {
  for (const kind of [SPLINE, { transformer: "affine" }]) {
    const map = transformerOf(new Float64Array(parametersOf(kind)), kind);
    for (const x of POINTS) {
      near(map.forward(x)[0], x);
      near(map.forward(x)[1], 0);
    }
  }
});

test("a map rises, its inverse undoes it, and its slope is that of a difference", () => {
  for (const kind of [SPLINE, { transformer: "affine" }]) {
    const map = transformerOf(some(parametersOf(kind)), kind);
    let last = -Infinity;
    for (const x of POINTS) {
      const [y, log] = map.forward(x);
      assert.ok(y > last);
      last = y;
      near(map.inverse(y)[0], x, 1e-7);
      near(map.inverse(y)[1], log, 1e-7);
    }
    for (const x of [-5, -1.1, 0.4, 2.2]) {
      const h = 1e-6;
      const slope = (map.forward(x + h)[0] - map.forward(x - h)[0]) / (2 * h);
      near(Math.exp(map.forward(x)[1]), slope, 1e-4 * slope);
    }
  }
});

test("the logarithm of a sum does not overflow", () => {
  near(logSumExp([1000, 1000]), 1000 + Math.log(2));
  near(logSumExp([-1000, 0]), 0);
});

/** A flow with one layer whose net says the same whatever it is given. */
function constantFlow(kind) {
  const d = 2;
  const size = parametersOf(SPLINE);
  const count = kind === "coupling" ? 1 : d;
  const columns = kind === "coupling" ? 1 : d;
  const net = [
    {
      weight: { shape: [count * size, columns], data: new Float64Array(count * size * columns) },
      bias: { data: Float64Array.from(some(count * size)) },
    },
  ];
  const base = new Gaussian(Float64Array.of(1, -2), Float64Array.of(2, 0, 0.5, 1));
  const layers = [{ net, order: [1, 0], kind, activation: "gelu", ...SPLINE }];
  return new Flow(layers, [{ base, condition: [], logWeight: 0 }]);
}

test("the density of a flow integrates to one", () => {
  for (const kind of ["coupling", "autoregressive"]) {
    const flow = constantFlow(kind);
    const step = 0.1;
    let total = 0;
    for (let a = -30; a < 30; a += step) {
      for (let b = -20; b < 20; b += step) total += Math.exp(flow.logProb(Float64Array.of(a, b))) * step * step;
    }
    near(total, 1, 5e-3);
  }
});
