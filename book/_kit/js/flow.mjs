/**
 * Conditional flows: coupling and masked autoregressive layers around a Gaussian, or a mixture.
 *
 * The mirror of `amortlib.heads.flow`. `loadFlow` reads what `pack_flow` wrote.
 */

import { flatContextOf } from "./encoder.mjs";
import { Gaussian, GaussMarkov } from "./gaussian.mjs";
import { ACTIVATIONS, layerOf, linear, mlp } from "./mlp.mjs";
import { choleskyHead } from "./posterior.mjs";
import { parametersOf, transformerOf } from "./splines.mjs";
import { WeightFileError, readWeights } from "./weights.mjs";

const LOG_2PI = Math.log(2 * Math.PI);

/** log(sum(exp(x))). */
export function logSumExp(x) {
  const top = Math.max(...x);
  return top + Math.log(x.reduce((sum, value) => sum + Math.exp(value - top), 0));
}

/** Entry `i` of the leading axis of a tensor. */
const entry = ({ shape, data }, i) => {
  const size = shape.slice(1).reduce((n, k) => n * k, 1);
  return { shape: shape.slice(1), data: data.subarray(i * size, (i + 1) * size) };
};

/** The layers of a flow, each `{ net, order }`, from tensors with one leading axis. */
function layersOfFlow(tensors, settings) {
  const order = tensors["['order']"];
  return Array.from({ length: order.shape[0] }, (_, i) => {
    const net = [];
    for (let j = 0; `['flow'].layers[${j}].weight` in tensors; j++) {
      const [weight, bias] = ["weight", "bias"].map((name) => entry(tensors[`['flow'].layers[${j}].${name}`], i));
      net.push({ weight, bias });
    }
    return { net, order: Array.from(entry(order, i).data), ...settings };
  });
}

/** The maps of the numbers from `from` on, as the layer's net says them of `input`. */
function mapsOf(layer, input, count) {
  const said = mlp(layer.net, input, { activation: layer.activation });
  const size = parametersOf(layer);
  return Array.from({ length: count }, (_, i) => transformerOf(said.subarray(i * size, (i + 1) * size), layer));
}

/** One layer, from state towards noise: the image and the log-determinant. */
function towardsNoise(layer, x, condition) {
  const d = x.length;
  const kept = layer.kind === "coupling" ? Math.floor(d / 2) : 0;
  const input = [...(kept ? x.slice(0, kept) : layer.kind === "coupling" ? [] : x), ...condition];
  const maps = mapsOf(layer, input, d - kept);
  let logDet = 0;
  const y = Array.from(x);
  maps.forEach((map, i) => {
    const [image, log] = map.forward(x[kept + i]);
    y[kept + i] = image;
    logDet += log;
  });
  return [layer.order.map((i) => y[i]), logDet];
}

/** Its inverse. Autoregressive layers take a pass a component. */
function towardsState(layer, z, condition) {
  const d = z.length;
  const y = new Array(d);
  layer.order.forEach((from, i) => (y[from] = z[i]));
  if (layer.kind === "coupling") {
    const kept = Math.floor(d / 2);
    const maps = mapsOf(layer, [...y.slice(0, kept), ...condition], d - kept);
    maps.forEach((map, i) => ([y[kept + i]] = map.inverse(y[kept + i])));
    return y;
  }
  const x = Array.from(y);
  for (let i = 0; i < d; i++) [x[i]] = mapsOf(layer, [...x, ...condition], d)[i].inverse(y[i]);
  return x;
}

/** A mixture of flows for one event. */
export class Flow {
  /** `components`: `{ base, condition, logWeight }`, one each. */
  constructor(layers, components) {
    this.layers = layers;
    this.components = components;
    this.dim = components[0].base.dim;
  }

  /** mu + L f(z; c) of one component: a draw where z is standard normal. */
  fromNoise(z, k) {
    const { base, condition } = this.components[k];
    let x = Array.from(z);
    for (let i = this.layers.length - 1; i >= 0; i--) x = towardsState(this.layers[i], x, condition);
    return base.colour(Float64Array.from(x));
  }

  /** Log-density, exact. */
  logProb(x) {
    return logSumExp(
      this.components.map(({ base, condition, logWeight }) => {
        let z = Array.from(base.whiten(x));
        let logDet = 0;
        for (const layer of this.layers) {
          const [image, log] = towardsNoise(layer, z, condition);
          z = image;
          logDet += log;
        }
        const square = z.reduce((sum, value) => sum + value * value, 0);
        return logWeight + base.halfLogDetPrecision() - 0.5 * this.dim * LOG_2PI - 0.5 * square + logDet;
      }),
    );
  }
}

/** The posterior in a file of `pack_flow`: a function of an event that returns a `Flow`. */
export function loadFlow(bytes) {
  const { tensors, settings } = readWeights(bytes);
  if (settings.head !== "flow") throw new WeightFileError(`expected a flow, got ${settings.head}`);
  const encode = flatContextOf(tensors, settings);
  const layers = layersOfFlow(tensors, settings.layers);
  const project = layerOf(tensors, "['project']");
  const offsets = tensors["['offsets']"];
  const logits = "['logits'].weight" in tensors ? layerOf(tensors, "['logits']") : null;
  const heads = [];
  for (let k = 0; `['bases'][${k}].linear.weight` in tensors; k++) heads.push(choleskyHead(tensors, `['bases'][${k}]`));
  const fixed = heads.length ? null : priorOf(tensors);
  return (event) => {
    const context = encode(event);
    const shared = linear(project, context).map(ACTIVATIONS.gelu);
    const said = logits === null ? [0] : Array.from(linear(logits, context));
    const total = logSumExp(said);
    const components = said.map((value, k) => ({
      base: heads.length ? heads[k](context) : fixed,
      condition: Array.from(shared, (c, j) => c + entry(offsets, k).data[j]),
      logWeight: value - total,
    }));
    return new Flow(layers, components);
  };
}

/** A fixed base: dense, or Markov. */
function priorOf(tensors) {
  const get = (name) => tensors[`['prior'].${name}`];
  if (get("chol")) return new Gaussian(get("loc").data, get("chol").data);
  return new GaussMarkov(get("loc").data, get("diag").data, get("off").data, get("diag").shape[1]);
}
