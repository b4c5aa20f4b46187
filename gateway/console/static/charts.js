// Charts as SVG, each with its figures in words and as a table.

import { h, s, setText } from "./dom.js";
import { clock, NONE } from "./format.js";

const HEIGHT = 132;
const EDGE = { left: 44, right: 8, top: 8, bottom: 20 };

/** Without zeros that say nothing: for scales. */
function short(text) {
  return text.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");
}

function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].find((step) => step * power >= value) * power;
}

/**
 * Lines over time. `format` writes a value, `fixed` is the top of the scale where that is known, `table` adds
 * the figures as a table.
 */
export class LineChart {
  constructor({ title, format, note = "", fixed = null, height = HEIGHT }) {
    Object.assign(this, { title, format, fixed, height });
    this.now = h("p", { class: "now" });
    this.read = h("p", { class: "read", "aria-hidden": "true" });
    this.svg = s("svg", { role: "img", preserveAspectRatio: "none" });
    this.table = h("table", { class: "plain" });
    this.details = h("details", { class: "figures" }, h("summary", {}, "As a table"),
      h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `${title}, as a table` }, this.table));
    this.element = h("figure", { class: "chart" },
      h("figcaption", {}, h("h3", {}, title), note ? h("span", { class: "note" }, note) : null), this.now, this.svg,
      h("div", { class: "foot" }, this.details, this.read));
    this.details.addEventListener("toggle", () => this.fillTable());
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.unpoint());
    new ResizeObserver(() => this.draw()).observe(this.element);
    this.data = { times: [], lines: [], marks: [], range: null };
  }

  /** `times`: Unix seconds; `lines`: name, values, and `band` of [low, high]; `marks`: at, what, tone. */
  update({ times, lines, marks = [], range = null }) {
    this.data = { times, lines, marks, range };
    this.now.replaceChildren(...lines.map((line, number) => {
      const last = line.values.findLast((value) => value !== null);
      return h("span", { class: `key c${line.tone ?? number}` }, h("b", {}, last === undefined ? NONE : this.format(last)), ` ${line.name}`);
    }));
    this.draw();
    if (this.details.open) this.fillTable();
  }

  draw() {
    const width = Math.max(220, this.svg.clientWidth || this.element.clientWidth - 24);
    const { times, lines, marks } = this.data;
    const first = this.data.range ? this.data.range[0] : times[0] ?? 0;
    const last = this.data.range ? this.data.range[1] : times.at(-1) ?? 1;
    const all = lines.flatMap((line) => [...line.values, ...(line.band ?? []).map((band) => band?.[1] ?? null)]);
    const top = this.fixed ?? niceTop(Math.max(0, ...all.filter((value) => value !== null)));
    const x = (at) => EDGE.left + ((at - first) / Math.max(1, last - first)) * (width - EDGE.left - EDGE.right);
    const y = (value) => this.height - EDGE.bottom - (Math.min(value, top) / top) * (this.height - EDGE.top - EDGE.bottom);
    this.x = x;
    this.y = y;
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = y(share * top);
      parts.push(s("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: at, y2: at }));
      parts.push(s("text", { x: EDGE.left - 6, y: at + 3.5, "text-anchor": "end" }, short(this.format(share * top))));
    }
    if (last > first) {
      const ticks = width < 340 ? [0, 1] : [0, 0.5, 1];
      for (const share of ticks) {
        const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
        parts.push(s("text", { x: x(first + share * (last - first)), y: this.height - 5, "text-anchor": anchor }, clock(first + share * (last - first))));
      }
    }
    for (const [number, mark] of marks.entries()) {
      if (mark.at < first || mark.at > last) continue;
      const at = x(mark.at);
      const right = at > width * 0.7;
      parts.push(s("line", { class: `mark ${mark.tone ?? ""}`, x1: at, x2: at, y1: EDGE.top, y2: this.height - EDGE.bottom }));
      parts.push(s("text", { class: `mark ${mark.tone ?? ""}`, x: right ? at - 4 : at + 4, y: EDGE.top + 9 + 12 * (number % 3), "text-anchor": right ? "end" : "start" }, mark.what));
    }
    lines.forEach((line, number) => {
      const tone = line.tone ?? number;
      for (const run of runs(line.values)) {
        if (line.band) {
          const upper = run.map((i) => `${x(times[i]).toFixed(1)} ${y(line.band[i][1]).toFixed(1)}`);
          const lower = run.toReversed().map((i) => `${x(times[i]).toFixed(1)} ${y(line.band[i][0]).toFixed(1)}`);
          parts.push(s("path", { class: `band c${tone}`, d: `M${[...upper, ...lower].join("L")}Z` }));
        }
        if (run.length === 1) {
          parts.push(s("circle", { class: `dot c${tone}`, cx: x(times[run[0]]), cy: y(line.values[run[0]]), r: 2.5 }));
        } else {
          parts.push(s("path", { class: `line c${tone}`, d: `M${run.map((i) => `${x(times[i]).toFixed(1)} ${y(line.values[i]).toFixed(1)}`).join("L")}` }));
        }
      }
    });
    this.cross = s("line", { class: "cross", y1: EDGE.top, y2: this.height - EDGE.bottom, visibility: "hidden" });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.svg.setAttribute("height", this.height);
    this.svg.setAttribute("aria-label", this.words());
    this.svg.replaceChildren(...parts, this.cross);
  }

  words() {
    const said = this.data.lines.map((line) => {
      const values = line.values.filter((value) => value !== null);
      if (!values.length) return `${line.name}: no figures`;
      const [low, high] = [Math.min(...values), Math.max(...values)];
      return `${line.name}: now ${this.format(values.at(-1))}, lowest ${this.format(low)}, highest ${this.format(high)}`;
    });
    const marks = this.data.marks.map((mark) => `${mark.what} at ${clock(mark.at)}`);
    return `${this.title}. ${[...said, ...marks].join("; ")}.`;
  }

  fillTable() {
    if (!this.details.open) return;
    const { times, lines } = this.data;
    const head = h("tr", {}, h("th", { scope: "col" }, "Time"), lines.map((line) => h("th", { scope: "col" }, line.name)));
    const rows = times.map((at, i) => h("tr", {}, h("th", { scope: "row" }, clock(at)),
      lines.map((line) => h("td", {}, line.values[i] === null ? NONE : this.format(line.values[i])))));
    this.table.replaceChildren(h("caption", { class: "hidden" }, this.title), h("thead", {}, head), h("tbody", {}, rows.reverse()));
  }

  point(event) {
    const { times, lines } = this.data;
    if (!times.length) return;
    const box = this.svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * this.svg.viewBox.baseVal.width;
    let near = 0;
    times.forEach((time, i) => { if (Math.abs(this.x(time) - at) < Math.abs(this.x(times[near]) - at)) near = i; });
    this.cross.setAttribute("x1", this.x(times[near]));
    this.cross.setAttribute("x2", this.x(times[near]));
    this.cross.setAttribute("visibility", "visible");
    const said = lines.map((line) => `${line.name} ${line.values[near] === null ? NONE : this.format(line.values[near])}`);
    setText(this.read, `${clock(times[near])}  ${said.join(", ")}`);
  }

  unpoint() {
    this.cross.setAttribute("visibility", "hidden");
    setText(this.read, "");
  }
}

