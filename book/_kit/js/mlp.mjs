/** Dense layers and multilayer perceptrons, as `equinox.nn` computes them. */

const GELU = Math.sqrt(2 / Math.PI);

/** Activation functions by the names they have in `jax.nn`. */
export const ACTIVATIONS = {
  // Hendrycks and Gimpel (2016), the form with tanh, which is the default of jax.
  gelu: (x) => 0.5 * x * (1 + Math.tanh(GELU * (x + 0.044715 * x ** 3))),
  relu: (x) => Math.max(x, 0),
  silu: (x) => x / (1 + Math.exp(-x)),
  softplus: (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))),
  tanh: Math.tanh,
  identity: (x) => x,
};

/** W x + b of one layer `{ weight: (out, in), bias: (out,) }`. */
export function linear(layer, x) {
  const [rows, columns] = layer.weight.shape;
  if (x.length !== columns) throw new Error(`expected ${columns} inputs, got ${x.length}`);
  const weight = layer.weight.data;
  const out = new Float64Array(rows);
  for (let i = 0, k = 0; i < rows; i++) {
    let sum = layer.bias.data[i];
    for (let j = 0; j < columns; j++) sum += weight[k++] * x[j];
    out[i] = sum;
  }
  return out;
}

/** The layers of an MLP whose tensors are named `PREFIX.layers[i].weight` and `.bias`. */
export function layersOf(tensors, prefix) {
  const layers = [];
  for (let i = 0; `${prefix}.layers[${i}].weight` in tensors; i++) layers.push(layerOf(tensors, `${prefix}.layers[${i}]`));
  if (!layers.length) throw new Error(`expected the layers of ${prefix}, found none`);
  return layers;
}

/** One dense layer. */
export function layerOf(tensors, prefix) {
  const weight = tensors[`${prefix}.weight`];
  const bias = tensors[`${prefix}.bias`];
  if (!weight || !bias) throw new Error(`expected the weight and bias of ${prefix}, found none`);
  return { weight, bias };
}

/** Layer after layer, an activation after each but the last, which has its own. */
export function mlp(layers, x, { activation = "gelu", final = "identity" } = {}) {
  layers.forEach((layer, i) => {
    const act = ACTIVATIONS[i < layers.length - 1 ? activation : final];
    x = linear(layer, x).map(act);
  });
  return x;
}
