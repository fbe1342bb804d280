// Line charts of SVG elements.

import { element, setAttribute, svgElement } from "./dom.js";
import { SPAN_S, textOf } from "./figures.js";

const WIDTH = 460;
const HEIGHT = 170;
const LEFT = 62;
const RIGHT = 8;
const TOP = 10;
const BOTTOM = 22;
const MINUTE_S = 60;
/** Points further apart than this are not joined: the server was away in between. */
const MAX_GAP_MS = 3000;
const STEPS = [1, 2, 2.5, 5, 10];

/** One chart with its legend, whose values are those under the pointer, else the latest. */
export class Chart {
  constructor({ title, unit, lines }) {
    this._unit = unit;
    this.lines = lines;
    this._points = [];
    this._pointer = null;
    this._grid = [0, 0.5, 1].map((part) => this._gridLine(part));
    this._paths = lines.map((_, index) => svgElement("path", { class: `line line-${index}` }));
    this._start = svgElement("text", { class: "tick", x: LEFT, y: HEIGHT - 6 });
    this._cursor = svgElement("path", { class: "cursor" });
    this._values = lines.map(() => element("span", { class: "value" }, "–"));
    this._image = svgElement(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" },
      ...this._grid.flatMap(({ line, label }) => [line, label]),
      this._start,
      svgElement("text", { class: "tick", x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, "now"),
      this._cursor,
      ...this._paths,
    );
    this._title = title;
    this.root = element("figure", {}, element("figcaption", {}, element("h3", {}, title)), this._image, this._legend());
    this._image.addEventListener("pointermove", (event) => this._point(event));
    this._image.addEventListener("pointerleave", () => this._point(null));
  }

  /** Draw points, each a `time` in milliseconds and a value or null for each line; the last one is the latest. */
  draw(points) {
    this._points = points;
    const isShort = points.at(-1).time - points[0].time <= MINUTE_S * 1000;
    this._span = isShort ? MINUTE_S : SPAN_S;
    this._start.textContent = isShort ? "1 minute ago" : "5 minutes ago";
    this._top = niceTop(Math.max(0, ...points.flatMap(({ values }) => values)), this._unit);
    for (const { part, label } of this._grid) label.textContent = textOf(this._top * part, this._unit);
    this._paths.forEach((path, index) => path.setAttribute("d", this._pathOf(index)));
    this._tell();
  }

  /** The line at a part of the axis, 0 to 1. */
  _gridLine(part) {
    const y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part;
    const line = svgElement("path", { class: "grid", d: `M${LEFT} ${y}H${WIDTH - RIGHT}` });
    return { part, line, label: svgElement("text", { class: "tick", x: LEFT - 6, y: y + 4, "text-anchor": "end" }) };
  }

  _legend() {
    const parts = this.lines.map(({ label }, index) => [sampleOf(index), `${label} `, this._values[index]]);
    return element("ul", { class: "legend" }, parts.map((each) => element("li", {}, each)));
  }

  _x(time) {
    const seconds = (this._points.at(-1).time - time) / 1000;
    return WIDTH - RIGHT - ((WIDTH - LEFT - RIGHT) * seconds) / this._span;
  }

  _y(value) {
    return HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * value) / this._top;
  }

  _pathOf(index) {
    let path = "";
    let before = -Infinity;
    for (const { time, values } of this._points) {
      if (values[index] === null) {
        before = -Infinity;
        continue;
      }
      const place = `${this._x(time).toFixed(1)} ${this._y(values[index]).toFixed(1)}`;
      path += time - before > MAX_GAP_MS ? `M${place}L${place}` : `L${place}`; // a point by itself shows as a dot
      before = time;
    }
    return path;
  }

  _point(event) {
    const box = this._image.getBoundingClientRect();
    this._pointer = event && ((event.clientX - box.left) / box.width) * WIDTH;
    this._tell();
  }

  /** The point nearest to the pointer, or null. */
  get _pointed() {
    if (this._pointer === null) return null;
    const distance = ({ time }) => Math.abs(this._x(time) - this._pointer);
    return this._points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
  }

  /** Write the legend's values, and what the picture shows in words. */
  _tell() {
    if (this._points.length === 0) return;
    const pointed = this._pointed;
    const shown = pointed ?? this._points.at(-1);
    this._values.forEach((value, index) => (value.textContent = textOf(shown.values[index], this._unit)));
    setAttribute(this._cursor, "d", pointed && `M${this._x(pointed.time).toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}`);
    const latest = this._points.at(-1).values;
    const parts = this.lines.map(({ label }, index) => `${label} ${textOf(latest[index], this._unit)}`);
    const span = this._span === MINUTE_S ? "the last minute" : "the last five minutes";
    this._image.setAttribute("aria-label", `${this._title}, ${span}. Now: ${parts.join(", ")}.`);
  }
}

function sampleOf(index) {
  const line = svgElement("path", { class: `line line-${index}`, d: "M1 4H23" });
  return svgElement("svg", { class: "sample", viewBox: "0 0 24 8", "aria-hidden": "true" }, line);
}

/** The end of an axis: a round number that is not below `value`. */
function niceTop(value, unit) {
  if (value <= 0) return unit === "seconds" ? 0.01 : unit === "bytes" ? 2 ** 20 : 1;
  const base = unit === "bytes" ? 2 ** (10 * Math.floor(Math.log2(value) / 10)) : 1;
  const size = 10 ** Math.floor(Math.log10(value / base));
  return STEPS.find((step) => step * size * base >= value) * size * base;
}
