// Quality over time: the share of answers that fail a check, with intervals, and what the watch did.

import { LineChart } from "./charts.js";
import { h, setOptions, setText, Table } from "./dom.js";
import { count, digits, moment, percent } from "./format.js";
import { searchBox } from "./search.js";

const RANGES = [["15 minutes", 900], ["1 hour", 3600], ["6 hours", 21_600], ["24 hours", 86_400], ["14 days", 1_209_600]];
/** Seconds that are shown at first. */
export const LONG_S = 3600;
const MOST_POINTS = 60, ENGINE = "(engine)", BUCKET_S = 10;
const VALUES = ["signals", "divergence", "first_token", "token_gap", "memory", "kv_cache", "preemptions"];
const TONES = { demoted: "bad", failed_probation: "bad", held_back: "warn", alarm: "warn", restored: "good" };
const ORDER = { demoted: 0, suspected: 1, "not enough evidence": 2, healthy: 3, "no evidence": 4 };

/** 95 % of a share, by Wilson. */
function wilson(part, whole) {
  const z = 1.96, share = part / whole, z2 = (z * z) / whole;
  const middle = (share + z2 / 2) / (1 + z2), half = (z * Math.sqrt((share * (1 - share) + z2 / 4) / whole)) / (1 + z2);
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

export class QualityView {
  constructor(state, console) {
    this.state = state;
    this.console = console;
    this.since = LONG_S;
    this.range = h("select", { id: "range" }, RANGES.map(([name, value]) => h("option", { value }, name)));
    this.range.value = LONG_S;
    this.range.addEventListener("change", () => { this.since = Number(this.range.value); console.ask(); });
    this.who = h("select", { id: "cell" });
    this.who.addEventListener("change", () => this.update());
    this.off = h("p", { class: "card", hidden: true });
    this.chart = new LineChart({ title: "Share of answers that fail, by check", format: (value) => percent(value, 0), note: "with 95 % intervals", fixed: 1, height: 240 });
    this.chart.element.classList.add("wide");
    this.quiet = h("p", { class: "empty" }, "No answer of this one has been checked in this time.");
    this.checks = new Table("What each check has found", [
      { title: "Check", text: (row) => row.name },
      { title: "Answers", number: true, text: (row) => count(row.answers) },
      { title: "Fail", number: true, text: (row) => percent(row.share) },
      { title: "95 %, always", number: true, text: (row) => row.answers ? `${percent(row.low)} to ${percent(row.high)}` : "–" },
      { title: "Tolerated", number: true, text: (row) => percent(row.tolerated) },
      { title: "Alarming", number: true, text: (row) => percent(row.alarming) },
      { title: "Evidence, nats", show: (cell, row) => showEvidence(cell, row) },
    ], { className: "stacks", empty: "Nothing has been checked yet." });
    this.cells = new Table("Every variant in every role", [
      { title: "Role", text: (row) => row.role },
      { title: "Variant", show: (cell, row) => {
        if (!cell.firstChild) cell.append(h("button", { class: "link", type: "button", onclick: () => { this.who.value = name(row); this.update(); this.chart.element.scrollIntoView({ block: "nearest" }); } }, row.variant));
      } },
      { title: "Verdict", show: (cell, row) => { setText(cell, row.pinned ? `${row.verdict}, pinned: ${row.pinned}` : row.verdict); cell.className = `verdict v-${row.verdict.replaceAll(" ", "-")}`; } },
      { title: "Last decision", text: (row) => row.since || row.why ? `${row.why}${row.since ? `, ${moment(row.since)}` : ""}` : "–" },
    ], { className: "stacks", empty: "No variant is watched." });
    this.events = new Table("Events, the newest first", [
      { title: "When", text: (row) => moment(row.time) },
      { title: "What", show: (cell, row) => { setText(cell, row.kind.replaceAll("_", " ")); cell.className = `verdict ${TONES[row.kind] ?? ""}`; } },
      { title: "Variant", text: (row) => row.variant },
      { title: "Role", text: (row) => row.role },
      { title: "Why", text: (row) => row.why },
    ], { className: "stacks", empty: "Nothing has happened." });
    this.body = h("div", {},
      h("div", { class: "tools" }, h("p", {}, h("label", { for: "cell" }, "Variant and role "), this.who), h("p", {}, h("label", { for: "range" }, "Time "), this.range)),
      this.chart.element, this.quiet, h("h2", {}, "What each check has found"), this.checks.element,
      h("div", { class: "tools" }, h("h2", {}, "Roles"), searchBox(state, () => this.update())), this.cells.element,
      h("h2", {}, "Events"), this.events.element);
    this.element = h("div", {}, this.off, this.body);
  }

  update() {
    const { watch, watchError, setup } = this.state;
    const why = !setup.watch ? "The watch is off. Set watch.enabled to true and start the gateway anew." : watchError;
    this.off.hidden = !why;
    setText(this.off, why);
    this.body.hidden = !watch;
    if (!watch) return;
    const cells = watch.cells.filter((cell) => cell.role !== ENGINE);
    const worst = [...cells].sort((a, b) => (ORDER[a.verdict] ?? 9) - (ORDER[b.verdict] ?? 9) || answers(b) - answers(a));
    setOptions(this.who, worst.map(name).sort(), worst[0] && name(worst[0]));
    const cell = cells.find((one) => name(one) === this.who.value);
    if (cell) this.showCell(cell, watch);
    this.cells.update(worst.filter((one) => this.state.wanted(one.role, one.variant)).map((one) => ({ key: `${name(one)} ${one.version}`, ...one })));
    this.events.update(watch.events.filter((one) => this.state.wanted(one.role, one.variant)).map((one) => ({ key: `${one.time} ${one.kind} ${name(one)} ${one.version} ${one.why}`, ...one })));
  }

  showCell(cell, watch) {
    const mine = (one) => one.variant === cell.variant && one.version === cell.version && one.role === cell.role;
    const buckets = watch.buckets.filter((one) => mine(one) && !VALUES.includes(one.check));
    const begun = Math.min(...buckets.map((one) => one.start), watch.time - 300);
    const range = [Math.max(watch.time - watch.since, begun - BUCKET_S), watch.time];
    const step = Math.max(BUCKET_S, (range[1] - range[0]) / MOST_POINTS);
    const slot = (at) => Math.floor((at - range[0]) / step);
    const times = Array.from({ length: MOST_POINTS }, (_, i) => range[0] + (i + 0.5) * step).filter((at) => at <= range[1]);
    const lines = [...new Set(buckets.map((one) => one.check))].sort().map((check) => {
      const sums = times.map(() => [0, 0]);
      for (const one of buckets) {
        const place = Math.min(times.length - 1, Math.max(0, slot(one.start)));
        if (one.check === check) { sums[place][0] += one.bad; sums[place][1] += one.answers; }
      }
      return { name: check, values: sums.map(([bad, all]) => all ? bad / all : null), band: sums.map(([bad, all]) => all ? wilson(bad, all) : null) };
    });
    const marks = watch.events.filter((one) => mine(one) && one.time >= range[0]).slice(0, 12)
      .map((one) => ({ at: one.time, what: one.kind.replaceAll("_", " "), tone: TONES[one.kind] }));
    this.quiet.hidden = lines.length > 0;
    this.chart.element.hidden = lines.length === 0;
    this.chart.update({ times, lines, marks, range });
    this.checks.update(Object.entries(cell.checks).map(([check, found]) => ({ key: check, name: check, ...found })));
  }
}

const name = (cell) => `${cell.variant} for ${cell.role}`;

function answers(cell) {
  return Object.values(cell.checks).reduce((sum, one) => sum + one.answers, 0);
}

function showEvidence(cell, row) {
  if (row.alarm === null) {
    setText(cell, row.learning ? `learning, ${row.learning} of 200` : "counted only");
    return;
  }
  let meter = cell.querySelector("meter");
  if (!meter) {
    meter = h("meter", { min: "0", "aria-hidden": "true" });
    cell.replaceChildren(meter, h("span", {}));
  }
  Object.assign(meter, { max: row.alarm, low: row.alarm / 3, high: row.alarm * 0.999, optimum: 0, value: Math.min(row.evidence, row.alarm) });
  setText(cell.lastChild, ` ${digits(row.evidence)} of ${digits(row.alarm)}`);
}
