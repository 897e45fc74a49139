/**
 * A small drawing surface in SVG: axes with round ticks, and named marks that are moved and never
 * made anew, so that a redraw costs a few strings.
 */

const NS = "http://www.w3.org/2000/svg";
const INK = "#26282c";
const FONT = 13;

/** An SVG element with its attributes, put into `parent` where one is given. */
export function svg(name, attributes = {}, parent = null) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

/** An attribute where it is another one than before: the browser lays out and paints what was set. */
export function write(made, name, value) {
  value = String(value);
  if (made.getAttribute(name) !== value) made.setAttribute(name, value);
}

/** Round numbers from `from` to `to`, about `count` of them. */
export function ticks(from, to, count = 5) {
  const rough = (to - from) / count;
  if (!(rough > 0) || !Number.isFinite(rough)) return [];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * (1 - 1e-9));
  const first = Math.ceil(from / step - 1e-9);
  const last = Math.floor(to / step + 1e-9);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toFixed(digits)));
}

/** One panel. Ranges are `{ label, from, to }`; `log: true` for powers of ten. */
export class Plot {
  /**
   * `label`: what the panel shows, for whoever does not see it. `wide`: never beside another;
   * `three`: three in a row where there is room.
   */
  constructor({ label, x, y, height = 300, left = 52, right = 12, top = 10, bottom = 44, wide = false, three = false, xTicks, yTicks }) {
    this.x = { ...x };
    this.y = { ...y };
    Object.assign(this, { height, left, right, top, bottom, wide, three, xTicks, yTicks });
    this.width = 0;
    this.root = svg("svg", { class: "live-plot", height });
    this.picture = svg("g", { role: "img", "aria-label": label }, this.root);
    this.ground = svg("g", {}, this.picture);
    this.axes = svg("g", { fill: INK, "font-size": FONT, stroke: "none" }, this.picture);
    this.clip = `live-clip-${Plot.count++}`;
    const defs = svg("defs", {}, this.root);
    this.window = svg("rect", {}, svg("clipPath", { id: this.clip }, defs));
    const clipped = { "clip-path": `url(#${this.clip})` };
    this.under = svg("g", clipped, this.picture);
    this.over = svg("g", clipped, this.picture);
    this.handles = svg("g", {}, this.root);
    this.marks = new Map();
  }

  /** Take a width in pixels; true where it is another one than before. */
  resize(width) {
    width = Math.max(120, Math.floor(width));
    if (width === this.width) return false;
    this.width = width;
    this.root.setAttribute("width", width);
    this.root.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.drawAxes();
    return true;
  }

  /** Other ranges; the axes are drawn again where they changed. */
  range({ x = {}, y = {} }) {
    const before = [this.x.from, this.x.to, this.y.from, this.y.to].join();
    Object.assign(this.x, x);
    Object.assign(this.y, y);
    if (before !== [this.x.from, this.x.to, this.y.from, this.y.to].join()) this.drawAxes();
  }

  get plotWidth() {
    return this.width - this.left - this.right;
  }

  get plotHeight() {
    return this.height - this.top - this.bottom;
  }

  /** Pixels of a value. */
  px(value) {
    return this.left + this.plotWidth * share(this.x, value);
  }

  py(value) {
    return this.top + this.plotHeight * (1 - share(this.y, value));
  }

  /** The value at a pixel. */
  xAt(pixel) {
    const at = (pixel - this.left) / this.plotWidth;
    const { from, to, log } = this.x;
    return log ? from * (to / from) ** at : from + at * (to - from);
  }

