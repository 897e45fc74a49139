/** Standard normal numbers from a seed: the mirror of `_kit/noise.py`. */

const STEP = 0x6d2b79f5;

/** A function that returns the next number above 0 and below 1. */
export function uniforms(seed) {
  let a = seed | 0;
  return () => {
    a = (a + STEP) | 0;
    let t = Math.imul(a ^ (a >>> 15), a | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
}

/** `n` standard normal numbers. */
export function normals(seed, n) {
  const next = uniforms(seed);
  const out = new Float64Array(n);
  for (let i = 0; i < n; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(next()));
    const angle = 2 * Math.PI * next();
    out[i] = radius * Math.cos(angle);
    if (i + 1 < n) out[i + 1] = radius * Math.sin(angle);
  }
  return out;
}
