// The precision map: which role runs on what, and why. A cell is a variant in a role.

import { askCanary, showCell } from "./actions.js";
import { h, setText, Table } from "./dom.js";
import { NONE, percent } from "./format.js";
import { searchBox } from "./search.js";
import { standing } from "./verdicts.js";

/** Why a role runs where it runs, as a sentence. */
export function reason(state, role) {
  const now = state.serving(role);
  if (now === null) return "No pool of this role can be reached: its requests are refused.";
  if (now !== role.ladder[0]) {
    const over = role.ladder.slice(0, role.ladder.indexOf(now));
    return `${over.join(" and ")} ${over.length > 1 ? "are" : "is"} down; the next more precise one takes over.`;
  }
  const demoted = role.considered.filter((step) => step.verdict === "demoted");
  if (role.reason === "raised_demoted") return demoted.map((step) => `${step.variant} is out of service: ${step.why.join("; ")}.`).join(" ");
  if (role.reason === "reference_only") {
    const closest = role.considered.find((step) => step.verdict !== "reference");
    return `No cheaper variant is within the budget${closest?.why.length ? `; ${closest.variant}: ${closest.why[0]}` : ""}.`;
  }
  return "The cheapest variant within the budget.";
}

export class PrecisionView {
  constructor(state, console) {
    this.state = state;
    this.console = console;
    this.note = h("p", { class: "note" }, "A role runs on the cheapest variant, of any model that may serve it, that is known to be good enough. Variants stand from the cheapest to the dearest. Choose a cell for its figures and to act.");
    this.table = new Table("Which role runs on what", [], { className: "stacks map", empty: "No role has this name." });
    this.element = h("div", {}, this.note, h("div", { class: "tools" }, h("h2", {}, "Roles"), searchBox(state, () => this.update())), this.table.element);
    this.table.element.classList.add("scroll");
  }

  columns(variants) {
    return [
      { title: "Role", text: (row) => row.role.name },
      { title: "Runs on", show: (cell, row) => {
        setText(cell, row.now ?? "nothing");
        cell.className = row.now ? "runs" : "runs bad";
      } },
      ...variants.map((variant) => ({ title: variant, show: (cell, row) => this.showCell(cell, row, variant) })),
      { title: "Why", long: true, show: (cell, row) => {
        if (!cell.firstChild) cell.append(h("div", {}, h("span", {}), h("small", {})));
        setText(cell.firstChild.firstChild, row.why);
        setText(cell.firstChild.lastChild, `Last minute: ${row.went}`);
      } },
      { title: "Canary", show: (cell, row) => this.showCanary(cell, row) },
    ];
  }

  showCell(cell, row, variant) {
    const step = row.role.considered.find((one) => one.variant === variant);
    if (!step) { // of a model that may not serve the role
      cell.replaceChildren(NONE);
      return;
    }
    const { words, tone, tags } = standing(this.state, row.role, step);
    const text = [words, ...tags].join("\u0000");
    let button = cell.firstElementChild;
    if (!button) {
      button = h("button", { type: "button" });
      button.addEventListener("click", () => showCell(this.console, this.state, row.role.name, variant));
      cell.replaceChildren(button);
    }
    if (button.dataset.text === text && button.className === `cell ${tone}`) return;
    button.dataset.text = text;
    button.className = `cell ${tone}`;
    button.setAttribute("aria-label", `${row.role.name} on ${variant}: ${[words, ...tags].join(", ")}`);
    button.replaceChildren(h("span", {}, words), ...tags.map((tag) => h("small", {}, tag)));
  }

  showCanary(cell, row) {
    let button = cell.firstElementChild;
    if (!button) {
      button = h("button", { type: "button", class: "quiet" });
      button.addEventListener("click", () => askCanary(this.console, this.state, row.role.name));
      cell.append(button);
    }
    const { canary } = row.role;
    setText(button, canary && canary.percent > 0 ? `${canary.percent} % ${canary.variant}` : "Set");
    button.setAttribute("aria-label", `Canary of ${row.role.name}: ${canary && canary.percent > 0 ? `${canary.percent} % on ${canary.variant}` : "none"}. Change it`);
  }

  update() {
    const { state } = this;
    const variants = state.columns();
    if (this.known !== variants.join("\u0000")) {
      this.known = variants.join("\u0000");
      this.table.setColumns(this.columns(variants));
    }
    const went = this.wentByRole();
    this.table.update(state.setup.roles.filter((role) => state.wanted(role.name, state.serving(role) ?? "")).map((role) => ({
      key: role.name, role, now: state.serving(role), why: reason(state, role), went: went.get(role.name) ?? "no requests",
    })));
  }

  /** The last minute's requests of each role, by where they went and the reason. */
  wentByRole() {
    const by = new Map();
    for (const [role, variant, why, requests] of this.state.overview.last_minute.routes) {
      const mine = by.get(role) ?? [];
      mine.push({ what: `${variant} (${why.replaceAll("_", " ")})`, requests });
      by.set(role, mine);
    }
    return new Map([...by].map(([role, mine]) => {
      const all = mine.reduce((sum, one) => sum + one.requests, 0);
      return [role, mine.sort((a, b) => b.requests - a.requests).map((one) => `${percent(one.requests / all, 0)} ${one.what}`).join(", ")];
    }));
  }
}
