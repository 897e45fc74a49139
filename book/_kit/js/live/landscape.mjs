/** The energy landscape: the minima of J for a gappy window, and the posterior beside them. */

import { solveLower, solveUpper } from "../gaussian.mjs";
import { covarianceIn, sampler, squaredIn } from "../lorenz.mjs";
import { normals, uniforms } from "../noise.mjs";
import { gapHandles, placeControls, placeOf } from "./gap_handles.mjs";
import { kernelAnswer, windowEvents } from "./window_events.mjs";

const CHI2_95 = 7.8147;
const CHI2_95_PLANE = 5.9915;
const DRAWS = 2500;
const DOTS = 300;

/** The ellipse that holds 95% of a Gaussian in the plane. */
function ellipse([cx, cy], root, [i, j]) {
  const [xx, xy, yy] = [covarianceIn(root, i, i), covarianceIn(root, i, j), covarianceIn(root, j, j)];
  const a = Math.sqrt(xx * CHI2_95_PLANE);
  const b = (xy / xx) * a;
  const c = Math.sqrt(Math.max(yy - xy ** 2 / xx, 0) * CHI2_95_PLANE);
  const angles = Array.from({ length: 49 }, (_, i) => (i * Math.PI) / 24);
  return [angles.map((t) => cx + a * Math.cos(t)), angles.map((t) => cy + b * Math.cos(t) + c * Math.sin(t))];
}

/** The direction in which J is weakest, one standard deviation long: inverse iteration. */
function weakest({ low }) {
  let z = Float64Array.of(1, 0.7, 0.4);
  let size = 1;
  for (let n = 0; n < 60; n++) {
    z = solveUpper(low, solveLower(low, z, 3), 3);
    size = Math.hypot(...z);
    z = z.map((x) => x / size);
  }
  // Its image under the inverse Hessian is `size` times as long: the variance along it.
  const largest = z.reduce((best, x) => (Math.abs(x) > Math.abs(best) ? x : best), 0);
  return z.map((x) => x * Math.sign(largest) * Math.sqrt(size));
}

/** The picture in words; the same as `LandscapePicture.words`, the last sentence once it is known. */
export function landscapeWords({ times, missing, bowls, inside }) {
  const found =
    bowls.length > 1
      ? `J has ${bowls.length} minima within 20 nats, the second ${(bowls[1].cost - bowls[0].cost).toFixed(1)} nats above the lowest`
      : "J has one minimum within 20 nats";
  const last =
    inside === undefined
      ? ""
      : " The region that Laplace's approximation at the lowest takes for 95% holds " +
        `${(100 * inside).toFixed(0)}% of the posterior.`;
  return `${missing} of ${times} times are missing; ${found}.${last}`;
}

