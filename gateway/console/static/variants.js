// Variants with their cards: loss against bytes, what every module has, the verdict per role.

import { scatter } from "./charts.js";
import { h, setOptions, setText, Table } from "./dom.js";
import { bytes, digits, NONE, percent } from "./format.js";
import { VERDICTS } from "./verdicts.js";
import { searchBox } from "./search.js";

const SIGNS = { passed: "✓", failed: "✕", not_enough_evidence: "?", demoted: "!", reference: "=" };

export class VariantsView {
  constructor(state) {
    this.state = state;
    this.plot = h("figure", { class: "chart wide" });
    this.table = new Table("Cards", [
      { title: "Variant", text: (one) => one.variant },
      { title: "Version", show: (cell, one) => { cell.className = "mono"; setText(cell, one.version); } },
      { title: "Scheme", text: (one) => one.scheme },
      { title: "Method", text: (one) => one.method },
      { title: "KV cache", text: (one) => one.kv },
      { title: "Bits per weight", number: true, text: (one) => digits(one.bits_per_weight ?? one.weight_bits) },
      { title: "Weights", number: true, text: (one) => bytes(one.weight_bytes) },
      { title: "KV per token", number: true, text: (one) => bytes(one.kv_bytes_per_token) },
      { title: "KL, nats per token", number: true, text: (one) => one.reference || !one.text ? NONE : `${one.text.kl_exact ? "" : "at least "}${digits(one.text.kl_mean)}` },
      { title: "Perplexity", number: true, text: (one) => digits(one.text?.perplexity) },
    ], { className: "stacks" });
    this.verdicts = new Table("The gate's verdict, by role", [], { className: "stacks", empty: "No role has this name." });
    this.select = h("select", { id: "heat-variant" });
    this.select.addEventListener("change", () => this.showHeat());
    this.heat = h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Bits of every module" });
    const bits = h("section", { class: "chart wide" }, h("div", { class: "tools" }, h("h2", {}, "Bits of every module"),
      h("p", {}, h("label", { for: "heat-variant" }, "Variant "), this.select)), this.heat);
    this.element = h("div", {}, h("div", { class: "halves" }, this.plot, bits), h("h2", {}, "Cards"), this.table.element,
      h("div", { class: "tools" }, h("h2", {}, "Verdicts"), searchBox(state, () => this.showVerdicts())), this.verdicts.element);
  }

  update() {
    const { setup } = this.state;
    if (this.known === setup.id) return;
    this.known = setup.id;
    const shown = [...setup.variants].sort((a, b) => b.weight_bytes - a.weight_bytes);
    this.table.update(shown.map((one) => ({ key: `${one.variant} ${one.version}`, ...one })));
    this.showPlot(shown);
    const quantized = setup.variants.filter((one) => one.modules.length).map((one) => one.variant);
    const kinds = (name) => new Set(this.state.variants.get(name).modules.map((module) => `${module.bits} ${module.scheme}`)).size;
    const mixed = [...quantized].sort((a, b) => kinds(b) - kinds(a))[0];
    setOptions(this.select, quantized.length ? quantized : setup.variants.map((one) => one.variant), mixed);
    this.showHeat();
    this.verdicts.setColumns([{ title: "Role", text: (row) => row.role.name },
      ...this.state.columns().map((variant) => ({ title: variant, show: (cell, row) => this.showVerdict(cell, row.role, variant) }))]);
    this.showVerdicts();
  }

  showPlot(shown) {
    const measured = shown.filter((one) => one.reference || one.text);
    const points = measured.map((one) => ({
      name: one.variant, x: one.weight_bytes, y: one.reference ? 0 : Math.max(0, one.text.kl_mean),
      low: one.reference ? null : one.text.kl_interval?.[0] ?? null, high: one.reference ? null : one.text.kl_interval?.[1] ?? null,
    }));
    const missing = shown.filter((one) => !one.reference && !one.text).map((one) => one.variant);
    const title = "Loss against bytes";
    this.plot.replaceChildren(h("figcaption", {}, h("h2", {}, title), h("span", { class: "note" }, "mean KL from the reference with its 95 % interval; low and left is good")),
      scatter(points, { title, xTitle: "bytes of the weights", yTitle: "KL, nats per token", xFormat: bytes, yFormat: digits }),
      ...(missing.length ? [h("p", { class: "note" }, `Not measured: ${missing.join(", ")}.`)] : []));
  }

  showHeat() {
    const one = this.state.variants.get(this.select.value);
    if (!one) return;
    if (!one.modules.length) {
      this.heat.replaceChildren(h("p", { class: "empty" }, `The card of ${one.variant} lists no quantized modules.`));
      return;
    }
    const layers = [...new Set(one.modules.map((module) => module.layer))].sort((a, b) => a - b);
    const kinds = [...new Set(one.modules.map((module) => module.kind))];
    const by = new Map(one.modules.map((module) => [`${module.kind} ${module.layer}`, module]));
    const cells = (kind) => layers.map((layer) => {
      const module = by.get(`${kind} ${layer}`);
      return module ? h("td", { class: `heat b${Math.min(16, module.bits)}` }, String(module.bits), module.scheme ? h("small", {}, module.scheme) : null) : h("td", {}, NONE);
    });
    this.heat.replaceChildren(h("table", { class: "plain heatmap" },
      h("caption", { class: "note" }, `${one.variant}: bits of a weight by module and layer (${one.scheme})`),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Module"), layers.map((layer) => h("th", { scope: "col" }, `layer ${layer}`)))),
      h("tbody", {}, kinds.map((kind) => h("tr", {}, h("th", { scope: "row" }, kind), cells(kind))))));
  }

  showVerdicts() {
    const roles = this.state.setup.roles.filter((role) => this.state.wanted(role.name));
    this.verdicts.update(roles.map((role) => ({ key: `${this.known} ${role.name}`, role })));
  }

  showVerdict(cell, role, variant) {
    if (cell.firstChild) return;
    const step = role.considered.find((one) => one.variant === variant);
    if (!step) { // of a model that may not serve the role
      cell.append(NONE);
      return;
    }
    const measured = this.state.variants.get(variant).roles[role.name];
    cell.append(h("span", { class: `verdict ${step.verdict}` }, `${SIGNS[step.verdict]} ${VERDICTS[step.verdict]}`));
    if (measured) cell.append(h("small", {}, `${percent(measured.accuracy)} right, KL ${digits(measured.kl)}`));
    for (const [model, drop] of Object.entries(measured?.across ?? {})) {
      const words = drop === 0 ? "as many right as" : `${percent(Math.abs(drop))} ${drop > 0 ? "fewer" : "more"} right than`;
      cell.append(h("small", {}, `${words} ${model}`));
    }
    if (step.why.length) cell.append(h("details", {}, h("summary", {}, "Why"), h("ul", { class: "reasons" }, step.why.map((why) => h("li", {}, why)))));
  }
}
