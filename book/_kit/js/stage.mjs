/** What every widget stands on: controls, panels, words; drawing when the model changes. */

import { Plot, svg, write } from "./plot.mjs";

let count = 0;

/** Milliseconds of work in a frame for what is drawn little by little. */
const SLICE = 4;

/** Milliseconds of rest before a screen reader is told what the picture shows now. */
const REST = 500;

/** Run `act` when the browser has drawn its next frame, which began at `frame`. */
function afterPaint(act) {
  requestAnimationFrame(() => {
    const frame = performance.now();
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      act(frame);
    };
    port2.postMessage(null);
  });
}

/** An HTML element with its attributes and content. */
export function html(name, attributes = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content);
  return made;
}

export class Stage {
  constructor(el, model) {
    this.el = el;
    this.model = model;
    this.id = `live-${count++}`;
    this.plots = [];
    this.listening = [];
    this.job = 0; // a number for each picture: what is left to do for another is dropped
    this.calm = globalThis.matchMedia?.("(prefers-reduced-motion: reduce)").matches ?? false;
    this.root = html("div", { class: "live", role: "group", "aria-label": model.get("title") ?? "widget" });
    this.controls = html("div", { class: "live-controls" });
    this.panels = html("div", { class: "live-panels" });
    this.legendBox = html("ul", { class: "live-legend", "aria-label": "legend" });
    this.words = html("p", { class: "live-words" });
    this.spoken = html("p", { class: "live-spoken", role: "status" });
    this.root.append(this.controls, this.panels, this.legendBox, this.words, this.spoken);
    el.replaceChildren(this.root);
  }

  get(name) {
    return this.model.get(name);
  }

  /** Set values of the model, as a control does; the picture is drawn once, and only if one changed. */
  set(values) {
    if (Object.entries(values).every(([name, value]) => this.get(name) === value)) return;
    this.held = true;
    for (const [name, value] of Object.entries(values)) this.model.set(name, value);
    this.held = false;
    this.redraw();
    this.model.save_changes();
  }

  /** A slider for the number `name`. `said`: the value in words, for its output and screen readers. */
  slider({ name, label, min, max, step = 1, said = String }) {
    const id = `${this.id}-${name}`;
    const input = html("input", { id, type: "range", min, max, step, "data-name": name });
    const output = html("output", { for: id });
    const show = () => {
      const value = this.get(name);
      if (Number(input.value) !== value) input.value = value;
      output.textContent = said(value);
      input.setAttribute("aria-valuetext", said(value));
    };
    input.addEventListener("input", () => this.timed(() => this.set({ [name]: Number(input.value) })));
    this.follow(name, show);
    this.controls.append(html("div", { class: "live-control" }, html("label", { for: id }, label), input, output));
    return input;
  }

  /** A choice between the keys of `options`, which are `{ value: label }`. */
  choice({ name, label, options }) {
    const id = `${this.id}-${name}`;
    const select = html("select", { id, "data-name": name });
    for (const [value, text] of Object.entries(options)) select.append(html("option", { value }, text));
    select.addEventListener("change", () => this.timed(() => this.set({ [name]: select.value })));
    this.follow(name, () => (select.value = this.get(name)));
    this.controls.append(html("div", { class: "live-control" }, html("label", { for: id }, label), select));
    return select;
  }

  /** A panel; the arguments of `Plot`. */
  plot(settings) {
    const made = new Plot(settings);
    this.plots.push(made);
    this.panels.append(made.root);
    return made;
  }

  /** What the marks are: `[name, colour, shape]`, a shape of line, dash, dot, box. */
  legend(entries) {
    this.legendBox.replaceChildren(
      ...entries.map(([name, color, shape]) => {
        const key = svg("svg", { width: 26, height: 12, "aria-hidden": "true" });
        if (shape === "box") svg("rect", { width: 26, height: 12, fill: color }, key);
        else if (shape === "dot") svg("circle", { cx: 13, cy: 6, r: 3.5, fill: color }, key);
        else svg("path", { d: "M0 6H26", stroke: color, "stroke-width": 2, "stroke-dasharray": shape === "dash" ? "5 3" : "" }, key);
        return html("li", {}, key, name);
      }),
    );
  }

