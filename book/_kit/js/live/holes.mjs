/** One hole, two answers: a gap hides the sign, and five answers stand beside the posterior. */

import { loadFlow } from "../flow.mjs";
import { fromBowl, sampler } from "../lorenz.mjs";
import { normals, uniforms } from "../noise.mjs";
import { loadPosterior } from "../posterior.mjs";
import { brownianPath, loadScore } from "../score.mjs";
import { gapHandles, placeControls, placeOf } from "./gap_handles.mjs";
import { kernelAnswer, windowEvents } from "./window_events.mjs";

const DRAWS = 200;
const PATHS = 40;
const REFERENCE = 1500;
const STEPS = 24;
const ROADS = ["score by ODE", "score by SDE"];
const NAMES = ["posterior", "Laplace", "regression", "flow", ...ROADS];

/** An answer's name within a sentence. */
const spoken = (name) =>
  ({ posterior: "the posterior", regression: "the regression head", flow: "the flow" })[name] ?? name.replace("score", "the score");

/** Where a list of cumulative shares is passed. */
function pick(logWeights, u) {
  let k = 0;
  for (let sum = Math.exp(logWeights[0]); k < logWeights.length - 1 && sum < u; sum += Math.exp(logWeights[k])) k++;
  return k;
}

/** What each answer gives for one event: functions of noise, one draw a call, and the score itself. */
function answersOf({ energy, bowls, heads, event }, noise, uniform) {
  const [regression, flow, score] = [heads.regression(event), heads.flow(event), heads.score(event)];
  const flowWeights = flow.components.map((part) => part.logWeight);
  return {
    reference: sampler(energy, bowls, noise),
    score,
    Laplace: (z) => energy.state(fromBowl(bowls[0], z, 1)),
    regression: (z) => regression.colour(z),
    flow: (z) => flow.fromNoise(z, pick(flowWeights, uniform())),
  };
}

/** Draws of the score head on one of the two roads: they set out from noise, and walk side by side. */
class Walkers {
  constructor(score, road) {
    this.score = score;
    this.bySde = road === "score by SDE";
    this.all = [];
  }

  /** One more: 3 normal numbers to start from, and those of a path. */
  add(z, k) {
    const path = this.bySde ? brownianPath(z.subarray(3), STEPS) : null;
    this.all.push({ k, path, u: this.score.start(z.subarray(0, 3), k) });
  }

  /** Step `i` of one of them. */
  step(one, i) {
    const { u, k, path } = one;
    one.u = this.bySde ? this.score.sdeStep(u, k, i, path) : this.score.odeStep(u, k, i, STEPS);
  }

  states() {
    return this.all.map(({ u, k }) => this.score.colour(u, k));
  }
}

export function holes(stage) {
  const roles = stage.get("roles");
  const numbers = windowEvents(stage.get("window"), stage.get("data"));
  const load = { regression: loadPosterior, flow: loadFlow, score: loadScore };
  const heads = Object.fromEntries(Object.entries(load).map(([name, read]) => [name, read(stage.get(name))]));
  const { times, window } = numbers;
  placeControls(stage, times);
  stage.choice({ name: "shown", label: "paths of", options: Object.fromEntries(NAMES.map((name) => [name, name])) });

  const colourOf = (name) => ({ posterior: roles.exact, Laplace: roles.prior })[name] ?? roles.amortized;
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
    ["Laplace", roles.prior, "dot"],
    ["regression, flow, score", roles.amortized, "dot"],
  ]);
  gapHandles(stage, path, times);
  const t = Array.from({ length: times }, (_, k) => k);
  const { unit } = stage.get("window").sees;
  const sizeOf = (name) => (name === "score by SDE" ? 3 + 6 * STEPS : 3);
  const countOf = (name) => (name === "posterior" ? REFERENCE : DRAWS);
  const noises = Object.fromEntries(NAMES.map((name, i) => [name, normals(20 + i, countOf(name) * sizeOf(name))]));

  stage.watch("start", "length", "event", "shown", "overlay");
  return function* () {
    const at = placeOf(stage);
    const shown = stage.get("shown");
    const energy = numbers.energy(at);
    const bowls = yield* numbers.survey(energy);
    const { y, mask } = energy.event;
    const uniform = uniforms(7);
    const answers = answersOf({ energy, bowls, heads, event: { y, mask } }, noises.posterior, uniform);
    const draws = Object.fromEntries(NAMES.map((name) => [name, []]));
    const walkers = {};

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

    const written = {};
    const show = () => {
      for (const name of NAMES) {
        if (!walkers[name] && written[name] === draws[name].length) continue;
        const made = walkers[name]?.states() ?? draws[name];
        written[name] = walkers[name] ? -1 : made.length;
        clouds[name].dots("draws", made.map((x) => x[0]), made.map((x) => x[2]), { color: colourOf(name), radius: 1.5, opacity: 0.7 });
      }
      // No path of those that are on their way: what is still noise is no state.
      const lines = draws[shown].slice(0, PATHS).map(numbers.xOf);
      const xs = lines.flatMap(() => [...t, NaN]);
      path.line("draws", xs, lines.flatMap((line) => [...line, NaN]), { color: colourOf(shown), width: 0.8 });
    };
    /** Noise becomes states, on both roads at once and level after level. */
    function* walk() {
      const weights = answers.score.frames.map((part) => part.logWeight);
      for (const road of ROADS) {
        const made = new Walkers(answers.score, road);
        for (let i = 0; i < DRAWS; i++) {
          yield;
          made.add(z(road, i), pick(weights, uniform()));
        }
        walkers[road] = made;
      }
      for (let step = 0; step < STEPS; step++) {
        for (let i = 0; i < DRAWS; i++) {
          for (const road of ROADS) {
            yield;
            walkers[road].step(walkers[road].all[i], step);
          }
        }
      }
      for (const road of ROADS) {
        draws[road] = walkers[road].states();
        delete walkers[road];
      }
    }
    const missing = seen.filter((here) => !here).length;
    const first = `${missing} of ${times} times are missing; J has ${bowls.length === 1 ? "one minimum" : `${bowls.length} minima`} within 20 nats. The paths are draws of ${spoken(shown)}.`;
    const share = (name) => Math.round((100 * draws[name].filter((x) => x[0] > 0).length) / draws[name].length);
    const last = () => ` Draws with x above zero: ${NAMES.map((name) => `${name} ${share(name)}%`).join(", ")}.`;

    const z = (name, i) => noises[name].subarray(sizeOf(name) * i, sizeOf(name) * (i + 1));
    stage.later(
      function* () {
        while (answers.reference.more(50, uniform) < REFERENCE) yield;
        draws.posterior = shuffled(answers.reference.resample(DRAWS)).map((v) => energy.state(v));
        for (let i = 0; i < DRAWS; i++) {
          yield;
          for (const name of ["Laplace", "regression", "flow"]) draws[name].push(answers[name](z(name, i)));
        }
        yield* walk();
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
