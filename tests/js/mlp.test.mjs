import assert from "node:assert/strict";
import test from "node:test";
import { ACTIVATIONS, layersOf, linear, mlp } from "../../book/_kit/js/mlp.mjs";

const tensor = (shape, ...data) => ({ shape, data: Float64Array.from(data) });
const LAYER = { weight: tensor([2, 3], 1, 2, 3, -1, 0, 1), bias: tensor([2], 0.5, -0.5) };

test("a layer is W x + b", () => {
  assert.deepEqual([...linear(LAYER, [1, 1, 2])], [9.5, 0.5]);
});

test("a layer says how many inputs it expected", () => {
  assert.throws(() => linear(LAYER, [1, 1]), /expected 3 inputs, got 2/);
});

test("activations stand between layers, and the last has its own", () => {
  const second = { weight: tensor([1, 2], 1, 1), bias: tensor([1], -20) };
  const layers = [LAYER, second];
  assert.deepEqual([...mlp(layers, [-1, 0, 0], { activation: "relu" })], [-19.5]);
  assert.deepEqual([...mlp(layers, [-1, 0, 0], { activation: "relu", final: "relu" })], [0]);
});

test("activations have the values that their definitions give", () => {
  const { gelu, silu, softplus } = ACTIVATIONS;
  assert.equal(gelu(0), 0);
  // x Phi(x) at 1 is 0.841345; the form with tanh is within 2e-4 of it.
  assert.ok(Math.abs(gelu(1) - 0.841345) < 2e-4);
  assert.ok(Math.abs(silu(1) - 1 / (1 + Math.exp(-1))) < 1e-15);
  assert.ok(Math.abs(softplus(0) - Math.log(2)) < 1e-15);
  assert.equal(softplus(1000), 1000);
  assert.equal(softplus(-1000), 0);
});

test("layers are found by name, in order, and their absence is said", () => {
  const tensors = {};
  for (const i of [0, 1, 2]) {
    tensors[`net.layers[${i}].weight`] = tensor([1, 1], i);
    tensors[`net.layers[${i}].bias`] = tensor([1], 0);
  }
  assert.deepEqual(layersOf(tensors, "net").map((layer) => layer.weight.data[0]), [0, 1, 2]);
  assert.throws(() => layersOf(tensors, "other"), /expected the layers of other, found none/);
});
