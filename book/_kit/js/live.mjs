/**
 * Live widgets, in two homes: JupyterLab, through anywidget, and a static page, through `startAll`.
 *
 * A widget is a function of a `Stage`: it puts up its controls and panels, and returns `draw`, a
 * generator that draws what the model says now, piece by piece, and returns the picture in a sentence. The model holds all state, as
 * anywidget's does: `get`, `set`, `save_changes`, `on`. Setting a value draws at once, whoever sets it.
 */

import { breakEven } from "./live/break_even.mjs";
import { faults } from "./live/faults.mjs";
import { gapExplorer } from "./live/gap.mjs";
import { holes } from "./live/holes.mjs";
import { ladder } from "./live/ladder.mjs";
import { landscape } from "./live/landscape.mjs";
import { Stage } from "./stage.mjs";

const WIDGETS = { "break-even": breakEven, faults, gap: gapExplorer, holes, ladder, landscape };

/** What anywidget calls: put the model's widget into `el`. Returns what takes it down again. */
export function render({ model, el }) {
  const stage = new Stage(el, model);
  try {
    const make = WIDGETS[model.get("kind")];
    if (!make) throw new Error(`expected a widget of ${Object.keys(WIDGETS)}, got ${model.get("kind")}`);
    stage.begin(make(stage));
  } catch (error) {
    stage.fail(error);
  }
  return () => stage.end();
}

/** The state of a widget on a page without a kernel, with the interface of anywidget's model. */
export class StaticModel {
  constructor(state) {
    this.state = state;
    this.listeners = new Map();
  }

  get(name) {
    return this.state[name];
  }

  set(name, value) {
    if (Object.is(this.state[name], value)) return;
    this.state[name] = value;
    for (const listener of this.listeners.get(`change:${name}`) ?? []) listener();
  }

  on(event, listener) {
    this.listeners.set(event, [...(this.listeners.get(event) ?? []), listener]);
  }

  off(event, listener) {
    this.listeners.set(event, (this.listeners.get(event) ?? []).filter((other) => other !== listener));
  }

  save_changes() {}
}

/** Bytes travel in a page as `{ base64 }`. */
function decoded(key, value) {
  if (!value || typeof value.base64 !== "string") return value;
  return Uint8Array.from(atob(value.base64), (letter) => letter.charCodeAt(0));
}

/** Start every widget of a page. Each holds its state in a script of its own, and a still picture. */
export function startAll(page) {
  for (const host of page.querySelectorAll("[data-live]")) {
    const still = host.querySelector(".live-still");
    const el = page.createElement("div");
    host.append(el);
    try {
      const state = JSON.parse(host.querySelector("script").textContent, decoded);
      render({ model: new StaticModel(state), el });
    } catch (error) {
      new Stage(el, new StaticModel({})).fail(error);
    }
    // The picture stays where the widget could not be started.
    if (!el.querySelector("[role=alert]")) still?.remove();
  }
}
