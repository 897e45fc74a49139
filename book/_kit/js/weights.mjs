/**
 * Weight files: the safetensors format with the header that `amortlib.export` writes.
 *
 * A tensor is `{ shape, data }` with `data` a `Float64Array` in C order: JavaScript computes in
 * double precision, and single-precision weights are taken over exactly.
 */

import { sha256 } from "./sha256.mjs";

/** The version of the format that this code reads; the same as `amortlib.export.FORMAT_VERSION`. */
export const FORMAT_VERSION = "1";

/** A file that cannot be used: the message says what was expected and what came. */
export class WeightFileError extends Error {}

const READ = {
  F64: [8, (view, at) => view.getFloat64(at, true)],
  F32: [4, (view, at) => view.getFloat32(at, true)],
  I64: [8, (view, at) => Number(view.getBigInt64(at, true))],
  I32: [4, (view, at) => view.getInt32(at, true)],
  U8: [1, (view, at) => view.getUint8(at)],
  BOOL: [1, (view, at) => view.getUint8(at)],
};

/** The `Uint8Array` over whatever a trait of bytes arrives as. */
export function asBytes(given) {
  if (given instanceof Uint8Array) return given;
  if (ArrayBuffer.isView(given)) {
    return new Uint8Array(given.buffer, given.byteOffset, given.byteLength);
  }
  return new Uint8Array(given);
}

/**
 * Read a file: `{ tensors, settings }`, tensors by name.
 *
 * Throws a `WeightFileError` where the file is cut short, damaged, of another version, or not
 * written by amortlib.
 */
export function readWeights(given) {
  const bytes = asBytes(given);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.length < 8 ? Infinity : Number(view.getBigUint64(0, true));
  if (length > bytes.length - 8) {
    throw new WeightFileError(`expected a weight file, got ${bytes.length} bytes cut short`);
  }
  const text = new TextDecoder().decode(bytes.subarray(8, 8 + length));
  let header;
  try {
    header = JSON.parse(text);
  } catch {
    throw new WeightFileError("expected a weight file, got one whose header is not readable");
  }
  const metadata = header.__metadata__ ?? {};
  if (metadata.format !== "amortlib") {
    throw new WeightFileError("expected a weight file written by amortlib.save");
  }
  if (metadata.version !== FORMAT_VERSION) {
    throw new WeightFileError(
      `expected weights of format version ${FORMAT_VERSION}, got version ${metadata.version}; ` +
        "build the book again with the release that it belongs to",
    );
  }
  if (!isWhole(bytes, text, metadata.sha256)) {
    throw new WeightFileError("expected a whole weight file, got one that is damaged");
  }
  const tensors = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name !== "__metadata__") tensors[name] = readTensor(name, entry, view, 8 + length);
  }
  return { tensors, settings: JSON.parse(metadata.settings) };
}

/** The digest covers every byte of the file but its own, which counts as zeros. */
function isWhole(bytes, text, digest) {
  const seal = text.indexOf(`"sha256":"${digest}"`);
  if (typeof digest !== "string" || digest.length !== 64 || seal < 0) return false;
  // The header may hold letters that take several bytes: count bytes, not letters.
  const start = 8 + new TextEncoder().encode(text.slice(0, seal)).length + '"sha256":"'.length;
  // A copy: the `slice` of node's buffers is a view, and would write into the file itself.
  const unsealed = Uint8Array.from(bytes);
  unsealed.fill("0".charCodeAt(0), start, start + 64);
  return sha256(unsealed) === digest;
}

function readTensor(name, entry, view, start) {
  if (!(entry.dtype in READ)) {
    throw new WeightFileError(`expected ${name} to be of ${Object.keys(READ)}, got ${entry.dtype}`);
  }
  const [size, read] = READ[entry.dtype];
  const [from, to] = entry.data_offsets;
  const data = new Float64Array((to - from) / size);
  for (let i = 0; i < data.length; i++) data[i] = read(view, start + from + i * size);
  return { shape: entry.shape, data };
}