export function landscape(stage) {
  const roles = stage.get("roles");
  const numbers = windowEvents(stage.get("window"), stage.get("data"));
  const { times, window, prior } = numbers;
  const components = stage.get("components");
  const [first, second] = stage.get("names");
  placeControls(stage, times);

  const path = stage.plot({
    label: `Forecasts of ${first} over the window from the lowest minima, beside the truth and the observations`,
    x: { label: "time step", from: -0.5, to: times - 0.5 },
    y: { label: `${first}(t)`, from: -24, to: 24 },
    height: 210,
    wide: true,
  });
  const line = stage.plot({
    label: "J above its minimum, along the line from the lowest minimum to the second or along the weakest direction",
    x: { label: "", from: -0.3, to: 1.3 },
    y: { label: "J above its minimum", from: -0.4, to: 8 },
    height: 260,
  });
  const [i, j] = components;
  const spread = (k) => Math.sqrt(covarianceIn(prior.chol, k, k));
  const plane = stage.plot({
    label: `The plane of ${first} and ${second} at time 0: draws of the posterior, Laplace's ellipses, the background`,
    x: { label: `${first} at time 0`, from: prior.loc[i] - 3 * spread(i), to: prior.loc[i] + 3 * spread(i) },
    y: { label: `${second} at time 0`, from: prior.loc[j] - 3 * spread(j), to: prior.loc[j] + 3 * spread(j) },
    height: 260,
  });
  const kernel = kernelAnswer(stage, path, numbers, [
    ["gap: drag it, or its edges", roles.gap, "box"],
    ["truth", roles.truth, "line"],
    ["observations", roles.truth, "dot"],
    ["posterior", roles.exact, "dot"],
    ["lowest minimum", roles.amortized, "line"],
    ["second minimum", roles.obs, "line"],
    ["background, 95%", roles.prior, "dash"],
  ]);
  gapHandles(stage, path, times);
  const noise = normals(5, 3 * DRAWS);
  const t = Array.from({ length: times }, (_, k) => k);
  const seenFirst = (clean) => t.map((k) => clean[k * window.width]);
  const back = ellipse([prior.loc[i], prior.loc[j]], prior.chol, components);
  const colours = [roles.amortized, roles.obs];

  stage.watch("start", "length", "event", "overlay");
  return function* () {
    const at = placeOf(stage);
    const energy = numbers.energy(at);
    const bowls = yield* numbers.survey(energy);
    const { mask, y } = energy.event;
    const seen = t.map((k) => mask[k * window.width]);
    const truth = numbers.truth(at.event);

    yield;
    kernel();
    path.line("truth", t, seenFirst(window.path(truth)), { color: roles.truth, width: 1.2 });
    path.dots("obs", t, t.map((k) => (seen[k] ? y[k * window.width] : NaN)), { color: roles.truth });
    yield;
    const two = bowls.slice(0, 2);
    const states = two.map(({ v }) => energy.state(v));
    for (const k of [0, 1]) {
      const color = colours[k];
      path.line(`path ${k}`, t, two[k] ? seenFirst(window.path(states[k])) : [], { color });
      const [xs, ys] = two[k] ? ellipse([states[k][i], states[k][j]], energy.rootOf(two[k]), components) : [[], []];
      plane.line(`ellipse ${k}`, xs, ys, { color });
      plane.dots(`mode ${k}`, two[k] ? [states[k][i]] : [], two[k] ? [states[k][j]] : [], { color, radius: 5 });
    }
    plane.line("background", ...back, { color: roles.prior, dash: "2 3" });
    plane.dots("truth", [truth[i]], [truth[j]], { color: roles.truth, radius: 4 });

    yield;
    const many = two.length > 1;
    const across = many ? two[1].v.map((x, k) => x - two[0].v[k]) : weakest(two[0]);
    const [from, to] = many ? [-0.3, 1.3] : [-4, 4];
    const steps = Array.from({ length: 161 }, (_, k) => from + ((to - from) * k) / 160);
    const rise = many ? two[1].cost - two[0].cost : 0;
    const top = many ? Math.max(8, 1.4 * rise) : 8;
    const heights = steps.map((s) => energy.cost(two[0].v.map((x, k) => x + s * across[k])) - two[0].cost);
    yield;
    line.range({ x: { from, to, label: many ? "from the lowest to the second minimum" : "sd, weakest direction" }, y: { from: -0.05 * top, to: top } });
    line.line("J", steps, heights.map((x) => Math.min(x, 10 * top)), { color: roles.exact });
    line.dots("low", [0], [0], { color: roles.amortized, radius: 5 });
    line.dots("next", [1], [many ? rise : NaN], { color: roles.obs, radius: 5 });

    const draws = sampler(energy, bowls, noise);
    const uniform = uniforms(6);
    const drawn = (xs, ys) => plane.dots("draws", xs, ys, { color: roles.exact, radius: 1.4, opacity: 0.6 });
    const missing = seen.filter((here) => !here).length;
    stage.later(
      function* () {
        while (draws.more(50, uniform) < DRAWS) yield;
      },
      (done) => {
        const cloud = draws.resample(DOTS).map((v) => energy.state(v));
        drawn(cloud.map((x) => x[i]), cloud.map((x) => x[j]));
        if (!done) return;
        const { draws: all, weights } = draws.weighted();
        const inside = all.reduce((sum, { x }, k) => sum + (squaredIn(two[0], x) <= CHI2_95 ? weights[k] : 0), 0);
        stage.say(landscapeWords({ times, missing, bowls, inside }));
      },
      () => drawn([], []),
    );
    return landscapeWords({ times, missing, bowls });
  };
}