  drawAxes() {
    if (!this.width) return;
    const { left, top, plotWidth: w, plotHeight: h } = this;
    for (const [key, value] of Object.entries({ x: left, y: top, width: w, height: h })) this.window.setAttribute(key, value);
    this.axes.replaceChildren();
    const line = (d) => svg("path", { d, stroke: INK, fill: "none", "stroke-width": 1 }, this.axes);
    const text = (content, attributes) => (svg("text", attributes, this.axes).textContent = content);
    line(`M${left} ${top}V${top + h}H${left + w}`);
    for (const [value, name] of marksOf(this.x, this.xTicks, w / 70)) {
      const at = this.px(value);
      line(`M${at} ${top + h}v4`);
      text(name, { x: at, y: top + h + 18, "text-anchor": "middle" });
    }
    for (const [value, name] of marksOf(this.y, this.yTicks, h / 45)) {
      const at = this.py(value);
      line(`M${left} ${at}h-4`);
      text(name, { x: left - 7, y: at + 4, "text-anchor": "end" });
    }
    text(this.x.label, { x: left + w / 2, y: this.height - 5, "text-anchor": "middle" });
    const middle = top + h / 2;
    text(this.y.label, { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` });
  }

  mark(name, kind, attributes, layer = this.over) {
    let made = this.marks.get(name);
    if (!made) this.marks.set(name, (made = svg(kind, attributes, layer)));
    return made;
  }

  /** A line through points. */
  line(name, xs, ys, { color, width = 1.8, dash = "" }) {
    const made = this.mark(name, "path", { fill: "none", stroke: color, "stroke-width": width, "stroke-dasharray": dash, "stroke-linejoin": "round" });
    write(made, "stroke", color); // a line may come to stand for another answer
    write(made, "d", this.through(xs, ys));
  }

  /** A shade between two lines. */
  band(name, xs, low, high, { color, opacity = 0.22 }) {
    const made = this.mark(name, "path", { fill: color, "fill-opacity": opacity, stroke: "none" }, this.under);
    const back = Array.from(xs).reverse();
    const d = xs.length ? `${this.through(xs, high)}L${this.through(back, Array.from(low).reverse()).slice(1)}Z` : "";
    write(made, "d", d);
  }

  /** Round dots, all in one path. */
  dots(name, xs, ys, { color, radius = 3.2, opacity = 1 }) {
    const made = this.mark(name, "path", { fill: "none", stroke: color, "stroke-width": 2 * radius, "stroke-linecap": "round", "stroke-opacity": opacity });
    let d = "";
    for (let i = 0; i < xs.length; i++) {
      if (Number.isFinite(ys[i])) d += `M${this.px(xs[i]).toFixed(1)} ${this.py(ys[i]).toFixed(1)}h0`;
    }
    write(made, "d", d);
  }

  /** Bars from the floor, one for each edge pair. */
  bars(name, edges, heights, { color, opacity = 1, gap = 1 }) {
    const made = this.mark(name, "path", { fill: color, "fill-opacity": opacity, stroke: "none" }, this.under);
    let d = "";
    for (let i = 0; i < heights.length; i++) {
      const [left, right] = [this.px(edges[i]) + gap / 2, this.px(edges[i + 1]) - gap / 2];
      const [low, high] = [this.py(this.y.from), this.py(heights[i])];
      d += `M${left.toFixed(1)} ${low.toFixed(1)}V${high.toFixed(1)}H${right.toFixed(1)}V${low.toFixed(1)}Z`;
    }
    write(made, "d", d);
  }

  /** A shade over the whole height, from one x to another. */
  shade(name, from, to, color) {
    const made = this.mark(name, "rect", { fill: color, y: this.top, height: this.plotHeight }, this.ground);
    const [a, b] = [from, to].map((value) => Math.min(Math.max(this.px(value), this.left), this.left + this.plotWidth));
    write(made, "x", a);
    write(made, "width", Math.max(b - a, 0));
  }

  through(xs, ys) {
    let d = "";
    let pen = "M";
    for (let i = 0; i < xs.length; i++) {
      if (!Number.isFinite(ys[i])) {
        pen = "M";
        continue;
      }
      d += `${pen}${this.px(xs[i]).toFixed(1)} ${this.py(ys[i]).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }
}

Plot.count = 0;

const share = ({ from, to, log }, value) => (log ? Math.log(value / from) / Math.log(to / from) : (value - from) / (to - from));

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const power = (k) => `10${k < 0 ? "⁻" : ""}${[...String(Math.abs(k))].map((digit) => SUPERSCRIPTS[digit]).join("")}`;

/** Values and names of an axis' ticks. */
function marksOf(axis, given, count) {
  if (given) return given;
  const { from, to, log } = axis;
  if (!log) return ticks(from, to, Math.max(2, count)).map((value) => [value, String(value).replace("-", "−")]);
  const [low, high] = [Math.ceil(Math.log10(from) - 1e-9), Math.floor(Math.log10(to) + 1e-9)];
  const skip = Math.ceil((high - low + 1) / Math.max(2, count));
  return Array.from({ length: high - low + 1 }, (_, i) => low + i).filter((k) => (k - low) % skip === 0).map((k) => [10 ** k, power(k)]);
}
