/** What every widget stands on: controls, panels, words; drawing when the model changes. */

import { Plot, svg, write } from "./plot.mjs";

let count = 0;

/** Milliseconds of a frame that a move may take before the rest of its picture is left to the next frame. */
const FRAME = 8;

/** Milliseconds of work in a frame for what is drawn little by little. */
const SLICE = 4;

/** A machine that takes longer than this for a picture, or for a frame of it, is slow: in milliseconds. */
const SLOW = 6;

/** Milliseconds without a move before a slow machine begins what is too long for a move. */
const PAUSE = 150;

/** Milliseconds of rest before a screen reader is told what the picture shows now. */
const REST = 500;

/** A message to oneself comes when the browser has drawn. A channel is kept: a new one takes as long as a line. */
let channel = null;
const waiting = [];

/** Run `act` when the browser has drawn its next frame, which began at `frame`. */
function afterPaint(act) {
  if (!channel) {
    channel = new MessageChannel();
    channel.port1.onmessage = () => waiting.shift()();
  }
  requestAnimationFrame(() => {
    const frame = performance.now();
    waiting.push(() => act(frame));
    channel.port2.postMessage(null);
  });
}

/** A mean over the last times, one more among them; a single long one makes no slow machine. */
const lately = (mean, time) => mean + 0.2 * (Math.min(time, 2 * SLOW) - mean);

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
    this.places = []; // what puts handles in place
    this.job = 0; // a number for each picture: what is left to do for another is dropped
    this.picture = null; // the one that is being drawn
    this.again = false; // something has changed since it was begun
    this.unfinished = 0; // works for later that belong to the picture and are not done
    this.usual = 0; // milliseconds that a picture takes, a mean over the last ones
    this.frame = 0; // milliseconds that the browser takes for a frame of it, likewise
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
   * it is now; `said`: the number in words.
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
    this.places.push(() => {
      place(made);
      const now = { valuemin: min(), valuemax: max(), valuenow: get(), valuetext: said(get()) };
      for (const [key, value] of Object.entries(now)) write(made, `aria-${key}`, value);
    });
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

  /**
   * Draw from now on. `draw` is a generator function that reads the model, draws what it says, and
   * returns the picture in a sentence. It yields wherever a frame may be shown in between: a couple of
   * milliseconds of work at most should lie from one `yield` to the next.
   */
  begin(draw) {
    this.draw = draw;
    const now = () => this.held || this.redraw();
    for (const name of this.watched ?? []) {
      const event = `change:${name}`;
      this.model.on(event, now);
      this.listening.push([event, now]);
    }
    this.fit();
    this.redraw(Infinity);
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

  /** Whether this machine takes long for these pictures. */
  get slow() {
    return Math.max(this.usual, this.frame) > SLOW;
  }

  /**
   * A picture of what the model says now. Handles are put in place at once, and all of it is drawn at
   * once where that is quick. Where it is not, the move is shown first, and the picture is drawn over the
   * next frames, so that a key or a finger never waits for more than a piece of it. A picture that
   * has been begun is finished first, for the eye to follow however fast the moves come: those that come
   * in the meantime are shown by one more.
   */
  redraw(budget = this.slow ? 0 : FRAME) {
    if (!this.draw || !this.plots.every((plot) => plot.width)) return;
    try {
      for (const place of this.places) place();
    } catch (error) {
      return this.fail(error);
    }
    if (this.picture) this.again ||= this.picture.begun;
    else {
      this.open();
      this.proceed(budget);
    }
  }

  open() {
    this.drop();
    this.again = false;
    this.picture = { pieces: this.draw(), begun: false, cost: 0, account: this.account };
    this.account = null;
  }

  /** What is left to do for the picture on the page will not be done. */
  drop() {
    this.job++;
    this.wait(-this.unfinished);
  }

  /** So many works for later more. While there are any the page says so, beside `aria-busy`. */
  wait(more) {
    this.unfinished += more;
    this.root.toggleAttribute("data-later", this.unfinished > 0);
  }

  /** Draw pieces of the picture for a time, and the others after the next frame. */
  proceed(budget) {
    const { picture } = this;
    const start = performance.now();
    let now = start;
    try {
      while (this.picture === picture && now < start + budget) {
        picture.begun = true;
        const { done, value } = picture.pieces.next();
        now = performance.now();
        if (done) this.finish(value, picture.cost + now - start);
      }
    } catch (error) {
      return this.fail(error);
    }
    picture.cost += now - start;
    if (!this.picture) return;
    this.root.setAttribute("aria-busy", true);
    afterPaint(() => this.picture && this.counted(this.picture.account, () => this.proceed(SLICE)));
  }

  finish(sentence, cost) {
    this.usual = lately(this.usual, cost);
    if (this.picture.account) this.picture.account.done = true;
    this.picture = null;
    this.root.removeAttribute("aria-busy");
    this.say(sentence);
    if (this.again) this.open();
  }

  /**
   * Work that is too long for a move, a generator like `draw`: it goes on for a few milliseconds a
   * frame, and is dropped at the next picture. It begins when the move has been drawn, so that no move
   * waits for it. `shown` draws what there is: after each slice, or at the end alone where the
   * reader wants no motion. So it is on a slow machine, where a frame of many marks takes longer than a
   * slice; and there it begins only when the hand rests. `clear` then takes away what an earlier
   * picture has left. Until all of it is done, `data-later` stands on the widget.
   */
  later(work, shown, clear) {
    const { job, slow } = this;
    const atEnd = this.calm || slow;
    const pieces = work();
    const slice = () => {
      if (job !== this.job) return;
      try {
        const until = performance.now() + SLICE;
        let done = false;
        while (!done && performance.now() < until) ({ done } = pieces.next());
        if (done || !atEnd) shown(done);
        if (done) this.wait(-1);
        else afterPaint(slice);
      } catch (error) {
        this.fail(error);
      }
    };
    this.wait(1);
    if (atEnd) clear?.();
    if (slow) setTimeout(slice, PAUSE);
    else afterPaint(slice);
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
    this.draw = this.picture = null;
    this.drop();
    this.root.removeAttribute("aria-busy");
    this.root.replaceChildren(html("p", { class: "live-error", role: "alert" }, `This widget cannot go on: ${error.message}`));
  }

  /**
   * Note how long answers took, when asked to: `live-draw`, the numbers and the marks, and
   * `live-paint`, that and the browser's work on the frames that show them. All of the work on a
   * picture is counted, from the move to the last of its pieces, and each frame that it took; and so
   * are moves that came in the meantime, to the picture that shows them. Not counted is the wait for the
   * screen's next refresh, nor work for `later`. `detail.whole`: the time from the move to the whole
   * picture, waits and all.
   */
  timed(act) {
    const shown = this.picture?.begun === false ? this.picture : this; // or by the next one
    const account = (shown.account ??= { start: performance.now(), draw: 0, paint: 0, frames: 0, done: false });
    this.counted(account, act);
    if (!this.again) this.account = null; // no other picture is to come
  }

  /** Do something, and put its time on the account, and that of the frame that shows it. */
  counted(account, act) {
    if (!account) return act();
    const start = performance.now();
    account.frames++;
    // Asked for first, so that work put off until after the frame does not count.
    afterPaint((frame) => {
      const now = performance.now();
      this.frame = lately(this.frame, now - frame);
      account.paint += now - frame;
      account.frames--;
      if (!account.done || account.frames || !globalThis.liveMeasure) return;
      const { start, draw, paint } = account;
      performance.measure("live-draw", { start, duration: draw });
      performance.measure("live-paint", { start, duration: draw + paint, detail: { whole: now - start } });
    });
    act();
    account.draw += performance.now() - start;
  }

  end() {
    this.draw = this.picture = null;
    this.drop();
    clearTimeout(this.resting);
    this.observer?.disconnect();
    for (const [event, listener] of this.listening) this.model.off(event, listener);
  }
}
