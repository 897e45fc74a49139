/** One hole, two answers: a gap hides the sign, and four answers stand beside the posterior. */

import { cholesky } from "../gaussian.mjs";
import { loadFlow } from "../flow.mjs";
import { fromBowl, sampler } from "../lorenz.mjs";
import { normals, uniforms } from "../noise.mjs";
import { loadScore } from "../score.mjs";
import { gapHandles, placeControls, placeOf } from "./gap_handles.mjs";
import { kernelAnswer, windowEvents } from "./window_events.mjs";

const DRAWS = 200;
const PATHS = 40;
const REFERENCE = 1500;
const NAMES = ["posterior", "Laplace", "best Gaussian", "flow", "score"];

/** An answer's name within a sentence. */
const spoken = (name) => (name === "posterior" || name === "best Gaussian" ? `the ${name}` : name);

/** Where a list of cumulative shares is passed. */
function pick(logWeights, u) {
  let k = 0;
  for (let sum = Math.exp(logWeights[0]); k < logWeights.length - 1 && sum < u; sum += Math.exp(logWeights[k])) k++;
  return k;
}

/** The Gaussian with the mean and the covariance of weighted draws of a state: a draw from noise. */
function bestGaussian(states, weights) {
  const mean = [0, 1, 2].map((i) => states.reduce((sum, x, n) => sum + weights[n] * x[i], 0));
  const covariance = new Float64Array(9);
  states.forEach((x, n) => {
    for (let i = 0; i < 3; i++) for (let j = 0; j < 3; j++) covariance[3 * i + j] += weights[n] * (x[i] - mean[i]) * (x[j] - mean[j]);
  });
  const low = cholesky(covariance, 3);
  return (z) => mean.map((m, i) => m + low[3 * i] * z[0] + (i > 0 ? low[3 * i + 1] * z[1] : 0) + (i > 1 ? low[3 * i + 2] * z[2] : 0));
}

/** What each answer gives for one event: functions of noise, one draw a call. */
function answersOf({ energy, bowls, flow, score, event }, noise, uniform) {
  const reference = sampler(energy, bowls, noise);
  const fromFlow = flow(event);
  const fromScore = score(event);
  const flowWeights = fromFlow.components.map((part) => part.logWeight);
  const scoreWeights = fromScore.frames.map((part) => part.logWeight);
  return {
    reference,
    Laplace: (z) => energy.state(fromBowl(bowls[0], z, 1)),
    flow: (z) => fromFlow.fromNoise(z, pick(flowWeights, uniform())),
    score: (z) => fromScore.fromNoise(z, pick(scoreWeights, uniform())),
  };
}

