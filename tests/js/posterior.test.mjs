import assert from "node:assert/strict";
import test from "node:test";
import { GaussMarkov } from "../../book/_kit/js/gaussian.mjs";
import { exactPosterior, gap } from "../../book/_kit/js/posterior.mjs";

/** A stationary path of unit variance whose neighbours correlate with `a`. */
function path(n, a, loc = 0) {
  const q = 1 - a * a;
  const diag = Float64Array.from({ length: n }, (_, i) => (i === 0 ? 1 : 1 / q) + (i < n - 1 ? (a * a) / q : 0));
  const made = GaussMarkov.fromInformation(new Float64Array(n), diag, new Float64Array(n - 1).fill(-a / q), 1);
  made.loc.fill(loc);
  return made;
}

const event = (y, mask, sd) => ({ y, mask, sd: y.map(() => sd) });

test("a gap is cut at the end of the record", () => {
  assert.deepEqual(gap(4, 1, 2), [true, false, false, true]);
  assert.deepEqual(gap(4, 3, 9), [true, true, true, false]);
  assert.deepEqual(gap(2, 0, 0), [true, true]);
  assert.deepEqual(gap(2, 0, 2), [false, false]);
});

test("with nothing observed the answer is the prior", () => {
  const prior = path(6, 0.8, 3);
  const exact = exactPosterior(prior, event(Array(6).fill(NaN), Array(6).fill(false), NaN));
  exact.sd().forEach((sd) => assert.ok(Math.abs(sd - 1) < 1e-12));
  exact.mean().forEach((mean) => assert.ok(Math.abs(mean - 3) < 1e-12));
});

test("one observation of one component is the textbook's average", () => {
  const exact = exactPosterior(path(1, 0.5, 1), event([3], [true], 0.5));
  assert.ok(Math.abs(exact.mean()[0] - (1 + (1 / 1.25) * 2)) < 1e-12);
  assert.ok(Math.abs(exact.sd()[0] - Math.sqrt(0.25 / 1.25)) < 1e-12);
});

test("the width does not depend on the values, and a gap is widest in its middle", () => {
  const prior = path(9, 0.9);
  const mask = gap(9, 2, 5);
  const width = (value) => [...exactPosterior(prior, event(Array(9).fill(value), mask, 0.3)).sd()];
  assert.deepEqual(width(0), width(7));
  assert.equal(width(0).indexOf(Math.max(...width(0))), 4);
});

test("a prior of blocks is refused", () => {
  const blocks = new GaussMarkov(new Float64Array(2), Float64Array.of(1, 0, 0, 1), new Float64Array(0), 2);
  assert.throws(() => exactPosterior(blocks, event([0, 0], [true, true], 1)), /expected a scalar path/);
});