  /**
   * A handle on a plot, dragged along x by mouse or finger and moved by the arrow keys.
   *
   * `get`, `put`: the whole number that it stands for, from `min()` to `max()`; `place(made)`: where
   * it is now; `said`: the number in words. Returns what puts it in place.
   */
  handle(plot, { label, min, max, get, put, place, attributes = {}, said = String }) {
    const made = svg("rect", { class: "live-handle", tabindex: 0, role: "slider", "aria-label": label, ...attributes }, plot.handles);
    let from = null;
    const at = (event) => plot.xAt(event.clientX - plot.root.getBoundingClientRect().left);
    const clipped = (value) => Math.min(Math.max(Math.round(value), min()), max());
    made.addEventListener("pointerdown", (event) => {
      from = at(event) - get();
      made.setPointerCapture(event.pointerId);
      event.preventDefault();
      made.focus();
    });
    made.addEventListener("pointermove", (event) => {
      if (from !== null) this.timed(() => put(clipped(at(event) - from)));
    });
    for (const over of ["pointerup", "pointercancel", "lostpointercapture"]) made.addEventListener(over, () => (from = null));
    made.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -5, PageUp: 5, Home: -Infinity, End: Infinity };
      if (!(event.key in moves)) return;
      event.preventDefault();
      this.timed(() => put(clipped(get() + moves[event.key])));
    });
    return () => {
      place(made);
      const now = { valuemin: min(), valuemax: max(), valuenow: get(), valuetext: said(get()) };
      for (const [key, value] of Object.entries(now)) write(made, `aria-${key}`, value);
    };
  }

  /** Call when a value changes, and once now. */
  follow(name, listener) {
    const event = `change:${name}`;
    this.model.on(event, listener);
    this.listening.push([event, listener]);
    listener();
  }

  /** Redraw when one of these changes. */
  watch(...names) {
    this.watched = names;
  }

  /** Draw from now on. */
  begin(draw) {
    this.draw = draw;
    const now = () => this.held || this.redraw();
    for (const name of this.watched ?? []) {
      const event = `change:${name}`;
      this.model.on(event, now);
      this.listening.push([event, now]);
    }
    this.fit();
    this.redraw();
    this.observer = new ResizeObserver(() => this.fit() && this.redraw());
    this.observer.observe(this.root);
  }

  fit() {
    const room = this.panels.clientWidth;
    if (!room) return false;
    const narrow = this.plots.filter((plot) => !plot.wide).length;
    const beside = (plot) => {
      if (plot.wide || narrow < 2) return 1;
      if (plot.three) return room >= 560 ? 3 : 2;
      return room >= 560 ? 2 : 1;
    };
    const widthOf = (plot) => (room - 8 * (beside(plot) - 1)) / beside(plot);
    return this.plots.map((plot) => plot.resize(widthOf(plot))).some(Boolean);
  }

  redraw() {
    if (!this.draw || !this.plots.every((plot) => plot.width)) return;
    this.job++;
    try {
      this.say(this.draw());
    } catch (error) {
      this.fail(error);
    }
  }

  /**
   * Work that is too long for a move: `work(until)` goes on until that time and returns whether it is
   * done, a few milliseconds a frame, and is dropped at the next redraw. It begins when the move has
   * been drawn, so that no move waits for it. `shown` draws what there is: after each slice, or at
   * the end alone where the reader wants no motion.
   */
  later(work, shown) {
    const { job } = this;
    const slice = () => {
      if (job !== this.job) return;
      try {
        const done = work(performance.now() + SLICE);
        if (done || !this.calm) shown(done);
        if (!done) afterPaint(slice);
      } catch (error) {
        this.fail(error);
      }
    };
    afterPaint(slice);
  }

  /** Words under the picture; a screen reader hears them when the hand rests. */
  say(sentence) {
    if (this.words.textContent !== sentence) this.words.textContent = sentence;
    clearTimeout(this.resting);
    this.resting = setTimeout(() => (this.spoken.textContent = sentence), REST);
  }

  /** A message to people in place of the widget. */
  fail(error) {
    console.warn(error);
    this.draw = null;
    this.root.replaceChildren(html("p", { class: "live-error", role: "alert" }, `This widget cannot go on: ${error.message}`));
  }

  /**
   * Note how long an answer took, when asked to: `live-draw`, the numbers and the marks, and
   * `live-paint`, that and the browser's work on the frame that shows them. The wait for the screen's
   * next refresh in between is not counted: `detail.refresh` has it.
   */
  timed(act) {
    if (!globalThis.liveMeasure) return act();
    const start = performance.now();
    let drawn = start;
    // Asked for first, so that work put off until after the frame does not count.
    afterPaint((frame) => {
      const painted = performance.now() - frame;
      performance.measure("live-draw", { start, end: drawn });
      performance.measure("live-paint", { start, end: drawn + painted, detail: { refresh: frame - drawn } });
    });
    act();
    drawn = performance.now();
  }

  end() {
    this.job++;
    clearTimeout(this.resting);
    this.observer?.disconnect();
    for (const [event, listener] of this.listening) this.model.off(event, listener);
  }
}
