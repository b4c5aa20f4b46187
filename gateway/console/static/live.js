// Traffic: four charts, and the last minute by role and variant.

import { LineChart, sparkline } from "./charts.js";
import { h, setText, Table } from "./dom.js";
import { count, percent, rate, seconds, span } from "./format.js";
import { searchBox } from "./search.js";
import { ERRORS, FIRST50, FIRST95, P50, P95, REQUESTS, TOKENS } from "./state.js";

const SPARK = 60;

export class LiveView {
  constructor(state) {
    this.state = state;
    this.shown = ["", ""];
    this.charts = {
      requests: new LineChart({ title: "Requests per second", format: rate }),
      latency: new LineChart({ title: "Latency", format: seconds, note: "of whole answers" }),
      first: new LineChart({ title: "Time to first token", format: seconds, note: "of streams" }),
      tokens: new LineChart({ title: "Tokens per second", format: rate, note: "written" }),
    };
    this.attention = h("ul", { class: "attention", "aria-label": "Needs attention" });
    this.which = h("p", { class: "which" });
    this.lacks = h("p", { class: "note" });
    this.table = new Table("The last minute, by role and variant", [
      { title: "Role", show: (cell, row) => this.showRole(cell, row) },
      { title: "Variant", text: (row) => row.variant === "none" ? "not routed" : row.variant },
      { title: "Requests/s", number: true, text: (row) => rate(row.figures[REQUESTS]) },
      { title: "Errors", number: true, show: (cell, row) => {
        const share = row.figures[REQUESTS] ? row.figures[ERRORS] / row.figures[REQUESTS] : null;
        setText(cell, percent(share));
        cell.classList.toggle("bad", share > 0);
      } },
      { title: "Latency p50", number: true, text: (row) => seconds(row.figures[P50]) },
      { title: "p95", number: true, text: (row) => seconds(row.figures[P95]) },
      { title: "First token p50", number: true, text: (row) => seconds(row.figures[FIRST50]) },
      { title: "p95", number: true, text: (row) => seconds(row.figures[FIRST95]) },
      { title: "Tokens/s", number: true, text: (row) => rate(row.figures[TOKENS]) },
      { title: "Last 5 min", show: (cell, row) => sparkline(cell, this.state.history(row.role, row.variant).figure(REQUESTS).slice(-SPARK).map((value) => value ?? 0)) },
    ], { className: "stacks", empty: "No request has ended in the last minute." });
    this.example = h("pre", { tabindex: "0" });
    this.silence = h("section", { class: "card quiet-state", hidden: true },
      h("h2", {}, "No traffic yet"),
      h("p", {}, "Charts begin with the first request. Send one:"), this.example);
    this.element = h("div", {}, this.attention, this.lacks, this.silence, this.which,
      h("div", { class: "charts" }, Object.values(this.charts).map((chart) => chart.element)),
      h("div", { class: "tools" }, h("h2", {}, "The last minute, by role and variant"), searchBox(state, () => this.update())), this.table.element);
  }

  showRole(cell, row) {
    let button = cell.firstElementChild;
    if (!button) {
      button = h("button", { class: "link", type: "button", title: "Show this one in the charts" }, row.role);
      button.addEventListener("click", () => {
        const same = this.shown[0] === row.role && this.shown[1] === row.variant;
        this.shown = same ? ["", ""] : [row.role, row.variant];
        this.update();
      });
      cell.append(button);
    }
    const pressed = String(this.shown[0] === row.role && this.shown[1] === row.variant);
    if (button.getAttribute("aria-pressed") !== pressed) button.setAttribute("aria-pressed", pressed);
  }

  update() {
    const { state } = this;
    this.showAttention();
    setText(this.lacks, state.overview.lacks.join(" "));
    const silent = state.overview.requests === 0;
    this.silence.hidden = !silent;
    setText(this.example, `curl ${location.origin}/v1/chat/completions -H 'content-type: application/json' \\\n  ${state.setup.keys ? "-H \"authorization: Bearer $KEY\" " : ""}-d '{"model": "${state.setup.models[0].name}", "messages": [{"role": "user", "content": "hello"}]}'`);
    const [role, variant] = this.shown;
    const name = role ? `${role} on ${variant === "none" ? "no variant" : variant}` : `All traffic, ${count(state.overview.requests)} requests since the start ${span(state.overview.time - state.overview.started)} ago`;
    if (this.which.dataset.name !== name) {
      this.which.dataset.name = name;
      this.which.replaceChildren(name, ...(role ? [" ", h("button", { type: "button", class: "quiet", onclick: () => { this.shown = ["", ""]; this.update(); } }, "Show all traffic")] : []));
    }
    const { times, figure } = state.history(role, variant);
    const range = [Math.min(times[0] ?? state.overview.time, state.overview.time - 300), state.overview.time];
    const line = (name, number, tone) => ({ name, values: figure(number), tone });
    this.charts.requests.update({ times, range, lines: [line("requests", REQUESTS, 0), line("errors", ERRORS, "bad")] });
    this.charts.latency.update({ times, range, lines: [line("p50", P50, 0), line("p95", P95, 1)] });
    this.charts.first.update({ times, range, lines: [line("p50", FIRST50, 0), line("p95", FIRST95, 1)] });
    this.charts.tokens.update({ times, range, lines: [line("tokens", TOKENS, 0)] });
    const rows = state.minute.filter((row) => row.role && state.wanted(row.role, row.variant));
    const place = (row) => state.order.get(row.role) ?? Infinity;
    rows.sort((a, b) => place(a) - place(b) || a.role.localeCompare(b.role) || a.variant.localeCompare(b.variant));
    this.table.update(rows.map((row) => ({ key: `${row.role}\u0000${row.variant}`, ...row })));
  }

  showAttention() {
    const found = this.state.troubles();
    const text = JSON.stringify(found);
    if (this.attention.dataset.text === text) return;
    this.attention.dataset.text = text;
    const some = found.slice(0, 6);
    this.attention.replaceChildren(...(some.length ? some.map((one) =>
      h("li", { class: one.tone }, h("a", { href: `#${one.view}` }, one.text)))
      : [h("li", { class: "good" }, "Every pool can be reached, and nothing is out of service.")]),
    ...(found.length > some.length ? [h("li", {}, h("a", { href: "#precision" }, `${found.length - some.length} more`))] : []));
  }
}