function runs(values) {
  const found = [];
  let run = [];
  values.forEach((value, i) => {
    if (value === null) {
      if (run.length) found.push(run);
      run = [];
    } else run.push(i);
  });
  if (run.length) found.push(run);
  return found;
}

/** A line as wide as a word. It repeats what the row says, so a screen reader need not hear of it. */
export function sparkline(cell, figures, most = 0) {
  if (figures.every((value) => value === null)) {
    setText(cell, NONE);
    return;
  }
  const values = figures.map((value) => value ?? 0);
  const top = most || Math.max(...values, 1e-9);
  const step = 84 / Math.max(1, values.length - 1);
  const d = values.length < 2 ? "" : `M${values.map((value, i) => `${(i * step).toFixed(1)} ${(19 - 17 * (value / top)).toFixed(1)}`).join("L")}`;
  let path = cell.querySelector("path");
  if (!path) {
    path = s("path", { class: "line c0" });
    cell.replaceChildren(s("svg", { class: "spark", viewBox: "0 0 84 20", width: 84, height: 20, "aria-hidden": "true" }, path));
  }
  if (path.getAttribute("d") !== d) path.setAttribute("d", d);
}

/** Loss against bytes: a point per variant, with its interval. Small and low is good. */
export function scatter(points, { xTitle, yTitle, xFormat, yFormat, title }) {
  const width = 640, height = 400, left = 88, right = 24, top = 18, bottom = 46;
  const xs = points.map((point) => point.x), highs = points.map((point) => point.high ?? point.y);
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const pad = Math.max((high - low) * 0.12, high * 0.02, 1);
  const [x0, x1] = [Math.max(0, low - pad), high + pad];
  const yTop = niceTop(Math.max(...highs, 0) * 1.05);
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => height - bottom - (value / yTop) * (height - top - bottom);
  const parts = [];
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    const py = y(share * yTop);
    parts.push(s("line", { class: "grid", x1: left, x2: width - right, y1: py, y2: py }));
    parts.push(s("text", { x: left - 8, y: py + 4, "text-anchor": "end" }, short(yFormat(share * yTop))));
  }
  const unit = 1024 ** Math.max(0, Math.floor(Math.log(x1) / Math.log(1024)));
  const apart = (unit * niceTop(((x1 - x0) / unit) / 5));
  for (let at = Math.ceil(x0 / apart) * apart; at <= x1; at += apart) {
    parts.push(s("text", { x: x(at), y: height - bottom + 17, "text-anchor": "middle" }, short(xFormat(at))));
  }
  parts.push(s("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, xTitle));
  parts.push(s("text", { x: 14, y: (top + height - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(top + height - bottom) / 2})` }, yTitle));
  const taken = [];
  for (const [number, point] of points.entries()) {
    const [px, py] = [x(point.x), y(point.y)];
    if (point.high !== null && point.high !== undefined) {
      parts.push(s("line", { class: `whisker c${number % 6}`, x1: px, x2: px, y1: y(Math.max(0, point.low)), y2: y(point.high) }));
    }
    parts.push(s("circle", { class: `dot c${number % 6}`, cx: px, cy: py, r: 5 }));
    const end = px > width * 0.7;
    const tx = end ? px - 10 : px + 10;
    let ty = py - 8;
    while (taken.some(([ox, oy]) => Math.abs(ox - px) < 130 && Math.abs(oy - ty) < 14)) ty -= 15;
    taken.push([px, ty]);
    parts.push(s("text", { class: "name", x: tx, y: Math.max(12, ty), "text-anchor": end ? "end" : "start" }, point.name));
  }
  const said = points.map((point) => `${point.name}: ${xFormat(point.x)}, ${yFormat(point.y)}`).join("; ");
  return s("svg", { role: "img", viewBox: `0 0 ${width} ${height}`, class: "scatter", "aria-label": `${title}. ${said}.` }, parts);
}