export function holes(stage) {
  const roles = stage.get("roles");
  const numbers = windowEvents(stage.get("window"), stage.get("data"));
  const [flow, score] = [loadFlow(stage.get("flow")), loadScore(stage.get("score"))];
  const { times, window } = numbers;
  placeControls(stage, times);
  stage.choice({ name: "shown", label: "paths of", options: Object.fromEntries(NAMES.map((name) => [name, name])) });

  const colours = { posterior: roles.exact, Laplace: roles.prior, "best Gaussian": roles.prior, flow: roles.amortized, score: roles.amortized };
  const path = stage.plot({
    label: "Draws of x over time from the chosen answer, beside the truth and what the observations say of x",
    x: { label: "observation", from: -0.5, to: times - 0.5 },
    y: { label: "x", from: -22, to: 22 },
    height: 210,
    wide: true,
  });
  const clouds = Object.fromEntries(
    NAMES.map((name) => [
      name,
      stage.plot({
        label: `Draws of ${name} in the plane of x and z at the first time`,
        x: { label: name, from: -22, to: 22 },
        y: { label: "z", from: 0, to: 48 },
        height: 180,
        left: 40,
        three: true,
      }),
    ]),
  );
  const kernel = kernelAnswer(stage, path, numbers, [
    ["gap: drag it, or its edges", roles.gap, "box"],
    ["truth", roles.truth, "line"],
    ["observed: x, then |x| with both signs", roles.obs, "dot"],
    ["posterior", roles.exact, "dot"],
    ["Laplace, best Gaussian", roles.prior, "dot"],
    ["flow, score", roles.amortized, "dot"],
  ]);
  gapHandles(stage, path, times);
  const t = Array.from({ length: times }, (_, k) => k);
  const { unit } = stage.get("window").sees;
  const noises = Object.fromEntries(NAMES.map((name, i) => [name, normals(20 + i, 3 * (name === "posterior" ? REFERENCE : DRAWS))]));

  stage.watch("start", "length", "event", "shown", "overlay");
  return function* () {
    const at = placeOf(stage);
    const shown = stage.get("shown");
    const energy = numbers.energy(at);
    const bowls = yield* numbers.survey(energy);
    const { y, mask } = energy.event;
    const uniform = uniforms(7);
    const answers = answersOf({ energy, bowls, flow, score, event: { y, mask } }, noises.posterior, uniform);
    const draws = Object.fromEntries(NAMES.map((name) => [name, []]));

    yield;
    kernel();
    const truth = numbers.truth(at.event);
    const seen = t.map((k) => mask[k * window.width]);
    path.line("truth", t, numbers.xOf(truth), { color: roles.truth, width: 2.2 });
    const size = t.map((k) => (k === 0 ? y[0] : Math.sqrt(Math.max(y[k * window.width], 0) * unit)));
    const dots = t.flatMap((k) => (seen[k] ? (k === 0 ? [[k, size[k]]] : [[k, size[k]], [k, -size[k]]]) : []));
    path.dots("obs", dots.map(([k]) => k), dots.map(([, x]) => x), { color: roles.obs, radius: 4 });
    for (const name of NAMES) clouds[name].dots("truth", [truth[0]], [truth[2]], { color: roles.truth, radius: 4 });

    yield;

    const show = () => {
      for (const name of NAMES) {
        const made = draws[name];
        clouds[name].dots("draws", made.map((x) => x[0]), made.map((x) => x[2]), { color: colours[name], radius: 1.5, opacity: 0.7 });
      }
      const lines = draws[shown].slice(0, PATHS).map(numbers.xOf);
      const xs = lines.flatMap(() => [...t, NaN]);
      path.line("draws", xs, lines.flatMap((line) => [...line, NaN]), { color: colours[shown], width: 0.8 });
    };
    const missing = seen.filter((here) => !here).length;
    const first = `${missing} of ${times} times are missing; J has ${bowls.length === 1 ? "one minimum" : `${bowls.length} minima`} within 20 nats. The paths are draws of ${spoken(shown)}.`;
    const share = (name) => Math.round((100 * draws[name].filter((x) => x[0] > 0).length) / draws[name].length);
    const last = () => ` Draws with x above zero: ${NAMES.map((name) => `${name} ${share(name)}%`).join(", ")}.`;

    const z = (name, i) => noises[name].subarray(3 * i, 3 * i + 3);
    stage.later(
      function* () {
        while (answers.reference.more(50, uniform) < REFERENCE) yield;
        const { draws: all, weights } = answers.reference.weighted();
        const gaussian = bestGaussian(all.map(({ x }) => energy.state(x)), weights);
        draws.posterior = shuffled(answers.reference.resample(DRAWS)).map((v) => energy.state(v));
        for (let i = 0; i < DRAWS; i++) {
          yield;
          for (const name of ["Laplace", "flow", "score"]) draws[name].push(answers[name](z(name, i)));
          draws["best Gaussian"].push(gaussian(z("best Gaussian", i)));
        }
      },
      (done) => {
        show();
        if (done) stage.say(first + last());
      },
    );
    show();
    return first;
  };
}

/** In another order, always the same: neighbours of a resampled list are alike. */
function shuffled(list) {
  const next = uniforms(8);
  return list.map((x) => [next(), x]).sort(([a], [b]) => a - b).map(([, x]) => x);
}
