import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import test from "node:test";
import { sha256 } from "../../book/_kit/js/sha256.mjs";
import { FORMAT_VERSION, WeightFileError, asBytes, readWeights } from "../../book/_kit/js/weights.mjs";

/** A weight file as `amortlib.save` writes it, with one tensor of two numbers and one of none. */
function file({ version = FORMAT_VERSION, format = "amortlib", settings = { name: "é" } } = {}) {
  const header = (digest) => JSON.stringify({
    __metadata__: { format, version, settings: JSON.stringify(settings), sha256: digest },
    two: { dtype: "F32", shape: [2], data_offsets: [0, 8] },
    none: { dtype: "F64", shape: [0, 3], data_offsets: [8, 8] },
    mask: { dtype: "BOOL", shape: [2], data_offsets: [8, 10] },
    site: { dtype: "I64", shape: [1], data_offsets: [10, 18] },
  });
  const build = (digest) => {
    const text = Buffer.from(header(digest));
    const data = Buffer.alloc(8 + text.length + 18);
    data.writeBigUInt64LE(BigInt(text.length));
    text.copy(data, 8);
    data.writeFloatLE(0.1, 8 + text.length);
    data.writeFloatLE(-2.5, 12 + text.length);
    data[16 + text.length] = 1;
    data.writeBigInt64LE(-7n, 18 + text.length);
    return data;
  };
  return build(createHash("sha256").update(build("0".repeat(64))).digest("hex"));
}

test("the digest is that of the standard, at every length around a block", () => {
  for (const length of [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000]) {
    const bytes = Uint8Array.from({ length }, (_, i) => (i * 37) % 256);
    assert.equal(sha256(bytes), createHash("sha256").update(bytes).digest("hex"));
  }
});

test("tensors come back with their names, shapes and values", () => {
  const { tensors, settings } = readWeights(file());
  assert.deepEqual(settings, { name: "é" });
  assert.deepEqual(tensors.two.shape, [2]);
  assert.deepEqual([...tensors.two.data], [Math.fround(0.1), -2.5]);
  assert.deepEqual(tensors.none, { shape: [0, 3], data: new Float64Array(0) });
  assert.deepEqual([...tensors.mask.data], [1, 0]);
  assert.deepEqual([...tensors.site.data], [-7]);
});

test("bytes may come as a view into something larger", () => {
  const bytes = file();
  const larger = new Uint8Array(bytes.length + 11);
  larger.set(bytes, 5);
  const view = new DataView(larger.buffer, 5, bytes.length);
  assert.deepEqual(readWeights(view), readWeights(bytes));
  assert.deepEqual(asBytes(Uint8Array.of(1, 2).buffer), Uint8Array.of(1, 2));
});

test("a file of another version is refused, with what to do", () => {
  assert.throws(() => readWeights(file({ version: "2" })), (error) => {
    assert.ok(error instanceof WeightFileError);
    assert.match(error.message, /expected weights of format version 1, got version 2; build the book/);
    return true;
  });
});

test("a file of something else is refused", () => {
  assert.throws(() => readWeights(file({ format: "other" })), /written by amortlib\.save/);
  assert.throws(() => readWeights(new Uint8Array(4)), /cut short/);
  assert.throws(() => readWeights(new Uint8Array(16)), /header is not readable/);
});

test("a file is refused whichever byte is damaged, and when it is cut short", () => {
  const whole = file();
  for (let at = 8; at < whole.length; at += 3) {
    const bytes = Buffer.from(whole);
    bytes[at] ^= 1;
    assert.throws(() => readWeights(bytes), WeightFileError, `byte ${at}`);
  }
  assert.throws(() => readWeights(whole.subarray(0, whole.length - 1)), /damaged/);
});
