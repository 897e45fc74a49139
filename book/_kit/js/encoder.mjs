/** Contexts of the plain encoder, in the units that it was trained in. */

import { layersOf, mlp } from "./mlp.mjs";

/**
 * `ScaledEncoder(FlatEncoder)`: values in units of their spread, and the mask, through one net.
 *
 * An event is `{ y, mask }`, flat arrays; what stands at entries that were not seen is never read.
 */
export function flatContextOf(tensors, { activation }) {
  const layers = layersOf(tensors, "['net']");
  const centre = tensors["['centre']"].data;
  const scale = tensors["['scale']"].data;
  return ({ y, mask }) => {
    const values = mask.map((seen, t) => (seen ? (y[t] - centre[t]) / scale[t] : 0));
    return mlp(layers, [...values, ...mask.map(Number)], { activation, final: activation });
  };
}
