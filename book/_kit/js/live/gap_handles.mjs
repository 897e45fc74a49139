/** The gap of a record: its sliders, and its shade on a plot, which is dragged whole or by its edges. */

import { write } from "../plot.mjs";

export function gapControls(stage, n) {
  stage.slider({ name: "start", label: "gap start", min: 0, max: n - 1 });
  stage.slider({ name: "length", label: "gap length", min: 0, max: n });
}

/** The gap and the event. */
export function placeControls(stage, n) {
  gapControls(stage, n);
  stage.slider({ name: "event", label: "event", min: 0, max: stage.get("events") - 1 });
}

/** Where those stand. */
export const placeOf = (stage) => Object.fromEntries(["start", "length", "event"].map((name) => [name, stage.get(name)]));

/** The shade of the gap and its handles, on a plot whose x counts times from 0. */
export function gapHandles(stage, plot, n) {
  // The gap as the picture shows it, cut at the end of the record.
  const start = () => stage.get("start");
  const end = () => Math.min(start() + stage.get("length"), n);
  const body = { y: plot.top, height: plot.plotHeight };
  const across = (from, to) => (made) => {
    const [a, b] = [plot.px(from() - 0.5), plot.px(to() - 0.5)];
    write(made, "x", a);
    write(made, "width", Math.max(b - a, 0));
  };
  const around = (where) => (made) => write(made, "x", plot.px(where() - 0.5) - 14);
  const edge = { y: plot.top, height: plot.plotHeight, width: 28 };
  stage.places.push(() => plot.shade("gap", start() - 0.5, end() - 0.5, stage.get("roles").gap));
  stage.handle(plot, {
    label: "the gap",
    min: () => 0,
    max: () => n - 1,
    get: start,
    put: (value) => stage.set({ start: value }),
    place: across(start, end),
    attributes: { ...body, "data-handle": "body", class: "live-handle live-body" },
    said: (value) => `starts at ${value}`,
  });
  stage.handle(plot, {
    label: "left edge of the gap",
    min: () => 0,
    max: () => Math.min(end(), n - 1),
    get: start,
    put: (value) => stage.set({ start: value, length: end() - value }),
    place: around(start),
    attributes: { ...edge, "data-handle": "left" },
    said: (value) => `starts at ${value}`,
  });
  stage.handle(plot, {
    label: "right edge of the gap",
    min: start,
    max: () => n,
    get: end,
    put: (value) => stage.set({ length: value - start() }),
    place: around(end),
    attributes: { ...edge, "data-handle": "right" },
    said: (value) => `ends before ${value}`,
  });
}
