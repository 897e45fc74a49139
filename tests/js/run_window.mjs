/** node run_window.mjs SETTINGS.json VECTORS: worst differences of J and its derivatives, as JSON. */

import { readFileSync } from "node:fs";
import { WindowEnergy, lorenzWindow } from "../../book/_kit/js/lorenz.mjs";
import { readWeights } from "../../book/_kit/js/weights.mjs";
import { difference } from "./parity.mjs";

const [settings, vectors] = process.argv.slice(2).map((path) => readFileSync(path));
const window = lorenzWindow(JSON.parse(settings));
const { tensors } = readWeights(vectors);
const get = (name) => tensors[`['${name}']`];
const row = (name, i) => {
  const { shape, data } = get(name);
  const size = shape.slice(1).reduce((n, k) => n * k, 1);
  return data.subarray(i * size, (i + 1) * size);
};
const prior = { loc: get("loc").data, chol: get("chol").data };
const worst = { events: 0 };
const note = (name, got, wanted) => (worst[name] = Math.max(worst[name] ?? 0, difference(got, wanted)));
for (let i = 0; i < get("v").shape[0]; i++) {
  const v = row("v", i);
  const event = { y: row("y", i), mask: Array.from(row("mask", i), Boolean), sd: row("sd", i) };
  const energy = new WindowEnergy(window, prior, event);
  const here = energy.look(v);
  note("path", window.path(energy.state(v)), row("path", i));
  note("control", energy.control(energy.state(v)), v);
  note("cost", [energy.cost(v)], row("cost", i));
  note("cost of a look", [here.cost], row("cost", i));
  note("slope", here.slope, row("slope", i));
  note("gauss", here.gauss, row("gauss", i));
  note("hessian", energy.hessian(v), row("hessian", i));
  const looks = energy.refine(v, 3);
  note("refined", looks[looks.length - 1].v, row("refined", i));
  worst.events += 1;
}
console.log(JSON.stringify(worst));
