// Line charts of SVG elements.

import { element, setAttribute } from "./dom.js";
import { SPAN_S, written } from "./figures.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 460;
const HEIGHT = 170;
const LEFT = 62;
const RIGHT = 8;
const TOP = 10;
const BOTTOM = 22;
const MINUTE_S = 60;
const MAX_GAP_MS = 3000;
/** Points further apart than this are not joined: the server was away in between. */
const STEPS = [1, 2, 2.5, 5, 10];

/** One chart with its legend, whose values are those under the pointer, else the latest. */
export class Chart {
  constructor({ title, unit, lines }) {
    this.unit = unit;
    this.lines = lines;
    this.points = [];
    this.pointer = null;
    this.grid = [0, 1, 2].map((third) => this.#gridLine(third));
    this.paths = lines.map((_, index) => svg("path", { class: `line line-${index}` }));
    this.start = svg("text", { class: "tick", x: LEFT, y: HEIGHT - 6 });
    this.cursor = svg("path", { class: "cursor" });
    this.values = lines.map(() => element("span", { class: "value" }, "–"));
    this.image = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" },
      ...this.grid.flatMap(({ line, label }) => [line, label]),
      this.start,
      svg("text", { class: "tick", x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, "now"),
      this.cursor,
      ...this.paths,
    );
    this.title = title;
    this.root = element("figure", {}, element("figcaption", {}, element("h3", {}, title)), this.image, this.#legend());
    this.image.addEventListener("pointermove", (event) => this.#point(event));
    this.image.addEventListener("pointerleave", () => this.#point(null));
  }

  /** Draw points, each a `time` in milliseconds and a value or null for each line; the last one is the latest. */
  draw(points) {
    this.points = points;
    const isShort = points.at(-1).time - points[0].time <= MINUTE_S * 1000;
    this.span = isShort ? MINUTE_S : SPAN_S;
    this.start.textContent = isShort ? "1 minute ago" : "5 minutes ago";
    this.top = niceTop(Math.max(0, ...points.flatMap(({ values }) => values)), this.unit);
    this.grid.forEach(({ label }, third) => (label.textContent = written((this.top * third) / 2, this.unit)));
    this.paths.forEach((path, index) => path.setAttribute("d", this.#pathOf(index)));
    this.#tell();
  }

  #gridLine(third) {
    const y = HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * third) / 2;
    const line = svg("path", { class: "grid", d: `M${LEFT} ${y}H${WIDTH - RIGHT}` });
    return { line, label: svg("text", { class: "tick", x: LEFT - 6, y: y + 4, "text-anchor": "end" }) };
  }

  #legend() {
    const items = this.lines.map(({ label }, index) =>
      element(
        "li",
        {},
        sampleOf(index),
        `${label} `,
        this.values[index],
      ),
    );
    return element("ul", { class: "legend" }, items);
  }

  #x(time) {
    const seconds = (this.points.at(-1).time - time) / 1000;
    return WIDTH - RIGHT - ((WIDTH - LEFT - RIGHT) * seconds) / this.span;
  }

  #y(value) {
    return HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * value) / this.top;
  }

  #pathOf(index) {
    let path = "";
    let before = -Infinity;
    for (const { time, values } of this.points) {
      if (values[index] === null) {
        before = -Infinity;
        continue;
      }
      const place = `${this.#x(time).toFixed(1)} ${this.#y(values[index]).toFixed(1)}`;
      path += time - before > MAX_GAP_MS ? `M${place}L${place}` : `L${place}`; // a point by itself shows as a dot
      before = time;
    }
    return path;
  }

  #point(event) {
    const box = this.image.getBoundingClientRect();
    this.pointer = event && ((event.clientX - box.left) / box.width) * WIDTH;
    this.#tell();
  }

  /** The point nearest to the pointer, or null. */
  get #pointed() {
    if (this.pointer === null) return null;
    const distance = ({ time }) => Math.abs(this.#x(time) - this.pointer);
    return this.points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
  }

  /** Write the legend's values, and what the picture shows in words. */
  #tell() {
    if (this.points.length === 0) return;
    const pointed = this.#pointed;
    const shown = pointed ?? this.points.at(-1);
    this.values.forEach((value, index) => (value.textContent = written(shown.values[index], this.unit)));
    setAttribute(this.cursor, "d", pointed && `M${this.#x(pointed.time).toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}`);
    const latest = this.points.at(-1).values;
    const parts = this.lines.map(({ label }, index) => `${label} ${written(latest[index], this.unit)}`);
    const span = this.span === MINUTE_S ? "the last minute" : "the last five minutes";
    this.image.setAttribute("aria-label", `${this.title}, ${span}. Now: ${parts.join(", ")}.`);
  }
}

function sampleOf(index) {
  const line = svg("path", { class: `line line-${index}`, d: "M1 4H23" });
  return svg("svg", { class: "sample", viewBox: "0 0 24 8", "aria-hidden": "true" }, line);
}

/** The end of an axis: a round number that is not below `value`. */
export function niceTop(value, unit) {
  if (value <= 0) return unit === "seconds" ? 0.01 : unit === "bytes" ? 2 ** 20 : 1;
  const base = unit === "bytes" ? 2 ** (10 * Math.floor(Math.log2(value) / 10)) : 1;
  const size = 10 ** Math.floor(Math.log10(value / base));
  return STEPS.find((step) => step * size * base >= value) * size * base;
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
