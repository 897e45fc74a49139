/** The gap explorer: move a gap through a path, and see the exact and the amortized posterior. */

import { kl } from "../gaussian.mjs";
import { exactPosterior, gap, loadPosterior, priorOf } from "../posterior.mjs";
import { readWeights } from "../weights.mjs";
import { gapControls, gapHandles, placeOf } from "./gap_handles.mjs";
import { kernelLegend } from "./kernel.mjs";

const Z = 1.96;

/** The numbers behind the picture: loaded once, and `answer` for every position, in pieces. */
export function gapNumbers(heads, paths) {
  const { tensors } = readWeights(paths);
  const prior = priorOf(tensors, "['prior']");
  const loaded = Object.fromEntries(Object.entries(heads).map(([name, bytes]) => [name, loadPosterior(bytes)]));
  const n = prior.dim;
  const row = (name, i) => tensors[`['${name}']`].data.subarray(i * n, (i + 1) * n);
  return {
    n,
    *answer({ head, start, length, noise, event }) {
      const truth = row("truth", event);
      const y = row("errors", event).map((error, t) => truth[t] + noise * error);
      const mask = gap(n, start, length);
      const seen = { y, mask, sd: new Float64Array(n).fill(noise) };
      const exact = exactPosterior(prior, seen);
      yield;
      const q = loaded[head](seen);
      yield;
      return { truth, y, mask, exact: moments(exact), head: moments(q), kl: Math.max(kl(exact, q), 0) };
    },
  };
}

const moments = (density) => ({ mean: density.mean(), sd: density.sd() });

/** The picture in one sentence; the same as `GapPicture.words`. */
export function gapWords({ mask, head, kl }) {
  const missing = mask.filter((seen) => !seen).length;
  return (
    `${missing} of ${mask.length} times are missing; the amortized standard deviation is ` +
    `${Math.min(...head.sd).toFixed(2)} at its smallest and ${Math.max(...head.sd).toFixed(2)} at its largest, ` +
    `and the amortized posterior is ${kl.toFixed(4)} nats from the exact one.`
  );
}

export function gapExplorer(stage) {
  const roles = stage.get("roles");
  const heads = stage.get("heads");
  const numbers = gapNumbers(heads, stage.get("paths"));
  const { n } = numbers;
  const t = Array.from({ length: n }, (_, i) => i);
  const fixed = (digits) => (value) => value.toFixed(digits);

  gapControls(stage, n);
  const [low, high] = stage.get("noise_range");
  if (low < high) stage.slider({ name: "noise", label: "noise sd", min: low, max: high, step: 0.05, said: fixed(2) });
  stage.slider({ name: "event", label: "event", min: 0, max: stage.get("events") - 1 });
  const names = Object.keys(heads);
  if (names.length > 1) stage.choice({ name: "head", label: "head", options: Object.fromEntries(names.map((name) => [name, name])) });

  const plot = stage.plot({
    label: "A path over time with a shaded gap, its observations, and the exact and amortized posteriors",
    x: { label: "time step", from: -0.5, to: n - 0.5 },
    y: { label: "state", from: -3.5, to: 3.5 },
  });
  const legend = [
    ["gap: drag it, or its edges", roles.gap, "box"],
    ["truth", roles.truth, "line"],
    ["observations", roles.obs, "dot"],
    ["exact, 95%", roles.exact, "dash"],
    ["amortized, 95%", roles.amortized, "line"],
  ];
  const kernel = kernelLegend(stage, legend, [roles.prior, "line"]);
  gapHandles(stage, plot, n);

  stage.watch("start", "length", "noise", "event", "head", "overlay");
  return function* () {
    const found = yield* numbers.answer({ ...placeOf(stage), noise: stage.get("noise"), head: stage.get("head") });
    const side = ({ mean, sd }, z) => mean.map((m, i) => m + z * sd[i]);
    const { truth, y, mask, exact, head } = found;
    yield;
    plot.band("head", t, side(head, -Z), side(head, Z), { color: roles.amortized });
    plot.line("head mean", t, head.mean, { color: roles.amortized });
    yield;
    plot.line("exact", t, exact.mean, { color: roles.exact, dash: "5 3" });
    plot.line("exact low", t, side(exact, -Z), { color: roles.exact, dash: "5 3", width: 1 });
    plot.line("exact high", t, side(exact, Z), { color: roles.exact, dash: "5 3", width: 1 });
    plot.line("truth", t, truth, { color: roles.truth, width: 1.2 });
    plot.dots("obs", t, y.map((value, i) => (mask[i] ? value : NaN)), { color: roles.obs });
    const { mean = [], sd = [] } = kernel();
    plot.band("more", t.slice(0, mean.length), side({ mean, sd }, -Z), side({ mean, sd }, Z), { color: roles.prior });
    plot.line("more mean", t.slice(0, mean.length), mean, { color: roles.prior });
    return gapWords(found);
  };
}
