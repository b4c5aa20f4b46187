// Replicas: memory, KV cache and queue of each engine.

import { sparkline } from "./charts.js";
import { h, setText, Table } from "./dom.js";
import { bytes, count, percent } from "./format.js";
import { searchBox } from "./search.js";

const SPARK = 60;

function condition(one) {
  if (one.reachable === null) return ["not asked yet", ""];
  if (!one.reachable) return ["cannot be reached", "bad"];
  if (!one.usable) return ["left out after errors", "warn"];
  return ["serves", "good"];
}

export class ReplicasView {
  constructor(state) {
    this.state = state;
    const spark = (number, top) => (cell, row) => sparkline(cell, state.engine(row.name, number).slice(-SPARK), top);
    this.table = new Table("Every replica, as its engine and the gateway see it", [
      { title: "Replica", text: (row) => row.name },
      { title: "State", show: (cell, row) => { const [text, tone] = condition(row); setText(cell, text); cell.className = `verdict ${tone}`; } },
      { title: "In flight", number: true, text: (row) => count(row.in_flight) },
      { title: "Running", number: true, text: (row) => count(row.running) },
      { title: "Waiting", number: true, text: (row) => count(row.waiting) },
      { title: "Load, 5 min", show: spark(0) },
      { title: "KV cache", show: (cell, row) => showShare(cell, row.kv_cache_usage) },
      { title: "KV, 5 min", show: spark(2, 1) },
      { title: "Memory", number: true, text: (row) => bytes(row.memory_bytes) },
      { title: "Memory, 5 min", show: spark(3) },
      { title: "Address", show: (cell, row) => { cell.className = "mono"; setText(cell, row.url); } },
    ], { className: "stacks", empty: "No replica has this name." });
    this.note = h("p", { class: "note" }, "Memory is known of engines that run on this machine. In flight counts this gateway's requests; running and waiting are the engine's own figures.");
    this.element = h("div", {}, h("div", { class: "tools" }, this.note, searchBox(state, () => this.update())), this.table.element);
  }

  update() {
    const shown = this.state.overview.replicas.filter((one) => this.state.wanted(one.variant, one.name));
    this.table.update(shown.map((one) => ({ key: `${one.variant} ${one.url}`, ...one })));
  }
}

function showShare(cell, share) {
  let meter = cell.querySelector("meter");
  if (!meter) {
    meter = h("meter", { min: "0", max: "1", low: "0.8", high: "0.95", optimum: "0", "aria-hidden": "true" });
    cell.replaceChildren(meter, h("span", {}));
  }
  meter.hidden = share === null;
  meter.value = share ?? 0;
  setText(cell.lastChild, ` ${percent(share)}`);
}
