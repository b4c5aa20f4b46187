// Tokens since the gateway's start, by role and variant, and by key.

import { h, setText, Table } from "./dom.js";
import { count, moment, percent } from "./format.js";
import { searchBox } from "./search.js";

export class UsageView {
  constructor(state) {
    this.state = state;
    this.note = h("p", { class: "note" });
    const figures = [
      { title: "Prompt", number: true, text: (row) => count(row.prompt) },
      { title: "Completion", number: true, text: (row) => count(row.completion) },
      { title: "Share of all tokens", show: (cell, row) => showShare(cell, row.share) },
    ];
    const names = [{ title: "Role", text: (row) => row.role }, { title: "Variant", text: (row) => row.variant }];
    this.variants = new Table("Tokens by variant", [{ title: "Variant", text: (row) => row.variant }, ...figures], { className: "stacks", empty: "No tokens yet." });
    this.roles = new Table("Tokens by role and variant", [...names, ...figures], { className: "stacks", empty: "No tokens yet." });
    this.keys = new Table("Tokens by key, role and variant", [{ title: "Key", text: (row) => row.key_name }, ...names, ...figures], { className: "stacks", empty: "No tokens of any key yet." });
    this.keyed = h("section", {}, h("h2", {}, "By key"), this.keys.element);
    this.element = h("div", {}, h("div", { class: "tools" }, this.note, searchBox(state, () => this.update())),
      h("h2", {}, "By variant"), this.variants.element, h("h2", {}, "By role"), this.roles.element, this.keyed);
  }

  update() {
    const { state } = this, { overview } = state;
    setText(this.note, `Since the gateway's start, ${moment(overview.started)}. Answers that were asked again of a higher precision count twice.`);
    const wanted = (row) => state.wanted(row.role, row.variant, row.key_name ?? "");
    const roles = gathered(overview.tokens.map(([role, variant, kind, tokens]) => ({ names: { role, variant }, kind, tokens })));
    const variants = gathered(overview.tokens.map(([, variant, kind, tokens]) => ({ names: { variant }, kind, tokens })));
    this.variants.update(variants);
    this.roles.update(roles.filter(wanted));
    this.keyed.hidden = !state.setup.keys;
    this.keys.update(gathered(overview.key_tokens.map(([key, role, variant, kind, tokens]) => ({ names: { key_name: key, role, variant }, kind, tokens }))).filter(wanted));
  }
}

/** Rows with the most tokens first, each with its share of all. */
function gathered(parts) {
  const rows = new Map();
  let all = 0;
  for (const { names, kind, tokens } of parts) {
    const key = Object.values(names).join("\u0000");
    const row = rows.get(key) ?? { key, ...names, prompt: 0, completion: 0 };
    row[kind] += tokens;
    all += tokens;
    rows.set(key, row);
  }
  return [...rows.values()].filter((row) => row.prompt + row.completion > 0)
    .map((row) => ({ ...row, share: (row.prompt + row.completion) / all }))
    .sort((a, b) => b.share - a.share);
}

function showShare(cell, share) {
  let bar = cell.querySelector("progress");
  if (!bar) {
    bar = h("progress", { max: "1", "aria-hidden": "true" });
    cell.replaceChildren(bar, h("span", {}));
  }
  bar.value = share;
  setText(cell.lastChild, ` ${percent(share)}`);
}
